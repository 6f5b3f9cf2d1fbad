"""Sessions in PostgreSQL, MySQL or MariaDB, for any number of machines."""

from __future__ import annotations

import functools
import hashlib
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from importlib import import_module
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from .._fork import close_at_end, reset_in_child
from ..errors import LockTimeoutError, StoreError, printable
from ..locks.sql import SQLLocks
from ._rows import RowStore
from .codec import Codec, EncryptionKeys

T = TypeVar("T")

#: The driver that a URL means where it names none.
_DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
#: What the drivers are told where a URL does not, in seconds: a server that does not answer keeps nobody for ever.
_DEFAULTS: dict[str, dict[str, Any]] = {
    # For one that stands still while its machine goes on, see _SILENT_FOR.
    # Without prepared statements, which a proxy may not keep with the connection.
    "psycopg": {
        "connect_timeout": 10,
        "keepalives_idle": 5,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": 10_000,
        "prepare_threshold": None,
    },
    "pymysql": {"connect_timeout": 10, "read_timeout": 10, "write_timeout": 10},
}
#: For how long PostgreSQL may be silent while an answer is awaited, in seconds. libpq knows no such bound, and the
#: connections of a server whose processes stand still are kept alive by its system.
_SILENT_FOR = 10.0
#: How many connections are kept while no statement uses them: one for each thread that reads, in most programs. To
#: connect anew costs as much as many statements.
_KEPT = 16
#: So many keys are read at a time.
_PAGE = 1000
#: The longest that a column for bytes and text can be asked to hold: MySQL chooses the kind of column by it.
_LONGEST = 2**24 - 1
#: How long another worker may take to make the tables, in seconds.
_TABLES_WITHIN = 60.0
#: How often a statement is tried again that gave way to another one.
_MOST_TRIES = 20
#: Another transaction came first: PostgreSQL's codes, and those of MySQL.
_GAVE_WAY: set[str | int] = {"40001", "40P01", 1205, 1213, 1020}
#: Nothing can be written by this connection: PostgreSQL's code, and those of MySQL.
_READ_ONLY: set[str | int] = {"25006", 1290, 1792, 1836}
#: Connections of a parent, kept in its child for good: to close one, or to collect it, would end it for the parent.
_inherited: list[Any] = []


def define_tables(metadata: sa.MetaData, *, prefix: str = "atproto_") -> tuple[sa.Table, sa.Table]:
    """Add the two tables of a store to ``metadata``: the sessions, and the log-ins that have begun. For those who
    make them by migrations of their own, as Alembic does.

    :param prefix: what their names begin with.
    """
    sessions = sa.Table(
        f"{prefix}sessions",
        metadata,
        # The SHA-256 of the key: keys may be longer than an index takes, and databases differ in which are equal.
        sa.Column("id", sa.String(64), primary_key=True),
        # The key, escaped as in a string of Python's: it may have characters that a column does not take.
        sa.Column("account", sa.Text().with_variant(sa.Text(_LONGEST), "mysql", "mariadb"), nullable=False),
        sa.Column("document", sa.LargeBinary(_LONGEST), nullable=False),
    )
    logins = sa.Table(
        f"{prefix}logins",
        metadata,
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("document", sa.LargeBinary(_LONGEST), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False, index=True),
    )
    return sessions, logins


class SQLStore(RowStore):
    """Sessions in a table of PostgreSQL, MySQL or MariaDB, and pending log-ins in another one.

    It has connections of its own, in autocommit mode: what it does is never part of a transaction of the application's,
    and waits for none.

    :param database: a URL, or an ``Engine`` of SQLAlchemy: the store then connects as that does, to as many connections
        more as its own pool has.
    :param prefix: what the names of the tables begin with. A URL may say it as ``?prefix=``.
    :param create_tables: whether tables that are missing are made. A URL may say ``?create_tables=no``. See
        :func:`define_tables`.
    :param encryption_keys: see :func:`.open_store`.
    :param allow_plaintext: see :func:`.open_store`.
    :raises StoreError: the URL cannot be understood, a table is missing, or the database cannot be used.
    """

    def __init__(
        self,
        database: str | sa.URL | sa.Engine,
        *,
        prefix: str = "atproto_",
        create_tables: bool = True,
        encryption_keys: EncryptionKeys = (),
        allow_plaintext: bool = False,
    ) -> None:
        codec = Codec(encryption_keys, allow_plaintext=allow_plaintext)
        if isinstance(database, sa.Engine):
            self._database = _Database(database.url, creator=_creator_of(database))
        else:
            url, options = _url_of(database)
            self._database = _Database(url, connect_args=_arguments_for(url))
            prefix = options.get("prefix", prefix)
            create_tables = options.get("create_tables", create_tables) in (True, "yes", "true", "1")
        metadata = sa.MetaData()
        sessions, logins = define_tables(metadata, prefix=prefix)
        dialect = self._database.dialect()
        # By the schema, since the locks of MySQL are those of the whole server.
        scope = f"{dialect.default_schema_name}.{sessions.name}"
        locks = SQLLocks(self._database.connect_apart, dialect.name, scope=scope)
        _prepare(self._database, metadata, locks, create=create_tables)
        super().__init__(_SQLRows(self._database, sessions), _SQLLogins(self._database, logins), locks, codec)

    @classmethod
    def from_url(cls, url: str, *, encryption_keys: EncryptionKeys = (), allow_plaintext: bool = False) -> SQLStore:
        """The store that ``postgresql://user:password@host/database`` names, as SQLAlchemy writes it."""
        return cls(url, encryption_keys=encryption_keys, allow_plaintext=allow_plaintext)

    def __repr__(self) -> str:
        url = self._database.engine.url
        return f"SQLStore({url.drivername}://{url.host or ''}/{url.database or ''})"


class _Database:
    """The connections. Every failure is a StoreError.

    :param options: how SQLAlchemy connects.
    """

    def __init__(self, url: sa.URL, **options: Any) -> None:
        # Each statement is a transaction, so there is nothing to reset. A pool without a bound keeps nobody waiting;
        # each connection is used for one statement.
        options |= {"isolation_level": "AUTOCOMMIT", "hide_parameters": True}
        self.engine = _engine(
            url, pool_size=_KEPT, max_overflow=-1, pool_reset_on_return=None, skip_autocommit_rollback=True, **options
        )
        self._apart = _engine(url, poolclass=sa.NullPool, **options)
        self._is_closed = False
        reset_in_child(self)
        close_at_end(self)
        weakref.finalize(self, self.engine.dispose).atexit = False

    def dialect(self) -> sa.Dialect:
        """The dialect, which knows after the first connection what it talks with."""
        try:
            return self.ask(lambda connection: connection.dialect)
        except TypeError as error:
            # Not chained: the message may show the value.
            raise StoreError(
                f"the URL of the store has an option that the driver does not know ({type(error).__name__})"
            ) from None

    def ask(self, work: Callable[[sa.Connection], T], *, once: bool = False) -> T:
        """
        :param once: the statement must not be tried again if it may have been carried out.
        """
        if self._is_closed:
            raise StoreError("the store is closed")
        gave_way = lost = refused = 0
        while True:
            try:
                with self.engine.connect() as connection:
                    return work(connection)
            except IntegrityError:
                raise  # it is the answer
            except SQLAlchemyError as error:
                if _has_code(error, _GAVE_WAY) and gave_way < _MOST_TRIES:
                    gave_way += 1
                    time.sleep(0.001 * gave_way)
                # A server that was restarted has ended all connections: the pool knows by now, and makes new ones.
                elif _is_lost(error) and not (once or lost):
                    lost += 1
                # After a failover, a connection may lead to what is a replica now. New ones may not.
                elif _has_code(error, _READ_ONLY) and not refused:
                    refused += 1
                    self.engine.dispose()
                else:
                    raise _failure(error) from error

    def connect_apart(self) -> Any:
        """A connection outside of the pool, in autocommit mode."""
        if self._is_closed:
            raise StoreError("the store is closed")
        connection = self._apart.raw_connection()
        connection.detach()  # SQLAlchemy would log that one has ended which is to be closed
        return connection.dbapi_connection

    def close(self) -> None:
        self._is_closed = True
        self.close_idle()

    def close_idle(self) -> None:
        self.engine.dispose()

    def reset_after_fork(self) -> None:
        _inherited.append(self.engine.pool)
        self.engine.dispose(close=False)


class _SQLRows:
    def __init__(self, database: _Database, table: sa.Table) -> None:
        self._database = database
        self._table = table
        self._read = sa.select(table.c.document).where(table.c.id == sa.bindparam("row"))
        self.close = database.close

    def read(self, key: str) -> bytes | None:
        data = self._database.ask(lambda connection: connection.scalar(self._read, {"row": _id_of(key)}))
        return None if data is None else bytes(data)

    def put(self, key: str, data: bytes) -> None:
        is_done = False
        while not is_done:  # another worker may insert or delete it in between
            is_done = self._update(key, data, None) or self.insert(key, data)

    def insert(self, key: str, data: bytes) -> bool:
        row = {"id": _id_of(key), "account": _escaped(key), "document": data}
        return _insert(self._database, sa.insert(self._table).values(row))

    def update(self, key: str, data: bytes, expected: bytes) -> bool:
        return self._update(key, data, expected)

    def delete(self, key: str, expected: bytes | None = None) -> bool:
        return self._change(sa.delete(self._table), key, expected)

    def clear(self) -> None:
        self._database.ask(lambda connection: connection.execute(sa.delete(self._table)))

    def keys(self) -> Iterator[str]:
        columns, last = self._table.c, ""
        while True:
            page = sa.select(columns.id, columns.account).where(columns.id > last).order_by(columns.id).limit(_PAGE)
            rows = self._database.ask(lambda connection, page=page: connection.execute(page).all())  # type: ignore[misc]
            yield from (account.encode("ascii").decode("unicode_escape") for _, account in rows)
            if len(rows) < _PAGE:
                return
            last = rows[-1].id

    def _update(self, key: str, data: bytes, expected: bytes | None) -> bool:
        return self._change(sa.update(self._table).values(document=data), key, expected)

    def _change(self, statement: Any, key: str, expected: bytes | None) -> bool:
        statement = statement.where(self._table.c.id == _id_of(key))
        if expected is not None:
            statement = statement.where(self._table.c.document == expected)
        return _is_done(self._database, statement, once=expected is not None)


class _SQLLogins:
    def __init__(self, database: _Database, table: sa.Table) -> None:
        self._database = database
        self._table = table

    def read(self, state: str) -> bytes | None:
        statement = sa.select(self._table.c.document).where(self._table.c.id == _id_of(state))
        data = self._database.ask(lambda connection: connection.scalar(statement))
        return None if data is None else bytes(data)

    def put(self, state: str, data: bytes, expires_at: float) -> None:
        row = {"document": data, "expires_at": expires_at}
        insert = sa.insert(self._table).values(id=_id_of(state), **row)
        update = sa.update(self._table).values(**row).where(self._table.c.id == _id_of(state))
        is_done = False
        while not is_done:  # another worker may take it in between
            is_done = _insert(self._database, insert) or _is_done(self._database, update)

    def delete(self, state: str, expected: bytes) -> bool:
        columns = self._table.c
        statement = sa.delete(self._table).where(columns.id == _id_of(state), columns.document == expected)
        return _is_done(self._database, statement, once=True)

    def sweep(self, now: float) -> None:
        self._database.ask(
            lambda connection: connection.execute(sa.delete(self._table).where(self._table.c.expires_at <= now))
        )


def _id_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _escaped(key: str) -> str:
    return key.encode("unicode_escape").decode("ascii")


def _insert(database: _Database, statement: Any) -> bool:
    try:
        database.ask(lambda connection: connection.execute(statement), once=True)
    except IntegrityError:
        return False
    return True


def _is_done(database: _Database, statement: Any, *, once: bool = False) -> bool:
    """Whether the statement found a row to change."""
    return bool(database.ask(lambda connection: connection.execute(statement).rowcount, once=once))


def _prepare(database: _Database, metadata: sa.MetaData, locks: SQLLocks, *, create: bool) -> None:
    """See to it that the tables are there."""
    missing = database.ask(lambda connection: _missing(connection, metadata))
    if not missing:
        return
    if not create:
        raise StoreError(
            f"the database has no table {' and no '.join(missing)}: make them by a migration (define_tables() "
            "describes them), or open the store with create_tables=True"
        )
    try:
        # Two workers that make one table at the same time are not made to wait for each other by every database.
        with locks.hold("tables", timeout=_TABLES_WITHIN):
            database.ask(metadata.create_all)
    except LockTimeoutError as error:
        raise StoreError("other workers make the tables all the time", retryable=True) from error


def _missing(connection: sa.Connection, metadata: sa.MetaData) -> list[str]:
    inspector = sa.inspect(connection)
    return [name for name in metadata.tables if not inspector.has_table(name)]


def _is_lost(error: SQLAlchemyError) -> bool:
    return isinstance(error, DBAPIError) and error.connection_invalidated


def _has_code(error: SQLAlchemyError, wanted: set[str | int]) -> bool:
    cause = getattr(error, "orig", None)
    codes = {getattr(cause, "sqlstate", None), getattr(cause, "pgcode", None), *(getattr(cause, "args", ())[:1])}
    return not codes.isdisjoint(wanted)


def _failure(error: SQLAlchemyError) -> StoreError:
    # The first line of the driver's message: what follows may show the values of a row.
    cause = getattr(error, "orig", None) or error
    first = printable(str(cause).partition("\n")[0], 200)
    is_passing = isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError)
    is_passing = is_passing or _has_code(error, _READ_ONLY)
    advice = "try again later" if is_passing else "the database, or the URL of the store, has to be mended"
    return StoreError(
        f"the session store in the database cannot be used ({type(cause).__name__}: {first}); {advice}",
        retryable=is_passing,
    )


# Engines


def _url_of(url: str | sa.URL) -> tuple[sa.URL, dict[str, Any]]:
    """What SQLAlchemy makes of a URL, and what it says to the store.

    :raises StoreError: it cannot be understood. The message does not hold it.
    """
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError) as error:
        raise _not_understood(error) from None
    driver = parsed.drivername.lower()
    parsed = parsed.set(drivername=_DRIVERS.get(driver, driver))
    options = {name: parsed.query[name] for name in ("prefix", "create_tables") if name in parsed.query}
    return parsed.difference_update_query(options), options


def _arguments_for(url: sa.URL) -> dict[str, Any]:
    defaults = _DEFAULTS.get(url.drivername.partition("+")[2], {})
    return {name: value for name, value in defaults.items() if name not in url.query}


def _creator_of(engine: sa.Engine) -> Callable[[], Any]:
    """What connects as ``engine`` does, without taking a place in its pool."""
    source = engine.pool.recreate()

    def connect() -> Any:
        connection = source.connect()
        connection.detach()
        return connection.dbapi_connection

    return connect


def _engine(url: sa.URL, **options: Any) -> sa.Engine:
    try:
        dialect = url.get_dialect()
        if dialect.name not in ("postgresql", "mysql", "mariadb") or dialect.is_async:
            raise StoreError(
                f"sessions can be kept in PostgreSQL, MySQL and MariaDB, by a driver that is not asynchronous, not by "
                f"{printable(url.drivername, 40)}; SQLiteStore keeps them in an SQLite file"
            )
        engine = sa.create_engine(url, **options)
    except ModuleNotFoundError as error:
        raise StoreError(
            f"the driver of the database is missing ({error.name}): pip install 'atproto-session[sql]'"
        ) from error
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise _not_understood(error) from None
    if engine.driver == "psycopg":
        sa.event.listen(engine, "do_connect", _connect_bounded)
    return engine


def _connect_bounded(dialect: sa.Dialect, record: object, arguments: Any, options: dict[str, Any]) -> Any:
    """Connect with psycopg, in the place of SQLAlchemy."""
    return _bounded_connection().connect(*arguments, **options)


@functools.cache
def _bounded_connection() -> Any:
    """psycopg's kind of connection, with a bound for silence."""
    psycopg = import_module("psycopg")

    class Bounded(psycopg.Connection):  # type: ignore[misc, name-defined]  # which need not be installed
        def wait(self, steps: Generator[Any, Any, T], *args: Any, **options: Any) -> Any:
            return super().wait(self._bounded(steps), *args, **options)

        def _bounded(self, steps: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
            ready, heard = None, time.monotonic()
            while True:
                try:
                    awaited = steps.send(ready)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                ready = yield awaited
                if ready:
                    heard = time.monotonic()
                elif time.monotonic() - heard > _SILENT_FOR:
                    self.pgconn.finish()  # for what it answers later there is nobody
                    raise psycopg.OperationalError("the server does not answer")

    return Bounded


def _not_understood(error: Exception) -> StoreError:
    # Not to be chained: the message may show any part of the URL, its password among them.
    return StoreError(
        "the URL of a store in a database is postgresql://user:password@host/database or mysql://...; this one cannot "
        f"be understood ({type(error).__name__})"
    )
