"""SQLite connections that threads take turns with, and that no fork catches.

Two things have to be known about SQLite and ``fork()``. A connection must not be used, nor even closed, in a child that
inherited it. And SQLite remembers in the process which locks it has on a file: a child that inherits this memory opens
a *new* connection without taking the locks that it believes to have, and when the parent then closes the database, the
log that the child goes on writing to has been deleted (measured with SQLite 3.40: what it wrote was lost). So every
connection is closed just before a fork, and there is nothing to inherit.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable

from ..errors import StoreError
from ..fork import pause_at_fork

#: More idle connections than this are closed.
_MOST_IDLE = 8
#: What a fork could not close, kept for good: to be collected is to be closed.
_inherited: list[sqlite3.Connection] = []


class Connections:
    """A pool. Whoever borrows a connection gives it back, or discards it if it may be in the middle of something.

    :param connect: makes a connection that any thread may use.
    :param patience: how many seconds a fork waits for connections to be given back.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection], *, patience: float) -> None:
        self._connect = connect
        self._patience = patience
        self._idle: list[sqlite3.Connection] = []
        self._changed = threading.Condition()
        self._in_use = 0
        self._pausing = False
        self._refused: str | None = None
        pause_at_fork(self)

    def borrow(self) -> sqlite3.Connection:
        """
        :raises StoreError: the pool is closed.
        """
        with self._changed:
            while self._pausing:
                self._changed.wait()
            if self._refused is not None:
                raise StoreError(self._refused)
            self._in_use += 1
            if self._idle:
                return self._idle.pop()
        try:
            return self._connect()
        except BaseException:
            self._settle()
            raise

    def give_back(self, connection: sqlite3.Connection) -> None:
        with self._changed:
            if self._refused is None and len(self._idle) < _MOST_IDLE:
                self._idle.append(connection)
                self._settle()
                return
        self.discard(connection)

    def discard(self, connection: sqlite3.Connection) -> None:
        try:
            connection.close()
        finally:
            self._settle()

    def close(self) -> None:
        with self._changed:
            self._refused = self._refused or "the store is closed"
            self._close_idle()

    def pause_for_fork(self) -> None:
        with self._changed:
            self._pausing = True
            self._changed.wait_for(lambda: self._in_use == 0, timeout=self._patience)
            self._close_idle()

    def resume_after_fork(self) -> None:
        with self._changed:
            self._pausing = False
            self._changed.notify_all()

    def reset_after_fork(self) -> None:
        self._changed = threading.Condition()
        self._pausing = False
        if self._in_use or self._idle:
            _inherited.extend(self._idle)
            self._idle.clear()
            self._in_use = 0
            self._refused = (
                "this process was forked while its parent was using the SQLite database, which must not be used here "
                "any more; start the process by spawning, or fork when the store is idle"
            )

    def _settle(self) -> None:
        with self._changed:
            self._in_use -= 1
            self._changed.notify_all()

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()
