"""Coverage's collector has a lock, which another thread may hold when a process forks: the child would wait for it for
ever. Importing this module gives it one that begins anew in every process."""

from __future__ import annotations

import os
import sys
import threading


class LockOfOneProcess:
    """A lock that nobody holds in a process that was just forked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()

    def acquire(self) -> None:
        if self._process != os.getpid():
            self._lock, self._process = threading.Lock(), os.getpid()
        self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


def _replace_lock() -> None:
    current = sys.modules["coverage"].Coverage.current() if "coverage" in sys.modules else None
    collector = getattr(current, "_collector", None)
    if collector is not None:
        collector.data_lock = LockOfOneProcess()


_replace_lock()
