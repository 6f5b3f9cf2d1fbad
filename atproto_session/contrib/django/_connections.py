"""Connections of the store's own to the project's database.

What is stored is stored when the store says so, whatever becomes of the request: so no statement of the store is ever
part of a transaction of the application's. Its connections are made from the project's ``DATABASES``, beside those that
Django keeps for each thread, and outside of a pool that Django may keep: where each thread of the application holds a
connection of that pool, and one of them waits for a refresh, there would be none left for the refresh.
"""

from __future__ import annotations

import copy
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from django.db import Error, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.constants import OnConflict

from ..._fork import Turns, close_at_end, copy_of, pause_at_fork
from ...errors import StoreError
from ...stores._connections import is_busy

T = TypeVar("T")

#: More idle connections than this are closed.
_MOST_IDLE = 4
#: One that was idle for longer is tried before it is used, in seconds.
_SURE_WITHIN = 1.0
#: How long a fork waits for connections to be given back, in seconds.
_PATIENCE = 1.0
#: How long a write waits for a transaction that has locked its row, in seconds: workers hold one for some milliseconds.
#: A view that has locked the row itself, and waits for the write, would wait for ever.
_LOCKED_WITHIN = 2
#: How often SQLite is asked again whether it is still locked, in seconds.
_POLL = 0.01
#: What is asked before a write and after it, by vendor.
_AROUND_WRITE: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    # For this transaction alone: a proxy may give the connection to others afterwards.
    "postgresql": (("BEGIN", f"SET LOCAL lock_timeout = '{_LOCKED_WITHIN}s'"), ("COMMIT",)),
    "mysql": ((f"SET SESSION innodb_lock_wait_timeout = {_LOCKED_WITHIN}",), ()),
}
#: Connections of a parent, kept in its child for good: to close one, or to collect it, would end it for the parent.
_inherited: list[BaseDatabaseWrapper] = []


class Connections:
    """The store's connections to one database.

    A few of them stay open between two uses for as long as Django's own would: during a request (:meth:`in_use`), and
    afterwards up to the ``CONN_MAX_AGE`` of the database.

    An SQLite database is put into WAL mode.

    Under ``django.test.TestCase`` there are none: what a test stores is seen and rolled back with all the rest, so the
    test's own connection is used, in the library's threads, too.

    :param alias: of the database.
    """

    def __init__(self, alias: str) -> None:
        self._idle: list[tuple[BaseDatabaseWrapper, float]] = []
        self.alias = alias
        self._turns = Turns(patience=_PATIENCE)
        # Weak: what was lost to an exception is in use no more.
        self._lent: weakref.WeakSet[BaseDatabaseWrapper] = weakref.WeakSet()
        self._uses: weakref.WeakSet[_Use] = weakref.WeakSet()
        self._test: BaseDatabaseWrapper | None = None
        self._vendor = ""
        self._files: dict[str, str] = {}
        pause_at_fork(self)
        close_at_end(self)

    def __del__(self) -> None:
        self.close_idle()  # nobody else would

    # What the store does

    def fetch(self, sql: str, parameters: Sequence[object] = ()) -> list[Any]:
        """The rows of a query. ``{...}`` in ``sql`` are names, which are quoted."""

        def work(connection: BaseDatabaseWrapper) -> list[Any]:
            with _cursor(connection) as cursor:
                cursor.execute(_quoted(connection, sql), parameters)
                return list(cursor.fetchall())

        return self._do(work)

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> int:
        """Write, at once and for good. Returns how many rows it concerned."""
        return self._do(lambda connection: self._write(connection, _quoted(connection, sql), parameters))

    def insert(self, table: str, row: Mapping[str, object]) -> bool:
        """Whether there was no row with the same key, and now is ``row``."""

        def work(connection: BaseDatabaseWrapper) -> int:
            # Not an error that is caught: it would end the transaction of a test.
            start = connection.ops.insert_statement(on_conflict=OnConflict.IGNORE)
            end = connection.ops.on_conflict_suffix_sql([], OnConflict.IGNORE, [], [])
            columns = ", ".join(map(connection.ops.quote_name, row))
            values = ", ".join(["%s"] * len(row))
            sql = f"{start} {connection.ops.quote_name(table)} ({columns}) VALUES ({values}) {end}"
            return self._write(connection, sql, list(row.values()))

        return bool(self._do(work))

    def _write(self, connection: BaseDatabaseWrapper, sql: str, parameters: Sequence[object]) -> int:
        nothing: tuple[Sequence[str], Sequence[str]] = ((), ())
        before, after = nothing if connection is self._test else _AROUND_WRITE.get(connection.vendor, nothing)
        with _cursor(connection) as cursor:
            for statement in before:
                cursor.execute(statement)
            cursor.execute(sql, parameters)
            rows: int = cursor.rowcount
            for statement in after:
                cursor.execute(statement)
        return rows

    def open(self) -> BaseDatabaseWrapper:
        """A new connection, its caller's to close."""
        connection = connections.create_connection(self.alias)
        settings = copy.deepcopy(connection.settings_dict)
        settings["OPTIONS"].pop("pool", None)
        settings["AUTOCOMMIT"] = True
        connection.settings_dict = settings
        connection.inc_thread_sharing()  # one thread at a time, but not always the same
        if connection.vendor == "sqlite" and settings["NAME"] == ":memory:":
            raise StoreError(
                f'the database "{self.alias}" is in the memory of each single connection: give it a file, or a name '
                'such as "file:name?mode=memory&cache=shared"'
            )
        if connection.vendor == "sqlite":
            settings["OPTIONS"]["timeout"] = _LOCKED_WITHIN
            try:
                self._prepare_sqlite(connection)
            except BaseException:
                _close(connection)
                raise
        return connection

    def _prepare_sqlite(self, connection: BaseDatabaseWrapper) -> None:
        with _cursor(connection) as cursor:
            cursor.execute("PRAGMA secure_delete = ON")  # tokens that were replaced are overwritten
            # Or a view that has read something in a transaction keeps all others from writing until it ends, and those
            # wait for a refresh that has to be written down.
            cursor.execute("PRAGMA journal_mode")
            if cursor.fetchone()[0] == "delete":
                with suppress(OperationalError):  # somebody is using the database; the next connection tries again
                    cursor.execute("PRAGMA journal_mode = WAL")

    @property
    def vendor(self) -> str:
        """The kind of database, such as ``"postgresql"``."""
        if not self._vendor:
            # Not the wrapper of this thread, which may be that of another database under the same alias.
            self._vendor = connections.create_connection(self.alias).vendor
        return self._vendor

    def name(self) -> str:
        """What the database is called now: tests give it another name."""
        return str(connections.settings[self.alias]["NAME"])

    def file(self) -> str:
        """The file of an SQLite database; empty if it is in memory."""
        name = self.name()
        if name not in self._files:
            self._files[name] = os.path.realpath(path) if (path := self.fetch("PRAGMA database_list")[0][2]) else ""
        return self._files[name]

    # How long connections stay open

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Connections stay open in this block."""
        use = _Use()
        self._uses.add(use)
        try:
            yield
        finally:
            self._uses.discard(use)
            self.close_old()

    def close_old(self) -> None:
        """Close what has no reason to be open."""
        for _ in range(len(self._idle)):
            with suppress(IndexError):
                self._give_back(*self._idle.pop(0))

    def close_idle(self) -> None:
        while self._idle:
            with suppress(IndexError):
                _close(self._idle.pop()[0])

    @contextmanager
    def _borrowed(self) -> Iterator[BaseDatabaseWrapper]:
        with self._turns.turn():
            connection = self._idle_one() or self.open()
            self._lent.add(connection)
            try:
                yield connection
            except BaseException:
                # It may be in the middle of something. This may be a child that was forked in the block.
                if connection not in _inherited:
                    _close(connection)
                raise
            finally:
                self._lent.discard(connection)
            if connection not in _inherited:
                self._give_back(connection, time.monotonic())

    def _idle_one(self) -> BaseDatabaseWrapper | None:
        while self._idle:
            with suppress(IndexError):
                connection, since = self._idle.pop()
                is_sure = time.monotonic() - since < _SURE_WITHIN or connection.is_usable()
                # Tests give a database another name.
                if is_sure and connection.settings_dict["NAME"] == connections.settings[self.alias]["NAME"]:
                    return connection
                _close(connection)
        return None

    def _give_back(self, connection: BaseDatabaseWrapper, since: float) -> None:
        is_old = connection.close_at is not None and time.monotonic() >= connection.close_at
        if connection.errors_occurred or (is_old and not self._uses) or len(self._idle) >= _MOST_IDLE:
            _close(connection)
        else:
            self._idle.append((connection, since))

    # Tests

    def join_test(self) -> None:
        """Use the connection of this thread, if it is in the transaction of a ``TestCase``, until that has ended."""
        for connection in connections.all(initialized_only=True):
            if connection.alias == self.alias and _is_in_test_case(connection) and connection is not self._test:
                connection.inc_thread_sharing()
                self._test = connection

    def test_connection(self) -> BaseDatabaseWrapper | None:
        """That of the test under way, if there is one."""
        self.join_test()
        test = self._test
        if test is not None and not _is_in_test_case(test):
            test.dec_thread_sharing()
            self._test = test = None
        return test

    # Errors

    def _do(self, work: Callable[[BaseDatabaseWrapper], T]) -> T:
        deadline = time.monotonic() + _LOCKED_WITHIN
        while True:
            try:
                if (test := self.test_connection()) is not None:
                    return work(test)
                with self._borrowed() as connection:
                    return work(connection)
            except Error as error:
                # SQLite does not wait for those who share a database in memory.
                if not is_busy(error.__cause__ or error) or time.monotonic() >= deadline:
                    raise failure_of(self.alias, error) from error
            except (ValueError, UnicodeError) as error:  # what no text of a database can hold
                raise failure_of(self.alias, error) from error
            time.sleep(_POLL)

    # Forks

    def pause_for_fork(self) -> None:
        self._turns.pause_for_fork()
        self.close_idle()

    def resume_after_fork(self) -> None:
        self._turns.resume_after_fork()

    def reset_after_fork(self) -> None:
        _inherited.extend([*copy_of(self._lent), *(connection for connection, _ in self._idle)])
        self._idle = []
        self._lent = weakref.WeakSet()
        self._uses = weakref.WeakSet()


class _Use:
    """A request under way."""


def failure_of(alias: str, error: Exception) -> StoreError:
    """The error that says that the database ``alias`` could not be used."""
    cause = error.__cause__ or error
    codes = {getattr(cause, "sqlstate", None), getattr(cause, "pgcode", None), *cause.args[:1]}
    is_missing = bool(codes & _NO_TABLE) or str(cause).startswith("no such table")
    if is_missing:
        hint = "its tables are missing: python manage.py migrate"
    elif codes & _ROW_LOCKED or is_busy(cause):
        hint = "a transaction keeps it locked; end that before you use the account"
    else:
        hint = "see the cause of this error"
    return StoreError(
        f'the session store in the database "{alias}" cannot be used ({type(error).__name__}): {hint}',
        retryable=not is_missing and type(error).__name__ in ("OperationalError", "InterfaceError"),
    )


#: What PostgreSQL and MySQL say of a table that is not there, and of a row that is locked.
_NO_TABLE = {"42P01", 1146}
_ROW_LOCKED = {"55P03", 1205}


def _is_in_test_case(connection: BaseDatabaseWrapper) -> bool:
    # Django marks them for itself, since on_commit and durable transactions work otherwise in tests.
    return any(getattr(block, "_from_testcase", False) for block in connection.atomic_blocks)


def _close(connection: BaseDatabaseWrapper) -> None:
    with suppress(Error):  # it has ended already
        if connection.vendor == "sqlite":
            BaseDatabaseWrapper.close(connection)  # SQLite's own keeps what is in memory
        else:
            connection.close()


def _cursor(connection: BaseDatabaseWrapper) -> Any:
    # Not connection.cursor(), which logs all values where DEBUG is set.
    connection.ensure_connection()
    with connection.wrap_database_errors:
        return connection.make_cursor(connection.create_cursor())


def _quoted(connection: BaseDatabaseWrapper, sql: str) -> str:
    head, *rest = sql.split("{")
    parts = (part.partition("}") for part in rest)
    return head + "".join(f"{connection.ops.quote_name(name)}{tail}" for name, _, tail in parts)
