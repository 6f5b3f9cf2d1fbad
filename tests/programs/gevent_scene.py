"""Under gevent, patched before anything else, ``late`` or in ``part``: what must not stop the hub, and what is said."""

# ruff: noqa: E402 - gevent comes first
from __future__ import annotations

import sys

LATE, PART = "late" in sys.argv, "part" in sys.argv

if not LATE:
    from gevent import monkey

    monkey.patch_all(queue=not PART)

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent

from atproto_session import ClientMetadata, OAuthClient, SQLiteStore
from atproto_session.errors import SessionError

from ..core import RESTLESS, SOON, make_session
from ..scenes import GET_SESSION, stored


def say(message: object) -> None:
    print(json.dumps(message), flush=True)


def while_others_work(work: Callable[[], object], release: Callable[[], object]) -> int:
    """Do ``work``, which waits for ``release``. That is called when another greenlet has had five turns meanwhile.
    Returns how many it has had."""
    turns: list[str] = []

    def tick() -> None:
        while len(turns) < 5:
            time.sleep(0.01)
            turns.append("one more")
        release()

    waiting: Any = gevent.spawn(work)
    ticking: Any = gevent.spawn(tick)
    gevent.joinall([waiting, ticking], timeout=SOON, raise_error=True)
    return len(turns) if waiting.dead and ticking.dead else 0


def busy_database(path: Path) -> int:
    """A write that waits for another connection's transaction."""
    store = SQLiteStore(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    turns = while_others_work(lambda: store.set("did:plc:a", make_session()), lambda: other.execute("COMMIT"))
    other.close()
    store.close()
    return turns


def busy_lock(path: Path) -> int:
    """A lock that another process keeps."""
    mine, theirs = SQLiteStore(path), SQLiteStore(path)
    held = theirs.locks.hold("did:plc:a", timeout=1)
    held.__enter__()

    def take() -> None:
        with mine.locks.hold("did:plc:a", timeout=SOON):
            pass

    return while_others_work(take, lambda: held.__exit__(None, None, None))


def sessions(setup: dict[str, Any]) -> list[str]:
    """Many greenlets use one account whose token has expired."""
    client = OAuthClient(ClientMetadata.loopback(), store=setup["store"], times=RESTLESS, **setup["options"])
    session = client.sessions.get_session
    greenlets = [
        gevent.spawn(lambda: client.restore(setup["did"]).get(GET_SESSION).json()["handle"]) for _ in range(20)
    ]
    gevent.joinall(greenlets, timeout=SOON, raise_error=True)
    assert session(setup["did"], False) == stored(client, setup["did"])
    client.close()
    return sorted({str(greenlet.value) for greenlet in greenlets})


def said(work: Callable[[], object]) -> str:
    try:
        work()
    except SessionError as error:
        return str(error)
    return "nothing"


def patched_late(setup: dict[str, Any]) -> list[str]:
    from gevent import monkey

    before = OAuthClient(ClientMetadata.loopback(), store=setup["store"], times=RESTLESS, **setup["options"])
    monkey.patch_all(ssl=False)
    return [
        said(lambda: before.restore(setup["did"], refresh=True)),
        said(lambda: before.authorize(setup["did"])),
        said(lambda: OAuthClient(ClientMetadata.loopback(), store="memory:")),
    ]


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    if LATE or PART:
        say(patched_late(setup) if LATE else [said(lambda: OAuthClient(ClientMetadata.loopback(), store="memory:"))])
        return
    directory = Path(setup["directory"])
    say({"database": busy_database(directory / "busy.db"), "lock": busy_lock(directory / "lock.db")})
    say(sessions(setup))


if __name__ == "__main__":
    main()
