"""SQLite connections that threads take turns with, and that no fork catches.

Two things have to be known about SQLite and ``fork()``. A connection must not be used, nor even closed, in a child that
inherited it. And SQLite remembers in the process which locks it has on a file: a child that inherits this memory opens
a *new* connection without taking the locks that it believes to have, and when the parent then closes the database, the
log that the child goes on writing to has been deleted (measured with SQLite 3.40: what it wrote was lost). So every
connection is closed just before a fork, and there is nothing to inherit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .._fork import Turns
from ..errors import StoreError

#: More idle connections than this are closed.
_MOST_IDLE = 8
#: What a fork could not close, kept for good: to be collected is to be closed.
_inherited: list[sqlite3.Connection] = []
_inherited_paths: set[str] = set()
_FORKED = (
    "this process was forked while its parent was using the SQLite database, which must not be used here any more; "
    "start the process by spawning, or fork when the store is idle"
)


class Connection(sqlite3.Connection):
    """One that a weak set can hold."""


class Connections(Turns):
    """A pool. Whoever borrows a connection gives it back, or discards it if it may be in the middle of something.

    Without a lock, as :class:`Turns` are.

    :param path: the database, as all of this process write it.
    :param connect: makes a :class:`Connection` that any thread may use.
    :param patience: how many seconds a fork waits for connections to be given back.
    """

    def __init__(self, path: str, connect: Callable[[], Connection], *, patience: float) -> None:
        self._path = path
        self._connect = connect
        self._idle: list[Connection] = []
        self._refused = _FORKED if path in _inherited_paths else None
        super().__init__(patience=patience)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """
        :raises StoreError: the pool is closed.
        """
        with super().turn():
            if self._refused is not None:
                raise StoreError(self._refused)
            yield

    def borrow(self) -> Connection:
        """
        :raises StoreError: the pool is closed.
        """
        with self.turn():
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
            self._under_way.add(connection)
            return connection

    def give_back(self, connection: Connection) -> None:
        if self._refused is not None or len(self._idle) >= _MOST_IDLE:
            self.discard(connection)
            return
        self._idle.append(connection)
        self._under_way.discard(connection)

    def discard(self, connection: Connection) -> None:
        try:
            connection.close()
        finally:
            self._under_way.discard(connection)

    def close(self) -> None:
        self._refused = self._refused or "the store is closed"
        self.close_idle()

    def pause_for_fork(self) -> None:
        super().pause_for_fork()
        self.close_idle()

    def reset_after_fork(self) -> None:
        if self._under_way or self._idle:
            _inherited.extend([*(each for each in self._under_way if isinstance(each, Connection)), *self._idle])
            _inherited_paths.add(self._path)
            self._idle = []
            self._refused = _FORKED
        super().reset_after_fork()

    def close_idle(self) -> None:
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().close()
