"""Locks between the threads and the processes of one machine."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import CancelledError, LockTimeoutError, StoreError
from . import LockKind
from .threads import ThreadLocks

#: How often a waiting process looks again, in seconds. One look costs about 50 microseconds.
_POLL = 0.01


class FileLocks:
    """Advisory locks on files, which the operating system frees when their holder dies.

    Threads queue at a :class:`ThreadLocks` first, so at most one thread of a process polls a file. The number of
    files is bounded: names share ``stripes`` files by hash. A lock file is never deleted: whoever still had the
    deleted file open would hold a lock that nobody else sees.

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
        deadline = time.monotonic() + timeout
        with self._threads.hold(name, timeout=timeout, cancel=cancel):
            path = self._directory / self._stripe_of(name)
            # A new object each time: nothing of it outlives the block or crosses a fork. Without flock there is no
            # lock that ends with its holder, so such a file system is refused rather than imitated.
            lock = FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False)
            try:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock.acquire(
                    timeout=max(0.0, deadline - time.monotonic()),
                    poll_interval=_POLL,
                    cancel_check=None if cancel is None else cancel.is_set,
                )
                hold = _FileHold(path)
            except Timeout:
                if cancel is not None and cancel.is_set():
                    raise CancelledError(f"waiting for the lock of {name} was cancelled") from None
                raise LockTimeoutError(f"another process keeps the lock of {name}; try again later") from None
            except (OSError, NotImplementedError) as error:
                raise StoreError(
                    f"the lock file {path} cannot be used ({error}); it needs a directory that this user may write "
                    "to, on a file system with file locks"
                ) from error
            try:
                yield hold
            finally:
                lock.release()

    def _stripe_of(self, name: str) -> str:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
        return f"{int.from_bytes(digest[:8]) % self._stripes:04x}.lock"


class _FileHold:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = self._look()

    def extend(self, seconds: float) -> bool:
        # Whoever deletes or replaces the file from outside lets a second holder in through the new one.
        try:
            return self._look() == self._identity
        except OSError:
            return False

    def _look(self) -> tuple[int, int]:
        status = self._path.stat()
        return status.st_dev, status.st_ino
