"""Stores of the user's own that have less than a session store needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, TypeVar

from ..errors import SessionError, StoreError, printable
from ..locks import Locks, ThreadLocks
from ..session import Session, TokenSet
from .memory import MemoryLogins, holds

T = TypeVar("T")


class CompletedStore:
    """``store`` with what it lacks filled in. What its methods raise becomes a StoreError, which calls it ``name``."""

    def __init__(self, store: Any, name: str) -> None:
        self._store = store
        self._name = name
        self._writes = ThreadLocks()
        self.locks: Locks = getattr(store, "locks", None) or ThreadLocks()
        self.logins = getattr(store, "logins", None) or MemoryLogins()

    def __repr__(self) -> str:
        return f"<{self._name}, completed>"

    def get(self, key: str) -> Session | None:
        return self._checked(key, self._call("read", self._store.get, key))

    def set(self, key: str, session: Session) -> None:
        with self._writes.hold(key, timeout=threading.TIMEOUT_MAX):
            self._set(key, session)

    def delete(self, key: str) -> None:
        with self._writes.hold(key, timeout=threading.TIMEOUT_MAX):
            self._delete(key)

    def replace(self, key: str, session: Session | None, expected: TokenSet | None) -> bool:
        """Compare-and-set; atomic between the threads of this process, unless the store does better."""
        if hasattr(self._store, "replace"):
            return bool(self._call("written", self._store.replace, key, session, expected))
        with self._writes.hold(key, timeout=threading.TIMEOUT_MAX):
            if not holds(self.get(key), expected):
                return False
            if session is not None:
                self._set(key, session)
            elif expected is not None:
                self._delete(key)
            return True

    def clear(self) -> None:
        self._call("cleared", self._method("clear"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._call("listed", lambda: list(self._method("__iter__")())))

    def close(self) -> None:
        if hasattr(self._store, "close"):
            self._call("closed", self._store.close)

    def _set(self, key: str, session: Session) -> None:
        self._call("written", self._store.set, key, session)

    def _delete(self, key: str) -> None:
        self._call("written", self._store.delete, key)

    def _checked(self, key: str, value: object) -> Session | None:
        if value is None or isinstance(value, Session):
            return value
        raise StoreError(f"{self._name} holds a {type(value).__name__} for {printable(key)} instead of a Session")

    def _method(self, name: str) -> Callable[[], Any]:
        method = getattr(self._store, name, None)
        if method is None:
            raise StoreError(f"{self._name} has no {name}() method")
        return method  # type: ignore[no-any-return]

    def _call(self, what: str, method: Callable[..., T], *arguments: object) -> T:
        try:
            return method(*arguments)
        except SessionError:
            raise
        except Exception as error:
            raise StoreError(f"the session store {self._name} cannot be {what}: {type(error).__name__}") from error


class MappingStore:
    """A mutable mapping, as the store that it almost is."""

    def __init__(self, mapping: MutableMapping[str, Session]) -> None:
        self._mapping = mapping
        self.get = mapping.get
        self.set = mapping.__setitem__
        self.clear = mapping.clear

    def delete(self, key: str) -> None:
        self._mapping.pop(key, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)
