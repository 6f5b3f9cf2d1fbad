"""The main job on the local network: log in, call, refresh, restore, sign out; and what can go wrong on the way."""

from __future__ import annotations

import io
import pickle
import sqlite3
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import jwt
import pytest
import requests

from atproto_session import (
    ClientMetadata,
    ClientMetadataError,
    DiscoveryError,
    IdentityError,
    LockTimeoutError,
    MemoryStore,
    OAuthCallbackError,
    OAuthClient,
    OAuthResponseError,
    OAuthSession,
    Session,
    SessionDeletedEvent,
    SessionError,
    SessionNotFoundError,
    SessionUpdatedEvent,
    StoreError,
    TokenInvalidError,
    TokenRefreshError,
    TokenRevokedError,
    TransportError,
)
from atproto_session.testing.network import Account, LocalNetwork, Request, Response

from .core import SOON, Worker, wait_until
from .scenes import ECHO, GET_SESSION, log_in


def params_of(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))


# Logging in


@pytest.mark.parametrize("start", ["handle", "@handle", "did", "pds"])
@pytest.mark.duty(4, 23)
def test_log_in_from(start: str, network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    given = {
        "handle": account.handle,
        "@handle": f" @{account.handle.upper()} ",
        "did": account.did,
        "pds": network.pds_url,
    }[start]
    url = client.authorize(given, state="where they came from")
    assert sorted(params_of(url)) == ["client_id", "request_uri"]
    result = client.callback(network.authorize(url, account))
    assert result.state == "where they came from"
    assert result.session.did == account.did
    assert result.session.get(GET_SESSION).json()["handle"] == account.handle


def test_log_in_at_an_entryway() -> None:
    with LocalNetwork(entryway=True) as network:
        account = network.create_account()
        metadata = ClientMetadata.loopback()
        with OAuthClient(metadata, store="memory:", **network.client_options()) as client:
            result = client.callback(network.authorize(client.authorize(network.issuer), account))
            assert result.session.get(GET_SESSION).json()["did"] == account.did
            assert result.session.token_info().iss == network.issuer != network.pds_url
            assert result.session.token_info().aud == network.pds_url


@pytest.mark.duty(31)
def test_the_callback_as_a_mapping(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    params = params_of(network.authorize(client.authorize(account.did), account))
    listed = {name: [value] for name, value in params.items()}
    assert client.callback(listed).session.did == account.did


@pytest.mark.duty(25, 31)
def test_a_callback_counts_once(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    callback = network.authorize(client.authorize(account.did), account)
    client.callback(callback)
    with pytest.raises(OAuthCallbackError, match="begin it again"):
        client.callback(callback)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"state": "forged"}, "not begun here"),
        ({"state": None}, "not begun here"),
        ({"iss": "https://evil.example.com"}, "does not come from the server"),
        ({"iss": None}, "does not come from the server"),
        ({"code": None}, "no code"),
        ({"response": "a.b.c"}, "JARM"),
        ({"error": "access_denied"}, "access_denied"),
    ],
)
@pytest.mark.duty(31, 43)
def test_a_callback_that_is_not_right(
    change: dict[str, Any], why: str, network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    params = params_of(network.authorize(client.authorize(account.did, state="mine"), account))
    code = params["code"]
    given = {name: value for name, value in (params | change).items() if value is not None}
    with pytest.raises(OAuthCallbackError, match=why) as caught:
        client.callback(given)
    assert code not in str(caught.value)
    assert code not in repr(caught.value.params)
    if "state" not in change:
        assert caught.value.state == "mine"
        with pytest.raises(OAuthCallbackError):
            client.callback(params)
    assert network.token_requests == 0


def test_a_parameter_given_twice(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    callback = network.authorize(client.authorize(account.did), account)
    with pytest.raises(OAuthCallbackError, match="more than once"):
        client.callback(f"{callback}&state=other")
    with pytest.raises(OAuthCallbackError, match="cannot be read"):
        client.callback("http://127.0.0.1/?" + urlencode([("a", "b")] * 200))


def test_the_user_declines(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    callback = network.authorize(client.authorize(account.did, state="mine"), account, approve=False)
    with pytest.raises(OAuthCallbackError, match="access_denied") as caught:
        client.callback(callback)
    assert caught.value.state == "mine"
    assert caught.value.params["error"] == "access_denied"


@pytest.mark.duty(33)
def test_another_account_than_the_one_that_was_asked_for(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    other = network.create_account()
    callback = network.authorize(client.authorize(account.did), other)
    with pytest.raises(OAuthCallbackError, match="another account"):
        client.callback(callback)
    assert network.revocations == 1
    assert list(client._store) == []


@pytest.mark.duty(33)
def test_an_account_that_the_server_does_not_speak_for(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    url = client.authorize(network.pds_url)
    callback = network.authorize(url, account)
    network.move_account_to_other_issuer(account.did)
    with pytest.raises(OAuthCallbackError, match="now belongs to"):
        client.callback(callback)
    assert network.revocations == 1


@pytest.mark.duty(3, 33)
def test_an_account_that_cannot_be_verified(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    callback = network.authorize(client.authorize(account.did), account)
    network.fault("plc", "status", status=500, times=None)
    with pytest.raises(IdentityError) as caught:
        client.callback(callback)
    assert caught.value.retryable, "nothing was spent"
    assert list(client._store) == []
    network.clear_faults()
    assert client.callback(callback).session.did == account.did


def test_a_session_belongs_to_the_client_that_got_it(network: LocalNetwork, account: Account, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/sessions.db"
    one = OAuthClient(ClientMetadata.loopback(), store=store, **network.client_options())
    other = OAuthClient(
        ClientMetadata.loopback(scope="atproto transition:generic"), store=store, **network.client_options()
    )
    with one, other:
        log_in(network, one, account)
        for use in (other.restore, other.revoke, lambda did: other.restore(did, refresh=True)):
            with pytest.raises(TokenRefreshError, match="log in again") as caught:
                use(account.did)
            assert caught.value.login_required
            assert one.metadata.client_id in str(caught.value)
            assert other.metadata.client_id in str(caught.value)
        assert caught.value.did == account.did
        one.restore(account.did, refresh=True)
        assert (network.rotations, network.replays, network.revocations) == (1, 0, 0)
        log_in(network, other, account)
        assert network.revocations == 0, "another client's grant is its own"


@pytest.mark.parametrize("argument", [None, b"alice.test", 1])
def test_arguments_that_are_no_strings(client: OAuthClient, argument: Any) -> None:
    with pytest.raises(TypeError, match="account is a string"):
        client.authorize(argument)
    with pytest.raises(TypeError, match="params is what the browser brought back"):
        client.callback(argument)


@pytest.mark.duty(32)
def test_fewer_scopes_than_asked(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    callback = network.authorize(client.authorize(account.did), account, scope="atproto")
    assert client.callback(callback).session.token_info().scope == "atproto"


def test_two_sessions_of_one_account(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    for session_id in ("phone", "desk"):
        callback = network.authorize(client.authorize(account.did), account)
        client.callback(callback, session_id=session_id)
    with pytest.raises(SessionNotFoundError):
        client.restore(account.did)
    client.revoke(account.did, session_id="phone")
    with pytest.raises(SessionNotFoundError):
        client.restore(account.did, session_id="phone")
    assert client.restore(account.did, session_id="desk").get(GET_SESSION).status_code == 200
    with pytest.raises(ValueError, match="session_id"):
        client.restore(account.did, session_id="")


def test_a_bad_session_id_costs_nothing(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    callback = network.authorize(client.authorize(account.did), account)
    with pytest.raises(ValueError, match="session_id"):
        client.callback(callback, session_id="")
    assert client.callback(callback, session_id="work").session.did == account.did


@pytest.mark.duty(23)
def test_what_cannot_be_begun(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    with pytest.raises(IdentityError) as caught:
        client.authorize("nobody.test")
    assert caught.value.reason == "failed"
    with pytest.raises(IdentityError) as caught:
        client.authorize("not a handle")
    assert caught.value.reason == "malformed"
    with pytest.raises(ClientMetadataError, match="scope"):
        client.authorize(account.did, scope="atproto transition:email")
    with pytest.raises(ClientMetadataError, match="redirect"):
        client.authorize(account.did, redirect_uri="https://elsewhere.example.com/callback")
    with pytest.raises(IdentityError):
        client.restore("alice.test")
    network.fault("as-metadata", "html", times=None)
    with pytest.raises(DiscoveryError):
        client.authorize(account.did)


@pytest.mark.duty(43)
def test_a_server_that_refuses_the_request(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    network.fault("par", "oauth_error", error="invalid_request", description="no\x1b[31m", status=400)
    with pytest.raises(OAuthResponseError) as caught:
        client.authorize(account.did)
    assert caught.value.error == "invalid_request"
    assert "\x1b" not in str(caught.value)
    assert not caught.value.retryable


@pytest.mark.duty(28)
@pytest.mark.parametrize("endpoint", ["par", "token"])
def test_a_strict_client_refuses_an_answer_without_a_nonce(
    endpoint: str, network: LocalNetwork, account: Account
) -> None:
    client = OAuthClient(ClientMetadata.loopback(), store="memory:", strict=True, **network.client_options())
    url = client.authorize(account.did)
    if endpoint == "token":
        callback = network.authorize(url, account)
    network.fault(endpoint, "no_nonce", times=None)
    with pytest.raises(TransportError, match="nonce"):
        client.authorize(account.did) if endpoint == "par" else client.callback(callback)
    assert network.revocations == (endpoint == "token"), "what was issued is given back"
    client.close()


def test_a_store_that_two_processes_cannot_share_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with OAuthClient(ClientMetadata.loopback(), store={}):  # type: ignore[arg-type]
        pass
    assert "one process only" in caplog.text
    caplog.clear()
    with OAuthClient(ClientMetadata.loopback(), store="memory:"):
        pass
    assert caplog.text == ""


def test_trusted_hosts_that_are_none() -> None:
    with pytest.raises(ValueError, match="trusted_hosts"):
        OAuthClient(ClientMetadata.loopback(), store="memory:", trusted_hosts=["http://pds"])


def test_an_unknown_store_and_an_unwritable_place(network: LocalNetwork) -> None:
    for store in ("mongodb://localhost", "sqlite:////proc/none/sessions.db", "json:////proc/none"):
        with pytest.raises(StoreError):
            OAuthClient(ClientMetadata.loopback(), store=store, **network.client_options())


def test_nothing_is_sent_after_the_end(network: LocalNetwork, account: Account, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/sessions.db"
    with OAuthClient(ClientMetadata.loopback(), store=store, **network.client_options()) as client:
        client.callback(network.authorize(client.authorize(account.did), account))
        fault = network.fault("refresh", "late")
        refresh = Worker(lambda: client.sessions.get_session(account.did, True))
        assert fault.fired.wait(SOON)
        closing = Worker(client.close)
        wait_until(lambda: client.sessions._flights._closed)
        stored = client.sessions.get_session(account.did, False)
        with pytest.raises(SessionError, match="it is closed"):
            client.sessions._flights.board("another", lambda flight: stored, deadline=0.0)
        fault.release.set()
        closing.outcome()
        refresh.outcome()
    assert set(network.refresh_token_uses.values()) == {1}
    with OAuthClient(ClientMetadata.loopback(), store=store, **network.client_options()) as later:
        assert later.restore(account.did, refresh=True).get(GET_SESSION).status_code == 200


# Using it


def test_a_fresh_session_makes_no_request_but_the_callers(network: LocalNetwork, session: OAuthSession) -> None:
    network.rotate_nonces()
    session.get(ECHO)
    before = network.resource_requests, network.token_requests
    assert session.get(ECHO).status_code == 200
    assert (network.resource_requests, network.token_requests) == (before[0] + 1, before[1])


def test_a_session_is_not_read_again_for_a_request_that_follows_at_once(
    client: OAuthClient, session: OAuthSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    get = client._store.get
    monkeypatch.setattr(client._store, "get", lambda key: reads.append(key) or get(key))  # type: ignore[func-returns-value]
    restored = client.restore(session.did)
    restored.get(ECHO)
    assert len(reads) == 1
    restored.get(ECHO)
    assert len(reads) == 2
    restored = client.restore(session.did)
    monkeypatch.setattr("atproto_session._signer.time.monotonic", lambda: float("inf"))
    restored.get(ECHO)
    assert len(reads) == 4, "one for each after a while"


def test_a_token_that_was_replaced_since_it_was_read_is_no_matter(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    restored = client.restore(session.did)
    client.restore(session.did, refresh=True)
    assert restored.get(ECHO).status_code == 200
    assert network.rotations == 1


@pytest.mark.duty(27)
def test_nonces_that_change_are_no_matter(network: LocalNetwork, session: OAuthSession) -> None:
    for _ in range(3):
        network.rotate_nonces()
        assert session.get(ECHO).status_code == 200
    network.fault("resource", "nonce_challenge", times=1)
    assert session.get(ECHO).status_code == 200


@pytest.mark.duty(27, 40)
def test_a_nonce_wanted_again_and_again_is_the_callers_to_see(network: LocalNetwork, session: OAuthSession) -> None:
    fault = network.fault("resource", "nonce_challenge", times=None)
    assert session.get(ECHO).status_code == 401
    assert fault.count == 2
    assert network.rotations == 0


@pytest.mark.duty(40)
@pytest.mark.parametrize("scheme", ["DPoP", "Bearer"])
def test_an_expired_token_is_replaced_and_the_request_sent_again(scheme: Any) -> None:
    with LocalNetwork(challenge_scheme=scheme) as network:
        account = network.create_account()
        with OAuthClient(ClientMetadata.loopback(), store="memory:", **network.client_options()) as client:
            session = client.callback(network.authorize(client.authorize(account.did), account)).session
            network.expire_access_tokens(account.did)
            response = session.post(ECHO, data=b"hello")
            assert response.status_code == 200
            assert response.json()["length"] == 5
            assert network.rotations == 1


@pytest.mark.duty(40)
@pytest.mark.parametrize("body", [b"0123456789", io.BytesIO(b"0123456789"), {"a": "b"}])
def test_bodies_that_can_be_sent_again(body: Any, network: LocalNetwork, session: OAuthSession) -> None:
    network.expire_access_tokens(session.did)
    network.rotate_nonces()
    assert session.post(ECHO, data=body).status_code == 200


def test_a_stream_cannot_be_sent_again(network: LocalNetwork, session: OAuthSession) -> None:
    session.get(ECHO)
    network.expire_access_tokens(session.did)
    assert session.post(ECHO, data=iter([b"01234", b"56789"])).status_code == 401
    assert network.rotations == 0
    network.fault("resource", "nonce_challenge")
    assert session.post(ECHO, data=iter([b"01234", b"56789"])).status_code == 401


def test_a_file_that_cannot_be_wound_back(network: LocalNetwork, session: OAuthSession) -> None:
    class OneWay(io.BytesIO):
        def read(self, *args: int | None) -> bytes:
            self.seek = self.refuse  # type: ignore[method-assign]
            return super().read(*args)

        def refuse(self, *args: int) -> int:
            raise OSError("a pipe")

    session.get(ECHO)
    network.expire_access_tokens(session.did)
    assert session.post(ECHO, data=OneWay(b"0123456789")).status_code == 401


@pytest.mark.duty(40)
def test_tokens_refused_for_good_end_the_session(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    events: list[SessionDeletedEvent] = []
    client.sessions.on_deleted(events.append)
    session._signer._sleep = lambda seconds: None
    network.reject_access_tokens(session.did)
    with pytest.raises(TokenInvalidError) as caught:
        session.get(ECHO)
    assert caught.value.login_required
    assert [event.cause for event in events] == [caught.value]
    with pytest.raises(SessionNotFoundError):
        client.restore(session.did)
    assert network.rotations == 1


@pytest.mark.duty(40)
@pytest.mark.parametrize("status", [403, 429, 401])
def test_other_refusals_are_not_about_the_token(status: int, network: LocalNetwork, session: OAuthSession) -> None:
    network.fault("resource", "status", status=status, headers={"Retry-After": "7"}, times=None)
    assert session.get(ECHO).status_code == status
    assert network.rotations == 0


@pytest.mark.duty(41)
def test_headers_pass_through(session: OAuthSession) -> None:
    headers = {"atproto-proxy": "did:web:api.example.com#bsky_appview"}
    echoed = session.get(ECHO, headers=headers, params={"limit": 10}).json()
    assert {name.lower(): value for name, value in echoed["headers"].items()}["atproto-proxy"] == headers[
        "atproto-proxy"
    ]
    assert echoed["query"] == {"limit": ["10"]} or echoed["query"] == {"limit": "10"}


def test_tokens_go_to_the_pds_alone(network: LocalNetwork, client: OAuthClient, session: OAuthSession) -> None:
    with LocalNetwork() as elsewhere:
        with pytest.raises(TransportError, match="alone"):
            session.get(f"{elsewhere.pds_url}{ECHO}")
        with pytest.raises(TransportError, match="alone"):
            session.get("/xrpc/app.test.redirect", params={"to": f"{elsewhere.pds_url}{ECHO}"})
        with pytest.raises(TransportError, match="alone"):
            requests.get(f"{elsewhere.pds_url}{ECHO}", auth=client.auth(session.did), timeout=10)
        assert elsewhere.resource_requests == 0


@pytest.mark.parametrize(
    "to",
    [
        *("javascript:alert(1)", "file:///etc/passwd", "data:text/html,x", "mailto:a@example.com", "https://["),
        *("https://a:b/", "https://[::1", "https://", "ftp://pds.example.com/", "//["),
    ],
)
def test_a_redirect_to_what_is_no_url_is_a_transport_error(
    to: str, network: LocalNetwork, session: OAuthSession
) -> None:
    network.fault("resource", "redirect", to=to)
    with pytest.raises(TransportError, match="redirects to an address that") as caught:
        session.get(ECHO)
    assert not caught.value.retryable
    assert caught.value.sent


def test_a_request_to_what_is_no_url_is_a_transport_error(session: OAuthSession) -> None:
    with pytest.raises(TransportError, match="was not sent") as caught:
        session.get("javascript:alert(1)")
    assert not caught.value.retryable


def test_a_redirect_within_the_pds_is_followed(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    assert session.get("/xrpc/app.test.redirect", params={"to": ECHO}).status_code == 200
    url = f"{network.pds_url}/xrpc/app.test.redirect"
    assert requests.get(url, params={"to": ECHO}, auth=client.auth(session.did), timeout=10).status_code == 200


def test_netrc_does_not_interfere(
    network: LocalNetwork, session: OAuthSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine localhost login root password secret")
    monkeypatch.setenv("NETRC", str(netrc))
    assert session.get(GET_SESSION).status_code == 200


def test_requests_of_ones_own(network: LocalNetwork, client: OAuthClient, session: OAuthSession) -> None:
    auth = client.auth(session.did)
    assert session.did in repr(auth)
    url = network.pds_url + ECHO
    own = requests.Session()
    network.rotate_nonces()
    assert own.get(url, auth=auth).status_code == 200
    network.expire_access_tokens(session.did)
    response = own.post(url, data=b"hello", auth=auth)
    assert response.status_code == 200
    assert response.json()["length"] == 5
    assert [earlier.status_code for earlier in response.history] == [401]
    session._signer._sleep = lambda seconds: None
    network.reject_access_tokens(session.did)
    with pytest.raises(TokenInvalidError):
        own.get(url, auth=auth)
    own.close()


def test_a_redirect_away_takes_no_token_along(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    with LocalNetwork() as elsewhere:
        away = elsewhere.pds_url.replace("localhost", "127.0.0.1") + ECHO
        url = f"{network.pds_url}/xrpc/app.test.redirect"
        response = requests.get(url, params={"to": away}, auth=client.auth(session.did), timeout=10)
        assert response.status_code == 401
        assert "Authorization" not in response.request.headers


def test_what_may_be_shown(session: OAuthSession, client: OAuthClient, network: LocalNetwork) -> None:
    info = session.token_info()
    assert (info.sub, info.iss, info.aud) == (session.did, network.issuer, network.pds_url)
    assert info.expired is False
    assert set(info.scope.split()) == {"atproto", "transition:generic"}
    assert session.did in repr(session)
    with pytest.raises(TypeError, match="restore"):
        pickle.dumps(session)


def test_restore_refreshes_on_demand(network: LocalNetwork, client: OAuthClient, session: OAuthSession) -> None:
    client.restore(session.did)
    assert network.rotations == 0
    client.restore(session.did, refresh=True)
    assert network.rotations == 1
    client.restore(session.did, refresh=False)
    assert session.token_info(refresh=True).expired is False
    assert network.rotations == 2


def test_events(network: LocalNetwork) -> None:
    events: list[SessionUpdatedEvent | SessionDeletedEvent] = []
    account = network.create_account()
    with OAuthClient(
        ClientMetadata.loopback(),
        store="memory:",
        on_session_updated=events.append,
        on_session_deleted=events.append,
        **network.client_options(),
    ) as client:
        session = client.callback(network.authorize(client.authorize(account.did), account)).session
        client.restore(account.did, refresh=True)
        session.sign_out()
    assert [type(event) for event in events] == [SessionUpdatedEvent, SessionUpdatedEvent, SessionDeletedEvent]
    assert {event.sub for event in events} == {account.did}
    assert isinstance(events[-1], SessionDeletedEvent)
    assert isinstance(events[-1].cause, TokenRevokedError)


@pytest.mark.duty(2, 32, 36)
@pytest.mark.parametrize("expires_in", [None, 90 * 86400, 0, 10**400])
def test_tokens_are_opaque_and_live_as_long_as_the_server_says(
    expires_in: int | None, network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    # A JWT that says that it expired in 2001, of another account.
    lie = jwt.encode({"exp": 1_000_000_000, "sub": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"}, "", algorithm="none")

    body: dict[str, object] = {
        "access_token": lie,
        "token_type": "DPoP",
        "scope": "atproto",
        "sub": account.did,
        "refresh_token": lie,
    }
    if expires_in is not None:
        body["expires_in"] = expires_in

    def respond(request: Request) -> Response:
        return replace(Response.of_json(body), headers={"Content-Type": "application/json", "DPoP-Nonce": "n"})

    network.fault("token", "custom", respond=respond)
    session = client.callback(network.authorize(client.authorize(account.did), account)).session
    info = session.token_info(refresh=False)
    assert info.sub == account.did
    if expires_in is None or expires_in > 1e9:
        assert (info.expires_at, info.expired) == (None, None)
    else:
        assert info.expires_at is not None
        left = (info.expires_at - datetime.now(UTC)).total_seconds()
        assert expires_in - 60 < left <= expires_in
        assert info.expired is (expires_in == 0)


# Ending it


@pytest.mark.duty(38)
def test_signing_out_ends_the_session_here_and_there(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    tokens = client.sessions.get_session(session.did).token_set
    session.sign_out()
    assert network.revocations == 1
    info = network.session_of(tokens.access_token)
    assert info is not None
    assert info.revoked
    with pytest.raises(SessionNotFoundError):
        session.get(ECHO)
    session.sign_out()
    assert network.revocations == 1


@pytest.mark.duty(38)
def test_signing_out_works_without_the_server(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession, caplog: pytest.LogCaptureFixture
) -> None:
    network.fault("revoke", "cut_before")
    client.revoke(session.did)
    assert "could not be revoked" in caplog.text
    with pytest.raises(SessionNotFoundError):
        client.restore(session.did)


@pytest.mark.parametrize("way", ["revoke", "sign_out"])
def test_signing_out_keeps_to_its_time_at_a_slow_server(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession, way: str
) -> None:
    slow = network.fault("revoke", "hold")
    if way == "revoke":
        client.revoke(session.did, timeout=0.1)
    else:
        session.sign_out(timeout=0.1)
    assert network.revocations == 0
    with pytest.raises(SessionNotFoundError, match="was signed out"):
        client.restore(session.did)
    slow.release.set()
    wait_until(lambda: network.revocations == 1)


@pytest.mark.parametrize("way", ["revoke", "sign_out"])
def test_signing_out_keeps_to_its_time_over_a_busy_database(
    network: LocalNetwork, account: Account, tmp_path: Path, way: str
) -> None:
    options = network.client_options()
    with OAuthClient(ClientMetadata.loopback(), store=f"sqlite:///{tmp_path}/sessions.db", **options) as client:
        session = log_in(network, client, account)
        other = sqlite3.connect(tmp_path / "sessions.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LockTimeoutError):
            client.revoke(session.did, timeout=0.1) if way == "revoke" else session.sign_out(timeout=0.1)
        other.execute("ROLLBACK")
        other.close()
        wait_until(lambda: network.revocations == 1)
        assert client.sessions.get_stored(session.did) is None


@pytest.mark.duty(37)
def test_a_session_revoked_elsewhere(network: LocalNetwork, client: OAuthClient, session: OAuthSession) -> None:
    network.revoke_sessions(session.did)
    with pytest.raises(Exception, match="log in again") as caught:
        session.get(ECHO)
    assert caught.value.login_required  # type: ignore[attr-defined]


# An account that moves


@pytest.mark.duty(34, 39)
def test_an_account_that_moves_within_its_issuer_takes_its_session_along() -> None:
    with LocalNetwork(entryway=True) as network:
        account = network.create_account()
        with OAuthClient(ClientMetadata.loopback(), store="memory:", **network.client_options()) as client:
            session = client.callback(network.authorize(client.authorize(account.did), account)).session
            new = network.move_account(account.did)
            network.expire_access_tokens(account.did)
            response = session.get(GET_SESSION)
            assert response.status_code == 200
            assert response.url.startswith(new)
            assert session.token_info().aud == new
            assert session.get(GET_SESSION).url.startswith(new)


@pytest.mark.duty(34)
def test_an_account_that_moves_to_another_issuer_has_to_log_in_again(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    network.move_account_to_other_issuer(session.did)
    with pytest.raises(Exception, match="now belongs to the authorization server") as caught:
        client.restore(session.did, refresh=True)
    assert caught.value.login_required  # type: ignore[attr-defined]
    assert network.token_requests == 1, "only the log-in"
    assert client.restore(session.did, False).did == session.did, "nobody has ended it"


@pytest.mark.duty(39)
def test_a_handle_that_changes_is_no_matter(network: LocalNetwork, client: OAuthClient, session: OAuthSession) -> None:
    network.change_handle(session.did, "bob.test")
    assert client.restore(session.did, refresh=True).get(GET_SESSION).json()["handle"] == "bob.test"


def test_a_store_is_told_when_a_log_in_s_thread_ends(network: LocalNetwork, account: Account) -> None:
    """As with refreshes: it may keep a connection for each thread."""

    class Store(MemoryStore[Session]):
        def thread_ended(self) -> None:
            ended.append(threading.current_thread())

    ended: list[threading.Thread] = []
    metadata = ClientMetadata.loopback(scope="atproto")
    with OAuthClient(metadata, store=Store(), **network.client_options()) as client:
        client.authorize(account.did)
        wait_until(lambda: ended)
    assert threading.current_thread() not in ended
