"""SQLite connections that threads take turns with, and that no fork catches.

Two things have to be known about SQLite and ``fork()``. A connection must not be used, nor even closed, in a child that
inherited it. And SQLite remembers in the process which locks it has on a file: a child that inherits this memory opens
a *new* connection without taking the locks that it believes to have, and when the parent then closes the database, the
log that the child goes on writing to has been deleted (measured with SQLite 3.40: what it wrote was lost). So every
connection is closed just before a fork, and there is nothing to inherit.
"""

from __future__ import annotations

import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors import StoreError
from ..fork import pause_at_fork

#: More idle connections than this are closed.
_MOST_IDLE = 8
#: How often a thread that waits for a fork looks again, and a fork that waits for a thread, in seconds.
_POLL = 0.001
#: What a fork could not close, kept for good: to be collected is to be closed.
_inherited: list[sqlite3.Connection] = []
_inherited_paths: set[str] = set()
_FORKED = (
    "this process was forked while its parent was using the SQLite database, which must not be used here any more; "
    "start the process by spawning, or fork when the store is idle"
)


class Connection(sqlite3.Connection):
    """One that a weak set can hold."""


class _Turn:
    """A thread that is about to get a connection."""


class Connections:
    """A pool. Whoever borrows a connection gives it back, or discards it if it may be in the middle of something.

    Without a lock: an exception may be raised in a thread at any instant, by a signal for one, and a lock that was left
    taken would stop every other. Lists and sets do what is asked of them here in one step.

    :param path: the database, as all of this process write it.
    :param connect: makes a :class:`Connection` that any thread may use.
    :param patience: how many seconds a fork waits for connections to be given back.
    """

    def __init__(self, path: str, connect: Callable[[], Connection], *, patience: float) -> None:
        self._path = path
        self._connect = connect
        self._patience = patience
        self._idle: list[Connection] = []
        # Weak: one that was lost to an exception is in use no more.
        self._in_use: weakref.WeakSet[Connection | _Turn] = weakref.WeakSet()
        self._pausing = False
        self._refused = _FORKED if path in _inherited_paths else None
        pause_at_fork(self)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """No fork happens in this block, and it waits for one that does.

        :raises StoreError: the pool is closed.
        """
        turn = _Turn()
        try:
            self._in_use.add(turn)  # before the look at _pausing: a fork that begins now sees one or the other
            while self._pausing:
                self._in_use.discard(turn)
                time.sleep(_POLL)
                self._in_use.add(turn)
            if self._refused is not None:
                raise StoreError(self._refused)
            yield
        finally:
            self._in_use.discard(turn)

    def borrow(self) -> Connection:
        """
        :raises StoreError: the pool is closed.
        """
        with self.turn():
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
            self._in_use.add(connection)
            return connection

    def give_back(self, connection: Connection) -> None:
        if self._refused is not None or len(self._idle) >= _MOST_IDLE:
            self.discard(connection)
            return
        self._idle.append(connection)
        self._in_use.discard(connection)

    def discard(self, connection: Connection) -> None:
        try:
            connection.close()
        finally:
            self._in_use.discard(connection)

    def close(self) -> None:
        self._refused = self._refused or "the store is closed"
        self.close_idle()

    def pause_for_fork(self) -> None:
        self._pausing = True
        deadline = time.monotonic() + self._patience
        while self._in_use and time.monotonic() < deadline:
            time.sleep(_POLL)
        self.close_idle()

    def resume_after_fork(self) -> None:
        self._pausing = False

    def reset_after_fork(self) -> None:
        self._pausing = False
        if self._in_use or self._idle:
            _inherited.extend([*(each for each in self._in_use if isinstance(each, Connection)), *self._idle])
            _inherited_paths.add(self._path)
            self._in_use, self._idle = weakref.WeakSet(), []
            self._refused = _FORKED

    def close_idle(self) -> None:
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().close()
