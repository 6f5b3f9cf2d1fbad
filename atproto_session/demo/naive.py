"""The same library with its protection taken out: what is left is how a library refreshes that does not lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..locks import LockKind
from ..session import Attempt, Session, TokenSet
from ..stores import SessionStore


class NoLocks:
    """Locks that everybody gets at once."""

    kind = LockKind.HOLDER
    lock = ""

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[NoLocks]:
        yield self

    def extend(self, seconds: float) -> bool:
        return True


class NaiveStore:
    """A store that writes without comparing. For one thread: each needs its own.

    It keeps the trace that a refresh leaves to itself, since one that is found in the store makes a worker stop before
    it spends anything, locks or not.
    """

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._attempt: Attempt | None = None

    def get(self, key: str) -> Session | None:
        session = self._store.get(key)
        return None if session is None else replace(session, attempt=self._attempt)

    def set(self, key: str, session: Session) -> None:
        self._attempt = session.attempt
        self._store.set(key, replace(session, attempt=None))

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        if session is None:
            self._store.delete(key)
        elif session.attempt is None:
            self.set(key, session)
        else:
            self._attempt = session.attempt
        return True

    def delete(self, key: str) -> None:
        self._store.delete(key)
