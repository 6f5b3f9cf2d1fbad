"""Locks between the threads and the processes of one machine."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CancelledError, LockTimeoutError, StoreError, printable
from . import LockKind
from .threads import ThreadLocks

#: How often a waiting process looks again, in seconds. One look costs about 50 microseconds.
_POLL = 0.01


class FileLocks:
    """Advisory locks on files, which the operating system frees when their holder dies.

    Threads queue at a :class:`ThreadLocks` first, so at most one thread of a process polls a file for a name. The
    number of files is bounded: names share ``stripes`` files by hash, so a block must not take a second lock of the
    same set. A lock file is never deleted: whoever still had the deleted file open would hold a lock that nobody else
    sees.

    A forked child holds none of its parent's locks, and keeps none of them alive: filelock closes the inherited
    descriptors in it, without unlocking what the parent goes on holding.

    :param directory: where the files live, on the same file system as the store; made when missing, for its owner
        alone.
    """

    kind = LockKind.HOLDER

    def __init__(self, directory: str | os.PathLike[str], *, stripes: int = 1024) -> None:
        self._directory = Path(directory).absolute()
        self._stripes = stripes
        self._threads = ThreadLocks()

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[_FileHold]:
        from filelock import FileLock, Timeout  # not before it is needed: it costs 30 ms and brings asyncio along

        deadline = time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
        with self._threads.hold(name, timeout=timeout, cancel=cancel):
            path = self._directory / self._stripe_of(name)
            hold = _FileHold(path)
            # A new object each time: nothing of it outlives the block or crosses a fork. To preserve the file is also
            # to refuse a file system without flock, where there is no lock that ends with its holder.
            lock = FileLock(path, mode=0o600, thread_local=False, preserve_lock_file=True, on_acquired=hold.remember)
            try:
                make_private(self._directory)
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
                raise StoreError(
                    f"the lock file {path} cannot be used ({error}); it needs a directory that this user may write "
                    "to, on a file system with file locks"
                ) from error
            try:
                yield hold
            finally:
                hold.forget()
                lock.release()

    def _stripe_of(self, name: str) -> str:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
        return f"{int.from_bytes(digest[:8]) % self._stripes:04x}.lock"


def make_private(directory: Path) -> None:
    """Make ``directory`` where it is missing, and its parents, all for their owner alone: ``Path.mkdir`` makes the
    parents for everybody."""
    if not directory.is_dir():
        make_private(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)


class _FileHold:
    """Which file is locked, and by which process: a child forked in the block does not hold it."""

    def __init__(self, path: Path) -> None:
        self._path = path
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
        # Whoever deletes or replaces the file from outside lets a second holder in through the new one.
        try:
            return self._identity == _identity_of(self._path.stat())
        except OSError:
            return False


def _identity_of(status: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), status.st_dev, status.st_ino
