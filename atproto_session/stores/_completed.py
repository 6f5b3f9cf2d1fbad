"""Stores of the user's own that have less than a session store needs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from .._fork import reset_in_child
from ..errors import SessionError, StoreError, printable
from ..locks import Locks, ThreadLocks
from ..session import Session, TokenSet
from .memory import MemoryLogins, holds

T = TypeVar("T")


#: Celery's. It strikes wherever the task is, and is no failure of the store.
_TIME_LIMIT = "SoftTimeLimitExceeded"


class FilledIn:
    """What a store may lack: one for each store of this process, whoever completes it.

    :param store: kept, where nothing else says how long this is needed.
    """

    def __init__(self, store: object = None) -> None:
        self.store = store
        self.locks = ThreadLocks()
        self.logins = MemoryLogins()
        self.writes = ThreadLocks()


class _Registry:
    """By identity: a mapping cannot be hashed. What is filled in for a store lives as long as that. For a ``dict``, of
    which nobody is told that it is gone, as long as somebody uses it; no other object has its number meanwhile."""

    def __init__(self) -> None:
        self._by_number: dict[int, FilledIn] = {}
        self._in_use: weakref.WeakValueDictionary[int, FilledIn] = weakref.WeakValueDictionary()
        self.reset_after_fork()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        self._mutex = threading.Lock()

    def of(self, store: object) -> FilledIn:
        number = id(store)
        with self._mutex:
            filled_in = self._by_number.get(number) or self._in_use.get(number)
            if filled_in is None:
                try:
                    weakref.finalize(store, self._by_number.pop, number, None).atexit = False
                except TypeError:
                    filled_in = self._in_use[number] = FilledIn(store)
                else:
                    filled_in = self._by_number[number] = FilledIn()
            return filled_in


filled_in_for = _Registry().of


class CompletedStore:
    """``store`` with what it lacks filled in. What its methods raise becomes a StoreError."""

    def __init__(self, store: Any, name: str, filled_in: FilledIn) -> None:
        self._store = store
        self._name = name
        self._filled_in = filled_in
        self._has_replace = getattr(store, "replace", None) is not None
        locks, logins = getattr(store, "locks", None), getattr(store, "logins", None)
        self.locks: Locks = filled_in.locks if locks is None else locks
        self.logins: Any = filled_in.logins if logins is None else _CheckedLogins(self._call, logins)

    def __repr__(self) -> str:
        return f"<{self._name}, completed>"

    def get(self, key: str) -> Session | None:
        return self._checked(key, self._call("read", self._store.get, key))

    def set(self, key: str, session: Session) -> None:
        with self._writing(key):
            self._set(key, session)

    def delete(self, key: str) -> None:
        with self._writing(key):
            self._delete(key)

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        """Compare-and-set; atomic between the threads of this process, unless the store does better."""
        if self._has_replace:
            return bool(self._call("written", self._store.replace, key, session, expected))
        with self._writing(key):
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

    def _writing(self, key: str) -> AbstractContextManager[object]:
        """Nothing else writes ``key`` in this block; a store with a ``replace`` of its own sees to that itself."""
        if self._has_replace:
            return nullcontext()
        return self._filled_in.writes.hold(key, timeout=threading.TIMEOUT_MAX)

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
            if type(error).__name__ == _TIME_LIMIT:
                raise
            raise StoreError(f"the session store {self._name} cannot be {what}: {type(error).__name__}") from error


class _CheckedLogins:
    """Log-ins in a store of the user's own."""

    def __init__(self, call: Callable[..., Any], logins: Any) -> None:
        self._call = call
        self._logins = logins

    def put(self, state: str, document: dict[str, Any], expires_at: float) -> None:
        self._call("written", self._logins.put, state, document, expires_at)

    def take(self, state: str) -> dict[str, Any] | None:
        return self._call("read", self._logins.take, state)  # type: ignore[no-any-return]


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
