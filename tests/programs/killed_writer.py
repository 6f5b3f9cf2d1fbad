"""A writer that waits, in the middle of a write, for its end."""

from __future__ import annotations

import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from atproto_session import Session, SQLiteStore, open_store
from atproto_session.testing.contracts import DID, make_session


def session_with(secret: str) -> Session:
    session = make_session(f"{secret}-token")
    return replace(session, dpop_key={**session.dpop_key, "d": f"{secret}-key"})


def stop(*_: object) -> NoReturn:
    print("in the middle", flush=True)
    sys.stdin.read()
    raise AssertionError("it was not killed")


def main() -> None:
    store: Any = open_store(sys.argv[1])
    store.set(DID, session_with("second"))
    if not isinstance(store, SQLiteStore):
        Path.replace = stop  # type: ignore[assignment, method-assign]
        store.set(DID, session_with("begun"))

    def work(connection: sqlite3.Connection) -> None:
        # So much that it does not stay in memory until the end of the transaction.
        connection.execute("PRAGMA cache_size = 1")
        data = store._codec.encode(DID, session_with("begun"))
        connection.executemany("INSERT INTO sessions VALUES (?, ?)", ((str(number), data) for number in range(200)))
        stop()

    store._database.write(work)


if __name__ == "__main__":
    main()
