"""The locks: the contract for every kind, and what files can do to them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from atproto_session.errors import CancelledError, LockTimeoutError, StoreError
from atproto_session.locks import FileLocks, LockKind, Locks, ThreadLocks, _places, files, threads
from atproto_session.testing.contracts import HOSTILE_KEYS, LocksContract, SharedLocksContract

from .core import SOON, Worker, wait_until
from .striking import Round, fail, give_away, strike_everywhere


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


def test_a_handler_between_any_two_steps_finds_no_lock_that_stays_taken() -> None:
    """It gets the lock, or is told in time that its own thread holds it; and the others go on."""
    outcomes = set()

    def begin() -> Round:
        locks = ThreadLocks()
        inside: list[str] = []

        def hold() -> None:
            with locks.hold("did", timeout=SOON) as hold:
                inside.append("here")
                assert hold.extend(1.0)
                inside.pop()

        def strike() -> None:
            with locks.hold("another", timeout=0):
                pass
            try:
                with locks.hold("did", timeout=0):
                    assert not inside
                    outcomes.add("held")
            except LockTimeoutError:
                outcomes.add("refused")

        def check() -> None:
            assert locks._lines == {}
            Worker(hold).outcome()

        return hold, strike, check

    assert strike_everywhere(begin, in_module=threads) > 100
    assert outcomes == {"held", "refused"}


def test_an_exception_between_any_two_steps_leaves_no_lock_taken() -> None:
    def begin() -> Round:
        locks = ThreadLocks()

        def hold() -> None:
            with locks.hold("did", timeout=SOON):
                pass

        def check() -> None:
            assert not locks._lines.get("did"), "nobody is in the line"
            hold()
            assert locks._lines == {}

        return hold, fail, check

    strike_everywhere(begin, in_module=threads)


def test_an_exception_at_any_step_of_waiting_lets_the_next_one_go_on() -> None:
    def begin() -> Round:
        locks = ThreadLocks()
        first = locks.hold("did", timeout=0)
        first.__enter__()

        def wait() -> None:
            with suppress(LockTimeoutError), locks.hold("did", timeout=0.001):
                pass

        def check() -> None:
            last = Worker(lambda: locks.hold("did", timeout=SOON).__enter__())
            wait_until(lambda: len(locks._lines["did"]) == 2)
            first.__exit__(None, None, None)
            assert last.outcome()
            del last
            assert locks._lines == {}

        return wait, fail, check

    strike_everywhere(begin, in_module=threads)


def test_those_that_wait_get_it_in_the_order_in_which_they_came() -> None:
    locks, got = ThreadLocks(), []
    with locks.hold("did", timeout=0):
        workers = []
        for number in range(5):

            def work(number: int = number) -> None:
                with locks.hold("did", timeout=SOON):
                    got.append(number)

            workers.append(Worker(work))
            wait_until(lambda number=number: len(locks._lines["did"]) == number + 2)  # type: ignore[misc]
    for worker in workers:
        worker.outcome()
    assert got == [0, 1, 2, 3, 4]
    assert locks._lines == {}


def test_who_joins_a_line_that_is_just_closed_joins_another() -> None:
    class Lines(dict[str, Any]):
        """Between the two steps of joining, the last one of the line leaves."""

        def setdefault(self, name: str, default: Any = None) -> Any:
            line = super().setdefault(name, default)
            if holder:
                holder.pop().__exit__(None, None, None)
            return line

    locks = ThreadLocks()
    locks._lines = Lines()
    holder: list[Any] = []
    first = locks.hold("did", timeout=0)
    first.__enter__()
    holder.append(first)
    with locks.hold("did", timeout=0), pytest.raises(LockTimeoutError):
        locks.hold("did", timeout=0).__enter__()
    assert locks._lines == {}


# Which file a name has


def test_every_process_that_shares_the_directory_has_the_same_salt(tmp_path: Path) -> None:
    """One object stands for one process: they know nothing of each other."""
    for lap in range(10):
        directory = tmp_path / str(lap)
        start = threading.Barrier(8)

        def read(directory: Path = directory, start: threading.Barrier = start) -> bytes:
            salts = FileLocks(directory)._salts
            start.wait(SOON)
            return salts.read().value

        with ThreadPoolExecutor(8) as threads_:
            salts = set(threads_.map(lambda _: read(), range(8)))
        assert len(salts) == 1
        assert (directory / "salt").read_bytes() in salts
        assert not (directory / "salt.new").exists()


def test_a_process_that_is_killed_while_it_makes_the_salt_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "salt.new").write_bytes(b"half")
    with FileLocks(tmp_path).hold("did", timeout=0):
        pass
    assert len((tmp_path / "salt").read_bytes()) == 32
    assert not (tmp_path / "salt.new").exists()


def test_a_salt_that_another_process_takes_too_long_to_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SALT_WITHIN", 0.0)
    with FileLock(tmp_path / "salt.lock"), pytest.raises(LockTimeoutError):
        FileLocks(tmp_path).hold("did", timeout=SOON).__enter__()


def test_nobody_knows_which_names_share_a_file(tmp_path: Path) -> None:
    """Under a plain hash, two such names are found in milliseconds. Here they share one in one directory of a
    million."""
    found: dict[int, str] = {}
    pairs: list[tuple[str, str]] = []
    for number in itertools.count():
        name = f"did:plc:{number}"
        stripe = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 1024
        if stripe in found:
            pairs.append((found[stripe], name))
        found[stripe] = name
        if len(pairs) == 20:
            break
    for directory in (tmp_path / "one", tmp_path / "two"):
        locks = FileLocks(directory)
        for first, second in pairs:
            with locks.hold(first, timeout=0), locks.hold(second, timeout=0):
                pass
    assert {path.relative_to(tmp_path / "one") for path in lock_files(tmp_path / "one")} != {
        path.relative_to(tmp_path / "two") for path in lock_files(tmp_path / "two")
    }


def test_names_hardly_ever_share_a_file(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path)
    salt = locks._salts.read().value
    assert len({locks._path_of(f"did:plc:{number}", salt) for number in range(2000)}) > 1990


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_a_damaged_salt_is_an_error(tmp_path: Path, content: bytes) -> None:
    with FileLocks(tmp_path).hold("did", timeout=0):
        pass
    (tmp_path / "salt").write_bytes(content)
    with pytest.raises(StoreError, match="salt is damaged: stop every process"):
        FileLocks(tmp_path).hold("did", timeout=0).__enter__()


def test_a_salt_that_is_replaced_ends_the_hold_and_is_read_again(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path)
    with locks.hold("did", timeout=0) as hold:
        (tmp_path / "salt").unlink()
        assert not hold.extend(1.0)
        with FileLocks(tmp_path).hold("did", timeout=0) as other:
            assert other.extend(1.0)
            assert not hold.extend(1.0)
            # It goes by what lies there, not by what it has in mind.
            with pytest.raises(LockTimeoutError, match="another thread"):
                locks.hold("did", timeout=0).__enter__()
            assert locks._salts.read() == FileLocks(tmp_path)._salts.read()
    with locks.hold("did", timeout=0) as hold:
        assert hold.extend(1.0)


def test_a_set_of_locks_has_a_file_at_least(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FileLocks(tmp_path, stripes=0)


# Whose places these are


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o770, 0o701])
def test_a_directory_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks").chmod(mode)
    with pytest.raises(StoreError, match=rf"open to other users \(mode {mode:o}\).*chmod 700 {tmp_path}/locks$"):
        FileLocks(tmp_path / "locks").hold("did", timeout=0).__enter__()
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_salt_that_is_open_to_others_is_refused(tmp_path: Path) -> None:
    with FileLocks(tmp_path).hold("did", timeout=0):
        pass
    (tmp_path / "salt").chmod(0o644)
    with pytest.raises(StoreError, match=rf"chmod 600 {tmp_path}/salt$"):
        FileLocks(tmp_path).hold("did", timeout=0).__enter__()


def test_a_link_in_the_place_of_anything_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "locks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="locks is a link"):
        FileLocks(tmp_path / "locks").hold("did", timeout=0).__enter__()
    (tmp_path / "salt").symlink_to(tmp_path / "theirs")
    with pytest.raises(StoreError, match="salt is a link"):
        FileLocks(tmp_path).hold("did", timeout=0).__enter__()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path / "theirs").exists()


def test_a_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path / "locks")
    with locks.hold("did", timeout=0):
        (file,) = lock_files(tmp_path / "locks")
    file.unlink()
    file.symlink_to(tmp_path / "theirs")
    with pytest.raises(StoreError, match="cannot be used"):
        locks.hold("did", timeout=0).__enter__()
    assert not (tmp_path / "theirs").exists()


def test_the_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locks").mkdir(mode=0o700)
    owner = give_away(tmp_path / "locks", monkeypatch)
    with pytest.raises(StoreError, match=rf"locks belongs to another user \(number {owner}\).*run as that user"):
        FileLocks(tmp_path / "locks").hold("did", timeout=0).__enter__()


def test_what_root_has_made_is_not_suspicious(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Root:
        st_uid, st_mode = 0, 0o40700

    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(Path, "lstat", lambda path: Root)
    _places.check_private(tmp_path)


def test_windows_has_owners_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.delattr(os, "geteuid")
    with FileLocks(tmp_path).hold("did", timeout=0):
        pass
    _places.check_parent(tmp_path)


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


def test_a_directory_that_cannot_be_used_is_found_out_before_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be used"):
        FileLocks(tmp_path / "file" / "locks").check()
    FileLocks(tmp_path / "locks").check()
    assert (tmp_path / "locks" / "salt").exists()
