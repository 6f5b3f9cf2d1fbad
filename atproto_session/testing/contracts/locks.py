"""What locks have to do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar

import pytest

from ...errors import CancelledError, LockTimeoutError
from ...locks import LockKind, Locks
from ._common import DID, KEYS, SOON, Process, at_once, take


class LocksContract:
    """What :class:`.Locks` do.

    :cvar names: of the locks, which are the keys of sessions.
    """

    names: ClassVar[list[str]] = KEYS

    def make_locks(self, tmp_path: Path) -> Locks:
        raise NotImplementedError

    @pytest.fixture
    def locks(self, tmp_path: Path) -> Locks:
        return self.make_locks(tmp_path)

    def test_the_kind_is_known(self, locks: Locks) -> None:
        assert isinstance(locks.kind, LockKind)

    def test_one_at_a_time(self, locks: Locks) -> None:
        inside: list[str] = []
        pause = threading.Event()
        most = 0

        def work(name: str) -> None:
            nonlocal most
            for _ in range(10):
                with locks.hold(DID, timeout=SOON):
                    inside.append(name)
                    pause.wait(0.001)  # so that all who can get in do
                    most = max(most, len(inside))
                    inside.remove(name)

        at_once(work, "abcdefgh")
        assert most == 1

    def test_a_timeout_of_zero_tries_once(self, locks: Locks) -> None:
        with _held_elsewhere(locks, DID):
            with pytest.raises(LockTimeoutError) as caught:
                take(locks, DID)
            assert caught.value.retryable
            assert isinstance(caught.value, TimeoutError)
        take(locks, DID)

    def test_waiting_ends_with_the_timeout(self, locks: Locks) -> None:
        with _held_elsewhere(locks, DID), pytest.raises(LockTimeoutError):
            take(locks, DID, timeout=0.1)

    def test_a_waiter_gets_it_when_it_is_released(self, locks: Locks) -> None:
        got = threading.Event()

        def wait() -> None:
            with locks.hold(DID, timeout=SOON):
                got.set()

        with ThreadPoolExecutor(1) as threads:
            with locks.hold(DID, timeout=SOON):
                waiter = threads.submit(wait)
                assert not got.wait(0.1)
            waiter.result(SOON)
            assert got.is_set()

    def test_waiting_ends_when_it_is_cancelled(self, locks: Locks) -> None:
        cancel = threading.Event()
        with _held_elsewhere(locks, DID), ThreadPoolExecutor(1) as threads:
            waiter = threads.submit(take, locks, DID, timeout=SOON, cancel=cancel)
            cancel.set()
            with pytest.raises(CancelledError):
                waiter.result(SOON)

    def test_a_cancel_that_is_not_set_does_nothing(self, locks: Locks) -> None:
        take(locks, DID, cancel=threading.Event())
        with _held_elsewhere(locks, DID), pytest.raises(LockTimeoutError):
            take(locks, DID, cancel=threading.Event())

    def test_an_infinite_timeout_is_one(self, locks: Locks) -> None:
        take(locks, DID, timeout=float("inf"))

    def test_an_exception_releases_it(self, locks: Locks) -> None:
        with pytest.raises(ZeroDivisionError), locks.hold(DID, timeout=SOON):
            raise ZeroDivisionError
        take(locks, DID)

    def test_a_failed_attempt_leaves_it_with_its_holder(self, locks: Locks) -> None:
        with _held_elsewhere(locks, DID):
            for _ in range(2):
                with pytest.raises(LockTimeoutError):
                    take(locks, DID)

    def test_other_names_are_free(self, locks: Locks) -> None:
        # Locks may share a bounded number of places by hash, so that one other name may not be free.
        with _held_elsewhere(locks, DID):
            free = 0
            for number in range(10):
                with suppress(LockTimeoutError):
                    take(locks, f"{DID}#{number}")
                    free += 1
            assert free >= 9

    def test_names_are_the_keys_of_sessions(self, locks: Locks) -> None:
        for name in self.names:
            with _held_elsewhere(locks, name), pytest.raises(LockTimeoutError) as caught:
                take(locks, name)
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 500

    def test_it_is_held_until_the_end_of_the_block(self, locks: Locks) -> None:
        with locks.hold(DID, timeout=SOON) as hold:
            assert hold.extend(1.0)
            assert hold.extend(30.0)
        assert not hold.extend(1.0)
        with locks.hold(DID, timeout=SOON) as newer:
            assert not hold.extend(1.0)
            assert newer.extend(1.0)

    def test_its_holder_does_not_get_it_twice(self, locks: Locks) -> None:
        """A handler of a signal that waits for what its own thread holds comes to an end."""
        with locks.hold(DID, timeout=SOON) as hold:
            with pytest.raises(LockTimeoutError):
                take(locks, DID, timeout=0.05)
            assert hold.extend(1.0)
        take(locks, DID)

    def test_whoever_holds_it_holds_the_same(self, locks: Locks) -> None:
        with locks.hold(DID, timeout=SOON) as hold:
            first = hold.lock
        with locks.hold(DID, timeout=SOON) as hold:
            assert hold.lock == first


class SharedLocksContract(LocksContract):
    """What locks do that exclude processes as well."""

    def opener(self, tmp_path: Path) -> Callable[[], Locks]:
        """What makes the locks, the same ones at each call; it can be pickled."""
        raise NotImplementedError

    def make_locks(self, tmp_path: Path) -> Locks:
        return self.opener(tmp_path)()

    def test_two_objects_exclude_each_other(self, locks: Locks, tmp_path: Path) -> None:
        other = self.opener(tmp_path)()
        with locks.hold(DID, timeout=SOON), pytest.raises(LockTimeoutError):
            take(other, DID)
        take(other, DID)

    def test_another_process_is_excluded(self, locks: Locks, tmp_path: Path) -> None:
        with Process(_hold_until_told, self.opener(tmp_path)) as holder:
            lock = holder.receive()
            with pytest.raises(LockTimeoutError):
                take(locks, DID)
            holder.send("release")
            assert holder.receive() == "released"
            with locks.hold(DID, timeout=SOON) as hold:
                assert hold.lock == lock, "it is known by another name here"

    def test_the_lock_of_a_killed_process_is_free(self, locks: Locks, tmp_path: Path) -> None:
        if locks.kind is not LockKind.HOLDER:
            pytest.skip("these locks do not end with their holder")
        with Process(_hold_until_told, self.opener(tmp_path)) as holder:
            holder.receive()
            holder.kill()
            take(locks, DID, timeout=SOON)


@contextmanager
def _held_elsewhere(locks: Locks, name: str) -> Iterator[None]:
    """The lock ``name``, held by another thread."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with locks.hold(name, timeout=SOON) as _hold:
            held.set()
            release.wait(SOON)

    with ThreadPoolExecutor(1) as threads:
        holder = threads.submit(hold)
        try:
            assert held.wait(SOON)
            yield
        finally:
            release.set()
            holder.result(SOON)


def _hold_until_told(connection: Connection, opener: Callable[[], Locks]) -> None:
    with opener().hold(DID, timeout=SOON) as hold:
        connection.send(hold.lock)
        connection.recv()
    connection.send("released")
