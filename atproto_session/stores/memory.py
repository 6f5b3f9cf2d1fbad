"""Values in the memory of this process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

from .._checks import check_kind, check_texts, refuse_to_pickle
from .._fork import copy_of
from ..errors import StoreError
from ..locks import LockKind, ThreadLocks
from ..session import Session, TokenSet

V = TypeVar("V")

#: Among so many dictionaries the values are spread, since each write copies one of them.
_SHARDS = 1024
#: So many log-ins are kept. The oldest go first.
_MOST_LOGINS = 100_000


def holds(stored: Session | None, expected: Session | TokenSet | None) -> bool:
    """The comparison in every compare-and-set; see :meth:`.FullStore.replace`."""
    check_kind("expected", expected, (Session, TokenSet), "a Session or a TokenSet", optional=True)
    if stored is None or expected is None:
        return stored is None and expected is None
    if isinstance(expected, TokenSet):
        return stored.token_set.has_same_tokens(expected)
    return stored.token_set.has_same_tokens(expected.token_set) and stored.attempt == expected.attempt


class _Entry(Generic[V]):
    """
    :ivar used: the number of its last use; higher is later.
    """

    __slots__ = ("used", "value")

    def __init__(self, value: V, used: int) -> None:
        self.value = value
        self.used = used


_Entries = dict[str, _Entry[V]]


class _Version(Generic[V]):
    """Entries that nobody changes any more, and the version that has taken their place, if there is one."""

    __slots__ = ("_next", "entries")

    def __init__(self, entries: _Entries[V]) -> None:
        self.entries = entries
        self._next: dict[str, _Version[V]] = {}

    def latest(self) -> _Version[V]:
        version = self
        while (later := version._next.get("next")) is not None:
            version = later
        return version

    def is_followed_by(self, version: _Version[V]) -> bool:
        """Put ``version`` in the place of this one. Of all who try that, one succeeds: ``setdefault`` of a dictionary
        with text as its keys is one step."""
        return self._next.setdefault("next", version) is version


class MemoryStore(Generic[V]):
    """A store that ends with its process. Sessions go here in tests and scripts, everything else in caches.

    Values are returned as they were stored, not as copies. A forked child has the values of that moment, and from then
    on its own.

    It has no lock, which the handler of a signal or a ``__del__`` could find taken by its own thread. The values lie in
    dictionaries that are never changed. A write copies one of them, changes the copy, and hangs it onto the one that it
    was made from, which only one write can do. Another write that was made from the same one begins again, with the
    comparison of ``replace`` too. A call in the middle of a write finds everything as it was before, or as it is
    after it.

    :param max_entries: keep this many values; the one that was not used for longest goes first. Not for sessions that
        matter.
    :raises ValueError: ``max_entries`` is less than 1.
    :raises TypeError: it is no number.
    """

    raises_only_session_errors = True
    # A copy would spend the same refresh tokens again.
    __reduce__ = refuse_to_pickle(
        "a MemoryStore", "it is for one process; processes share a file or a database, which each of them opens"
    )

    def __init__(self, max_entries: int | None = None) -> None:
        if not isinstance(max_entries, int | None):
            raise TypeError(f"max_entries is a number, or None, not {type(max_entries).__name__}")
        if max_entries is not None and max_entries < 1:
            raise ValueError("max_entries is at least 1, or None")
        self._max_entries = max_entries
        # Where the number of entries is bounded, one dictionary is small enough, and knows which was not used.
        self._spread = _SHARDS if max_entries is None else 1
        self._shards: dict[int, _Version[V]] = {}
        self._uses = itertools.count()
        self.locks = ThreadLocks(LockKind.HOLDER)
        self.logins = MemoryLogins()

    @classmethod
    def from_url(cls, url: str, **options: object) -> MemoryStore[Session]:
        """
        :param options: of :func:`.open_store`. Nothing is written down, so there is nothing to encrypt.
        :raises StoreError: there is more than the scheme.
        """
        if url.partition(":")[2]:
            raise StoreError("memory: names the store in memory, with nothing behind it")
        return MemoryStore[Session]()

    def get(self, key: str) -> V | None:
        check_texts(key=key)
        version = self._shards.get(hash(key) % self._spread)
        entry = None if version is None else version.latest().entries.get(key)
        if entry is None:
            return None
        entry.used = next(self._uses)
        return entry.value

    def set(self, key: str, value: V) -> None:
        self._change(key, value, lambda stored: True)

    def replace(
        self: MemoryStore[Session], key: str, session: Session | None, expected: Session | TokenSet | None
    ) -> bool:
        """Compare-and-set; see :meth:`.FullStore.replace`."""
        return self._change(key, session, lambda stored: holds(stored, expected))

    def delete(self, key: str) -> None:
        self._change(key, None, lambda stored: True)

    def clear(self) -> None:
        for key in self:
            self.delete(key)

    def __iter__(self) -> Iterator[str]:
        return iter([key for version in copy_of(self._shards.values()) for key in version.latest().entries])

    def close(self) -> None:
        """Nothing to close."""

    def _change(self, key: str, value: V | None, is_expected: Callable[[V | None], bool]) -> bool:
        """Store ``value`` if what is stored is expected, or delete if it is ``None``."""
        check_texts(key=key)
        number = hash(key) % self._spread
        version = self._shards.get(number) or self._shards.setdefault(number, _Version({}))
        while True:
            version = version.latest()
            stored = version.entries.get(key)
            if not is_expected(None if stored is None else stored.value):
                return False
            if stored is None and value is None:
                return True
            entries = version.entries.copy()
            if value is None:
                del entries[key]
            else:
                entries[key] = _Entry(value, next(self._uses))
            if self._max_entries is not None and len(entries) > self._max_entries:
                del entries[min(entries, key=lambda key: entries[key].used)]
            changed = _Version(entries)
            if version.is_followed_by(changed):
                # To forget what was before. Where another write comes first, or none comes here, latest() finds it.
                self._shards[number] = changed
                return True


class MemoryLogins:
    """Pending log-ins in the memory of this process. It has no lock either: each step is one operation on a dictionary.

    :param most: keep this many; the oldest go first.
    """

    def __init__(self, *, most: int = _MOST_LOGINS) -> None:
        self._most = most
        self._pending: dict[str, tuple[float, dict[str, Any]]] = {}
        self._sweep_at = 64

    def put(self, state: str, document: dict[str, Any], expires_at: float) -> None:
        self._pending[state] = expires_at, document
        # When there are twice as many as were left the last time: a constant effort for each.
        if len(self._pending) >= self._sweep_at:
            self._sweep()
        while len(self._pending) > self._most:
            with suppress(RuntimeError, StopIteration):  # another thread has changed it in between
                self._pending.pop(next(iter(self._pending)), None)

    def take(self, state: str) -> dict[str, Any] | None:
        expires_at, document = self._pending.pop(state, (0.0, None))
        return document if time.time() < expires_at else None

    def purge(self) -> int:
        """Forget those that have expired. Returns how many."""
        now = time.time()
        expired = [state for state, (expires_at, _) in copy_of(self._pending.items()) if expires_at <= now]
        return sum(self._pending.pop(state, None) is not None for state in expired)

    def _sweep(self) -> None:
        self.purge()
        self._sweep_at = max(64, 2 * len(self._pending))
