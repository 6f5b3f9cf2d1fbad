"""Who is stored, keeping idle sessions alive, and deleting what nobody can use."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from atproto_session import (
    CancelledError,
    ClientMetadata,
    IdentityError,
    KeepAliveResult,
    MemoryStore,
    OAuthClient,
    OAuthResponseError,
    Session,
    SessionDeletedEvent,
    SessionError,
    SessionNotFoundError,
    StoreError,
    TokenRefreshError,
    TransportError,
    open_store,
)
from atproto_session import _upkeep as upkeep
from atproto_session.errors import RefreshInterruptedError
from atproto_session.session import Attempt
from atproto_session.testing.network import LocalNetwork

from .core import RESTLESS, SOON, PlainStore, Worker, make_session, make_tokens, wait_until
from .scenes import Scene, log_in, store_tokens, stored

DAY = 24 * 3600.0
DIDS = [f"did:plc:{letter * 24}" for letter in "abcdef"]
OURS = ClientMetadata.loopback().client_id


def session_of(did: str, *, idle: float = 0.0, lifetime: float = 3600.0, **tokens: Any) -> Session:
    """A session that was refreshed ``idle`` seconds ago."""
    at = time.time() - idle
    token_set = make_tokens(lifetime=lifetime, sub=did, **tokens)
    return make_session(token_set=token_set, client_id=OURS, began_at=at - DAY, refreshed_at=at)


def client_over(store: Any, **options: Any) -> OAuthClient:
    return OAuthClient(ClientMetadata.loopback(), store=store, times=RESTLESS, **options)


def age(client: OAuthClient, key: str, seconds: float | None) -> None:
    """Let the last refresh of a session be so long ago, or unknown."""
    session = stored(client, key)
    at = None if seconds is None else time.time() - seconds
    assert client._store.replace(key, replace(session, refreshed_at=at, began_at=at), session)


def outcomes(results: list[KeepAliveResult]) -> list[tuple[str, str]]:
    return [(result.did, result.outcome) for result in results]


@pytest.fixture
def crowd(network: LocalNetwork, client: OAuthClient) -> list[str]:
    """Four accounts that are logged in, the first of them idle for longest."""
    dids = []
    for days in (9, 8, 7, 6):
        account = network.create_account()
        log_in(network, client, account)
        age(client, account.did, days * DAY)
        dids.append(account.did)
    return dids


# Who is stored


def test_accounts_tell_who_is_stored_since_when_and_no_secret() -> None:
    store: MemoryStore[Session] = MemoryStore()
    whole = session_of(DIDS[0], idle=60.0)
    store.set(DIDS[0], whole)
    bare = make_session(
        token_set=make_tokens(lifetime=None, sub=DIDS[1]), began_at=1e300, client_id="https://x.example"
    )
    store.set(f"{DIDS[1]}#phone", bare)
    with client_over(store) as client:
        one, other = sorted(client.accounts(), key=lambda account: account.did)
    assert (one.did, one.session_id, one.iss, one.aud) == (
        DIDS[0],
        None,
        "https://issuer.example.com",
        "https://pds.example.com",
    )
    assert (one.scope, one.client_id, one.error) == ("atproto transition:generic", OURS, None)
    assert one.refreshed_at is not None
    assert one.began_at == one.refreshed_at - timedelta(days=1)
    assert one.expires_at == whole.token_set.expires_at
    assert abs(datetime.now(UTC) - one.refreshed_at - timedelta(seconds=60)) < timedelta(seconds=SOON)
    assert (other.did, other.session_id, other.client_id) == (DIDS[1], "phone", "https://x.example")
    assert (other.began_at, other.refreshed_at, other.expires_at) == (None, None, None)
    for secret in ("access-1", "refresh-1", str(whole.dpop_key["d"])):
        assert secret not in repr([one, other])


@pytest.mark.parametrize("url", ["json:///s", "sqlite:///s.db"])
def test_records_that_cannot_be_read_do_not_end_the_walk(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(url)
    for did in DIDS[:3]:
        store.set(did, session_of(did, idle=9 * DAY))
    store.set(DIDS[3], session_of(DIDS[0]))
    if url.startswith("json"):
        (path,) = (path for path in Path("s/sessions").iterdir() if "b" * 24 in path.name)
        path.write_bytes(b"damaged")
    else:
        store._database.write(  # type: ignore[attr-defined]
            lambda database: database.execute("UPDATE sessions SET document = 'damaged' WHERE key = ?", (DIDS[1],))
        )
    with client_over(store) as client:
        accounts = {account.did: account for account in client.accounts()}
        assert sorted(accounts) == DIDS[:4]
        damaged = accounts[DIDS[1]].error
        assert isinstance(damaged, StoreError)
        assert damaged.did == DIDS[1]
        assert (accounts[DIDS[1]].iss, accounts[DIDS[1]].client_id) == ("", None)
        assert "another account" in str(accounts[DIDS[3]].error)
        assert (accounts[DIDS[0]].error, accounts[DIDS[2]].error) == (None, None)
        assert client.clean().sessions == ()
        assert "stays in the store: the session of" in caplog.text
        results = {result.did: result for result in client.keep_alive(pace=0)}
        assert isinstance(results[DIDS[1]].error, StoreError)
        assert sorted(results) == DIDS[:4]
    store.close()


def test_files_whose_key_cannot_be_told_are_an_error_at_the_end(network: LocalNetwork, tmp_path: Path) -> None:
    scene = Scene(network, f"json:///{tmp_path}/s")
    age(scene.client, scene.did, 9 * DAY)
    (tmp_path / "s/sessions/Strange.json").write_text("{}")
    walk = scene.client.accounts()
    assert next(walk).did == scene.did
    with pytest.raises(StoreError, match="Strange"):
        next(walk)
    results: list[KeepAliveResult] = []
    with pytest.raises(StoreError, match="Strange"):
        scene.client.keep_alive(on_result=results.append)
    assert outcomes(results) == [(scene.did, "refreshed")]
    with pytest.raises(StoreError, match="Strange"):
        scene.client.clean()
    scene.close()


def test_a_store_that_cannot_be_walked_says_so_at_once() -> None:
    with client_over(PlainStore()) as client:
        for call in (client.accounts, client.keep_alive, client.clean):
            with pytest.raises(StoreError, match=r"PlainStore has no __iter__\(\) method, which yields its keys"):
                call()


def test_any_store_that_iterates_will_do() -> None:
    mapping: dict[str, Session] = {did: session_of(did) for did in DIDS}
    mapping[DIDS[0]] = session_of(DIDS[0], lifetime=-1.0, refresh_token=None)
    with client_over(mapping) as client:
        assert sorted(account.did for account in client.accounts()) == DIDS
        assert [account.did for account in client.clean().sessions] == DIDS[:1]
        assert sorted(account.did for account in client.accounts()) == DIDS[1:]


def test_a_record_that_goes_during_the_walk_is_left_out() -> None:
    store: MemoryStore[Session] = MemoryStore()
    for did in DIDS:
        store.set(did, session_of(did))
    with client_over(store) as client:
        walk = client.accounts()
        first = next(walk)
        gone = next(did for did in DIDS if did != first.did)
        store.delete(gone)
        assert gone not in {account.did for account in walk}


# Keeping alive


def test_what_was_idle_is_refreshed_the_oldest_first(
    network: LocalNetwork, client: OAuthClient, crowd: list[str]
) -> None:
    fresh = network.create_account()
    log_in(network, client, fresh)
    told: list[KeepAliveResult] = []
    results = client.keep_alive(pace=0, on_result=told.append)
    assert outcomes(results) == [(did, "refreshed") for did in crowd]
    assert told == results
    assert [result.left for result in results] == [3, 2, 1, 0]
    assert [(result.session_id, result.error) for result in results] == [(None, None)] * 4
    assert network.rotations == 4
    for did in crowd:
        assert time.time() - (stored(client, did).refreshed_at or 0.0) < DAY
    assert client.keep_alive(pace=0) == []
    assert network.rotations == 4


def test_how_long_idle_is_can_be_said(network: LocalNetwork, client: OAuthClient, crowd: list[str]) -> None:
    assert outcomes(client.keep_alive(idle=7.5 * DAY, pace=0)) == [(did, "refreshed") for did in crowd[:2]]
    assert len(client.keep_alive(idle=0, pace=0)) == 4
    assert network.rotations == 6


def test_a_session_of_its_own_id_and_one_whose_times_nobody_knows(network: LocalNetwork, client: OAuthClient) -> None:
    account = network.create_account()
    log_in(network, client, account, session_id="phone")
    key = f"{account.did}#phone"
    age(client, key, None)
    (result,) = client.keep_alive()
    assert (result.did, result.session_id, result.outcome) == (account.did, "phone", "refreshed")
    assert client.keep_alive() == []
    age(client, key, -9 * DAY)  # a clock that was wrong
    assert len(client.keep_alive()) == 1
    age(client, key, -60.0)  # one that is a little ahead
    assert client.keep_alive() == []


def test_one_accounts_error_stops_no_other(network: LocalNetwork, client: OAuthClient, crowd: list[str]) -> None:
    network.revoke_sessions(crowd[0])
    session = stored(client, crowd[1])
    assert client._store.replace(crowd[1], replace(session, dpop_key={"kty": "EC"}), session)
    network.fault("refresh", "status", status=503, times=1, after=1)
    results = client.keep_alive(pace=0)
    assert [result.outcome for result in results] == ["ended", "failed", "failed", "refreshed"]
    assert isinstance(results[0].error, TokenRefreshError)
    assert results[0].error.did == crowd[0]
    assert isinstance(results[2].error, OAuthResponseError)
    assert client.sessions.get_stored(crowd[0]) is None
    assert client.sessions.get_stored(crowd[2]) is not None


def test_one_that_was_signed_out_meanwhile(client: OAuthClient, crowd: list[str]) -> None:
    def sign_out(result: KeepAliveResult) -> None:
        if result.did == crowd[0]:
            client.sessions.delete_stored(crowd[1])

    results = client.keep_alive(pace=0, on_result=sign_out)
    assert [result.outcome for result in results] == ["refreshed", "ended", "refreshed", "refreshed"]
    assert isinstance(results[1].error, SessionNotFoundError)


def test_sessions_of_other_clients_and_those_without_a_refresh_token_are_left_alone() -> None:
    store: MemoryStore[Session] = MemoryStore()
    store.set(DIDS[0], replace(session_of(DIDS[0], idle=9 * DAY), client_id="https://other.example/client.json"))
    store.set(DIDS[1], session_of(DIDS[1], idle=9 * DAY, refresh_token=None))
    with client_over(store) as client:
        assert client.keep_alive() == []


def test_what_another_process_has_refreshed_is_not_refreshed_again(
    network: LocalNetwork, client: OAuthClient, crowd: list[str]
) -> None:
    with OAuthClient(
        ClientMetadata.loopback(scope="atproto transition:generic"), store=client._store, **network.client_options()
    ) as other:

        def interfere(result: KeepAliveResult) -> None:
            if result.did == crowd[0]:
                assert len(other.keep_alive(pace=0)) == 3

        results = client.keep_alive(idle=DAY, pace=0, on_result=interfere)
    assert outcomes(results) == [(did, "refreshed") for did in crowd]
    assert network.rotations == 4
    assert network.replays == 0


def test_what_another_brings_after_the_last_look_is_as_good(
    network: LocalNetwork, client: OAuthClient, crowd: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rest_of = upkeep._Servers.rest_of

    def interfere(servers: Any, server: str, key: str) -> SessionError | None:
        client.sessions.get_session(key, True)
        return rest_of(servers, server, key)

    monkeypatch.setattr(upkeep._Servers, "rest_of", interfere)
    assert [result.outcome for result in client.keep_alive(pace=0)] == ["refreshed"] * 4
    assert network.rotations == 4


def test_several_processes_at_once_spend_each_token_once(network: LocalNetwork, tmp_path: Path) -> None:
    scene = Scene(network, f"sqlite:///{tmp_path}/s.db")
    accounts = [network.create_account() for _ in range(5)]
    for account in accounts:
        log_in(network, scene.client, account)
    dids = [scene.did, *(account.did for account in accounts)]
    for did in dids:
        age(scene.client, did, 9 * DAY)
    clients = [scene.open_client() for _ in range(3)]
    workers = [Worker(lambda client=client: client.keep_alive(pace=0)) for client in clients]  # type: ignore[misc]
    for worker in workers:
        assert {result.outcome for result in worker.outcome()} <= {"refreshed"}  # type: ignore[attr-defined]
    assert network.rotations == 6
    assert set(network.refresh_token_uses.values()) == {1}
    for client in [scene.client, *clients]:
        client.close()


def test_it_pauses_between_two_accounts_and_not_after_those_that_cost_nothing(
    network: LocalNetwork, client: OAuthClient, crowd: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(upkeep, "_pause", lambda seconds, cancel: pauses.append(seconds))

    def interfere(result: KeepAliveResult) -> None:
        if result.did == crowd[1]:
            client.sessions.get_session(crowd[2], True)

    client.keep_alive(pace=7.0, on_result=interfere)
    assert pauses == [7.0, 7.0]


@pytest.mark.parametrize("cancel", [None, threading.Event()])
def test_a_pause_ends_by_itself(cancel: threading.Event | None) -> None:
    upkeep._pause(-1.0, cancel)
    upkeep._pause(0.001, cancel)


def test_when_its_time_is_over_the_rest_is_left_for_the_next_call(
    network: LocalNetwork, client: OAuthClient, crowd: list[str]
) -> None:
    assert client.keep_alive(timeout=0) == []
    hold = network.fault("refresh", "hold")
    results = client.keep_alive(pace=0, timeout=0.5)
    assert outcomes(results) == [(crowd[0], "failed")]
    assert isinstance(results[0].error, TimeoutError)
    hold.release.set()
    wait_until(lambda: network.rotations == 1)
    wait_until(lambda: not client.sessions._flights._all)
    assert outcomes(client.keep_alive(pace=0)) == [(did, "refreshed") for did in crowd[1:]]


def test_it_can_be_cancelled_between_two_accounts_and_while_one_is_refreshed(
    network: LocalNetwork, client: OAuthClient, crowd: list[str]
) -> None:
    cancel = threading.Event()
    results = client.keep_alive(pace=SOON, cancel=cancel, on_result=lambda result: cancel.set())
    assert outcomes(results) == [(crowd[0], "refreshed")]
    assert client.keep_alive(cancel=cancel) == []
    hold = network.fault("plc", "hold")
    again = threading.Event()
    worker = Worker(lambda: client.keep_alive(cancel=again))
    assert hold.fired.wait(SOON)
    again.set()
    assert worker.outcome() == []
    hold.release.set()
    assert network.rotations == 1


def test_a_refresh_that_something_else_has_cancelled_is_a_failure(
    client: OAuthClient, crowd: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(*arguments: Any, **options: Any) -> Session:
        raise CancelledError("the thread that began the work was interrupted")

    monkeypatch.setattr(client.sessions, "get_session", cut_short)
    for cancel in (None, threading.Event()):
        assert {result.outcome for result in client.keep_alive(pace=0, cancel=cancel)} == {"failed"}


def test_what_the_callback_raises_is_the_callers(client: OAuthClient, crowd: list[str]) -> None:
    def fail(result: KeepAliveResult) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.keep_alive(on_result=fail)


def test_a_server_that_fails_again_and_again_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    pauses: list[float] = []
    monkeypatch.setattr(upkeep, "_pause", lambda seconds, cancel: pauses.append(seconds))

    class Authority:
        def prepare(self, session: Session) -> Callable[[Session], Session]:
            asked.append(session.token_set.aud)
            if "sick" in session.token_set.aud:
                raise TransportError("it is down")
            return lambda session: replace(session, token_set=replace(session.token_set, access_token="new"))

        def revoke(self, session: Session) -> None: ...

    store: MemoryStore[Session] = MemoryStore()
    for number, did in enumerate(DIDS):
        aud = "https://well.example" if number == 5 else "https://sick.example"
        store.set(did, session_of(did, idle=20 * DAY - number, aud=aud))
    with client_over(store) as client:
        client.sessions._world = replace(client.sessions._world, authority=Authority())
        results = client.keep_alive(pace=7.0)
    assert [result.outcome for result in results] == ["failed"] * 5 + ["refreshed"]
    assert pauses == [7.0] * 3, "and none for those that nothing was sent for"
    assert Counter(asked) == {"https://sick.example": 3, "https://well.example": 1}
    for result in results[3:5]:
        assert result.error is not None
        assert result.error.retryable
        assert "sick.example has failed 3 times in a row" in str(result.error)
        assert 0 < (result.error.retry_after or 0) <= 1
        assert result.error.did == result.did


def test_which_failures_are_a_servers() -> None:
    now = [1000.0]
    servers = upkeep._Servers(lambda: now[0])
    for error in (
        IdentityError("the directory is away", retryable=True),
        StoreError("busy", retryable=True),
        CancelledError("cancelled"),
        TokenRefreshError("over"),
        OAuthResponseError("bad", status=400),
    ):
        for _ in range(4):
            servers.note("a", error)
    assert servers.rest_of("a", "key") is None
    for _ in range(2):
        servers.note("a", RefreshInterruptedError("lost"))
    servers.note("a", None)
    for _ in range(2):
        servers.note("a", TransportError("away"))
    assert servers.rest_of("a", "key") is None
    servers.note("a", OAuthResponseError("slow down", status=429, retry_after=90.0))
    assert servers.rest_of("b", "key") is None
    now[0] += 89.0
    assert "3 times" in str(servers.rest_of("a", "key"))
    now[0] += 1.5
    assert servers.rest_of("a", "key") is None
    for _ in range(20):
        servers.note("a", TransportError("away"))
    rest = servers.rest_of("a", "key")
    assert rest is not None
    assert rest.retry_after == 60.0


@pytest.mark.parametrize("name", ["idle", "pace", "timeout"])
def test_times_that_are_none(name: str, client: OAuthClient) -> None:
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name} is a finite number of seconds, 0 or more"):
            client.keep_alive(**{name: value})  # type: ignore[arg-type]
    for wrong in ("1", timedelta(days=1), True):
        with pytest.raises(TypeError, match=f"{name} is a number of seconds, not"):
            client.keep_alive(**{name: wrong})  # type: ignore[arg-type]


# Cleaning


def test_what_nobody_can_use_is_deleted_and_nothing_else() -> None:
    over = session_of(DIDS[0], lifetime=-1.0, refresh_token=None)
    kept = {
        DIDS[1]: session_of(DIDS[1], lifetime=60.0, refresh_token=None),
        DIDS[2]: replace(over, token_set=replace(over.token_set, sub=DIDS[2], expires_at=None)),
        DIDS[3]: session_of(DIDS[3], idle=1000 * DAY, lifetime=-900 * DAY),
        DIDS[4]: replace(over, token_set=replace(over.token_set, sub=DIDS[4]), client_id="https://other.example"),
        DIDS[5]: replace(session_of(DIDS[5], lifetime=-1.0), attempt=Attempt("1", "worker", 1.0, 2.0, is_over=True)),
    }
    unmarked = replace(over, token_set=replace(over.token_set, sub=DIDS[5]), client_id=None)
    store: MemoryStore[Session] = MemoryStore()
    for key, session in {f"{DIDS[0]}#a": over, f"{DIDS[5]}#node": unmarked, **kept}.items():
        store.set(key, session)
    told: list[SessionDeletedEvent] = []
    with client_over(store, on_session_deleted=told.append) as client:
        cleaned = client.clean()
        assert sorted((account.did, account.session_id) for account in cleaned.sessions) == [
            (DIDS[0], "a"),
            (DIDS[5], "node"),
        ]
        assert sorted(event.sub for event in told) == [f"{DIDS[0]}#a", f"{DIDS[5]}#node"]
        assert all(isinstance(event.cause, TokenRefreshError) for event in told)
        assert sorted(store) == sorted(kept)
        assert client.clean().sessions == ()


def test_what_has_come_since_stays_and_a_store_that_fails_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store: MemoryStore[Session] = MemoryStore()
    for did in DIDS[:3]:
        store.set(did, session_of(did, lifetime=-1.0, refresh_token=None))
    replace_ = store.replace

    def interfere(key: str, session: Session | None, expected: Any) -> bool:
        if key == DIDS[0]:
            store.set(key, session_of(key))
        if key == DIDS[1]:
            raise StoreError("the disk is gone")
        return replace_(key, session, expected)

    monkeypatch.setattr(store, "replace", interfere)
    with client_over(store) as client:
        assert [account.did for account in client.clean().sessions] == DIDS[2:3]
    assert sorted(store) == DIDS[:2]
    assert "stays in the store: the disk is gone" in caplog.text


@pytest.fixture(params=["memory:", "json:///s", "sqlite:///s.db", "own", "own with purge"])
def logins(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OAuthClient]:
    monkeypatch.chdir(tmp_path)

    class Own(PlainStore):
        logins = MemoryStore[Session]().logins

        def __iter__(self) -> Iterator[str]:
            return iter(self.sessions)

    store: Any = request.param
    if store == "own":
        Own.logins = Logins()  # type: ignore[assignment]
    with client_over(Own() if store.startswith("own") else store) as client:
        yield client


class Logins:
    """Log-ins that expire by themselves."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}

    def put(self, state: str, document: dict[str, Any], expires_at: float) -> None:
        if time.time() < expires_at:
            self.kept[state] = document

    def take(self, state: str) -> dict[str, Any] | None:
        return self.kept.pop(state, None)


def test_log_ins_past_their_hour_are_deleted(logins: OAuthClient, request: pytest.FixtureRequest) -> None:
    now = time.time()
    store = logins._store.logins
    store.put("pending", {"a": 1}, now + 3600)
    store.put("over", {"a": 2}, now - 1)
    assert logins.clean().logins == (0 if "[own]" in request.node.name else 1)
    assert logins.clean().logins == 0
    assert store.take("pending") == {"a": 1}
    assert store.take("over") is None


def test_a_session_that_is_being_refreshed_stays(network: LocalNetwork, client: OAuthClient, crowd: list[str]) -> None:
    network.fault("refresh", "hold")
    store_tokens(client, crowd[0], expires_at=datetime.now(UTC) - timedelta(days=1))
    worker = Worker(lambda: client.sessions.get_session(crowd[0], True))
    wait_until(lambda: stored(client, crowd[0]).attempt)
    assert client.clean().sessions == ()
    network.clear_faults()
    worker.outcome()
    assert sorted(account.did for account in client.accounts()) == sorted(crowd)
