"""A process that forks while a refresh of its own is under way.

It reads what to do as one JSON object, begins to refresh, and forks when it is told so by a line. The child says that
it runs: ``{"parent": ..., "child": ...}``, and then either ends at once, as any program does (``"child": "exit"``), or
waits for another line and asks for the session itself (``"child": "refresh"``).

Either process prints what it got: ``{"of": "parent", "got": ACCESS_TOKEN}``, or ``{"of": ..., "error": NAME}``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

from atproto_session import ClientMetadata, OAuthClient, SessionError, TokenRefreshError


def main() -> None:
    # From Python 3.12 on, a fork while other threads run is warned of.
    warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
    order = json.loads(read_line())
    client = OAuthClient(ClientMetadata.loopback(), store=order["store"], **order["options"])
    did = order["did"]
    with ThreadPoolExecutor(1) as threads:
        refreshed = threads.submit(ask, client, did, "parent")
        read_line()
        if (pid := os.fork()) == 0:
            say({"parent": os.getppid(), "child": os.getpid()})
            if order["child"] == "refresh":
                read_line()
                say(ask(client, did, "child"))
            del client, refreshed
            gc.collect()
            sys.exit(0)
        if order["child"] == "exit":
            say({"child ended": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})
        say(refreshed.result())
    client.close()


def ask(client: OAuthClient, did: str, who: str) -> dict[str, object]:
    try:
        return {"of": who, "got": client.sessions.get_session(did, True).token_set.access_token}
    except SessionError as error:
        return {
            "of": who,
            "error": type(error).__name__,
            "answer_lost": isinstance(error, TokenRefreshError) and error.answer_lost,
        }


def say(message: dict[str, object]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def read_line() -> bytes:
    """Without a buffer, which parent and child would share."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            os._exit(1)
        line += byte
    return line


if __name__ == "__main__":
    main()
