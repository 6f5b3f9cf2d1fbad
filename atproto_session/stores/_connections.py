"""SQLite connections that threads take turns with, and that no fork catches.

Two things have to be known about SQLite and ``fork()``. A connection must not be used, nor even closed, in a child that
inherited it. And SQLite remembers in the process which locks it has on a file: a child that inherits this memory opens
a *new* connection without taking the locks that it believes to have, and when the parent then closes the database, the
log that the child goes on writing to has been deleted (measured with SQLite 3.40: what it wrote was lost). So every
connection is closed just before a fork, and there is nothing to inherit.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .._fork import Turns, copy_of, pause_at_fork
from ..errors import StoreError

#: More idle connections than this are closed.
_MOST_IDLE = 8
#: How long a fork waits for connections to be given back, in seconds, and that twice: Turns wait by themselves, too.
#: What waits for another process gives its connection back meanwhile, so that only a disk that stands still takes so
#: long.
_PATIENCE = 1.0
#: What a fork could not close, kept for good: to be collected is to be closed.
_inherited: list[sqlite3.Connection] = []
_inherited_paths: set[str] = set()
_FORKED = (
    "this process was forked while its parent was using the SQLite database, which must not be used here any more; "
    "start the process by spawning, or fork when the store is idle"
)


class Connection(sqlite3.Connection):
    """One whose methods can be watched: those of SQLite's own class cannot be replaced."""


class _Use:
    """Something under way: a connection is lent, or the database is being opened."""

    connection: Connection | None = None


class Connections:
    """A pool. It has no lock: an exception may be raised in a thread at any instant, by a signal for one, and a lock
    that was left taken would stop every other.

    :param path: the database, as all of this process write it.
    :param connect: makes a :class:`Connection` that any thread may use.
    """

    def __init__(self, path: str, connect: Callable[[], Connection]) -> None:
        self._path = path
        self._connect = connect
        self._turns = Turns(patience=_PATIENCE)
        self._idle: list[Connection] = []
        # Weak: what was lost to an exception is under way no more.
        self._uses: weakref.WeakSet[_Use] = weakref.WeakSet()
        self._refused = _FORKED if path in _inherited_paths else None
        pause_at_fork(self)

    @contextmanager
    def turn(self) -> Iterator[_Use]:
        """No fork happens in this block, and it waits for one that does.

        :raises StoreError: the pool is closed.
        """
        with self._turns.turn():
            if self._refused is not None:
                raise StoreError(self._refused)
            use = _Use()
            self._uses.add(use)
            try:
                yield use
            finally:
                self._uses.discard(use)

    @property
    def are_in_use(self) -> bool:
        """Whether any thread has one at this moment."""
        return bool(self._uses)

    @contextmanager
    def lent(self) -> Iterator[Connection]:
        """A connection for this block. It is closed if the block fails, since it may be in the middle of something; not
        where the block failed to begin, since the database is locked.

        :raises StoreError: the pool is closed.
        """
        with self.turn() as use:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
            use.connection = connection
            try:
                yield connection
            except BaseException as error:
                self._give_back(connection, is_usable=is_busy(error) and not connection.in_transaction)
                raise
            self._give_back(connection, is_usable=True)

    def _give_back(self, connection: Connection, *, is_usable: bool) -> None:
        if is_usable and self._refused is None and len(self._idle) < _MOST_IDLE:
            self._idle.append(connection)
        # This may be a child that was forked in the block.
        elif connection not in _inherited:
            connection.close()

    def close(self) -> None:
        self._refused = self._refused or "the store is closed"
        self.close_idle()

    def close_idle(self) -> None:
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().close()

    def pause_for_fork(self) -> None:
        self._turns.pause_for_fork()
        self.close_idle()

    def resume_after_fork(self) -> None:
        self._turns.resume_after_fork()

    def reset_after_fork(self) -> None:
        uses = copy_of(self._uses)
        if uses or self._idle:
            _inherited.extend([*filter(None, (use.connection for use in uses)), *self._idle])
            _inherited_paths.add(self._path)
            self._idle = []
            self._refused = _FORKED
        self._uses = weakref.WeakSet()


def is_busy(error: BaseException) -> bool:
    """Whether somebody else keeps the database locked."""
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
