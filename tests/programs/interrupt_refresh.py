"""A program that refreshes a session and is interrupted while the request is out.

``python -m tests.programs.interrupt_refresh WAY``, where ``WAY`` is one of the functions below. The first line of its
standard input is its setup; further lines tell it to go on. It says what happens to it, one word a line. It leaves the
client open, so that nothing but the interpreter waits for what is under way when it ends.
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
from types import FrameType
from typing import Any, NoReturn

from atproto_session import ClientMetadata, LockTimeoutError, OAuthClient, SessionError, SessionUpdatedEvent

from ..scenes import GET_SESSION


class TimeLimit(Exception):
    """As Celery's ``SoftTimeLimitExceeded``: an ordinary exception from nowhere."""


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    program = Program(setup["did"], OAuthClient(ClientMetadata.loopback(), store=setup["store"], **setup["options"]))
    WAYS[sys.argv[1]](program)


def say(word: str) -> None:
    print(word, flush=True)


def raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise ``error`` in ``thread``, wherever it is, as watchdogs do."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error)) == 1


class Program:
    def __init__(self, did: str, client: OAuthClient) -> None:
        self.did = did
        self.client = client

    def refresh(self, **options: Any) -> None:
        """Refresh, and say how that ended."""
        try:
            self.client.sessions.get_session(self.did, True, **options)
        except BaseException as error:
            say(type(error).__name__)
            raise
        say("refreshed")

    def use(self) -> None:
        say(f"used: {self.client.restore(self.did).get(GET_SESSION).status_code}")


# Exceptions in the main thread


def stopped_by_a_signal(program: Program) -> None:
    """Control-C, or SIGTERM with the usual handler. Nothing is caught. Says when the interpreter calls the exit
    handlers; straight from C, where no further signal gets in between."""
    atexit.register(os.write, sys.stdout.fileno(), b"at its end\n")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    program.refresh()


def at_its_time_limit(program: Program) -> None:
    """The task ends, and the worker goes on to the next one, which wants the same session."""

    def exceeded(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeLimit

    def start_timer() -> None:
        sys.stdin.readline()
        signal.setitimer(signal.ITIMER_REAL, 0.001)

    signal.signal(signal.SIGALRM, exceeded)
    threading.Thread(target=start_timer).start()
    try:
        program.refresh()
    except TimeLimit:
        program.use()


def out_of_time(program: Program) -> None:
    """The caller's own ``timeout``, longer and longer until the request is out by then."""
    timeout = 0.2
    while True:
        try:
            program.refresh(timeout=timeout)
        except LockTimeoutError:
            timeout *= 2
        if sys.stdin.readline() == "enough\n":
            return


def cancelled(program: Program) -> None:
    cancel = threading.Event()

    def wait_and_cancel() -> None:
        sys.stdin.readline()
        cancel.set()

    threading.Thread(target=wait_and_cancel).start()
    try:
        program.refresh(cancel=cancel)
    except SessionError:
        program.use()


# Threads


def raised_in_a_thread(program: Program) -> None:
    """A watchdog raises an exception in the thread, which handles it and goes on."""

    def work() -> None:
        try:
            program.refresh()
        except TimeLimit:
            program.use()

    thread = threading.Thread(target=work)
    thread.start()
    sys.stdin.readline()
    raise_in(thread, TimeLimit)
    thread.join()


def thread_dies(program: Program) -> None:
    """The thread ends then and there."""
    thread = threading.Thread(target=program.refresh)
    thread.start()
    sys.stdin.readline()
    raise_in(thread, SystemExit)
    thread.join()
    say("dead")


def exits_with_a_daemon_thread_waiting(program: Program) -> None:
    threading.Thread(target=program.refresh, daemon=True).start()
    sys.stdin.readline()
    say("leaving")


def exits_with_a_thread_waiting(program: Program) -> None:
    threading.Thread(target=program.refresh).start()
    sys.stdin.readline()
    say("leaving")
    sys.exit(3)


# Listeners


def listener_fails(program: Program) -> None:
    _refresh_with_a_listener_that_raises(program, ValueError("a bug of the application's own"))


def listener_exits(program: Program) -> None:
    _refresh_with_a_listener_that_raises(program, SystemExit(1))


def _refresh_with_a_listener_that_raises(program: Program, error: BaseException) -> None:
    def listener(event: SessionUpdatedEvent) -> None:
        say("told")
        raise error

    program.client.sessions.on_updated(listener)
    program.client.sessions.on_updated(lambda event: say("told as well"))
    program.refresh()
    program.use()


WAYS: dict[str, Callable[[Program], None]] = {
    way.__name__: way
    for way in (
        *(stopped_by_a_signal, at_its_time_limit, out_of_time, cancelled),
        *(raised_in_a_thread, thread_dies, exits_with_a_daemon_thread_waiting, exits_with_a_thread_waiting),
        *(listener_fails, listener_exits),
    )
}

if __name__ == "__main__":
    main()
