"""A cached getter over a store: look, lock, look again, fetch, store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from atproto_session import (
    CachedGetter,
    CancelledError,
    GetOptions,
    LockTimeoutError,
    MemoryStore,
    SessionError,
    StoreError,
)
from atproto_session._flights import Flight
from atproto_session.locks import ThreadLocks

from .core import SOON, Gate, Worker, flight_of, wait_until


class Source:
    """Counts what is fetched: the first value of a key is ``key-1``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, GetOptions, str | None]] = []
        self.gate: Gate | None = None
        self.error: Exception | None = None

    def __call__(self, key: str, options: GetOptions, stored: str | None) -> str:
        self.calls.append((key, options, stored))
        if self.gate is not None:
            self.gate()
        if self.error is not None:
            raise self.error
        return f"{key}-{len(self.calls)}"


class NoLocks:
    """Locks that nobody may take."""

    kind = None

    def hold(self, name: str, **options: object) -> object:
        raise AssertionError("a lock was taken")


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def store() -> MemoryStore[str]:
    return MemoryStore()


def test_a_stored_value_takes_neither_lock_nor_fetch(source: Source, store: MemoryStore[str]) -> None:
    store.set("a", "stored")
    getter = CachedGetter(source, store, locks=NoLocks())  # type: ignore[arg-type]
    assert getter.get("a") == "stored"
    assert source.calls == []


def test_an_absent_value_is_fetched_and_stored(source: Source, store: MemoryStore[str]) -> None:
    getter = CachedGetter(source, store)
    assert getter.get("a", timeout=SOON) == "a-1"
    assert store.get("a") == "a-1"
    assert getter.get("a") == "a-1"
    assert [(key, stored) for key, _, stored in source.calls] == [("a", None)]


def test_a_stale_value_is_fetched_again_unless_it_will_do(source: Source, store: MemoryStore[str]) -> None:
    store.set("a", "old")
    getter = CachedGetter(source, store, is_stale=lambda key, value: value == "old")
    assert getter.get("a", allow_stale=True) == "old"
    assert getter.get("a") == "a-1"
    assert source.calls[0][2] == "old"


def test_no_cache_fetches_and_tells_the_getter(source: Source, store: MemoryStore[str]) -> None:
    store.set("a", "stored")
    getter = CachedGetter(source, store)
    assert getter.get("a", no_cache=True) == "a-1"
    assert source.calls[0][1].no_cache
    assert store.get("a") == "a-1"


def test_concurrent_callers_share_one_fetch(source: Source, store: MemoryStore[str]) -> None:
    source.gate = Gate()
    getter = CachedGetter(source, store)
    workers = [Worker(lambda: getter.get("a", no_cache=True)) for _ in range(8)]
    source.gate.wait_until_reached()
    flight = flight_of(getter, "a")
    wait_until(lambda: len(flight.landed._waiters) == 8)
    source.gate.open()
    assert {worker.outcome() for worker in workers} == {"a-1"}
    assert len(source.calls) == 1


def test_an_error_reaches_its_own_caller_alone(source: Source, store: MemoryStore[str]) -> None:
    source.gate, source.error = Gate(), ValueError("no")
    getter = CachedGetter(source, store)
    first = Worker(lambda: getter.get("a"))
    source.gate.wait_until_reached()
    flight = flight_of(getter, "a")
    second = Worker(lambda: getter.get("a"))
    wait_until(lambda: len(flight.landed._waiters) == 2)
    source.gate.open()
    with pytest.raises(ValueError, match="no"):
        first.outcome()
    with pytest.raises(ValueError, match="no"):
        second.outcome()
    assert len(source.calls) == 2, "the second tried for itself"


def test_a_caller_finds_what_a_failed_fetch_left_in_the_store(source: Source, store: MemoryStore[str]) -> None:
    source.gate, source.error = Gate(), ValueError("no")
    getter = CachedGetter(source, store)
    first = Worker(lambda: getter.get("a"))
    source.gate.wait_until_reached()
    flight = flight_of(getter, "a")
    second = Worker(lambda: getter.get("a"))
    wait_until(lambda: len(flight.landed._waiters) == 2)
    store.set("a", "from elsewhere")
    source.gate.open()
    assert second.outcome() == "from elsewhere"
    with pytest.raises(ValueError, match="no"):
        first.outcome()


def test_the_lock_is_followed_by_another_look(source: Source, store: MemoryStore[str]) -> None:
    locks = ThreadLocks()
    getter = CachedGetter(source, store, locks=locks)
    with locks.hold("a", timeout=0):
        worker = Worker(lambda: getter.get("a"))
        wait_until(lambda: getter._flights.get("a"))
        store.set("a", "from elsewhere")
    assert worker.outcome() == "from elsewhere"
    assert source.calls == []


def test_a_value_is_stored_even_if_its_caller_gave_up(source: Source, store: MemoryStore[str]) -> None:
    source.gate = Gate()
    getter = CachedGetter(source, store)
    with pytest.raises(LockTimeoutError):
        getter.get("a", timeout=0.01)
    source.gate.wait_until_reached()  # or it would be closed before it has begun
    source.gate.open()
    getter.close()
    assert store.get("a") == "a-1"


def test_a_caller_who_leaves_before_the_fetch_prevents_it(source: Source, store: MemoryStore[str]) -> None:
    locks, cancel = ThreadLocks(), threading.Event()
    getter = CachedGetter(source, store, locks=locks)
    with locks.hold("a", timeout=0):
        worker = Worker(lambda: getter.get("a", cancel=cancel))
        wait_until(lambda: getter._flights.get("a"))
        cancel.set()
        with pytest.raises(CancelledError):
            worker.outcome()
    getter.close()
    assert source.calls == []


def test_one_that_joins_and_runs_out_of_time_does_not_end_the_fetch(source: Source, store: MemoryStore[str]) -> None:
    source.gate = Gate()
    getter = CachedGetter(source, store)
    first = Worker(lambda: getter.get("a"))
    source.gate.wait_until_reached()
    with pytest.raises(LockTimeoutError):
        getter.get("a", timeout=0.01)
    source.gate.open()
    assert first.outcome() == "a-1"


def test_one_whose_time_is_over_when_another_fails_is_told_so(source: Source, store: MemoryStore[str]) -> None:
    locks = ThreadLocks()
    getter = CachedGetter(source, store, locks=locks)
    flight, own = getter._flights.board("a", lambda flight: (_ for _ in ()).throw(ValueError("no")), deadline=0.0)
    assert own
    assert flight.over.wait(SOON)
    getter._flights._joinable["a"] = flight  # as it was in the moment before it unregistered
    with pytest.raises(LockTimeoutError):
        getter.get("a", timeout=0.0)


def test_deletion_on_certain_errors(source: Source, store: MemoryStore[str]) -> None:
    source.error = ValueError("gone")
    store.set("a", "old")
    store.set("b", "old")
    getter = CachedGetter(
        source,
        store,
        is_stale=lambda key, value: True,
        delete_on_error=lambda error, key, stored: isinstance(error, ValueError) and (key, stored) == ("a", "old"),
    )
    for key in "ab":
        with pytest.raises(ValueError, match="gone"):
            getter.get(key)
    assert (store.get("a"), store.get("b")) == (None, "old")


class FullStore(MemoryStore[str]):
    def set(self, key: str, value: str) -> None:
        raise OSError("disk full")


def test_what_cannot_be_stored_is_told(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[str, str, str]] = []

    def on_store_error(error: Exception, key: str, value: str) -> None:
        told.append((str(error), key, value))
        if key == "b":
            raise SessionError("revoked")

    getter = CachedGetter(source, FullStore(), on_store_error=on_store_error)
    assert getter.get("a") == "a-1"
    with pytest.raises(SessionError, match="revoked"):
        getter.get("b")
    assert told == [("disk full", "a", "a-1"), ("disk full", "b", "b-2")]
    with caplog.at_level(logging.WARNING, "atproto_session"):
        assert CachedGetter(source, FullStore()).get("c") == "c-3"
    assert "could not be stored: disk full" in caplog.text


def test_a_failure_may_be_shared(source: Source, store: MemoryStore[str]) -> None:
    source.gate, source.error = Gate(), ValueError("no")
    getter = CachedGetter(source, store, share_failures=True)
    workers = [Worker(lambda: getter.get("a")) for _ in range(8)]
    source.gate.wait_until_reached()
    flight = flight_of(getter, "a")
    wait_until(lambda: len(flight.landed._waiters) == 8)
    source.gate.open()
    for worker in workers:
        with pytest.raises(ValueError, match="no"):
            worker.outcome()
    assert len(source.calls) == 1


def test_a_getter_that_asks_for_its_own_key_is_told_so(store: MemoryStore[str]) -> None:
    getter: CachedGetter[str] = CachedGetter(lambda key, options, stored: getter.get(key), store)
    with pytest.raises(SessionError, match="asks for a itself"):
        getter.get("a")


def test_a_getter_may_ask_for_another_key(store: MemoryStore[str]) -> None:
    getter: CachedGetter[str] = CachedGetter(
        lambda key, options, stored: key if key == "b" else f"{key}, {getter.get('b')}", store
    )
    assert getter.get("a") == "a, b"
    assert store.get("b") == "b"


class OwnLocks(ThreadLocks):
    """Locks of a user's own, with faults.

    :ivar fails: at which end.
    """

    fails = ""

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[Any]:
        if self.fails == "taken":
            raise ConnectionError
        yield self
        if self.fails == "released":
            raise ConnectionError


def test_locks_of_ones_own_may_fail(source: Source, store: MemoryStore[str], caplog: pytest.LogCaptureFixture) -> None:
    locks = OwnLocks()
    getter = CachedGetter(source, store, locks=locks)
    locks.fails = "taken"
    with pytest.raises(StoreError, match="the lock of a cannot be used: ConnectionError"):
        getter.get("a")
    locks.fails = "released"
    assert getter.get("a") == "a-1", "what was done under it counts"
    assert "was not released: ConnectionError" in caplog.text


class Found(Flight[str]):
    """One that finds a value in the store, for another caller."""

    def __init__(self, getter: CachedGetter[str], store: MemoryStore[str], stores: str) -> None:
        super().__init__("a", lambda flight: "found")
        self._has_begun = True
        self._getter, self._store, self._stores = getter, store, stores
        getter._flights._joinable["a"] = self

    def wait(self, deadline: float, cancel: threading.Event | None = None) -> str:
        self._getter._flights._joinable.pop("a")
        if self._stores:
            self._store.set("a", self._stores)
        return "found"


def test_what_was_found_by_another_is_looked_for_again(source: Source, store: MemoryStore[str]) -> None:
    getter = CachedGetter(source, store)
    Found(getter, store, "stored")
    assert getter.get("a") == "stored"
    store.delete("a")
    Found(getter, store, "")
    assert getter.get("a") == "a-1"
