"""The contract suites find stores and locks that break the contract. Good ones pass in tests of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from atproto_session import MemoryStore, Session, TokenSet
from atproto_session.locks import Hold, LockKind, Locks, ThreadLocks
from atproto_session.stores.memory import MemoryLogins
from atproto_session.testing.contracts import LocksContract, SharedStoreContract, StoreContract

CONTRACT, LOCKS = StoreContract(), LocksContract()


class Careless(MemoryStore[Session]):
    """Replaces whatever is there."""

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        if session is None:
            self.delete(key)
        else:
            self.set(key, session)
        return True


class Folding(MemoryStore[Session]):
    """Takes two keys for one."""

    def get(self, key: str) -> Session | None:
        return super().get(key.lower())

    def set(self, key: str, value: Session) -> None:
        super().set(key.lower(), value)


class Lazy(MemoryStore[Session]):
    """Keeps what it has."""

    def set(self, key: str, value: Session) -> None:
        if self.get(key) is None:
            super().set(key, value)

    def delete(self, key: str) -> None:
        return


class Sweeping(MemoryStore[Session]):
    """Clears too much."""

    def clear(self) -> None:
        super().clear()
        self.logins = MemoryLogins()


class Generous(MemoryStore[Session]):
    """Gives a log-in away again and again, however old."""

    def __init__(self) -> None:
        super().__init__()
        pending: dict[str, dict[str, Any]] = {}

        def put(state: str, document: dict[str, Any], expires_at: float) -> None:
            pending[state] = document

        self.logins.put = put  # type: ignore[method-assign]
        self.logins.take = pending.get  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("store", "check"),
    [
        (Careless, CONTRACT.test_replace_does_not_resurrect),
        (Careless, CONTRACT.test_replace_of_nothing_inserts),
        (Careless, CONTRACT.test_of_many_threads_that_insert_one_does),
        (Careless, CONTRACT.test_of_many_threads_that_replace_the_same_tokens_one_does),
        (Careless, lambda store: CONTRACT.test_replace_leaves_other_tokens_alone(store, {"refresh_token": "another"})),
        (Folding, CONTRACT.test_keys_are_never_mixed_up),
        (Lazy, CONTRACT.test_set_overwrites),
        (Lazy, CONTRACT.test_iterating_while_it_changes),
        (Sweeping, CONTRACT.test_clear_deletes_the_sessions_and_not_the_logins),
        (Generous, lambda store: CONTRACT.test_a_login_is_taken_once(store.logins)),
        (Generous, lambda store: CONTRACT.test_an_expired_login_is_gone(store.logins)),
        (Generous, lambda store: CONTRACT.test_of_many_threads_one_takes_a_login(store.logins)),
    ],
)
def test_a_store_that_breaks_it_is_found(
    store: Callable[[], MemoryStore[Session]], check: Callable[[MemoryStore[Session]], None]
) -> None:
    check(MemoryStore[Session]())
    with pytest.raises(AssertionError):
        check(store())


class Absent(StoreContract):
    """Of a store that takes a damaged record for one that is not there."""

    def damage(self, store: Any, key: str) -> bool:
        store.delete(key)
        return True


def test_a_record_that_cannot_be_read_and_passes_for_absent_is_found() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        Absent().test_an_unreadable_record_is_an_error_and_not_an_absence(MemoryStore[Session]())


@pytest.mark.parametrize(
    "check",
    [
        CONTRACT.test_an_unreadable_record_is_an_error_and_not_an_absence,
        CONTRACT.test_an_unreadable_record_can_be_deleted,
    ],
)
def test_what_cannot_be_checked_is_skipped_and_says_so(check: Callable[[MemoryStore[Session]], None]) -> None:
    with pytest.raises(pytest.skip.Exception, match="damage"):
        check(MemoryStore[Session]())


class NoLocks:
    """Let everybody in."""

    kind = LockKind.PROCESS

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[Hold]:
        with ThreadLocks().hold(name, timeout=timeout) as hold:
            yield hold


class Leaking:
    """Stay locked when something goes wrong."""

    kind = LockKind.PROCESS

    def __init__(self) -> None:
        self._locks = ThreadLocks()
        self._blocks: list[object] = []

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[Hold]:
        block = self._locks.hold(name, timeout=timeout, cancel=cancel)
        self._blocks.append(block)
        yield block.__enter__()
        block.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("locks", "check", "error"),
    [
        (NoLocks, LOCKS.test_one_at_a_time, AssertionError),
        (NoLocks, LOCKS.test_a_timeout_of_zero_tries_once, pytest.fail.Exception),
        (NoLocks, LOCKS.test_whoever_holds_it_holds_the_same, AssertionError),
        (Leaking, LOCKS.test_an_exception_releases_it, TimeoutError),
    ],
)
def test_locks_that_break_it_are_found(
    locks: Callable[[], Locks], check: Callable[[Locks], None], error: type[BaseException]
) -> None:
    check(ThreadLocks())
    with pytest.raises(error):
        check(locks())


def test_what_a_contract_needs_is_asked_for() -> None:
    for contract in (StoreContract(), SharedStoreContract(), LocksContract()):
        with pytest.raises(NotImplementedError):
            contract.make_locks(None) if isinstance(contract, LocksContract) else contract.make_store(None)  # type: ignore[arg-type]
