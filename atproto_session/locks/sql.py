"""Locks that a database keeps: advisory locks of PostgreSQL, named locks of MySQL and MariaDB."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .._fork import copy_of, reset_in_child
from ..errors import CancelledError, LockTimeoutError, StoreError, printable
from . import LockKind
from .threads import ThreadLocks

#: How long one wait on the server lasts, in seconds. In between, ``cancel`` is looked at.
_SLICE = 0.25
#: How long the server keeps a lock whose worker says nothing, in seconds: as long as an attempt (``Times.window``), so
#: that whoever waits for a worker that died elsewhere waits for both at once.
_LEASE = 15
#: The pause after a server that rounds a slice to nothing, in seconds.
_PAUSE = 0.02
#: Connections of a parent, kept in its child for good: to close one, or to collect it, would end it for the parent.
_inherited: list[Any] = []


class SQLLocks:
    """A lock for each name, each on a connection of its own, which the database gives up when that connection ends.

    It may end before its holder does: a server that restarts, a firewall, a proxy. And the server ends one that was
    silent for 15 seconds, since it cannot know whether there still is a machine at its other end. So the next one that
    gets the lock knows nothing about the one before (``LockKind.LEASE``), and it is the record that keeps the two
    apart.

    Threads of one process queue at a :class:`ThreadLocks` first, so that at most one connection of a process waits for
    a name. The database knows names by their hash.

    :param connect: opens a DB-API connection in autocommit mode, with ``%s`` for parameters: that of psycopg, PyMySQL
        or mysqlclient, or Django's wrapper of one.
    :param dialect: ``"postgresql"``, ``"mysql"`` or ``"mariadb"``.
    :param scope: what is locked, such as the schema and the table, so that others in the same database have other
        locks.
    :raises ValueError: ``dialect`` is another one.
    """

    kind = LockKind.LEASE

    def __init__(self, connect: Callable[[], Any], dialect: str, *, scope: str = "") -> None:
        if dialect not in _DIALECTS:
            raise ValueError(f"there are locks for {', '.join(_DIALECTS)}, not for {printable(dialect)}")
        self._connect = connect
        self._dialect = _DIALECTS[dialect]
        self._scope = scope
        self._threads = ThreadLocks()
        self._holds: weakref.WeakSet[SQLHold] = weakref.WeakSet()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        for hold in copy_of(self._holds):
            hold.leave_to_parent()

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[SQLHold]:
        deadline = time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
        with self._threads.hold(name, timeout=timeout, cancel=cancel):
            hold = self._open(name)
            self._holds.add(hold)
            try:
                while not hold.try_for(min(deadline - time.monotonic(), _SLICE)):
                    if cancel is not None and cancel.is_set():
                        raise CancelledError(f"waiting for the lock of {printable(name)} was cancelled")
                    if time.monotonic() >= deadline:
                        raise LockTimeoutError(f"another worker keeps the lock of {printable(name)}; try again later")
                yield hold
            finally:
                hold.end()

    def _open(self, name: str) -> SQLHold:
        try:
            return self._dialect(self._connect(), f"{self._scope}\0{name}")
        except StoreError:
            raise
        except Exception as error:
            raise _unusable(error) from error


class SQLHold(ABC):
    """One lock on its connection.

    :ivar lock: see :class:`.Hold`.
    """

    lock: str

    def __init__(self, connection: Any, name: str) -> None:
        self._connection = connection
        self._process = os.getpid()
        self._is_held = False
        self._digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=24)
        self._begin()

    @abstractmethod
    def _begin(self) -> None:
        """Find out which lock it is."""

    def try_for(self, seconds: float) -> bool:
        """Whether the lock could be had within so many ``seconds``, or at once if there are none left."""
        try:
            self._is_held = self._try_for(seconds)
        except Exception as error:
            raise _unusable(error) from error
        return self._is_held

    def extend(self, seconds: float) -> bool:
        """Whether it is still held. It lasts as long as its connection; a child forked in the block has none."""
        if not self._is_held or self._process != os.getpid():
            return False
        try:
            self._is_held = self._is_kept()
        except Exception:  # noqa: BLE001 - whatever has become of the connection, the lock is gone with it
            self._is_held = False
        return self._is_held

    def leave_to_parent(self) -> None:
        """In a forked child: let go of the connection without a word to the server. It would not see that the parent
        has died, and would keep the lock, as long as the child has the connection open, too."""
        if (descriptor := _descriptor_of(self._connection)) is not None:
            with open(os.devnull, "rb+") as nothing:  # noqa: PTH123 - no path
                os.dup2(nothing.fileno(), descriptor, inheritable=False)

    def end(self) -> None:
        if self._process != os.getpid():
            _inherited.append(self._connection)
            return
        was_held, self._is_held = self._is_held, False
        with suppress(Exception):  # the connection has ended, and the lock with it
            if was_held:
                self._release()
        with suppress(Exception):
            self._connection.close()

    def _ask(self, sql: str, *parameters: object) -> Any:
        """The first value of the answer, if there is one."""
        with self._connection.cursor() as cursor:
            cursor.execute(sql, parameters)
            return cursor.fetchone()[0] if cursor.description else None

    @abstractmethod
    def _try_for(self, seconds: float) -> bool: ...

    @abstractmethod
    def _is_kept(self) -> bool: ...

    @abstractmethod
    def _release(self) -> None: ...


class PostgreSQLHold(SQLHold):
    """A lock of a transaction (``pg_advisory_xact_lock``) that is open as long as it is held: so it works through a
    proxy, too, that gives each transaction to another connection of the server (PgBouncer)."""

    def _begin(self) -> None:
        self._number = int.from_bytes(self._digest.digest()[:8], signed=True)
        self.lock = f"postgresql:{self._number}"

    def _try_for(self, seconds: float) -> bool:
        self._ask("BEGIN")
        # Whatever bounds the database or the role may have.
        self._ask(
            "SELECT set_config('statement_timeout', '0', true), set_config('lock_timeout', %s, true),"
            " set_config('idle_in_transaction_session_timeout', %s, true)",
            f"{max(1, round(seconds * 1000))}ms",
            f"{_LEASE}s",
        )
        got = self._wait() if seconds > 0 else bool(self._ask("SELECT pg_try_advisory_xact_lock(%s)", self._number))
        if not got:
            self._ask("ROLLBACK")
        return got

    def _wait(self) -> bool:
        try:
            self._ask("SELECT pg_advisory_xact_lock(%s)", self._number)
        except Exception as error:
            if _sqlstate_of(error) != _LOCK_NOT_AVAILABLE:
                raise
            return False
        return True

    def _is_kept(self) -> bool:
        # An answer proves the transaction: a connection that was made anew would have none, and no lock.
        return bool(
            self._ask(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted"
                " AND objsubid = 1 AND (classid::bigint << 32 | objid::bigint) = %s",
                self._number,
            )
        )

    def _release(self) -> None:
        self._ask("ROLLBACK")


class MySQLHold(SQLHold):
    """A named lock (``GET_LOCK``) of the connection."""

    def _begin(self) -> None:
        self.lock = f"atproto:{self._digest.hexdigest()}"  # at most 64 characters
        self._ask("SET SESSION wait_timeout = %s", _LEASE)

    def _try_for(self, seconds: float) -> bool:
        began = time.monotonic()
        if self._ask("SELECT GET_LOCK(%s, %s)", self.lock, max(0.0, seconds)):
            return True
        if (left := seconds - (time.monotonic() - began)) > 0:  # MySQL knows whole seconds only
            time.sleep(min(left, _PAUSE))
        return False

    def _is_kept(self) -> bool:
        return bool(self._ask("SELECT IS_USED_LOCK(%s) = CONNECTION_ID()", self.lock))

    def _release(self) -> None:
        self._ask("SELECT RELEASE_LOCK(%s)", self.lock)


_DIALECTS: dict[str, type[SQLHold]] = {"postgresql": PostgreSQLHold, "mysql": MySQLHold, "mariadb": MySQLHold}
_LOCK_NOT_AVAILABLE = "55P03"


def _descriptor_of(connection: Any) -> int | None:
    """The descriptor of a connection's socket, as far as it can be known."""
    connection = getattr(connection, "dbapi_connection", connection)  # of SQLAlchemy's
    connection = getattr(connection, "connection", connection)  # of Django's
    for owner in (connection, getattr(connection, "_sock", None)):
        fileno = getattr(owner, "fileno", None)
        if fileno is not None:
            return int(fileno())
    return None


def _sqlstate_of(error: BaseException | None) -> str | None:
    """PostgreSQL's code for an error, which Django and others wrap."""
    while error is not None:
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        if state is not None:
            return str(state)
        error = error.__cause__
    return None


def _unusable(error: Exception) -> StoreError:
    # The first line of the driver's message, as in errors of the store.
    first = printable(str(error).partition("\n")[0], 200)
    return StoreError(
        f"the locks in the database cannot be used ({type(error).__name__}: {first}); try again later", retryable=True
    )
