"""Stores that fail as servers do: they refuse to write, go away in the middle of a write, lose an answer, or are slow.
In each: nothing is spent that could not be stored, and a token that has come is stored. See
:mod:`tests.topics.test_failing_stores`."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
import sqlalchemy as sa

from atproto_session import Freshness, OAuthClient, Session, StoreError, open_store
from atproto_session.stores import FullStore
from atproto_session.testing.network import Account, LocalNetwork

from ...core import SOON, Worker
from ...programs.store_scene import Pause, Steps, WatchedStore, present, tokens_of
from ...servers import MySQL, PostgreSQL, Redis, Server, connect_mysql
from ..test_failing_stores import (
    Clock,
    Place,
    clean_up,
    test_a_damaged_record_can_be_signed_out_of_and_replaced_by_a_log_in,
    test_a_damaged_record_is_an_error_for_its_account_alone,
    test_a_record_that_is_damaged_just_before_the_request_spends_nothing,
    test_records_in_each_others_place_are_errors,
)

__all__ = [
    "clean_up",
    "test_a_damaged_record_can_be_signed_out_of_and_replaced_by_a_log_in",
    "test_a_damaged_record_is_an_error_for_its_account_alone",
    "test_a_record_that_is_damaged_just_before_the_request_spends_nothing",
    "test_records_in_each_others_place_are_errors",
]

SERVERS: dict[str, Callable[[], Server]] = {
    "redis": lambda: Redis("--appendonly", "yes", "--appendfsync", "always"),
    "postgresql": PostgreSQL,
    "mysql": MySQL,
}
#: What a write of a record looks like on its way, and nothing else does.
WRITES = {"redis": (b"EVAL", b"session"), "postgresql": (b"UPDATE ", b"sessions"), "mysql": (b"UPDATE ", b"sessions")}


class Strike:
    """What a relay does to one request.

    :param arrives: whether the request reaches the server, which answers.
    :param is_cut: whether the connection is cut then; otherwise everything goes on.
    :ivar fired: set when the request has come, and the server's answer if it arrives.
    :ivar release: lets the relay go on.
    """

    def __init__(self, marks: tuple[bytes, ...], *, arrives: bool, is_cut: bool = True) -> None:
        self.arrives, self.is_cut = arrives, is_cut
        self.fired, self.release = threading.Event(), threading.Event()
        self._marks = marks

    def is_about(self, data: bytes) -> bool:
        return all(mark in data for mark in self._marks)

    def carry_out(self) -> bool:
        """Whether the connection lives on."""
        self.fired.set()
        assert self.release.wait(SOON)
        return not self.is_cut


class Relay:
    """Passes on what clients and the server at ``port`` say to each other."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._sockets: list[socket.socket] = []
        self._strikes: list[Strike] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def strike(self, strike: Strike) -> Strike:
        """The next request that it is about."""
        self._strikes.append(strike)
        return strike

    def close(self) -> None:
        for one in (self._listener, *self._sockets):
            _end(one)

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:  # it is away
                    client.close()
                    continue
                self._sockets += client, server
                struck: list[Strike] = []
                for work in (self._to_server, self._to_client):
                    threading.Thread(target=work, args=(client, server, struck), daemon=True).start()

    def _to_server(self, client: socket.socket, server: socket.socket, struck: list[Strike]) -> None:
        with _ended(client, server):
            while data := client.recv(65536):
                for strike in [each for each in self._strikes if each.is_about(data)]:
                    self._strikes.remove(strike)
                    if strike.arrives:
                        struck.append(strike)
                    elif not strike.carry_out():
                        return
                server.sendall(data)

    @staticmethod
    def _to_client(client: socket.socket, server: socket.socket, struck: list[Strike]) -> None:
        with _ended(client, server):
            while data := server.recv(65536):
                if struck and not struck.pop().carry_out():
                    return
                client.sendall(data)


@contextmanager
def _ended(*sockets: socket.socket) -> Iterator[None]:
    with suppress(OSError):
        yield
    for one in sockets:
        _end(one)


def _end(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)  # wakes who waits for it
    one.close()


class ServerPlace(Place):
    """A store on a server, with a relay in between."""

    def __init__(self, network: LocalNetwork, kind: str, url: str, clean_up: ExitStack) -> None:
        self.network = network
        self.kind = kind
        parts = urlsplit(url)
        self.relay = clean_up.enter_context(closing(Relay(parts.port or 0)))
        self.url = parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{self.relay.port}")).geturl()
        self._clean_up = clean_up
        self._rows: Any = clean_up.enter_context(closing(open_store(url)))._rows  # type: ignore[attr-defined]
        self.client = self.open()
        self.alice, self.bob = self.log_in(), self.log_in()
        self._secrets = set()
        self.note_secrets()

    def open_store(self, **options: Any) -> FullStore:
        return self._clean_up.enter_context(closing(open_store(self.url, **options)))

    def record(self, account: Account) -> bytes:
        return bytes(self._rows.read(account.did))

    def overwrite(self, account: Account, data: bytes) -> None:
        self._rows.put(account.did, data)

    def watched(self, **options: Any) -> tuple[OAuthClient, Steps]:
        """Another client, and its steps."""
        steps = Steps()
        return self.open(WatchedStore(self.open_store(), steps), **options), steps

    def stopped(self, step: str, client: OAuthClient, steps: Steps) -> tuple[Pause, Worker]:
        """A refresh of alice's session by ``client`` that stands at this step."""
        pause = steps.pause(step)
        refresh = Worker(lambda: self.refresh(self.alice, client))
        pause.wait_until_reached()
        return pause, refresh

    def strike(self, *, arrives: bool, is_cut: bool = True) -> Strike:
        return self.relay.strike(Strike(WRITES[self.kind], arrives=arrives, is_cut=is_cut))

    def connection_of(self, store: Any) -> int:
        """What the server calls the connection that ``store`` uses now."""
        if self.kind == "redis":
            return int(store._rows._server.client.client_id())
        function = "pg_backend_pid()" if self.kind == "postgresql" else "CONNECTION_ID()"
        return int(store._rows._database.ask(lambda connection: connection.scalar(sa.text(f"SELECT {function}"))))

    def check_stored(self, renewed: Session, client: OAuthClient) -> None:
        """What the refresh of ``client`` has brought is what is stored at the end, and was brought once."""
        client.sessions.close()  # tokens are handed out before they are stored, if that takes long
        assert tokens_of(renewed) == tokens_of(self.stored(self.alice))
        assert self.network.revocations == 0
        assert set(self.network.refresh_token_uses.values()) == {1}
        self.check_works()


@pytest.fixture(params=list(SERVERS))
def place(request: pytest.FixtureRequest, network: LocalNetwork, clean_up: ExitStack) -> ServerPlace:
    return ServerPlace(network, request.param, request.getfixturevalue(f"{request.param}_url"), clean_up)


@pytest.fixture(params=list(SERVERS))
def own(request: pytest.FixtureRequest, network: LocalNetwork, clean_up: ExitStack) -> tuple[ServerPlace, Server]:
    """A place on a server that no other test has."""
    request.getfixturevalue(f"{request.param}_server")  # skips where it is not installed
    server = clean_up.enter_context(SERVERS[request.param]())
    url = server.url
    if request.param == "mysql":  # one who may do everything may write where nobody may
        with closing(connect_mysql(url)) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE USER app@'%' IDENTIFIED BY 'app'")
            cursor.execute("GRANT ALL ON tests.* TO app@'%'")
        url = f"mysql://app:app@{server.host}:{server.port}/tests"
    return ServerPlace(network, request.param, url, clean_up), server


# A server that refuses to write


@contextmanager
def redis_with(server: Server, name: str, value: str) -> Iterator[None]:
    with redis.Redis.from_url(server.local_url) as connection:
        usual = connection.config_get(name)[name]
        connection.config_set(name, value)
        yield
        connection.config_set(name, usual)


@contextmanager
def read_only_postgresql(server: Server) -> Iterator[None]:
    """As after a failover to a replica: the connections end, and new ones may read only."""
    with psycopg.connect(server.local_url, autocommit=True) as connection:
        connection.execute("ALTER ROLE postgres SET default_transaction_read_only = on")
        connection.execute(
            "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        yield
        # Connections that are there already stay as they are.
        connection.execute("ALTER ROLE postgres RESET default_transaction_read_only")


@contextmanager
def read_only_mysql(server: Server) -> Iterator[None]:
    with closing(connect_mysql(server.local_url)) as connection, connection.cursor() as cursor:
        cursor.execute("SET GLOBAL read_only = 1")
        yield
        cursor.execute("SET GLOBAL read_only = 0")


@contextmanager
def demoted_redis(server: Server) -> Iterator[None]:
    """As after a failover."""
    with redis.Redis.from_url(server.local_url) as connection:
        connection.replicaof("127.0.0.1", "1")  # where nobody is
        yield
        connection.replicaof("NO", "ONE")


#: Ways to refuse, and what the error says then.
REFUSALS: dict[str, list[tuple[Callable[[Server], Any], str]]] = {
    "redis": [
        (lambda server: redis_with(server, "maxmemory", "1"), "maxmemory"),
        (lambda server: redis_with(server, "min-replicas-to-write", "1"), "NOREPLICAS"),
        (demoted_redis, "read only replica"),
    ],
    "postgresql": [(read_only_postgresql, "read-only")],
    "mysql": [(read_only_mysql, "read-only")],
}


def test_a_server_that_refuses_to_write_spends_nothing(own: tuple[ServerPlace, Server]) -> None:
    place, server = own
    for refuse, hint in REFUSALS[place.kind]:
        sessions = [place.stored(account) for account in (place.alice, place.bob)]
        with refuse(server):
            assert [place.client.sessions.get_session(one.did) for one in (place.alice, place.bob)] == sessions
            for account in (place.alice, place.bob):
                with place.refused(hint) as caught:
                    place.refresh(account)
                assert str(caught.value).endswith(("try again later", "has to be mended"))
        place.check_works()


def test_a_server_that_refuses_for_a_moment_loses_no_answer(own: tuple[ServerPlace, Server]) -> None:
    place, server = own
    for refuse, _ in REFUSALS[place.kind]:
        client, steps = place.watched()
        before = place.stored(place.alice)
        first_try, refresh = place.stopped("store", client, steps)
        with refuse(server):
            second_try = steps.pause("store")
            first_try.release.set()
            second_try.wait_until_reached()
        second_try.release.set()
        renewed = present(refresh.outcome())
        assert tokens_of(renewed) != tokens_of(before)
        place.check_stored(renewed, client)


def test_a_connection_that_refuses_is_not_used_again(own: tuple[ServerPlace, Server]) -> None:
    place, server = own
    refuse, hint = REFUSALS[place.kind][-1]  # as after a failover
    store: Any = place.open_store()
    session = place.stored(place.alice)
    with refuse(server):
        before = place.connection_of(store)
        assert place.connection_of(store) == before
        with pytest.raises(StoreError, match=hint) as caught:
            store.set(place.alice.did, session)
        assert caught.value.retryable
        assert place.connection_of(store) != before


# A server that goes


@pytest.mark.parametrize("instant", ["finds", "attempt", "after attempt"])
def test_a_server_that_goes_just_before_the_request_spends_nothing(
    own: tuple[ServerPlace, Server], instant: str
) -> None:
    place, server = own
    client, steps = place.watched()
    pause = Pause.at(place.network.fault("plc", "hold")) if instant == "finds" else steps.pause(instant)
    refresh = Worker(lambda: place.refresh(place.alice, client))
    pause.wait_until_reached()
    server.kill()
    with place.refused("cannot be used"):
        pause.release.set()
        refresh.outcome()
    server.start()
    place.check_works()


@contextmanager
def standing_still(server: Server) -> Iterator[None]:
    """With all of its processes."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
    processes = [server.pid, *map(int, children.read_text(encoding="ascii").split())]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def test_a_server_that_stands_still_for_too_long_spends_nothing(own: tuple[ServerPlace, Server]) -> None:
    place, server = own
    clock = Clock()
    client, steps = place.watched(freshness=Freshness(clock=clock))
    pause, refresh = place.stopped("attempt", client, steps)
    request = place.strike(arrives=False, is_cut=False)
    pause.release.set()
    assert request.fired.wait(SOON)
    with place.refused("took too long to record"):
        with standing_still(server):
            request.release.set()
            clock.off += client.sessions._terms.times.window
        refresh.outcome()
    place.check_works()


@pytest.mark.parametrize("arrives", [True, False], ids=["written", "not written"])
def test_a_server_that_dies_while_it_stores_tokens_gets_them_when_it_is_back(
    own: tuple[ServerPlace, Server], *, arrives: bool
) -> None:
    place, server = own
    client, steps = place.watched()
    first_try, refresh = place.stopped("store", client, steps)
    second_try, strike = steps.pause("store"), place.strike(arrives=arrives)
    first_try.release.set()
    assert strike.fired.wait(SOON)
    server.kill()
    third_try = steps.pause("store", after=1)
    strike.release.set()
    second_try.wait_until_reached()
    second_try.release.set()  # it is still away
    third_try.wait_until_reached()
    with place.refused():
        place.refresh(place.bob)
    server.start()
    third_try.release.set()
    place.check_stored(present(refresh.outcome()), client)


# A connection that is cut


@pytest.mark.parametrize("arrives", [True, False], ids=["written", "not written"])
def test_tokens_are_stored_although_the_connection_is_cut(place: ServerPlace, *, arrives: bool) -> None:
    client, steps = place.watched()
    first_try, refresh = place.stopped("store", client, steps)
    strike = place.strike(arrives=arrives)
    strike.release.set()
    first_try.release.set()
    place.check_stored(present(refresh.outcome()), client)
    assert strike.fired.is_set()


@pytest.mark.parametrize("arrives", [True, False], ids=["written", "not written"])
def test_nothing_is_sent_when_nobody_knows_whether_it_was_announced(place: ServerPlace, *, arrives: bool) -> None:
    client, steps = place.watched()
    pause, refresh = place.stopped("attempt", client, steps)
    strike = place.strike(arrives=arrives)
    strike.release.set()
    with place.refused():
        pause.release.set()
        refresh.outcome()
    assert strike.fired.is_set()
    place.check_works()


# A server that is slow


def test_a_slow_server_keeps_nobody_else_waiting_and_nothing_is_sent_twice(place: ServerPlace) -> None:
    client, steps = place.watched()
    first_try, refresh = place.stopped("store", client, steps)
    strike = place.strike(arrives=True, is_cut=False)
    first_try.release.set()
    assert strike.fired.wait(SOON)
    place.check_works(place.bob)
    another = Worker(lambda: place.client.sessions.get_session(place.alice.did, True, timeout=SOON))
    strike.release.set()
    renewed = present(refresh.outcome())
    another.outcome()
    assert set(place.network.refresh_token_uses.values()) == {1}
    assert renewed.is_same_grant(place.stored(place.alice))
    place.check_works()


def test_a_server_that_is_away_says_so(place: ServerPlace) -> None:
    place.relay.close()
    for account in (place.alice, place.bob):
        for refresh in ("auto", True, False):
            with place.refused():
                place.client.sessions.get_session(account.did, refresh)
    with pytest.raises(StoreError):
        place.open()
