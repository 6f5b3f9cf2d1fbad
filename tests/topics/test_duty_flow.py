"""What a log-in, its callback, the refreshes and the end of a session look like on the wire, clause by clause."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jwt
import pytest
import requests

from atproto_session import (
    ClientAuthMethod,
    ClientMetadata,
    IdentityError,
    Keyset,
    MemoryStore,
    OAuthCallbackError,
    OAuthClient,
    OAuthResponseError,
    OAuthSession,
    Session,
    SessionError,
    SessionNotFoundError,
    StoreError,
    TokenRefreshError,
    TransportError,
)
from atproto_session.dpop import challenge_of
from atproto_session.keys import generate_jwk, public_jwk
from atproto_session.testing.network import Account, LocalNetwork, Request, Response

from ..scenes import ECHO, GET_SESSION, log_in

REDIRECT_URI = "http://127.0.0.1:4711/"


@dataclass(frozen=True)
class Post:
    """A form that the client sent."""

    path: str
    headers: dict[str, str]
    form: dict[str, str]


def posts_of(client: OAuthClient) -> list[Post]:
    """What ``client`` posts from now on."""
    posts: list[Post] = []
    request = client._transport.request

    def spy(method: str, url: str, **options: Any) -> Any:
        if method == "POST":
            posts.append(Post(urlsplit(url).path, dict(options["headers"]), dict(options["data"])))
        return request(method, url, **options)

    client._transport.request = spy  # type: ignore[method-assign]
    return posts


def claims_of(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


def query_of(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))


def nonce_of(network: LocalNetwork) -> str:
    """A nonce that the servers take at this moment."""
    return network._proofs[0].nonces.current()


@pytest.fixture
def entryway() -> Iterator[LocalNetwork]:
    with LocalNetwork(entryway=True) as network:
        yield network


@pytest.fixture
def entryway_client(entryway: LocalNetwork) -> Iterator[OAuthClient]:
    with OAuthClient(ClientMetadata.loopback(), store="memory:", **entryway.client_options()) as client:
        yield client


# The authorization request


@pytest.mark.duty(1, 4, 23)
@pytest.mark.parametrize("start", ["handle", "@HANDLE", "did", "pds"])
def test_what_is_pushed(start: str, network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    posts = posts_of(client)
    given = {"handle": account.handle, "@HANDLE": f"@{account.handle.upper()}", "did": account.did}
    hint = {"handle": account.handle, "@HANDLE": account.handle, "did": account.did}.get(start)
    client.authorize(given.get(start, network.pds_url), redirect_uri=REDIRECT_URI, scope="atproto", prompt="login")
    push = posts[-1]
    assert push.path == "/oauth/par"
    form = dict(push.form)
    assert len(form.pop("state")) >= 22, "128 bits and more"
    assert len(form.pop("code_challenge")) == 43
    assert form == {
        "client_id": client.metadata.client_id,
        "response_type": "code",
        "code_challenge_method": "S256",
        "redirect_uri": REDIRECT_URI,
        "scope": "atproto",
        "prompt": "login",
    } | ({} if hint is None else {"login_hint": hint})
    assert claims_of(push.headers["DPoP"])["htm"] == "POST"


@pytest.mark.duty(23, 24)
def test_the_browser_learns_nothing_that_was_pushed(client: OAuthClient, account: Account) -> None:
    posts = posts_of(client)
    url = client.authorize(account.did, state="where-they-came-from")
    assert sorted(query_of(url)) == ["client_id", "request_uri"]
    for secret in (posts[-1].form["state"], posts[-1].form["code_challenge"], account.did):
        assert secret not in url
    assert not [post for post in posts if "came-from" in str(post)], "nothing is kept inside of the state"


@pytest.mark.duty(24, 26)
def test_two_log_ins_share_nothing(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    posts = posts_of(client)
    sessions = []
    for number in ("one", "two"):
        callback = network.authorize(client.authorize(account.did), account)
        client.callback(callback, session_id=number)
        sessions.append(client.sessions.get_session(f"{account.did}#{number}"))
    pushed = [post.form for post in posts if post.path == "/oauth/par"]
    exchanged = [post.form for post in posts if post.path == "/oauth/token"]
    assert len({form["state"] for form in pushed}) == 2
    assert len({form["code_challenge"] for form in pushed}) == 2
    assert len({form["code_verifier"] for form in exchanged}) == 2
    assert all(len(form["code_verifier"]) >= 43 for form in exchanged)
    assert not sessions[0].is_same_grant(sessions[1])


@pytest.mark.duty(44)
def test_scopes_go_out_as_they_are(network: LocalNetwork, account: Account) -> None:
    granular = (
        "atproto repo:app.example.thing?action=create&action=update rpc:*?aud=did:web:api.example.com%23svc "
        "blob:image/* account:email?action=read identity:handle "
        "include:com.example.basic?aud=did:web:a.example.com%23b future:x?y=z"
    )
    with OAuthClient(ClientMetadata.loopback(granular), store="memory:", **network.client_options()) as client:
        posts = posts_of(client)
        session = log_in(network, client, account)
        assert posts[0].form["scope"] == granular
        assert session.token_info().scope == granular


# The log-in that is pending


@pytest.mark.duty(25)
def test_a_log_in_is_stored_before_anything_is_sent(
    network: LocalNetwork, client: OAuthClient, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[tuple[str, dict[str, Any], float, int]] = []
    put = client._store.logins.put

    def spy(state: str, document: dict[str, Any], expires_at: float) -> None:
        stored.append((state, document, expires_at, network.par_requests))
        put(state, document, expires_at)

    monkeypatch.setattr(client._store.logins, "put", spy)
    posts = posts_of(client)
    began = time.time()
    client.authorize(account.handle, redirect_uri=REDIRECT_URI, state="mine")
    [(state, document, expires_at, pushed_before)] = stored
    assert pushed_before == 0
    assert began < expires_at <= time.time() + 3600
    push = posts[-1]
    assert state == push.form["state"]
    assert challenge_of(document["verifier"]) == push.form["code_challenge"]
    assert public_jwk(document["dpop_key"]) == jwt.get_unverified_header(push.headers["DPoP"])["jwk"]
    assert document["issuer"] == network.issuer
    assert document["did"] == account.did
    assert document["redirect_uri"] == REDIRECT_URI
    assert document["state"] == "mine"


@pytest.mark.duty(25)
def test_a_log_in_that_cannot_be_stored_is_not_begun(network: LocalNetwork, account: Account) -> None:
    class Full:
        def put(self, state: str, document: dict[str, Any], expires_at: float) -> None:
            raise StoreError("the disk is full")

        def take(self, state: str) -> dict[str, Any] | None:
            raise NotImplementedError

    store = MemoryStore[Session]()
    store.logins = Full()  # type: ignore[assignment]
    client = OAuthClient(ClientMetadata.loopback(), store=store, **network.client_options())
    with client, pytest.raises(StoreError, match="full"):
        client.authorize(account.did)
    assert network.par_requests == 0


@pytest.mark.duty(25)
def test_a_log_in_that_was_refused_is_not_pending(
    network: LocalNetwork, client: OAuthClient, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    take = client._store.logins.take
    monkeypatch.setattr(client._store.logins, "take", lambda state: taken.append(state) or take(state))  # type: ignore[func-returns-value]
    posts = posts_of(client)
    network.fault("par", "oauth_error", error="invalid_request")
    with pytest.raises(OAuthResponseError):
        client.authorize(account.did)
    assert taken == [posts[-1].form["state"]]
    assert take(taken[0]) is None


@pytest.fixture(params=["memory:", "json", "sqlite"])
def anywhere(request: pytest.FixtureRequest, network: LocalNetwork, tmp_path: Path) -> Iterator[OAuthClient]:
    """A client, over each kind of store."""
    url = request.param if request.param == "memory:" else f"{request.param}:///{tmp_path}/place"
    with OAuthClient(ClientMetadata.loopback(), store=url, **network.client_options()) as client:
        yield client


@pytest.mark.duty(25)
def test_a_log_in_expires(
    network: LocalNetwork, anywhere: OAuthClient, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = network.authorize(anywhere.authorize(account.did), account)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    with pytest.raises(OAuthCallbackError, match="longer than an hour"):
        anywhere.callback(callback)
    assert network.token_requests == 0


@pytest.mark.duty(25)
def test_a_log_in_ends_once(network: LocalNetwork, anywhere: OAuthClient, account: Account) -> None:
    callback = network.authorize(anywhere.authorize(account.did), account)
    anywhere.callback(callback)
    with pytest.raises(OAuthCallbackError, match="ended already"):
        anywhere.callback(callback)
    assert network.token_requests == 1


@pytest.mark.duty(25, 31)
@pytest.mark.parametrize("fault", ["exchange", "iss", "error"])
def test_a_log_in_is_over_however_its_callback_ends(
    fault: str, network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    good = query_of(network.authorize(client.authorize(account.did), account))
    given = dict(good)
    if fault == "exchange":
        network.fault("token", "status", status=503)
    elif fault == "iss":
        given["iss"] += "/"
    else:
        given["error"] = "server_error"
    with pytest.raises(SessionError):
        client.callback(given)
    with pytest.raises(OAuthCallbackError, match="ended already"):
        client.callback(good)


@pytest.mark.duty(25, 30)
def test_a_log_in_ends_with_the_client_key_that_it_began_with(network: LocalNetwork, account: Account) -> None:
    one, two = generate_jwk() | {"kid": "one"}, generate_jwk() | {"kid": "two"}
    store = MemoryStore[Session]()

    def deploy(*keys: dict[str, str]) -> OAuthClient:
        keyset = Keyset(keys)
        metadata = ClientMetadata(
            "https://app.example.com/client-metadata.json",
            ["https://app.example.com/callback"],
            token_endpoint_auth_method="private_key_jwt",
        )
        network.publish(metadata.client_id, metadata.document(keyset))
        return OAuthClient(metadata, store=store, keyset=keyset, **network.client_options())

    with deploy(one) as client:
        callback = network.authorize(client.authorize(account.did), account)
    with deploy(two, one) as client:
        client.callback(callback)
        stored = client.sessions.get_session(account.did)
    assert stored.auth_method == ClientAuthMethod("private_key_jwt", "one")


# The callback


@pytest.mark.duty(31, 43)
@pytest.mark.parametrize("error", [None, "access_denied"])
@pytest.mark.parametrize(
    "change",
    [lambda iss: f"{iss}/", lambda iss: iss.upper(), lambda iss: f" {iss}", lambda iss: iss[:-1], lambda _: ""],
)
def test_the_issuer_of_a_callback_is_compared_exactly(
    change: Callable[[str], str], error: str | None, network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    given = query_of(network.authorize(client.authorize(account.did), account))
    given["iss"] = change(given["iss"])
    if error is not None:
        given["error"] = error
    with pytest.raises(OAuthCallbackError, match="does not come from the server that was asked"):
        client.callback(given)
    assert network.token_requests == 0


@pytest.mark.duty(43)
@pytest.mark.parametrize("change", [str.swapcase, lambda state: f"{state} ", lambda state: state[:-1], lambda _: ""])
def test_the_state_of_a_callback_is_compared_exactly(
    change: Callable[[str], str], network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    good = query_of(network.authorize(client.authorize(account.did), account))
    with pytest.raises(OAuthCallbackError, match="was not begun here"):
        client.callback(good | {"state": change(good["state"])})
    assert client.callback(good).session.did == account.did, "the log-in is still pending"


@pytest.mark.duty(1, 31)
def test_the_code_is_exchanged_with_what_was_stored(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    posts = posts_of(client)
    callback = network.authorize(client.authorize(account.did, redirect_uri=REDIRECT_URI), account)
    client.callback(callback)
    push, exchange = posts[0], posts[-1]
    assert exchange.path == "/oauth/token"
    assert challenge_of(exchange.form.pop("code_verifier")) == push.form["code_challenge"]
    assert exchange.form == {
        "grant_type": "authorization_code",
        "code": query_of(callback)["code"],
        "redirect_uri": REDIRECT_URI,
        "client_id": client.metadata.client_id,
    }
    keys = [jwt.get_unverified_header(post.headers["DPoP"])["jwk"] for post in posts]
    assert all(key == keys[0] for key in keys)
    assert keys[0] == public_jwk(client.sessions.get_session(account.did).dpop_key)


# The answer to it


@pytest.mark.duty(32, 33)
@pytest.mark.parametrize(
    ("action", "options", "complaint"),
    [
        ("wrong_sub", {}, "another account"),
        ("wrong_sub", {"sub": ""}, "another account"),
        ("scope_without_atproto", {}, "scope atproto"),
        ("scope_without_atproto", {"scope": "atproto.x transition:generic"}, "scope atproto"),
        ("wrong_token_type", {}, "not bound to its key"),
        ("wrong_token_type", {"token_type": ""}, "not bound to its key"),
    ],
)
def test_tokens_that_must_not_be_used(
    action: str, options: dict[str, Any], complaint: str, network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    events: list[object] = []
    client.sessions.on_updated(events.append)
    network.fault("token", action, **options)
    with pytest.raises(OAuthCallbackError, match=complaint):
        log_in(network, client, account)
    assert network.revocations == 1
    assert (list(client._store), events) == ([], [])


@pytest.mark.duty(32)
@pytest.mark.parametrize("sub", ["", "alice.test", "did:key:abc", 7])
def test_a_sub_that_is_no_did_of_an_account(
    sub: Any, network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    network.fault("token", "wrong_sub", sub=sub)
    with pytest.raises(IdentityError):
        client.callback(network.authorize(client.authorize(network.pds_url), account))
    assert network.revocations == 1
    assert list(client._store) == []


@pytest.mark.duty(32)
@pytest.mark.parametrize("endpoint", ["token", "refresh"])
def test_an_answer_without_an_access_token(
    endpoint: str, network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    body = {"token_type": "DPoP", "scope": "atproto", "sub": account.did, "expires_in": 60}
    if endpoint == "refresh":
        log_in(network, client, account)
    network.fault(endpoint, "custom", respond=lambda _: Response.of_json(body).with_headers(DPoP_Nonce="n"))
    with pytest.raises(SessionError) as caught:
        log_in(network, client, account) if endpoint == "token" else client.restore(account.did, refresh=True)
    assert caught.value.retryable == (endpoint == "refresh"), "a code is spent, and another log-in is needed"
    assert len(list(client._store)) == (endpoint == "refresh")


@pytest.mark.duty(32)
def test_what_may_vary_in_an_answer(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    network.fault("token", "wrong_token_type", token_type="dPOP")
    assert log_in(network, client, account).get(GET_SESSION).status_code == 200
    network.fault("refresh", "scope_without_atproto", scope="transition:generic atproto")
    client.restore(account.did, refresh=True)
    assert client.restore(account.did).token_info().scope == "transition:generic atproto"
    network.fault("refresh", "scope_without_atproto", scope="atproto")
    client.restore(account.did, refresh=True)
    assert client.restore(account.did).token_info().scope == "atproto", "what was granted, not what was asked for"


@pytest.mark.duty(32, 36)
def test_a_session_without_a_refresh_token_lasts_as_long_as_its_access_token(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    network.fault("token", "no_refresh_token")
    session = log_in(network, client, account)
    assert session.get(GET_SESSION).status_code == 200
    network.expire_access_tokens(account.did)
    with pytest.raises(TokenRefreshError, match="without a refresh token"):
        session.get(GET_SESSION)
    with pytest.raises(SessionNotFoundError):
        client.restore(account.did)


# Proofs


@pytest.mark.duty(26)
def test_a_session_keeps_its_key_through_refreshes(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    keys = {json.dumps(dict(client.sessions.get_session(session.did).dpop_key))}
    for _ in range(2):
        client.restore(session.did, refresh=True)
        keys.add(json.dumps(dict(client.sessions.get_session(session.did).dpop_key)))
    assert len(keys) == 1
    assert network.rotations == 2


@pytest.mark.duty(26)
def test_the_proof_of_a_resource_request(network: LocalNetwork, client: OAuthClient, session: OAuthSession) -> None:
    proofs = []
    for _ in range(2):
        echoed = session.put(ECHO, params={"limit": 10}, data=b"x").json()
        proofs.append(echoed["headers"]["dpop"])
        assert echoed["headers"]["authorization"] == "DPoP"
    stored = client.sessions.get_session(session.did)
    header, claims = jwt.get_unverified_header(proofs[1]), claims_of(proofs[1])
    assert header == {"typ": "dpop+jwt", "alg": "ES256", "jwk": public_jwk(stored.dpop_key)}
    token = stored.token_set.access_token.encode()
    assert claims["ath"] == base64.urlsafe_b64encode(hashlib.sha256(token).digest()).rstrip(b"=").decode()
    assert (claims["htm"], claims["htu"]) == ("PUT", network.pds_url + ECHO)
    assert abs(claims["iat"] - time.time()) < 60
    assert claims["nonce"]
    assert sorted(claims) == ["ath", "htm", "htu", "iat", "jti", "nonce"]
    assert claims["jti"] != claims_of(proofs[0])["jti"]


@pytest.mark.duty(27)
def test_a_nonce_may_be_wanted_in_either_way_by_either_server(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    def challenge(_: Request) -> Response:
        response = Response(401, b"", {"WWW-Authenticate": 'DPoP algs="ES256", error="use_dpop_nonce"'})
        return response.with_headers(DPoP_Nonce=nonce_of(network))

    def oauth_error(_: Request) -> Response:
        response = Response.of_json({"error": "use_dpop_nonce"}, 400)
        return response.with_headers(DPoP_Nonce=nonce_of(network))

    session = log_in(network, client, account)
    for respond in (challenge, oauth_error):
        for endpoint, act in (
            ("par", lambda: client.authorize(account.did)),
            ("refresh", lambda: client.restore(account.did, refresh=True)),
            ("resource", lambda: session.get(ECHO).raise_for_status()),
        ):
            client._nonces._nonces.clear()
            fault = network.fault(endpoint, "custom", respond=respond)
            act()
            assert fault.count == 1
    assert network.rotations == 2
    assert set(network.refresh_token_uses.values()) == {1}


@pytest.mark.duty(27)
@pytest.mark.parametrize("own", [False, True], ids=["session", "auth"])
def test_a_nonce_may_be_wanted_in_an_answer_that_does_not_say_how_long_it_is(
    own: bool, network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    def respond(_: Request) -> Response:
        response = replace(Response.of_json({"error": "use_dpop_nonce"}, 401), chunked=True)
        return response.with_headers(DPoP_Nonce=nonce_of(network))

    client._nonces._nonces.clear()
    network.fault("resource", "custom", respond=respond)
    if own:
        response = requests.get(network.pds_url + ECHO, auth=client.auth(session.did), timeout=10)
    else:
        response = session.get(ECHO)
    assert response.status_code == 200


@pytest.mark.duty(27, 40)
def test_a_wanted_nonce_is_no_matter_of_tokens(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a refresh nor a write to the store comes of it."""
    writes: list[str] = []
    for name in ("set", "replace", "delete"):
        monkeypatch.setattr(client._store, name, lambda *arguments: writes.append(arguments[0]))
    for _ in range(3):
        network.rotate_nonces()
        assert session.get(ECHO).status_code == 200
    assert writes == []
    assert network.rotations == 0


@pytest.mark.duty(27)
def test_every_server_has_its_nonces(entryway: LocalNetwork, entryway_client: OAuthClient) -> None:
    account = entryway.create_account()
    session = log_in(entryway, entryway_client, account)
    session.get(ECHO)
    nonces = {entryway_client._nonces.get(server) for server in (entryway.issuer, entryway.pds_url)}
    assert len(nonces) == 2
    assert None not in nonces
    for _ in range(2):
        before = entryway.token_requests, entryway.resource_requests
        entryway_client.restore(account.did, refresh=True)
        session.get(ECHO)
        assert (entryway.token_requests, entryway.resource_requests) == (before[0] + 1, before[1] + 1)


@pytest.mark.duty(28)
def test_refreshed_tokens_are_kept_without_a_nonce(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    network.fault("refresh", "no_nonce")
    client.restore(session.did, refresh=True)
    assert network.rotations == 1
    assert session.get(GET_SESSION).status_code == 200


@pytest.mark.duty(28)
def test_a_resource_answer_without_a_nonce_is_logged_and_counts_all_the_same(
    network: LocalNetwork, session: OAuthSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "atproto_session")
    session.get(ECHO)
    assert "nonce" not in caplog.text
    network.fault("resource", "no_nonce")
    assert session.get(ECHO).status_code == 200
    assert network.pds_url in caplog.text
    assert "without DPoP nonces" in caplog.text
    assert network.rotations == 0


# Before a refresh


@pytest.mark.duty(34)
def test_a_pds_that_turned_to_another_issuer(network: LocalNetwork, client: OAuthClient, session: OAuthSession) -> None:
    """The PDS is where it was, and what it said a moment ago is in the cache."""
    other = {"resource": network.pds_url, "authorization_servers": ["http://localhost:1"]}
    network.fault("protected-resource", "custom", respond=lambda _: Response.of_json(other), times=None)
    with pytest.raises(TokenRefreshError, match="now belongs to the authorization server"):
        client.restore(session.did, refresh=True)
    assert network.refresh_token_uses == {}


@pytest.mark.duty(34)
@pytest.mark.parametrize("endpoint", ["plc", "protected-resource"])
def test_nothing_is_spent_while_the_account_cannot_be_verified(
    endpoint: str, network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    network.fault(endpoint, "status", status=503, times=None)
    with pytest.raises(SessionError) as caught:
        client.restore(session.did, refresh=True)
    assert caught.value.retryable
    assert not caught.value.login_required
    assert network.refresh_token_uses == {}
    network.clear_faults()
    client.restore(session.did, refresh=True)


@pytest.mark.duty(13, 34)
def test_every_refresh_looks_anew(network: LocalNetwork, client: OAuthClient, session: OAuthSession) -> None:
    paths = f"/{session.did}", "/.well-known/oauth-protected-resource"
    for _ in range(3):
        before = [network.requests(path) for path in paths]
        client.restore(session.did, refresh=True)
        assert [network.requests(path) for path in paths] == [count + 1 for count in before]


# The life of a session, and its end


@pytest.mark.duty(37)
def test_a_token_that_outlives_its_session_works_until_the_refresh(
    entryway: LocalNetwork, entryway_client: OAuthClient
) -> None:
    account = entryway.create_account()
    session = log_in(entryway, entryway_client, account)
    entryway.revoke_sessions(account.did)
    assert session.get(GET_SESSION).status_code == 200
    entryway.expire_access_tokens(account.did)
    with pytest.raises(TokenRefreshError) as caught:
        session.get(GET_SESSION)
    assert caught.value.login_required
    with pytest.raises(SessionNotFoundError):
        entryway_client.restore(account.did)


@pytest.mark.duty(38)
def test_signing_out_sends_the_refresh_token_with_a_proof(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    """The one that is stored now, and not what the session was opened with: that would end nothing."""
    client.restore(session.did, refresh=True)
    stored = client.sessions.get_session(session.did)
    posts = posts_of(client)
    session.sign_out()
    [post] = posts
    assert post.path == "/oauth/revoke"
    assert post.form == {
        "token": stored.token_set.refresh_token,
        "token_type_hint": "refresh_token",
        "client_id": client.metadata.client_id,
    }
    assert jwt.get_unverified_header(post.headers["DPoP"])["jwk"] == public_jwk(stored.dpop_key)
    assert network.revocations == 1


@pytest.mark.duty(38)
@pytest.mark.parametrize(("status", "complains"), [(200, False), (204, False), (400, True), (404, True), (503, True)])
def test_a_revocation_answers_200_or_204(
    status: int, complains: bool, network: LocalNetwork, client: OAuthClient, session: OAuthSession, caplog: Any
) -> None:
    network.fault("revoke", "status", status=status, headers={"DPoP-Nonce": nonce_of(network)})
    client.revoke(session.did)
    assert ("could not be revoked" in caplog.text) is complains
    with pytest.raises(SessionNotFoundError):
        client.restore(session.did)


@pytest.mark.duty(16, 38)
def test_a_server_without_a_revocation_endpoint(
    network: LocalNetwork, account: Account, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with OAuthClient(ClientMetadata.loopback(), store="memory:", **network.client_options()) as client:
        metadata = replace(client._discovery.metadata(network.issuer), revocation_endpoint=None)
        monkeypatch.setattr(client._discovery, "metadata", lambda _: metadata)
        log_in(network, client, account).sign_out()
        with pytest.raises(SessionNotFoundError):
            client.restore(account.did)
    assert (network.revocations, caplog.text) == (0, "")


@pytest.mark.duty(38)
def test_signing_out_of_a_session_without_a_refresh_token(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    network.fault("token", "no_refresh_token")
    session = log_in(network, client, account)
    posts = posts_of(client)
    session.sign_out()
    assert posts[-1].form["token_type_hint"] == "access_token"
    assert network.revocations == 1


# Answers of the resource server


@pytest.mark.duty(40)
@pytest.mark.parametrize("status", [403, 429, 503])
def test_what_is_not_about_the_token_is_the_callers_after_one_request(
    status: int, network: LocalNetwork, session: OAuthSession
) -> None:
    session.get(ECHO)
    challenge = 'DPoP error="invalid_token"' if status == 403 else ""
    headers = {"Retry-After": "7", "WWW-Authenticate": challenge}
    fault = network.fault("resource", "status", status=status, headers=headers, times=None)
    response = session.get(ECHO)
    assert (response.status_code, response.headers["Retry-After"]) == (status, "7")
    assert fault.count == 1
    assert network.rotations == 0


@pytest.mark.duty(40)
def test_a_missing_scope_is_no_reason_to_refresh(network: LocalNetwork, session: OAuthSession) -> None:
    response = session.get("/xrpc/app.test.scoped", params={"scope": "transition:email"})
    assert response.status_code == 403
    assert network.rotations == 0


@pytest.mark.duty(40)
def test_a_token_endpoint_that_wants_rest_gets_it(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    network.fault("refresh", "status", status=429, headers={"Retry-After": "600"})
    before = network.token_requests
    for _ in range(2):
        with pytest.raises(OAuthResponseError) as caught:
            client.restore(session.did, refresh=True)
        assert caught.value.retryable
        assert 0 < (caught.value.retry_after or 0) <= 600
        assert network.token_requests == before + 1
    assert client.restore(session.did).get(GET_SESSION).status_code == 200


@pytest.mark.duty(14, 15, 42)
@pytest.mark.parametrize("endpoint", ["par", "token", "revoke", "plc", "protected-resource", "as-metadata"])
def test_no_redirect_is_followed_where_none_is_due(
    endpoint: str, network: LocalNetwork, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    with LocalNetwork() as elsewhere:
        network.fault(endpoint, "redirect", to=f"{elsewhere.pds_url}/elsewhere", status=307, times=None)
        with OAuthClient(ClientMetadata.loopback(), store="memory:", **network.client_options()) as client:
            if endpoint == "revoke":
                log_in(network, client, account).sign_out()
                assert "could not be revoked" in caplog.text
            else:
                with pytest.raises(SessionError) as caught:
                    log_in(network, client, account)
                assert not isinstance(caught.value, TransportError)
        assert elsewhere.requests("/elsewhere") == 0
