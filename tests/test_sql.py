"""The store in a database and its locks, on PostgreSQL and MariaDB."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import MetaData, create_engine, event, make_url

from atproto_session import Session, SessionGetter
from atproto_session.errors import CancelledError, LockTimeoutError, StoreError
from atproto_session.locks import Locks
from atproto_session.locks.sql import SQLLocks
from atproto_session.stores import FullStore, open_store, sql
from atproto_session.stores.sql import SQLStore, define_tables
from atproto_session.testing.contracts import (
    DID,
    HOSTILE_KEYS,
    SharedLocksContract,
    SharedStoreContract,
    StoreContract,
    make_session,
)

from .core import QUICK, SOON, FakeAuthority, Gate, Worker, expired_session, wait_until
from .processes import forked
from .servers import PASSWORD, PostgreSQL

KEY = Fernet.generate_key()
LATER, EARLIER = 4e9, 1e9


@pytest.fixture(params=["postgresql", "mysql"])
def sql_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


class OnEachServer:
    @pytest.fixture(autouse=True)
    def place(self, sql_url: str) -> None:
        self.url = sql_url


def locks_of(url: str) -> Locks:
    return open_store(url).locks


class TestSQLStore(OnEachServer, SharedStoreContract):
    keys = HOSTILE_KEYS

    def opener(self, tmp_path: Path) -> Callable[[], FullStore]:
        return partial(open_store, self.url)

    def damage(self, store: FullStore, key: str) -> bool:
        return cut(store, key)

    def open_connections(self, store: FullStore) -> int | None:
        return store._database.engine.pool.checkedin()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("sql_url", ["postgresql"], indirect=True)
class TestEncryptedSQLStore(OnEachServer, StoreContract):
    def make_store(self, tmp_path: Path) -> FullStore:
        return open_store(self.url, encryption_keys=[KEY])

    def damage(self, store: FullStore, key: str) -> bool:
        return cut(store, key)

    def stored_bytes(self, store: FullStore) -> bytes | None:
        tables: list[Any] = [store._rows._table, store.logins._rows._table]  # type: ignore[attr-defined]
        return b"".join(
            repr(store._database.ask(lambda connection, table=table: connection.execute(table.select()).all())).encode()  # type: ignore[attr-defined]
            for table in tables
        )


class TestSQLLocks(OnEachServer, SharedLocksContract):
    names = HOSTILE_KEYS

    def opener(self, tmp_path: Path) -> Callable[[], Locks]:
        return partial(locks_of, self.url)


def cut(store: Any, key: str) -> bool:
    rows = store._rows
    data = rows.read(key)
    return bool(rows.update(key, data[:-20], data))


# Connections


def database_of(store: Any) -> Any:
    return store._database


def with_driver(url: str) -> Any:
    """As applications write it."""
    parsed = make_url(url)
    return parsed.set(drivername={"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}[parsed.drivername])


def count_sessions(connection: Any) -> int:
    return int(connection.exec_driver_sql("SELECT count(*) FROM atproto_sessions").scalar())


def asked(url: str, statement: str) -> Any:
    """What the server answers, on a connection of its own."""
    engine = create_engine(with_driver(url), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        answer = connection.exec_driver_sql(statement)
        value = answer.scalar() if answer.returns_rows else None
    engine.dispose()
    return value


def number_of(connection: Any) -> int:
    """By what number the server knows the connection."""
    connection = getattr(connection, "dbapi_connection", connection)
    thread = getattr(connection, "thread_id", None)
    return int(connection.info.backend_pid if thread is None else thread())


def is_connected(number: int, url: str) -> bool:
    tables = "information_schema.processlist WHERE id" if url.startswith("mysql") else "pg_stat_activity WHERE pid"
    return bool(asked(url, f"SELECT count(*) FROM {tables} = {number}"))


def end_connection(connection: Any, url: str) -> None:
    number = number_of(connection)
    asked(url, f"KILL {number}" if url.startswith("mysql") else f"SELECT pg_terminate_backend({number}, 10000)")


def idle_connections(store: Any) -> list[Any]:
    pool = database_of(store).engine.pool
    records = [pool.connect() for _ in range(max(1, pool.checkedin()))]
    connections = [record.dbapi_connection for record in records]
    for record in records:
        record.close()
    return connections


def test_each_lock_has_a_connection_of_its_own_and_leaves_none(sql_url: str) -> None:
    with closing(open_store(sql_url)) as store:
        with store.locks.hold("one", timeout=SOON) as one, store.locks.hold("two", timeout=SOON) as two:
            numbers = {number_of(one._connection), number_of(two._connection)}  # type: ignore[attr-defined]
            assert len(numbers) == 2
            assert all(is_connected(number, sql_url) for number in numbers)
        wait_until(lambda: not any(is_connected(number, sql_url) for number in numbers))


def test_a_lock_whose_connection_the_server_ends_is_lost_and_known_to_be(sql_url: str) -> None:
    with closing(open_store(sql_url)) as store, closing(open_store(sql_url)) as other:
        with store.locks.hold(DID, timeout=SOON) as hold:
            assert hold.extend(1.0)
            end_connection(hold._connection, sql_url)  # type: ignore[attr-defined]
            with other.locks.hold(DID, timeout=SOON):
                assert not hold.extend(1.0)
            assert not hold.extend(1.0)
        with store.locks.hold(DID, timeout=SOON) as hold:
            assert hold.extend(1.0)


def test_a_lock_that_ends_in_the_middle_of_a_refresh_lets_nobody_send_again(sql_url: str) -> None:
    """The server ends its connection when the request has left, and another worker gets the lock."""
    with closing(open_store(sql_url)) as store, closing(open_store(sql_url)) as other:
        store.set(DID, expired_session())
        authority, answer = FakeAuthority(), Gate()

        def end_the_lock(session: Session) -> None:
            (hold,) = store.locks._holds  # type: ignore[attr-defined]
            end_connection(hold._connection, sql_url)
            answer()

        authority.on_send = end_the_lock
        getters = [SessionGetter(one, authority, times=QUICK) for one in (store, other)]
        first = Worker(lambda: getters[0].get_session(DID))
        answer.wait_until_reached()
        second = Worker(lambda: getters[1].get_session(DID))
        wait_until(lambda: any(hold._is_held for hold in list(other.locks._holds)))  # type: ignore[attr-defined]
        answer.open()
        outcomes = [first.outcome(), second.outcome()]
        assert [one.token_set.access_token for one in outcomes if isinstance(one, Session)] == ["access-2"] * 2
        assert authority.sends == 1
        for getter in getters:
            getter.close()


def test_a_worker_that_stands_still_keeps_a_lock_for_some_time_only(
    sql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server cannot tell it from a machine that is gone."""
    monkeypatch.setattr("atproto_session.locks.sql._LEASE", 1)
    with (
        closing(open_store(sql_url)) as store,
        closing(open_store(sql_url)) as other,
        store.locks.hold(DID, timeout=0) as hold,
        other.locks.hold(DID, timeout=SOON),
    ):
        assert not hold.extend(1.0)


def test_locks_of_another_place_on_the_same_server_are_others(sql_url: str) -> None:
    with (
        closing(open_store(sql_url)) as store,
        closing(SQLStore(sql_url, prefix="other_")) as other,
        store.locks.hold(DID, timeout=0),
        other.locks.hold(DID, timeout=0),
    ):
        pass


def test_nothing_waits_for_ever_for_what_a_database_may_set(postgresql_url: str) -> None:
    """Bounds of a role end neither a lock that is waited for nor one that is held."""
    with closing(SQLStore(make_url(postgresql_url))) as store:
        event.listen(
            database_of(store)._apart,
            "connect",
            lambda connection, _: connection.execute(
                "SET statement_timeout = 300; SET lock_timeout = 300; SET idle_in_transaction_session_timeout = 300"
            ),
        )
        with store.locks.hold(DID, timeout=SOON) as hold, closing(open_store(postgresql_url)) as other:
            waiting = Worker(lambda: take(store.locks, DID))
            with pytest.raises(LockTimeoutError), other.locks.hold(DID, timeout=0.5):
                pass
            assert hold.extend(1.0)
        waiting.outcome()


def take(locks: Locks, name: str, cancel: threading.Event | None = None) -> None:
    with locks.hold(name, timeout=SOON, cancel=cancel):
        pass


def test_a_server_that_ended_all_connections_is_connected_to_anew(sql_url: str) -> None:
    with closing(open_store(sql_url)) as store:
        works: list[Callable[[], object]] = [
            lambda: store.get(DID),
            lambda: store.set(DID, make_session("1")),
            lambda: store.replace(DID, make_session("2"), make_session("1")),
            lambda: store.delete(DID),
            lambda: list(store),
            lambda: store.logins.take("state"),
        ]
        for work in works:
            store.get(DID)
            for connection in idle_connections(store):
                end_connection(connection, sql_url)
            work()


def test_a_write_whose_answer_may_be_lost_is_not_done_again(sql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its failure nor its success is known: whoever asked for it has to look."""
    with closing(open_store(sql_url)) as store:
        store.set(DID, make_session("1"))
        read = store._rows.read  # type: ignore[attr-defined]

        def read_and_lose_the_connection(key: str) -> bytes | None:
            data: bytes | None = read(key)
            for connection in idle_connections(store):
                end_connection(connection, sql_url)
            return data

        monkeypatch.setattr(store._rows, "read", read_and_lose_the_connection)  # type: ignore[attr-defined]
        with pytest.raises(StoreError) as caught:
            store.replace(DID, make_session("2"), make_session("1"))
        assert caught.value.retryable
        monkeypatch.undo()
        assert store.get(DID) == make_session("1")


def test_what_gives_way_to_another_transaction_is_tried_again(postgresql_url: str) -> None:
    database = database_of(open_store(postgresql_url))
    failures = ["40001", "40P01"]

    def work(connection: Any) -> str:
        if failures:
            connection.exec_driver_sql(f"DO $$ BEGIN RAISE SQLSTATE '{failures.pop()}'; END $$")
        return "done"

    assert database.ask(work, once=True) == "done"
    tries: list[int] = []

    def fail(connection: Any) -> None:
        tries.append(1)
        connection.exec_driver_sql("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

    with pytest.raises(StoreError):
        database.ask(fail)
    assert len(tries) == 21


def test_it_takes_no_part_in_a_transaction_of_the_application(sql_url: str) -> None:
    """Not even where the pool of its engine has only one connection, which the transaction has."""
    engine = create_engine(with_driver(sql_url), pool_size=1, max_overflow=0)
    with closing(SQLStore(engine)) as store:
        with engine.connect() as connection:
            assert count_sessions(connection) == 0
            store.set(DID, make_session())
            store.logins.put("state", {"verifier": "v"}, LATER)
            with store.locks.hold(DID, timeout=0):
                pass
            connection.rollback()
        assert store.get(DID) == make_session()
        assert store.logins.take("state") == {"verifier": "v"}
    with engine.connect() as connection:
        assert count_sessions(connection) == 1, "the engine goes on when the store is closed"
    engine.dispose()


def test_an_engine_connects_the_store_in_its_own_way(sql_url: str) -> None:
    engine = create_engine(with_driver(sql_url))
    connected: list[object] = []
    event.listen(engine, "connect", lambda connection, _: connected.append(connection))
    with closing(SQLStore(engine)) as store:
        with store.locks.hold(DID, timeout=0):
            pass
        assert len(connected) >= 2
    engine.dispose()


def test_a_child_has_connections_of_its_own(sql_url: str) -> None:
    with closing(open_store(sql_url)) as store:
        store.set(DID, make_session("1"))
        with store.locks.hold(DID, timeout=SOON) as hold:

            def work(connection: object) -> tuple[bool, bool]:
                was_held = hold.extend(1.0)
                try:
                    with store.locks.hold(DID, timeout=0):
                        got = True
                except LockTimeoutError:
                    got = False
                hold.end()  # type: ignore[attr-defined] # as the end of the block does
                store.set(DID, make_session("2"))
                return was_held, got

            with forked(work) as child:
                assert child.result() == (False, False)
            assert hold.extend(1.0), "what the child did ended nothing here"
        assert store.get(DID) == make_session("2")


def test_waiting_for_another_worker_ends_when_it_is_cancelled(sql_url: str) -> None:
    with closing(open_store(sql_url)) as store, closing(open_store(sql_url)) as other:
        cancel = threading.Event()
        with store.locks.hold(DID, timeout=0):
            waiter = Worker(lambda: take(other.locks, DID, cancel=cancel))
            wait_until(lambda: other.locks._threads._lines)  # type: ignore[attr-defined]
            cancel.set()
            with pytest.raises(CancelledError):
                waiter.outcome()


# Tables


def test_tables_that_are_missing_are_made_on_request(sql_url: str) -> None:
    refused: list[Callable[[], object]] = [
        lambda: SQLStore(sql_url, create_tables=False),
        lambda: open_store(f"{sql_url}{'&' if '?' in sql_url else '?'}create_tables=no"),
    ]
    for refuse in refused:
        with pytest.raises(
            StoreError, match="no table atproto_sessions and no atproto_logins: make them by a migration"
        ):
            refuse()
    metadata = MetaData()
    define_tables(metadata, prefix="mine_")
    engine = create_engine(with_driver(sql_url))
    metadata.create_all(engine)
    with closing(SQLStore(engine, prefix="mine_", create_tables=False)) as store:
        store.set(DID, make_session())
        assert list(store) == [DID]
    engine.dispose()


def test_tables_that_others_make_all_the_time_are_not_waited_for_for_ever(
    sql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(SQLStore(sql_url)) as store, store.locks.hold("tables", timeout=0):
        monkeypatch.setattr(sql, "_TABLES_WITHIN", 0.05)
        monkeypatch.setattr(sql, "_missing", lambda *ignored: ["atproto_sessions"])
        with pytest.raises(StoreError, match="make the tables all the time"):
            SQLStore(sql_url)


def test_all_keys_are_walked(sql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "_PAGE", 3)
    with closing(open_store(sql_url)) as store:
        for count in range(8):
            assert len(list(store)) == count
            store.set(f"{DID}#{count}", make_session())


def test_a_log_in_may_begin_anew_and_those_that_expired_are_deleted(sql_url: str) -> None:
    with closing(open_store(sql_url)) as store:
        store.logins.put("old", {"verifier": "1"}, EARLIER)
        store.logins.put("state", {"verifier": "1"}, LATER)
        store.logins.put("state", {"verifier": "2"}, LATER)
        rows = store.logins._rows  # type: ignore[attr-defined]
        assert rows.read("old") is not None
        rows.sweep(EARLIER + 1)
        assert rows.read("old") is None
        assert store.logins.take("state") == {"verifier": "2"}


def test_others_that_write_in_between_keep_nothing_from_being_written(
    sql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_store(sql_url)) as store:
        rows: Any = store._rows  # type: ignore[attr-defined]
        insert = rows.insert

        def come_first(key: str, data: bytes) -> bool:
            monkeypatch.undo()
            assert insert(key, b"another")
            return bool(insert(key, data))

        monkeypatch.setattr(rows, "insert", come_first)
        store.set(DID, make_session())
        assert store.get(DID) == make_session()

        is_done = sql._is_done

        def take_first(*arguments: Any) -> bool:
            monkeypatch.undo()
            assert store.logins.take("state") == {"verifier": "1"}
            return is_done(*arguments)

        store.logins.put("state", {"verifier": "1"}, LATER)
        monkeypatch.setattr(sql, "_is_done", take_first)
        store.logins.put("state", {"verifier": "2"}, LATER)
        assert store.logins.take("state") == {"verifier": "2"}


# URLs and errors


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+nothing://user:hunter2@host/db", "cannot be understood"),
        ("postgresql://user:hunter2@host:hunter2/db", "cannot be understood"),
        ("MySQL://user:hunter2@127.0.0.1:1/db", "cannot be used"),
        ("postgres://user:hunter2@127.0.0.1:1/db?password=hunter2", "cannot be used"),
        ("postgresql://user:hunter2@127.0.0.1:1/db?nonsense=hunter2", "cannot be used"),
        ("mariadb://user:hunter2@127.0.0.1:1/db?nonsense=hunter2", "option that the driver does not know"),
        ("postgresql+asyncpg://user:hunter2@host/db", "by a driver that is not asynchronous|driver .* is missing"),
        ("mysql+notthere://user:hunter2@host/db", "cannot be understood"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused_and_not_shown(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        open_store(url)
    shown = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in "\n".join(line for line in shown.splitlines() if "open_store(" not in line)


def test_a_wrong_password_is_not_shown(sql_url: str) -> None:
    wrong = sql_url.replace(PASSWORD, "hunter2")
    with pytest.raises(StoreError, match="cannot be used") as caught:
        open_store(wrong)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    with closing(open_store(sql_url)) as store:
        assert PASSWORD not in repr(store)
        assert "127.0.0.1" in repr(store)


def test_neither_logs_nor_errors_show_what_is_stored(
    sql_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    with closing(open_store(sql_url)) as store:
        database_of(store).engine.echo = "debug"
        store.set(DID, make_session("secret"))
        store._rows._table.drop(database_of(store).engine)  # type: ignore[attr-defined]
        with pytest.raises(StoreError) as caught:
            store.set(DID, make_session("secret"))
        database_of(store).engine.echo = False
    assert caplog.records
    assert "secret" not in caplog.text
    assert "secret" not in "".join(traceback.format_exception(caught.value)).replace('make_session("secret")', "")


def test_other_databases_are_refused() -> None:
    for database in ("sqlite://", create_engine("sqlite://")):
        with pytest.raises(StoreError, match=r"PostgreSQL, MySQL and MariaDB.*SQLiteStore"):
            SQLStore(database)


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"driver .* missing \(psycopg\): pip install 'atproto-session\[sql\]'"):
        open_store("postgresql://localhost/db")


def test_a_store_that_is_closed_says_so(sql_url: str) -> None:
    store = open_store(sql_url)
    store.close()
    works: list[Callable[[], object]] = [lambda: store.get(DID), lambda: take(store.locks, DID)]
    for work in works:
        with pytest.raises(StoreError, match="closed"):
            work()


def test_a_server_that_is_gone_is_an_error_of_the_store(postgresql_server: str) -> None:
    with PostgreSQL() as server:
        store = open_store(server.url)
        with store.locks.hold(DID, timeout=0) as hold:
            store.set(DID, make_session())
            server.stop()
            assert not hold.extend(1.0)
            works: list[Callable[[], object]] = [lambda: store.get(DID), lambda: take(store.locks, "another")]
            for work in works:
                with pytest.raises(StoreError, match="cannot be used") as caught:
                    work()
                assert caught.value.retryable
        server.start()
        assert store.get(DID) == make_session()
        take(store.locks, DID)
        store.close()


# Locks over any connection


class FakeConnection:
    """Of a server that rounds the time that it waits to nothing, as MySQL does.

    :ivar answers: what the next questions are answered.
    """

    description = ((),)

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)

    def cursor(self) -> FakeConnection:
        return self

    def __enter__(self) -> FakeConnection:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def execute(self, sql: str, parameters: object) -> None:
        if isinstance(self.answers[0], Exception):
            raise self.answers.pop(0)  # type: ignore[misc]

    def fetchone(self) -> tuple[object]:
        return (self.answers.pop(0),)

    def close(self) -> None:
        pass


def test_a_postgresql_that_stands_still_keeps_nobody_for_ever(
    monkeypatch: pytest.MonkeyPatch, postgresql_server: str
) -> None:
    """Its system goes on to answer for its connections."""
    monkeypatch.setattr(sql, "_SILENT_FOR", 0.3)
    with PostgreSQL() as server, closing(open_store(f"{server.url}?connect_timeout=2")) as store:
        store.set(DID, make_session())
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text(encoding="ascii").split()
        processes = [server.pid, *map(int, children)]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        with pytest.raises(StoreError, match="cannot be used") as caught:
            store.get(DID)
        assert caught.value.retryable
        for process in processes:
            os.kill(process, signal.SIGCONT)
        assert store.get(DID) == make_session()


def test_a_server_that_knows_whole_seconds_only_is_not_asked_without_pause() -> None:
    connection = FakeConnection(None, 0, 0, 0, 1, 1)
    began = time.monotonic()
    with SQLLocks(lambda: connection, "mysql").hold(DID, timeout=SOON):
        pass
    assert time.monotonic() - began >= 0.06
    assert connection.answers == []


def test_what_a_lock_s_connection_raises_is_a_store_error() -> None:
    connection = FakeConnection(None, OSError("gone"))
    with pytest.raises(StoreError, match=r"locks in the database cannot be used \(OSError"):
        take(SQLLocks(lambda: connection, "mariadb"), DID)

    def fail() -> Any:
        raise OSError("no route")

    with pytest.raises(StoreError, match="OSError"):
        take(SQLLocks(fail, "postgresql"), DID)


def test_an_error_that_another_library_wraps_is_understood() -> None:
    """As Django does: the driver's own error is its cause."""

    class Wrapped(Exception):
        pass

    class Timeout(Exception):
        sqlstate = "55P03"

    error = Wrapped()
    error.__cause__ = Timeout()
    connection = FakeConnection(None, None, error, None, None, None, None, None)
    take(SQLLocks(lambda: connection, "postgresql"), DID)
    assert connection.answers == []
    connection = FakeConnection(None, None, Wrapped())
    with pytest.raises(StoreError):
        take(SQLLocks(lambda: connection, "postgresql"), DID)


def test_there_are_no_locks_for_other_databases() -> None:
    with pytest.raises(ValueError, match="not for oracle"):
        SQLLocks(FakeConnection, "oracle")


def test_a_child_leaves_a_connection_alone_whose_socket_is_not_known() -> None:
    connection = FakeConnection(None, 1, 1)
    locks = SQLLocks(lambda: connection, "mysql")
    with locks.hold(DID, timeout=SOON):
        locks.reset_after_fork()
    assert connection.answers == []
