"""Values in the memory of this process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from .._fork import reset_in_child
from ..locks import LockKind, ThreadLocks
from ..session import Session, TokenSet

V = TypeVar("V")


def holds(stored: Session | None, expected: Session | TokenSet | None) -> bool:
    """The comparison in every compare-and-set; see :meth:`.FullStore.replace`."""
    if stored is None or expected is None:
        return stored is None and expected is None
    if isinstance(expected, TokenSet):
        return stored.token_set.has_same_tokens(expected)
    return stored.token_set.has_same_tokens(expected.token_set) and stored.attempt == expected.attempt


class MemoryStore(Generic[V]):
    """A store that ends with its process. Sessions go here in tests and scripts, everything else in caches.

    Values are returned as they were stored, not as copies. A forked child has the values of that moment, and from then
    on its own.

    :param max_entries: keep this many values; the one that was not used for longest goes first. Not for sessions that
        matter.
    :raises ValueError: ``max_entries`` is less than 1.
    """

    def __init__(self, max_entries: int | None = None) -> None:
        if max_entries is not None and max_entries < 1:
            raise ValueError("max_entries is at least 1, or None")
        self._values: OrderedDict[str, V] = OrderedDict()
        self._max_entries = max_entries
        self.locks = ThreadLocks(LockKind.HOLDER)
        self.logins = MemoryLogins()
        self.reset_after_fork()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        self._mutex = threading.Lock()

    def get(self, key: str) -> V | None:
        if self._max_entries is None:
            return self._values.get(key)
        with self._mutex:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def set(self, key: str, value: V) -> None:
        with self._mutex:
            self._set(key, value)

    def replace(
        self: MemoryStore[Session], key: str, session: Session | None, expected: Session | TokenSet | None
    ) -> bool:
        """Compare-and-set; see :meth:`.FullStore.replace`."""
        with self._mutex:
            if not holds(self._values.get(key), expected):
                return False
            if session is None:
                self._values.pop(key, None)
            else:
                self._set(key, session)
            return True

    def delete(self, key: str) -> None:
        with self._mutex:
            self._values.pop(key, None)

    def clear(self) -> None:
        with self._mutex:
            self._values.clear()

    def __iter__(self) -> Iterator[str]:
        with self._mutex:
            return iter(list(self._values))

    def close(self) -> None:
        """Nothing to close."""

    def _set(self, key: str, value: V) -> None:
        self._values[key] = value
        if self._max_entries is not None:
            self._values.move_to_end(key)
            if len(self._values) > self._max_entries:
                self._values.popitem(last=False)


class MemoryLogins:
    """Pending log-ins in the memory of this process."""

    def __init__(self) -> None:
        self._pending: dict[str, tuple[float, dict[str, Any]]] = {}
        self.reset_after_fork()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        self._mutex = threading.Lock()

    def put(self, state: str, document: dict[str, Any], expires_at: float) -> None:
        now = time.time()
        with self._mutex:
            for old in [old for old, (end, _) in self._pending.items() if end <= now]:
                del self._pending[old]
            self._pending[state] = expires_at, document

    def take(self, state: str) -> dict[str, Any] | None:
        with self._mutex:
            expires_at, document = self._pending.pop(state, (0.0, None))
        return document if time.time() < expires_at else None
