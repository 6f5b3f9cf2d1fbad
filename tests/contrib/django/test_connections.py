"""The store's connections: their own, few, and given back."""

from __future__ import annotations

import os
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from django.db import OperationalError, connections, transaction
from django.test import TestCase, override_settings

from atproto_session import OAuthClient, StoreError
from atproto_session.contrib.django import _connections
from atproto_session.contrib.django.models import StoredSession
from atproto_session.contrib.django.store import DjangoStore
from atproto_session.testing.contracts._common import DID, SOON, make_session
from atproto_session.testing.network import LocalNetwork

from ...core import RESTLESS
from ...processes import Program, in_child
from . import project

SERVERS = ["postgresql", "mysql"]
#: The connections of a test, all but the one that asks.
MINE = {
    "postgresql": "application_name = current_setting('application_name') AND pid <> pg_backend_pid()",
    "mysql": "db = database() AND id <> connection_id()",
}


@pytest.fixture
def store(own_database: dict[str, Any]) -> Iterator[DjangoStore]:
    store = project.open_django_store(own_database)
    yield store
    store.close()


def counted(store: DjangoStore) -> int:
    """The connections that the server has from here."""
    table = {"postgresql": "pg_stat_activity", "mysql": "information_schema.processlist"}[store.connections.vendor]
    sql = f"SELECT count(*) FROM {table} WHERE {MINE[store.connections.vendor]}"
    with connections[project.OWN].cursor() as cursor:
        cursor.execute(sql)
        return int(cursor.fetchone()[0])


def come_down_to(most: int, store: DjangoStore) -> bool:
    """A server takes a moment to let a connection go."""
    deadline = time.monotonic() + SOON
    while counted(store) > most and time.monotonic() < deadline:
        time.sleep(0.01)
    return counted(store) <= most


# Transactions


@pytest.mark.parametrize("own_database", ["sqlite", *SERVERS], indirect=True)
def test_what_is_stored_in_a_transaction_that_comes_to_nothing_is_stored(store: DjangoStore) -> None:
    with transaction.atomic(using=project.OWN):
        store.set(DID, make_session("1"))
        assert store.replace(DID, make_session("2"), make_session("1"))
        transaction.set_rollback(True, using=project.OWN)
    assert store.get(DID) == make_session("2")


@pytest.mark.parametrize("own_database", SERVERS, indirect=True)
def test_a_transaction_sees_what_others_store_meanwhile(store: DjangoStore) -> None:
    store.set(DID, make_session("1"))
    with transaction.atomic(using=project.OWN):
        assert StoredSession.objects.using(project.OWN).count() == 1  # a snapshot, for databases that make one
        with ThreadPoolExecutor(1) as threads:
            threads.submit(store.set, DID, make_session("2")).result(SOON)
        assert store.get(DID) == make_session("2")


@pytest.mark.parametrize("own_database", ["postgresql"], indirect=True)
def test_after_an_error_in_a_transaction_the_store_goes_on(store: DjangoStore) -> None:
    with transaction.atomic(using=project.OWN):
        with pytest.raises(Exception, match="no_such_table"), connections[project.OWN].cursor() as cursor:
            cursor.execute("SELECT * FROM no_such_table")
        store.set(DID, make_session())
        transaction.set_rollback(True, using=project.OWN)
    assert store.get(DID) == make_session()


@pytest.mark.parametrize("own_database", SERVERS, indirect=True)
def test_a_row_that_a_view_has_locked_is_read_and_not_waited_for_for_long(
    store: DjangoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.set(DID, make_session("1"))
    with transaction.atomic(using=project.OWN):
        StoredSession.objects.using(project.OWN).select_for_update().get()
        assert store.get(DID) == make_session("1")
        with pytest.raises(StoreError, match="a transaction keeps it locked") as caught:
            store.replace(DID, make_session("2"), make_session("1"))
        assert caught.value.retryable
        store.set(f"{DID}#other", make_session())  # which nobody has locked
    assert store.replace(DID, make_session("2"), make_session("1"))


@contextmanager
def client_of(store: DjangoStore, network: LocalNetwork) -> Iterator[tuple[OAuthClient, str]]:
    """A client with an account that is logged in."""
    from atproto_session import ClientMetadata

    account = network.create_account()
    with OAuthClient(
        ClientMetadata.loopback("atproto"), store=store, times=RESTLESS, **network.client_options()
    ) as client:
        client.callback(network.authorize(client.authorize(account.did), account))
        yield client, account.did


@pytest.mark.parametrize("own_database", SERVERS, indirect=True)
def test_a_view_that_has_locked_the_row_loses_nothing(store: DjangoStore, network: LocalNetwork) -> None:
    with client_of(store, network) as (client, did):
        with transaction.atomic(using=project.OWN):
            StoredSession.objects.using(project.OWN).select_for_update().get()
            with pytest.raises(StoreError, match="locked"):
                client.restore(did, refresh=True)
            assert network.rotations == 0, "a token was spent whose successor could not be stored"
        assert client.restore(did, refresh=True).get("/xrpc/com.atproto.server.getSession").ok
        assert network.rotations == 1


@pytest.mark.parametrize("own_database", ["sqlite", *SERVERS], indirect=True)
def test_a_refresh_in_a_transaction_that_comes_to_nothing_is_kept(store: DjangoStore, network: LocalNetwork) -> None:
    with client_of(store, network) as (client, did):
        with transaction.atomic(using=project.OWN):
            client.restore(did, refresh=True)
            transaction.set_rollback(True, using=project.OWN)
        assert client.restore(did).get("/xrpc/com.atproto.server.getSession").ok
        assert (network.rotations, network.replays) == (1, 0)


# How many there are


@pytest.mark.parametrize("own_database", SERVERS, indirect=True)
@pytest.mark.parametrize("age", [0, None])
def test_sixty_laps_leave_as_many_connections_as_before(
    store: DjangoStore, network: LocalNetwork, age: int | None
) -> None:
    connections.settings[project.OWN]["CONN_MAX_AGE"] = age
    with client_of(store, network) as (client, did):

        def lap(number: int) -> None:
            session = client.restore(did, refresh=number % 10 == 0)
            assert session.get("/xrpc/com.atproto.server.getSession").ok

        lap(0)
        before = counted(store)
        for number in range(60):
            thread = threading.Thread(target=lap, args=(number,))
            thread.start()
            thread.join(SOON)
        client.sessions.close()
        assert come_down_to(before, store)
    store.close()
    assert come_down_to(0, store)


@pytest.mark.parametrize("own_database", ["postgresql"], indirect=True)
def test_a_pool_of_four_suffices(own_database: dict[str, Any], network: LocalNetwork) -> None:
    """Four views have all connections of Django's pool, and wait for refreshes, which have connections of their own."""
    options = {**own_database["OPTIONS"], "pool": {"min_size": 1, "max_size": 4, "timeout": 5}}
    project.use({**own_database, "NAME": own_database["NAME"], "CONN_MAX_AGE": 0, "OPTIONS": options})
    store = DjangoStore(project.OWN)
    inside = threading.Barrier(4)
    try:
        with client_of(store, network) as (client, did):

            def view(number: int) -> None:
                with transaction.atomic(using=project.OWN):
                    StoredSession.objects.using(project.OWN).count()
                    inside.wait(SOON)
                    client.restore(did, refresh=True)
                connections[project.OWN].close()

            with ThreadPoolExecutor(4) as threads:
                list(threads.map(view, range(4)))
            assert network.replays == 0
    finally:
        connections[project.OWN].close_pool()  # type: ignore[attr-defined]
        store.close()


def test_they_stay_open_as_long_as_django_s_own_do(store: DjangoStore, monkeypatch: pytest.MonkeyPatch) -> None:
    connections.settings[project.OWN]["CONN_MAX_AGE"] = 0
    own = store.connections
    store.set(DID, make_session())
    assert own._idle == [], "it is closed at once"
    with own.in_use():
        with own.in_use():
            store.get(DID)
            ((first, _),) = own._idle
        store.get(DID)
        ((second, _),) = own._idle
        assert second is first, "another request has ended, and this one has not"
    assert own._idle == []
    connections.settings[project.OWN]["CONN_MAX_AGE"] = 3600
    store.get(DID)
    assert len(own._idle) == 1


@pytest.mark.parametrize("own_database", SERVERS, indirect=True)
def test_one_that_was_idle_is_tried_before_it_is_used(store: DjangoStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_connections, "_SURE_WITHIN", 0.0)
    store.set(DID, make_session())
    ((idle, _),) = store.connections._idle
    idle.connection.close()  # as a server that restarts does
    assert store.get(DID) == make_session()
    ((another, _),) = store.connections._idle
    assert another is not idle


def test_a_test_s_database_has_another_name(store: DjangoStore, tmp_path: Any) -> None:
    store.set(DID, make_session())
    elsewhere = project.sqlite_in(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    connections.settings[project.OWN]["NAME"] = elsewhere["NAME"]
    with pytest.raises(StoreError, match=r"its tables are missing: python manage\.py migrate"):
        store.get(DID)


def test_a_forked_child_has_its_own(store: DjangoStore) -> None:
    store.set(DID, make_session("1"))

    def child() -> None:
        assert store.connections._idle == []
        assert store.get(DID) == make_session("1")
        assert store.replace(DID, make_session("2"), make_session("1"))

    in_child(child)
    assert store.get(DID) == make_session("2")


@pytest.mark.parametrize("own_database", ["postgresql"], indirect=True)
def test_a_child_that_is_forked_in_the_middle_leaves_the_parent_s_alone(
    store: DjangoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.connections._turns, "_patience", 0.0)
    store.set(DID, make_session("1"))
    with store.connections._borrowed() as connection:

        def child() -> None:
            assert connection in _connections._inherited
            assert store.get(DID) == make_session("1")

        in_child(child)
        assert connection.is_usable()


# Errors


def test_an_error_of_the_database_is_one_of_the_store(store: DjangoStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, is_retryable in ((OperationalError("gone"), True), (ValueError("no text"), False)):

        def fail(connection: Any, error: Exception = error) -> None:
            raise error

        with pytest.raises(StoreError, match=r'database "own" cannot be used \(\w+Error\): see the cause') as caught:
            store.connections._do(fail)
        assert caught.value.retryable is is_retryable
        assert caught.value.__cause__ is error
    assert store.get(DID) is None


def test_a_server_that_is_away(own_database: dict[str, Any]) -> None:
    away = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "x",
        "HOST": "127.0.0.1",
        "PORT": "1",
        "PASSWORD": "secret",
    }
    store = project.open_django_store(away)
    uses: list[Callable[[], object]] = [lambda: store.get(DID), lambda: store.locks.hold(DID, timeout=1).__enter__()]
    for use in uses:
        with pytest.raises(StoreError) as caught:
            use()
        assert caught.value.retryable
        assert "secret" not in str(caught.value)


def test_values_are_not_logged(store: DjangoStore, caplog: pytest.LogCaptureFixture) -> None:
    with override_settings(DEBUG=True), caplog.at_level("DEBUG"):
        store.set(DID, make_session())
        assert store.get(DID) == make_session()
    assert "access-1" not in caplog.text
    assert "SELECT" not in caplog.text


def test_a_database_in_the_memory_of_one_connection_is_refused() -> None:
    store = project.open_django_store({"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"})
    with pytest.raises(StoreError, match="in the memory of each single connection"):
        store.get(DID)
    project.forget()


def test_a_database_in_memory_that_is_shared() -> None:
    name = f"file:shared-{os.getpid()}?mode=memory&cache=shared"
    store = project.open_django_store({"ENGINE": "django.db.backends.sqlite3", "NAME": name})
    try:
        project.create_tables()
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda number: store.set(f"{DID}#{number}", make_session()), range(40)))
        assert len(list(store)) == 40
        with store.locks.hold(DID, timeout=SOON) as hold:
            assert hold.extend(1.0)
    finally:
        store.close()
        project.forget()


def test_in_a_test_case_the_connection_is_the_test_s(own_database: dict[str, Any], store: DjangoStore) -> None:
    class Case(TestCase):
        databases = {project.OWN}  # noqa: RUF012 - as in Django

        def test_it(self) -> None:
            store.set(DID, make_session())
            with ThreadPoolExecutor(1) as threads:
                assert threads.submit(store.get, DID).result(SOON) == make_session()
            assert StoredSession.objects.using(project.OWN).count() == 1
            with store.locks.hold(DID, timeout=SOON) as hold:
                assert hold.extend(1.0)

    result = unittest.TestResult()
    unittest.TestSuite([Case("test_it")]).run(result)
    assert (result.testsRun, result.errors, result.failures) == (1, [], [])
    assert store.get(DID) is None, "what a test stores is rolled back"
    assert store.connections._test is None


# Processes


@pytest.mark.parametrize("own_database", ["sqlite", "postgresql"], indirect=True)
def test_of_a_herd_of_processes_one_refreshes(own_database: dict[str, Any], network: LocalNetwork) -> None:
    store = project.open_django_store(own_database)
    with client_of(store, network) as (_, did), ExitStack() as clean_up:
        herd = [clean_up.enter_context(Program("programs.django_worker", is_measured=False)) for _ in range(3)]
        for program in herd:
            program.say({"database": own_database, "did": did, "options": network.client_options()})
        assert [program.hear() for program in herd] == [{"ready": True}] * 3
        for lap in range(1, 4):
            network.expire_access_tokens(did)
            for program in herd:
                program.say({"do": "request", "threads": 4})
            answers = [program.hear() for program in herd]
            assert [answer["errors"] for answer in answers] == [[], [], []]
            assert (network.rotations, network.replays) == (lap, 0)
    store.close()


def end_all(store: DjangoStore) -> None:
    """The server ends all connections but the one of this thread, as when it restarts."""
    with connections[project.OWN].cursor() as cursor:
        if store.connections.vendor == "postgresql":
            cursor.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {MINE['postgresql']}")
        else:
            cursor.execute(f"SELECT id FROM information_schema.processlist WHERE {MINE['mysql']}")
            for (number,) in cursor.fetchall():
                cursor.execute(f"KILL {number}")


@pytest.mark.parametrize("own_database", SERVERS, indirect=True)
def test_a_lock_whose_connection_ends_does_no_harm(
    store: DjangoStore, network: LocalNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a refresh, the server ends all connections. Another worker gets the lock, and finds in the
    record that a refresh is under way."""
    monkeypatch.setattr(_connections, "_SURE_WITHIN", 0.0)
    with client_of(store, network) as (client, did), ExitStack() as clean_up:
        elsewhere = DjangoStore(project.OWN)
        clean_up.callback(elsewhere.close)
        other = clean_up.enter_context(
            OAuthClient(client.metadata, store=elsewhere, times=RESTLESS, **network.client_options())
        )
        held = network.fault("token", "hold")
        threads = clean_up.enter_context(ThreadPoolExecutor(2))
        clean_up.callback(held.disarm)
        first = threads.submit(client.restore, did, True)
        while (session := store.get(did)) is None or session.attempt is None or not held.arrived.is_set():
            time.sleep(0.01)
        end_all(store)
        with elsewhere.locks.hold(did, timeout=SOON):
            pass  # the lock is free
        second = threads.submit(other.restore, did, True)
        while other.sessions._flights.get(did) is None:
            time.sleep(0.01)
        held.disarm()
        assert first.result(SOON).token_info().sub == second.result(SOON).token_info().sub == did
        assert (network.rotations, network.replays) == (1, 0)
        assert client.restore(did).get("/xrpc/com.atproto.server.getSession").ok
