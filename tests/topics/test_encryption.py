"""Encryption at rest: the same for every store that writes something down, switched on and rotated while in use."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography.fernet import Fernet

from atproto_session import (
    ClientMetadata,
    JSONStore,
    OAuthClient,
    Session,
    SessionNotFoundError,
    SQLiteStore,
    StoreError,
    open_store,
    rotate_encryption,
)
from atproto_session.stores import FullStore
from atproto_session.testing.contracts import DID, make_session
from atproto_session.testing.network import Account, LocalNetwork

from ..core import SOON, Worker
from ..crew import Crew
from ..scenes import GET_SESSION, log_in

OLD, NEW, OTHER = (Fernet.generate_key().decode() for _ in range(3))
BOB = "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb"

Open = Callable[..., FullStore]


class Place:
    """Where a store keeps its records, as somebody finds it who has the disk and not the keys."""

    def __init__(self, scheme: str, path: Path) -> None:
        self.scheme = scheme
        self.path = path
        self.url = f"{scheme}:///{path}"

    def __repr__(self) -> str:
        return self.url

    def content(self) -> bytes:
        """All that is on the disk, the database's log included."""
        return b"".join(file.read_bytes() for file in sorted(self.path.parent.rglob("*")) if file.is_file())

    def records(self) -> dict[str, bytes]:
        """The records of sessions and of log-ins, by where they are."""
        if self.scheme == "json":
            files = [*self.path.glob("sessions/*.json"), *self.path.glob("logins/*.login")]
            return {str(file): file.read_bytes() for file in files}
        with closing(sqlite3.connect(self.path)) as connection:
            sessions = connection.execute("SELECT 'session ' || key, document FROM sessions").fetchall()
            return dict(sessions + connection.execute("SELECT 'login ' || state, document FROM logins").fetchall())

    def move(self, source: str, target: str) -> None:
        """Put the record of one key in the place of another's."""
        if self.scheme == "json":
            (theirs,) = self.path.glob(f"sessions/*{target.rpartition(':')[2]}.json")
            (ours,) = self.path.glob(f"sessions/*{source.rpartition(':')[2]}.json")
            theirs.write_bytes(ours.read_bytes())
            return
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(
                "UPDATE sessions SET document = (SELECT document FROM sessions WHERE key = ?) WHERE key = ?",
                (source, target),
            )


@pytest.fixture(params=["json", "sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(request.param, tmp_path / "store" / "sessions")


@pytest.fixture
def opened(place: Place) -> Iterator[Open]:
    """Opens the same store each time, with the keys that are given."""
    stores: list[FullStore] = []

    def open_(*keys: str) -> FullStore:
        stores.append(open_store(place.url, encryption_keys=keys))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


@pytest.fixture
def client_with(place: Place, network: LocalNetwork) -> Iterator[Callable[..., OAuthClient]]:
    """Makes a client of that store with the keys that are given."""
    clients: list[OAuthClient] = []

    def client_with_(*keys: str, **options: Any) -> OAuthClient:
        options |= network.client_options()
        clients.append(OAuthClient(ClientMetadata.loopback(), store=place.url, encryption_keys=keys, **options))
        return clients[-1]

    yield client_with_
    for client in clients:
        client.close()


def secrets_of(session: Session) -> list[str]:
    tokens = session.token_set
    return [tokens.access_token, tokens.refresh_token or "", session.dpop_key["d"]]


# What is on the disk


def test_nothing_of_a_whole_life_is_readable(
    place: Place,
    network: LocalNetwork,
    client_with: Callable[..., OAuthClient],
    account: Account,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither while a log-in is pending nor after it, and nothing that the disk keeps of what was replaced."""
    client = client_with(OLD)
    secrets: list[str] = []
    put = client._store.logins.put

    def spy(state: str, document: dict[str, Any], expires_at: float) -> None:
        secrets.extend((document["verifier"], document["dpop_key"]["d"], document["issuer"], document["state"]))
        put(state, document, expires_at)

    monkeypatch.setattr(client._store.logins, "put", spy)
    url = client.authorize(account.did, state="the-state-of-the-application")
    assert len(secrets) == 4
    assert len(place.records()) == 1
    assert [secret for secret in secrets if secret.encode() in place.content()] == []

    client.callback(network.authorize(url, account))
    for _ in range(2):
        secrets += secrets_of(client.sessions.get_session(account.did))
        client.restore(account.did, refresh=True)
    secrets += secrets_of(client.sessions.get_session(account.did))
    assert len(place.records()) == 1
    assert [secret for secret in secrets if secret.encode() in place.content()] == []


def test_without_keys_it_is_json(place: Place, opened: Open) -> None:
    store = opened()
    store.set(DID, make_session())
    store.logins.put("state", {"verifier": "v"}, 4e9)
    assert all(isinstance(json.loads(record), dict) for record in place.records().values())
    assert len(place.records()) == 2


# Keys as they are given


@pytest.mark.parametrize(
    "keys",
    [OLD, OLD.encode(), [OLD], (OLD.encode(),), [NEW, OLD], {OLD: None}],
    ids=["str", "bytes", "list", "tuple", "two", "another iterable"],
)
def test_keys_in_every_form(place: Place, opened: Open, keys: Any) -> None:
    opened(OLD).set(DID, make_session())
    with closing(open_store(place.url, encryption_keys=keys)) as store:
        assert store.get(DID) == make_session()
        store.set(BOB, make_session())
    assert len(place.records()) == 2
    assert not any(record.startswith(b"{") for record in place.records().values())


@pytest.mark.parametrize("keys", [OLD, OLD.encode(), [OLD]], ids=["str", "bytes", "list"])
def test_a_client_that_is_given_keys_uses_them(
    place: Place, network: LocalNetwork, account: Account, opened: Open, keys: Any
) -> None:
    metadata = ClientMetadata.loopback()
    with OAuthClient(metadata, store=place.url, encryption_keys=keys, **network.client_options()) as client:
        session = log_in(network, client, account)
        assert session.get(GET_SESSION).status_code == 200
        stored = client.sessions.get_session(account.did)
    assert opened(OLD).get(account.did) == stored
    with pytest.raises(StoreError):
        opened().get(account.did)


@pytest.mark.parametrize("store_class", [JSONStore, SQLiteStore])
def test_a_store_that_is_given_keys_uses_them(store_class: type[Any], tmp_path: Path) -> None:
    place = tmp_path / "place"
    with closing(store_class(place, encryption_keys=OLD)) as store:
        store.set(DID, make_session())
        assert store.get(DID) == make_session()
    with closing(store_class(place)) as store, pytest.raises(StoreError, match="encrypted"):
        store.get(DID)


def test_keys_beside_a_store_object_are_refused(tmp_path: Path) -> None:
    """They would do nothing there, and the program would believe that they did."""
    with pytest.raises(StoreError, match="encryption_keys"):
        OAuthClient(ClientMetadata.loopback(), store=JSONStore(tmp_path), encryption_keys=[OLD])


@pytest.mark.parametrize("keys", ["", [""], "hunter2", [OLD, "hunter2"], [OLD[:-2]], [b""]], ids=range(6))
def test_what_is_no_key_is_refused_at_once_and_not_shown(place: Place, keys: Any) -> None:
    with pytest.raises(StoreError, match=r"not a Fernet key.*generate_key\(\)") as caught:
        OAuthClient(ClientMetadata.loopback(), store=place.url, encryption_keys=keys)
    assert "hunter2" not in str(caught.value)
    assert OLD[:-2] not in str(caught.value)
    assert caught.value.__suppress_context__, "whose traceback would show it"


# Wrong keys, and none


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ((), "encrypted, and there are no encryption_keys: give those that it was written with"),
        (
            (NEW,),
            "none of the encryption_keys opens it, or it is damaged: give the key that it was written with as well",
        ),
        (
            (NEW, OTHER),
            "none of the encryption_keys opens it, or it is damaged: give the key that it was written with as well",
        ),
    ],
    ids=["none", "another", "two others"],
)
def test_a_record_that_no_key_opens_is_an_error_and_stays(
    place: Place, network: LocalNetwork, client_with: Callable[..., OAuthClient], keys: tuple[str, ...], told: str
) -> None:
    """It is not a session that is absent: nobody is told to log in again, and nothing is spent, deleted or replaced."""
    account = network.create_account()
    good, wrong = client_with(OLD), client_with(*keys)
    log_in(network, good, account)
    pending = good.authorize(account.did)
    before = place.records()
    stored = good.sessions.get_session(account.did)
    acts: list[Callable[[], object]] = [
        lambda: wrong.restore(account.did),
        lambda: wrong.restore(account.did, refresh=False),
        lambda: wrong.restore(account.did, refresh=True),
        lambda: wrong.auth(account.did)(requests.Request("GET", network.pds_url).prepare()),
        lambda: wrong.sessions.get_stored(account.did),
        lambda: wrong.sessions.get_session(account.did, rejected=stored.token_set.access_token),
        lambda: wrong._store.replace(account.did, stored, stored.token_set),
        lambda: wrong._store.replace(account.did, None, stored.token_set),
        lambda: wrong._store.replace(account.did, stored, None),
        lambda: wrong.callback(network.authorize(pending, account)),
        lambda: rotate_encryption(wrong._store),
    ]
    for act in acts:
        with pytest.raises(StoreError) as caught:
            act()
        assert told in str(caught.value)
        assert not caught.value.login_required
    assert place.records() == before
    assert network.refresh_token_uses == {}
    assert good.restore(account.did).get(GET_SESSION).status_code == 200


def test_a_session_that_no_key_opens_can_be_signed_out_of(
    network: LocalNetwork, client_with: Callable[..., OAuthClient], account: Account
) -> None:
    log_in(network, client_with(OLD), account)
    client_with(NEW).revoke(account.did)
    with pytest.raises(SessionNotFoundError):
        client_with(OLD).restore(account.did)


def test_a_record_in_the_place_of_anothers_is_refused(place: Place, opened: Open) -> None:
    store = opened(OLD)
    store.set(DID, make_session())
    store.set(BOB, make_session())
    place.move(DID, BOB)
    with pytest.raises(StoreError, match=f"session of {BOB} cannot be read: it is the record of another key"):
        opened(OLD).get(BOB)
    assert opened(OLD).get(DID) == make_session()


def test_a_log_in_in_the_place_of_anothers_is_refused(place: Place, opened: Open) -> None:
    logins = opened(OLD).logins
    for state in ("mine", "theirs"):
        logins.put(state, {"verifier": state}, 4e9)
    if place.scheme == "json":
        ours, theirs = place.path.glob("logins/*")
        content = ours.read_bytes(), theirs.read_bytes()
        ours.write_bytes(content[1])
        theirs.write_bytes(content[0])
    else:
        with closing(sqlite3.connect(place.path)) as connection, connection:
            connection.execute("UPDATE logins SET state = CASE state WHEN 'mine' THEN 'x' ELSE 'mine' END")
    with pytest.raises(StoreError, match="not the record of this log-in"):
        opened(OLD).logins.take("mine")


# Switching it on, and changing the keys


def test_encryption_is_switched_on_in_a_store_that_is_in_use(
    place: Place, network: LocalNetwork, client_with: Callable[..., OAuthClient]
) -> None:
    alice, bob = network.create_account(), network.create_account()
    plain = client_with()
    for account in (alice, bob):
        log_in(network, plain, account)
    pending = plain.authorize(alice.did)

    with pytest.raises(StoreError, match="allow_plaintext=True"):
        client_with(OLD).restore(alice.did)
    client = client_with(OLD, allow_plaintext=True)
    client.callback(network.authorize(pending, alice), session_id="second")
    for account in (alice, bob):
        assert client.restore(account.did).get(GET_SESSION).status_code == 200
    client.restore(alice.did, refresh=True)
    assert sum(record.startswith(b"{") for record in place.records().values()) == 1, "bob's, which nobody wrote since"
    assert rotate_encryption(client._store) == 3
    assert not any(record.startswith(b"{") for record in place.records().values())
    for account in (alice, bob):
        client.restore(account.did, refresh=True)
    assert client.restore(alice.did, session_id="second").get(GET_SESSION).status_code == 200


def test_a_log_in_begun_before_the_keys_changed_ends_after(
    network: LocalNetwork, client_with: Callable[..., OAuthClient], account: Account
) -> None:
    callback = network.authorize(client_with(OLD).authorize(account.did), account)
    with pytest.raises(StoreError, match="the log-in cannot be read"):
        client_with(NEW).callback(callback)
    assert client_with(NEW, OLD).callback(callback).session.did == account.did


def test_a_refresh_in_flight_is_not_written_over(
    place: Place, network: LocalNetwork, client_with: Callable[..., OAuthClient], account: Account
) -> None:
    log_in(network, client_with(OLD), account)
    client = client_with(NEW, OLD)
    late = network.fault("refresh", "late")
    worker = Worker(lambda: client.restore(account.did, refresh=True))
    assert late.fired.wait(SOON)
    before = place.records()
    with pytest.raises(StoreError, match=f"0 sessions were encrypted again, 1 were not: .*{account.did}"):
        rotate_encryption(client._store, timeout=0)
    assert place.records() == before
    late.release.set()
    worker.outcome()
    assert rotate_encryption(client._store) == 1
    assert client_with(NEW).restore(account.did).get(GET_SESSION).status_code == 200


def test_keys_change_while_workers_refresh(place: Place, network: LocalNetwork) -> None:
    """Workers are replaced one generation after the other, with no moment at which one of them cannot read what another
    has written; and while the records are encrypted again, they are refreshed all the time."""
    account = network.create_account()
    options = network.client_options()

    def crew(*keys: str) -> Crew:
        return Crew(place.url, account.did, options | {"encryption_keys": list(keys)}, processes=1)

    metadata = ClientMetadata.loopback()
    with OAuthClient(metadata, store=place.url, encryption_keys=[OLD], **options) as client:
        log_in(network, client, account)
    with crew(OLD) as first:
        first.do("refresh", threads=2)
        with crew(OLD, NEW) as second:
            second.do("refresh", threads=2)
            first.do("request", threads=2)
            with crew(NEW, OLD) as third, closing(open_store(place.url, encryption_keys=[NEW, OLD])) as store:
                third.do("refresh", threads=2)
                second.do("refresh", threads=2)
                before = network.rotations
                stop = False

                def refresh() -> None:
                    while not stop:
                        third.do("refresh", threads=2)

                worker = Worker(refresh)
                rewritten = 0
                while network.rotations < before + 10 or rewritten < 10:
                    assert worker.is_alive(), worker.outcome()
                    rewritten += rotate_encryption(store)
                stop = True
                worker.outcome()
                rotate_encryption(store)
                with crew(NEW) as fourth:
                    fourth.do("refresh", threads=2)
                    third.do("request", threads=2)
                    fourth.do("request", threads=2)
    with closing(open_store(place.url, encryption_keys=[OLD])) as store, pytest.raises(StoreError):
        store.get(account.did)
    assert network.replays == 0
    assert set(network.refresh_token_uses.values()) == {1}
