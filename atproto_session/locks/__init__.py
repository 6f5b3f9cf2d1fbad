"""What is locked: the refresh (or log-in, or log-out) of one account, and nothing else. Reading takes no lock.

A set of locks is an object with ``hold`` and ``kind``:

* :class:`ThreadLocks` excludes the threads of this process,
* :class:`FileLocks` excludes the processes of this machine as well, and its locks end with the process that holds them.

A new kind proves itself by subclassing ``atproto_session.testing.contracts.LocksContract``.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from enum import Enum
from typing import Protocol


class LockKind(Enum):
    """What finding a lock free says about the one that held it before."""

    HOLDER = "holder"
    """It was released, or its holder is dead. Only the operating system of the holder's own machine knows that."""
    LEASE = "lease"
    """It was released, or its server has given it up: its time ran out, or a connection ended. The one that held it
    may be alive, and its request under way. Every lock that a server keeps is of this kind (Redis, a database): the
    connection of a worker that lives can end, and its lock ends with it."""
    PROCESS = "process"
    """Nothing about other processes: it excludes the threads of this one alone."""


class Hold(Protocol):
    """One lock, held."""

    @property
    def lock(self) -> str:
        """Which lock it is: each holder reads the same here, in every process. Another text means that the lock
        was replaced from outside, and that somebody may still hold the one before. Constant where that cannot be."""
        ...

    def extend(self, seconds: float) -> bool:
        """Whether the lock is still held by this holder, and will be for ``seconds`` more. A lease is prolonged."""
        ...


class Locks(Protocol):
    """Named locks, shared by every worker that shares the store."""

    @property
    def kind(self) -> LockKind: ...

    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> AbstractContextManager[Hold]:
        """Hold the lock ``name`` for the length of a ``with`` block. Not reentrant.

        :param timeout: how many seconds to wait for it; 0 tries once.
        :param cancel: ends the waiting early when set.
        :raises LockTimeoutError: somebody else kept it for so long.
        :raises CancelledError: ``cancel`` was set.
        :raises StoreError: the place where the locks live cannot be used.
        """
        ...


from .files import FileLocks  # noqa: E402 - the implementations import the contract above
from .threads import ThreadLocks  # noqa: E402

__all__ = ["FileLocks", "Hold", "LockKind", "Locks", "ThreadLocks"]
