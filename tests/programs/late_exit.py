"""A program in which a daemon thread begins a refresh when the interpreter is ending already.

``python -m tests.programs.late_exit WHEN``, where ``WHEN`` is ``before`` or ``after``: whether the exit handler that
lets the thread begin is called before the library's own or after it; or ``struck``: before it, and a signal is pending
when the interpreter comes to the library's. The first line of its standard input is its setup; the handler ends when
the thread has come to its end, or at the next line.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from unittest.mock import call, patch

#: What is done after everything that is registered further down, since the last to register is the first to be called.
last: list[Callable[[], None]] = []


@atexit.register
def at_last() -> None:
    for action in last:
        action()


with patch("atexit.register", wraps=atexit.register) as register:
    from atproto_session import ClientMetadata, OAuthClient, SessionError, _fork

if sys.argv[1] == "struck":
    # Just before the library's own, by a function of C's: Python looks for signals only when it is back in Python.
    atexit.unregister(_fork._end_at_exit)
    for _ in range(register.call_args_list.count(call(_fork._end_at_exit))):
        atexit.register(_fork._end_at_exit)
    atexit.register(ctypes.CDLL(None).kill, os.getpid(), signal.SIGINT.value)

#: Longer than it takes to refuse a refresh, in seconds. Nobody who waits for one that is under way leaves earlier.
PATIENCE = 10.0


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    client = OAuthClient(ClientMetadata.loopback(), store=setup["store"], **setup["options"])
    begun = threading.Event()
    enough = SimpleQueue[None]()

    def work() -> None:
        begun.wait()
        try:
            client.sessions.get_session(setup["did"], True, timeout=PATIENCE)
        except SessionError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        enough.put(None)

    def listen() -> None:
        sys.stdin.readline()
        enough.put(None)

    def at_exit() -> None:
        begun.set()
        enough.get()

    for job in (work, listen):
        threading.Thread(target=job, daemon=True).start()
    if sys.argv[1] in ("before", "struck"):
        atexit.register(at_exit)
    else:
        last.append(at_exit)


if __name__ == "__main__":
    main()
