"""Locks between the threads and the processes of one machine."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from .._fork import importing
from ..errors import CancelledError, LockTimeoutError, StoreError, printable
from . import LockKind
from ._places import check_private, make_private, path_of
from .threads import ThreadLocks

#: How often a waiting process looks again, in seconds. One look costs about 50 microseconds.
_POLL = 0.01
#: How long another process may take to write the salt, in seconds.
_SALT_WITHIN = 10.0
_SALT_BYTES = 32
#: So many that two accounts hardly ever share one.
_STRIPES = 2**20


class FileLocks:
    """Advisory locks on files, which the operating system frees when their holder dies.

    Threads queue at a :class:`ThreadLocks` first, so at most one thread of a process polls a file for a name. The
    number of files is bounded: names share ``stripes`` files by a hash, so a block must not take a second lock of the
    same set. The hash begins with a secret salt that lies beside the files, so that nobody can choose a name that
    shares the file of another one. A file is made when it is first used, and never deleted: a process that still had
    the deleted file open would hold a lock that nobody else sees.

    A forked child holds none of its parent's locks, and keeps none of them alive: filelock closes the inherited
    descriptors in it, without unlocking what the parent goes on holding.

    :param directory: where the files live, on the same file system as the store; made when missing, for its owner
        alone.
    :param stripes: how many files there can be.
    :raises StoreError: ``directory`` is no path.
    :raises ValueError: ``stripes`` is less than 1.
    """

    kind = LockKind.HOLDER

    def __init__(self, directory: str | os.PathLike[str], *, stripes: int = _STRIPES) -> None:
        if stripes < 1:
            raise ValueError("stripes is at least 1")
        self._directory = path_of("the directory of the locks", directory)
        self._stripes = stripes
        self._threads = ThreadLocks()
        self._salts = _SaltFile(self._directory)

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[_FileHold]:
        with importing():
            from filelock import FileLock, Timeout  # not before it is needed: it costs 30 ms and brings asyncio along

        deadline = time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
        with self._threads.hold(name, timeout=timeout, cancel=cancel), ExitStack() as clean_up:
            try:
                salt = self._salts.read()
                hold = _FileHold(self._path_of(name, salt.value), self._salts, salt)
                # A new object each time: nothing of it outlives the block or crosses a fork. To preserve the file is
                # also to refuse a file system without flock, where there is no lock that ends with its holder.
                lock = FileLock(
                    hold.path, mode=0o600, thread_local=False, preserve_lock_file=True, on_acquired=hold.remember
                )
                clean_up.callback(lock.release)
                clean_up.callback(hold.forget)
                lock.acquire(
                    timeout=max(0.0, deadline - time.monotonic()),
                    poll_interval=_POLL,
                    cancel_check=None if cancel is None else cancel.is_set,
                )
            except Timeout:
                if cancel is not None and cancel.is_set():
                    raise CancelledError(f"waiting for the lock of {printable(name)} was cancelled") from None
                raise LockTimeoutError(
                    f"another process keeps the lock of {printable(name)}; try again later"
                ) from None
            except OSError as error:
                raise self._failure(error) from error
            yield hold

    def check(self) -> None:
        """
        :raises StoreError: the directory cannot be used.
        """
        try:
            self._salts.read()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> StoreError:
        return StoreError(
            f"the locks in {self._directory} cannot be used ({error}); it needs a directory that this user may write "
            "to, on a file system with file locks"
        )

    def _path_of(self, name: str, salt: bytes) -> Path:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), key=salt, digest_size=16).digest()
        stripe = int.from_bytes(digest) % self._stripes
        # A directory in between: no file system is quick with a million files in one.
        directory = self._directory / f"{stripe & 0xFF:02x}"
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        return directory / f"{stripe >> 8:03x}.lock"


class _Salt(NamedTuple):
    value: bytes
    identity: tuple[int, ...]


class _SaltFile:
    """What keeps others from knowing which names share a file. It is the same for every process that uses the
    directory: the one that comes first draws it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "salt"
        self._last: _Salt | None = None

    def read(self) -> _Salt:
        """
        :raises OSError: the directory or the file cannot be read or made.
        :raises StoreError: the file is damaged, or open to others, or the directory is.
        """
        last = self._last
        if last is not None and self.is_still(last):
            return last
        make_private(self._directory)
        if not os.path.lexists(self._path):
            self._make()
        check_private(self._path)
        with self._path.open("rb") as file:
            identity = _salt_identity_of(os.fstat(file.fileno()))
            value = file.read(_SALT_BYTES + 1)
        if len(value) != _SALT_BYTES:
            raise StoreError(
                f"{self._path} is damaged: stop every process that uses these locks, then remove it; a new one is made"
            )
        self._last = salt = _Salt(value, identity)
        return salt

    def is_still(self, salt: _Salt) -> bool:
        """Whether ``salt`` is the one that lies there."""
        try:
            return _salt_identity_of(os.lstat(self._path)) == salt.identity
        except FileNotFoundError:
            return False

    def _make(self) -> None:
        with importing():
            from filelock import FileLock
        lock = FileLock(self._directory / "salt.lock", mode=0o600, thread_local=False, preserve_lock_file=True)
        try:
            lock.acquire(timeout=_SALT_WITHIN, poll_interval=_POLL)
            if not self._path.exists():
                new = self._directory / "salt.new"
                new.unlink(missing_ok=True)  # of a process that was killed
                with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(secrets.token_bytes(_SALT_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                new.replace(self._path)
        finally:
            lock.release()


class _FileHold:
    """Which file is locked, and by which process: a child forked in the block does not hold it."""

    def __init__(self, path: Path, salts: _SaltFile, salt: _Salt) -> None:
        self.path = path
        self._salts = salts
        self._salt = salt
        self._identity: tuple[int, int, int] | None = None

    @property
    def lock(self) -> str:
        # No two files have one number at a time, and a deleted file keeps its own as long as somebody holds it.
        _, device, number = self._identity or (0, 0, 0)
        return f"{device}:{number}"

    def remember(self, descriptor: int) -> None:
        self._identity = _identity_of(os.fstat(descriptor))

    def forget(self) -> None:
        self._identity = None

    def extend(self, seconds: float) -> bool:
        # To delete or replace the file from outside lets a second holder in through the new one. Under another
        # salt, the name has another file.
        try:
            return self._identity == _identity_of(self.path.stat()) and self._salts.is_still(self._salt)
        except OSError:
            return False


def _identity_of(status: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), status.st_dev, status.st_ino


def _salt_identity_of(status: os.stat_result) -> tuple[int, ...]:
    # With the time: a new file may get the number of one that was deleted.
    return status.st_dev, status.st_ino, status.st_mtime_ns
