"""The locks: the contract for every kind, and what files can do to them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from atproto_session.errors import CancelledError, LockTimeoutError, StoreError
from atproto_session.locks import FileLocks, LockKind, Locks, ThreadLocks
from atproto_session.testing.contracts import HOSTILE_KEYS, LocksContract, SharedLocksContract


class TestThreadLocks(LocksContract):
    names = HOSTILE_KEYS

    def make_locks(self, tmp_path: Path) -> Locks:
        return ThreadLocks()


class TestFileLocks(SharedLocksContract):
    names = HOSTILE_KEYS

    def opener(self, tmp_path: Path) -> Callable[[], Locks]:
        return partial(FileLocks, tmp_path / "locks")


class TestFewFileLocks(SharedLocksContract):
    """Names that share their files are locked all the same."""

    def opener(self, tmp_path: Path) -> Callable[[], Locks]:
        return partial(FileLocks, tmp_path / "locks", stripes=1)

    def test_other_names_are_free(self, locks: Locks) -> None:
        with locks.hold("one", timeout=0), pytest.raises(LockTimeoutError), locks.hold("two", timeout=0):
            pass


def lock_files(directory: Path) -> list[Path]:
    return list(directory.glob("??/*.lock"))


def test_thread_locks_say_whether_another_process_can_reach_what_they_lock() -> None:
    assert ThreadLocks().kind is LockKind.PROCESS
    assert ThreadLocks(LockKind.HOLDER).kind is LockKind.HOLDER


def test_thread_locks_are_kept_only_while_they_are_used() -> None:
    locks = ThreadLocks()
    for number in range(100):
        with locks.hold(str(number), timeout=0):
            assert len(locks._lines) == 1
    assert len(locks._lines) == 0


def test_the_files_are_bounded_private_and_never_deleted(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path / "locks", stripes=4)
    old = os.umask(0)
    try:
        for number in range(50):
            with locks.hold(f"did:plc:{number}", timeout=0):
                pass
    finally:
        os.umask(old)
    assert len(lock_files(tmp_path / "locks")) == 4
    for path in [tmp_path / "locks", *(tmp_path / "locks").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_a_deleted_directory_is_made_again(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path / "locks")
    with locks.hold("did", timeout=0) as hold:
        shutil.rmtree(tmp_path / "locks")
        assert not hold.extend(1.0)
    with locks.hold("did", timeout=0) as hold:
        assert hold.extend(1.0)


def test_a_replaced_file_ends_the_hold(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path / "locks")
    with locks.hold("did", timeout=0) as hold:
        (file,) = lock_files(tmp_path / "locks")
        file.rename(tmp_path / "moved")
        assert not hold.extend(1.0)
        with FileLocks(tmp_path / "locks").hold("did", timeout=0) as second:
            assert second.extend(1.0)
            assert second.lock != hold.lock
            assert not hold.extend(1.0)


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="directory that this user may write to"):
        FileLocks(tmp_path / "file" / "locks").hold("did", timeout=0).__enter__()


def test_a_file_system_without_locks_is_refused_and_nothing_stays_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    locks = FileLocks(tmp_path / "locks")
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", no_flock)
        with pytest.raises(StoreError, match="file locks"):
            locks.hold("did", timeout=0).__enter__()
    with locks.hold("did", timeout=0):
        pass


def test_waiting_for_another_process_ends_with_the_timeout(tmp_path: Path) -> None:
    # Two objects stand for two processes: the threads of one object wait for each other, before the file.
    with FileLocks(tmp_path).hold("did", timeout=0), pytest.raises(LockTimeoutError, match="another process"):
        FileLocks(tmp_path).hold("did", timeout=0.05).__enter__()


def test_waiting_for_another_process_can_be_cancelled(tmp_path: Path) -> None:
    class Cancelled(threading.Event):
        """Set as soon as the waiting for other threads is over."""

        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            return self.looks > 1

    with FileLocks(tmp_path).hold("did", timeout=0), pytest.raises(CancelledError):
        FileLocks(tmp_path).hold("did", timeout=60, cancel=Cancelled()).__enter__()
