"""Stores of the user's own that have less than a session store needs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CodeType
from typing import Any, TypeVar

from ..errors import LockTimeoutError, SessionError, StoreError, printable
from ..locks import Locks, ThreadLocks
from ..session import Session, TokenSet
from .memory import MemoryLogins, holds

T = TypeVar("T")

#: How long a write waits for another one to the same account, in seconds.
_WRITE_TIMEOUT = 30.0


class CompletedStore:
    """``store`` with what it lacks filled in. What its methods raise becomes a StoreError.

    :ivar has_own_replace: compare-and-set is the store's own, so that it may hold between processes.
    """

    raises_only_session_errors = True

    def __init__(self, store: Any, name: str) -> None:
        self._store = store
        self._name = name
        self.has_own_replace = getattr(store, "replace", None) is not None
        locks, logins = getattr(store, "locks", None), getattr(store, "logins", None)
        self.locks: Locks = ThreadLocks() if locks is None else locks
        self.logins: Any = MemoryLogins() if logins is None else _CheckedLogins(self._call, logins)
        self._writes = ThreadLocks()

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
        """Compare-and-set; atomic between those who use this object, unless the store does better."""
        if self.has_own_replace:
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
        self._call_if_there("closed", "close")

    def scrub(self) -> None:
        self._call_if_there("scrubbed", "scrub")

    def thread_ended(self) -> None:
        self._call_if_there("left by a thread", "thread_ended")

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        """Nothing else writes ``key`` in this block; a store with a ``replace`` of its own sees to that itself."""
        with ExitStack() as clean_up:
            if not self.has_own_replace:
                try:
                    # Bounded: the handler of a signal may write what its own thread is writing.
                    clean_up.enter_context(self._writes.hold(key, timeout=_WRITE_TIMEOUT))
                except LockTimeoutError as error:
                    raise StoreError(
                        f"{printable(key)} is being written in {self._name} all the time", retryable=True
                    ) from error
            yield

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
            what = ", which yields its keys" if name == "__iter__" else ""
            raise StoreError(f"{self._name} has no {name}() method{what}")
        return method  # type: ignore[no-any-return]

    def _call_if_there(self, what: str, name: str) -> None:
        if hasattr(self._store, name):
            self._call(what, self._method(name))

    def _call(self, what: str, method: Callable[..., T], *arguments: object) -> T:
        try:
            return method(*arguments)
        except SessionError:
            raise
        except Exception as error:
            if _is_from_a_signal(error):
                raise
            raise StoreError(f"the session store {self._name} cannot be {what}: {type(error).__name__}") from error


def _is_from_a_signal(error: BaseException) -> bool:
    """Whether the handler of a signal has raised it, as for the time limit of a task. It struck where the program was,
    and says nothing about the store."""
    codes = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in codes:
            return True
        traceback = traceback.tb_next
    return False


def _code_of(handler: object) -> CodeType | None:
    """That of a function, a method, a ``partial`` of one, or of an object that can be called."""
    while isinstance(handler, partial):
        handler = handler.func
    return getattr(handler, "__code__", None) or getattr(getattr(handler, "__call__", None), "__code__", None)  # noqa: B004


class _CheckedLogins:
    """Log-ins in a store of the user's own."""

    def __init__(self, call: Callable[..., Any], logins: Any) -> None:
        self._call = call
        self._logins = logins

    def put(self, state: str, document: dict[str, Any], expires_at: float) -> None:
        self._call("written", self._logins.put, state, document, expires_at)

    def take(self, state: str) -> dict[str, Any] | None:
        return self._call("read", self._logins.take, state)  # type: ignore[no-any-return]

    def purge(self) -> int:
        """0 where the log-ins expire by themselves."""
        purge: Callable[[], int] | None = getattr(self._logins, "purge", None)
        return 0 if purge is None else self._call("cleaned", purge)


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
