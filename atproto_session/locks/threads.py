"""Locks between the threads of one process."""

from __future__ import annotations

import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from .._fork import reset_in_child
from ..errors import CancelledError, LockTimeoutError, printable
from . import LockKind

#: How often a waiting thread looks at ``cancel``, in seconds: a lock and an event cannot be waited for together.
_SLICE = 0.02


class _KeyLock:
    """A lock that a weak dictionary can hold."""

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()


class _ThreadHold:
    def __init__(self, lock: str) -> None:
        self.lock = lock
        self.held = True

    def extend(self, seconds: float) -> bool:
        return self.held


class ThreadLocks:
    """A :class:`threading.Lock` for each name, kept as long as somebody holds it or waits for it.

    :param kind: ``LockKind.HOLDER`` only for a store that no other process can reach.
    """

    def __init__(self, kind: LockKind = LockKind.PROCESS) -> None:
        self._kind = kind
        self.reset_after_fork()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        self._locks: weakref.WeakValueDictionary[str, _KeyLock] = weakref.WeakValueDictionary()
        self._mutex = threading.Lock()
        self._name = uuid.uuid4().hex  # a child's locks are not those of its parent

    @property
    def kind(self) -> LockKind:
        return self._kind

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[_ThreadHold]:
        with self._mutex:
            key_lock = self._locks.get(name)
            if key_lock is None:
                key_lock = self._locks[name] = _KeyLock()
        hold = _ThreadHold(self._name)
        _acquire(key_lock.lock, name, time.monotonic() + timeout, cancel)
        try:
            yield hold
        finally:
            hold.held = False
            key_lock.lock.release()


def _acquire(lock: threading.Lock, name: str, deadline: float, cancel: threading.Event | None) -> None:
    while True:
        left = max(0.0, deadline - time.monotonic())
        if cancel is not None and cancel.is_set():
            raise CancelledError(f"waiting for the lock of {printable(name)} was cancelled")
        if lock.acquire(timeout=min(left, threading.TIMEOUT_MAX if cancel is None else _SLICE)):
            return
        if left == 0.0:
            raise LockTimeoutError(f"another thread keeps the lock of {printable(name)}; try again later")
