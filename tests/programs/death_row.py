"""Processes that are there to be killed.

This one reads orders, one JSON object a line, and forks a child for each, which is much faster than to start it: all
modules are loaded, and no thread runs yet. The child tells what becomes of it, one JSON object a line:

``{"pid": ...}``
    it begins;
``{"at": "before send"}``
    it has come to the step at which the order tells it to stop (``stop_at``, counted from 0), and stands still there;
``{"done": ..., "errors": [...]}``
    it has come to its end.

Then this process tells how it ended: ``{"ended": -9}``.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import dns.resolver  # noqa: F401 - loaded before the fork, as is what follows
import filelock  # noqa: F401
from cryptography.fernet import Fernet  # noqa: F401

from atproto_session import ClientMetadata, OAuthClient, Session, SessionError, TokenRefreshError
from atproto_session.locks.files import _FileHold
from atproto_session.server import AccountAuthority
from atproto_session.stores import FullStore, open_store, rotate_encryption
from atproto_session.stores._connections import Connection

T = TypeVar("T")


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if (pid := os.fork()) == 0:
            say({"pid": os.getpid()})
            done, errors = WORK[order["do"]](order, Steps(order.get("stop_at")))
            say({"done": done, "errors": errors})
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        say({"ended": os.waitstatus_to_exitcode(status)})


def say(message: dict[str, Any]) -> None:
    # In one piece: a message is shorter than what a pipe takes at once.
    os.write(1, json.dumps(message).encode() + b"\n")


def stand_still() -> None:
    """Until whoever started all this has gone."""
    os.read(0, 1)
    os._exit(1)


class Steps:
    """The steps of one piece of work, and where it has to stop."""

    def __init__(self, stop_at: int | None) -> None:
        self._left = stop_at
        self.counting = False

    def __call__(self, name: str) -> None:
        if not self.counting or self._left is None:
            return
        if self._left == 0:
            say({"at": name})
            stand_still()
        self._left -= 1

    def before(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        def stepped(*arguments: Any, **options: Any) -> T:
            self(f"before {name}")
            return function(*arguments, **options)

        return stepped

    def around(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        def stepped(*arguments: Any, **options: Any) -> T:
            result = self.before(name, function)(*arguments, **options)
            self(f"after {name}")
            return result

        return stepped

    def watch(self, owner: object, name: str, called: str | None = None) -> None:
        setattr(owner, name, self.around(called or name, getattr(owner, name)))

    def watch_system(self) -> None:
        """Step at what changes files. What comes after one such call comes before the next."""
        self.watch(os, "open")  # after which a new file is empty
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (fcntl, "flock")):
            setattr(owner, name, self.before(name, getattr(owner, name)))
        execute = sqlite3.Connection.execute

        def stepped(connection: Connection, sql: str, *arguments: Any) -> sqlite3.Cursor:
            return self.before(sql.split()[0], execute)(connection, sql, *arguments)

        Connection.execute = stepped  # type: ignore[assignment]

    def watch_store(self, store: FullStore) -> None:
        """Step at what a store and its locks are asked to do."""
        for name in ("get", "set", "replace", "delete"):
            self.watch(store, name, f"{name} in store")
        self.watch(store.logins, "take", "take log-in")
        self.watch(_FileHold, "extend")
        hold = store.locks.hold

        @contextmanager
        def held(key: str, **options: Any) -> Iterator[Any]:
            self("before lock")
            with hold(key, **options) as lock:
                self("after lock")
                yield lock
                self("before unlock")
            self("after unlock")

        vars(store.locks)["hold"] = held

    def watch_authority(self, authority: AccountAuthority) -> None:
        """Step at what the authorization server is asked."""
        prepare = authority.prepare

        def prepared(session: Session) -> Callable[[], Session]:
            return self.around("send", self.around("prepare", prepare)(session))

        vars(authority)["prepare"] = prepared
        self.watch(authority, "revoke")


Outcome = tuple[int, list[str]]


def refresh(order: dict[str, Any], steps: Steps) -> Outcome:
    client = open_client(order, steps)
    client.sessions.get_session(order["did"], True)
    return 1, []


def log_in(order: dict[str, Any], steps: Steps) -> Outcome:
    open_client(order, steps).callback(order["callback"])
    return 1, []


def log_out(order: dict[str, Any], steps: Steps) -> Outcome:
    open_client(order, steps).revoke(order["did"])
    return 1, []


def rotate(order: dict[str, Any], steps: Steps) -> Outcome:
    steps.watch_system()
    store = open_store(order["store"], encryption_keys=order["encryption_keys"])
    steps.watch_store(store)
    steps.counting = True
    return rotate_encryption(store), []


def hammer(order: dict[str, Any], steps: Steps) -> Outcome:
    """Refresh with several threads, over and over, until told to stop or the session is over."""
    client = open_client(order, steps)
    refreshes: list[str] = []
    errors: list[str] = []
    enough = threading.Event()

    def work(did: str) -> None:
        while not enough.is_set():
            try:
                refreshes.append(client.sessions.get_session(did, True).token_set.access_token)
            except SessionError as error:
                lost = " of a lost answer" if isinstance(error, TokenRefreshError) and error.answer_lost else ""
                errors.append(type(error).__name__ + lost)
                if error.login_required:
                    return

    threads = [threading.Thread(target=work, args=(did,)) for did in order["dids"] for _ in range(order["threads"])]
    for thread in threads:
        thread.start()
    say({"hammering": True})
    if not os.read(0, 1):
        os._exit(1)
    enough.set()
    for thread in threads:
        thread.join()
    return len(refreshes), errors


WORK = {"refresh": refresh, "log-in": log_in, "log-out": log_out, "rotate": rotate, "hammer": hammer}


def open_client(order: dict[str, Any], steps: Steps) -> OAuthClient:
    steps.watch_system()
    client = OAuthClient(ClientMetadata.loopback(), store=order["store"], **order["options"])
    steps.watch_store(client._store)
    steps.watch_authority(client._authority)
    steps.counting = True
    return client


if __name__ == "__main__":
    main()
