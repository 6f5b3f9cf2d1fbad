"""The whole client against the real PDS, and beside the reference client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from atproto_session import (
    ClientMetadata,
    IdentityError,
    OAuthCallbackError,
    OAuthClient,
    OAuthSession,
    SessionDeletedEvent,
    SessionNotFoundError,
    SessionUpdatedEvent,
    TokenRefreshError,
    TokenRevokedError,
)
from atproto_session.session import from_document, to_document
from atproto_session.testing.network import Account
from tests.core import SOON, wait_until
from tests.crew import Crew
from tests.network import raw
from tests.network.raw import SCOPE, LoggedIn, error_of, tokens_of
from tests.pds import proxy
from tests.pds.by_hand import take_over
from tests.pds.harness import PATIENCE, Browser, NodeClient, RealPDS
from tests.pds.proxy import Refresh
from tests.scenes import GET_SESSION, store_tokens, stored

ROUNDS = 20
PROCESSES, THREADS = 4, 8


@pytest.fixture
def node(real_pds: RealPDS, client: OAuthClient) -> Iterator[NodeClient]:
    """The reference client, as the same application."""
    with real_pds.node_client(client.metadata.client_id) as node:
        yield node


def log_in(browser: Browser, client: OAuthClient, account: Account, **options: Any) -> OAuthSession:
    return client.callback(browser.authorize(client.authorize(account.handle), account), **options).session


def call(by_hand: LoggedIn) -> requests.Response:
    return by_hand.client.call(by_hand.client.issuer, GET_SESSION, by_hand.tokens.access)


# Logging in


@pytest.mark.duty(4, 17, 33)
@pytest.mark.parametrize("start", ["handle", "did", "pds_url"])
def test_an_account_logs_in(
    real_pds: RealPDS, browser: Browser, client: OAuthClient, pds_account: Account, start: str
) -> None:
    given = real_pds.pds_url if start == "pds_url" else getattr(pds_account, start)
    updates: list[SessionUpdatedEvent] = []
    client.sessions.on_updated(updates.append)

    result = client.callback(browser.authorize(client.authorize(given, state="mine"), pds_account))

    assert result.state == "mine"
    assert result.session.did == pds_account.did
    assert result.session.get(GET_SESSION).json()["handle"] == pds_account.handle
    info = result.session.token_info()
    assert (info.sub, info.iss, info.aud) == (pds_account.did, real_pds.pds_url, real_pds.pds_url)
    assert (set(info.scope.split()), info.expired) == (set(SCOPE.split()), False)
    assert info.expires_at is not None
    assert timedelta(minutes=59) < info.expires_at - datetime.now(UTC) < timedelta(minutes=61)
    assert len(updates) == 1
    assert updates[0].token_set.has_same_tokens(stored(client, pds_account.did).token_set)


def test_an_unknown_handle_is_an_error(client: OAuthClient) -> None:
    with pytest.raises(IdentityError, match=r"nobody\.test"):
        client.authorize("nobody.test")


@pytest.mark.duty(31)
def test_a_declined_log_in_is_an_error_and_cannot_be_ended_again(
    browser: Browser, client: OAuthClient, pds_account: Account
) -> None:
    url = client.authorize(pds_account.handle, state="mine")
    callback = browser.authorize(url, pds_account, approve=False)
    with pytest.raises(OAuthCallbackError, match="access_denied") as caught:
        client.callback(callback)
    assert caught.value.state == "mine"
    with pytest.raises(OAuthCallbackError, match="ended already"):
        client.callback(callback)
    assert client.sessions.get_stored(pds_account.did) is None


def test_fewer_scopes_may_be_asked_for(browser: Browser, client: OAuthClient, pds_account: Account) -> None:
    url = client.authorize(pds_account.handle, scope="atproto")
    session = client.callback(browser.authorize(url, pds_account)).session
    assert session.token_info().scope == "atproto"


# Refreshing


@pytest.mark.duty(35)
def test_a_refresh_replaces_both_tokens(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, by_hand: LoggedIn
) -> None:
    before = stored(client, session.did)
    after = client.sessions.get_session(session.did, True)

    assert not after.token_set.has_same_tokens(before.token_set)
    assert after.is_same_grant(before)
    assert stored(client, session.did).token_set.has_same_tokens(after.token_set)
    assert real_pds.proxy.refreshes() == [Refresh(by_hand.tokens.refresh, 200)]
    refused = call(by_hand)
    assert (refused.status_code, error_of(refused)) == (401, ("invalid_token", "Invalid token"))
    assert session.get(GET_SESSION).status_code == 200


def test_a_newer_token_is_the_answer_to_a_rejected_one(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, by_hand: LoggedIn
) -> None:
    newer = client.sessions.get_session(session.did, True)
    real_pds.proxy.reset()
    answer = client.sessions.get_session(session.did, rejected=by_hand.tokens.access)
    assert answer.token_set.has_same_tokens(newer.token_set)
    assert real_pds.proxy.refreshes() == []


@pytest.mark.duty(36)
def test_an_expired_token_is_replaced_before_it_is_used(
    real_pds: RealPDS, browser: Browser, client: OAuthClient, pds_account: Account
) -> None:
    with real_pds.token_lifetime(0.3):
        session = log_in(browser, client, pds_account)
    wait_until(lambda: session.token_info(refresh=False).expired)
    real_pds.proxy.reset()

    session = client.restore(pds_account.did)
    assert session.get(GET_SESSION).json()["did"] == pds_account.did
    assert session.token_info().expired is False
    assert len(real_pds.proxy.refreshes()) == 1
    assert real_pds.proxy.count(GET_SESSION) == 1


@pytest.mark.duty(40)
def test_the_word_of_the_server_counts_for_more_than_the_clock(
    real_pds: RealPDS, browser: Browser, client: OAuthClient, pds_account: Account
) -> None:
    with real_pds.token_lifetime(0.3):
        session = log_in(browser, client, pds_account)
    store_tokens(client, pds_account.did, expires_at=datetime.now(UTC) + timedelta(hours=1))
    by_hand = take_over(client, pds_account)
    wait_until(lambda: call(by_hand).status_code == 401)
    assert error_of(call(by_hand)) == ("invalid_token", '"exp" claim timestamp check failed')

    assert session.get(GET_SESSION).status_code == 200
    assert real_pds.proxy.refreshes() == [Refresh(by_hand.tokens.refresh, 200)]


@pytest.mark.duty(35)
@pytest.mark.parametrize("store", ["sqlite", "json"])
@pytest.mark.parametrize("kind", ["expired", "rejected"])
def test_a_herd_of_threads_and_processes_refreshes_once_and_loses_no_request(
    real_pds: RealPDS, browser: Browser, pds_account: Account, tmp_path: Path, store: str, kind: str
) -> None:
    url, options = f"{store}:///{tmp_path}/sessions", real_pds.client_options()
    metadata = ClientMetadata.loopback(SCOPE, [raw.REDIRECT_URI])
    did = pds_account.did
    with OAuthClient(metadata, store=url, **options) as client:
        log_in(browser, client, pds_account)
        dead = stored(client, did).token_set.access_token
        client.sessions.get_session(did, True)
        real_pds.proxy.reset()
        with Crew(url, did, options, processes=PROCESSES, metadata={"client_id": metadata.client_id}) as crew:
            for round_ in range(ROUNDS):
                tokens = stored(client, did).token_set
                if kind == "expired":
                    store_tokens(client, did, expires_at=datetime.fromtimestamp(1, UTC))
                else:
                    # What died when it was replaced, and what an unlucky worker may still believe in.
                    store_tokens(client, did, access_token=dead)
                dead = tokens.access_token
                assert set(crew.do("request", threads=THREADS)) == {did}
                assert len(real_pds.proxy.refreshes()) == round_ + 1
    assert {refresh.status for refresh in real_pds.proxy.refreshes()} == {200}
    assert len(set(real_pds.proxy.refresh_tokens())) == ROUNDS


# What ends a session


@pytest.mark.duty(37)
@pytest.mark.parametrize("how", ["spent_elsewhere", "restored_from_a_backup"])
def test_a_replay_is_seen_for_what_it_is(
    client: OAuthClient, session: OAuthSession, by_hand: LoggedIn, how: str
) -> None:
    deletions: list[SessionDeletedEvent] = []
    client.sessions.on_deleted(deletions.append)
    if how == "spent_elsewhere":
        newest = tokens_of(by_hand.client.refresh(by_hand.tokens.refresh)).refresh
    else:
        backup = stored(client, session.did)
        newest = client.sessions.get_session(session.did, True).token_set.refresh_token or ""
        client._store.set(session.did, backup)

    with pytest.raises(TokenRefreshError) as caught:
        client.restore(session.did, refresh=True)

    assert caught.value.login_required
    assert not caught.value.answer_lost
    assert "replayed" in str(caught.value.__cause__)
    assert client.sessions.get_stored(session.did) is None
    assert [(event.sub, event.cause) for event in deletions] == [(session.did, caught.value)]
    assert error_of(by_hand.client.refresh(newest)) == ("invalid_grant", "Invalid refresh token")
    with pytest.raises(SessionNotFoundError):
        client.restore(session.did)


@pytest.mark.duty(37)
def test_a_session_that_was_revoked_elsewhere_is_over_at_its_next_request(
    client: OAuthClient, session: OAuthSession, by_hand: LoggedIn
) -> None:
    assert by_hand.client.revoke(by_hand.tokens.refresh).status_code == 200
    with pytest.raises(TokenRefreshError) as caught:
        session.get(GET_SESSION)
    assert caught.value.login_required
    assert client.sessions.get_stored(session.did) is None


@pytest.mark.duty(38)
@pytest.mark.parametrize("way", ["revoke", "sign_out"])
@pytest.mark.parametrize("refreshed", [False, True])
def test_signing_out_ends_the_session_here_and_there(
    client: OAuthClient, session: OAuthSession, by_hand: LoggedIn, way: str, refreshed: bool
) -> None:
    if refreshed:
        client.sessions.get_session(session.did, True)
    deletions: list[SessionDeletedEvent] = []
    client.sessions.on_deleted(deletions.append)
    newest = take_over(client, by_hand.account)

    if way == "revoke":
        client.revoke(session.did)
    else:
        session.sign_out()

    assert client.sessions.get_stored(session.did) is None
    assert [type(event.cause) for event in deletions] == [TokenRevokedError]
    assert call(newest).status_code == 401
    assert error_of(newest.client.refresh(newest.tokens.refresh)) == ("invalid_grant", "Invalid refresh token")
    with pytest.raises(SessionNotFoundError):
        session.get(GET_SESSION)


@pytest.mark.duty(38)
def test_signing_out_works_here_even_if_the_server_is_away(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, by_hand: LoggedIn
) -> None:
    fault = real_pds.proxy.arm("/oauth/revoke", proxy.cut_before())
    session.sign_out()
    assert fault.fired.wait(SOON)  # which follows the cut that the client has seen
    assert client.sessions.get_stored(session.did) is None
    assert call(by_hand).status_code == 200


# Several at once


def test_sessions_of_one_account_live_side_by_side(
    browser: Browser, client: OAuthClient, session: OAuthSession, pds_account: Account
) -> None:
    log_in(browser, client, pds_account, session_id="phone")
    phone = stored(client, f"{session.did}#phone").token_set

    client.restore(session.did, refresh=True)
    assert stored(client, f"{session.did}#phone").token_set == phone
    assert client.restore(session.did, session_id="phone").get(GET_SESSION).status_code == 200

    client.revoke(session.did, session_id="phone")
    assert session.get(GET_SESSION).status_code == 200
    with pytest.raises(SessionNotFoundError):
        client.restore(session.did, session_id="phone")


@pytest.mark.duty(40)
def test_requests_of_a_programs_own_are_signed_and_renewed(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, by_hand: LoggedIn
) -> None:
    url = real_pds.pds_url + GET_SESSION
    assert requests.get(url, auth=client.auth(session.did), timeout=PATIENCE).json()["did"] == session.did
    assert real_pds.proxy.refreshes() == []

    client.sessions.get_session(session.did, True)
    store_tokens(client, session.did, access_token=by_hand.tokens.access)
    assert requests.get(url, auth=client.auth(session.did), timeout=PATIENCE).status_code == 200
    assert len(real_pds.proxy.refreshes()) == 2


# Beside the reference client


def test_a_session_of_the_reference_client_is_taken_over(
    real_pds: RealPDS, browser: Browser, client: OAuthClient, node: NodeClient, pds_account: Account
) -> None:
    did = pds_account.did
    theirs = node.callback(browser.authorize(node.authorize(pds_account.handle), pds_account)).document
    real_pds.proxy.reset()

    client._store.set(did, from_document(did, theirs))
    session = client.restore(did)
    assert session.get(GET_SESSION).json()["did"] == did
    assert session.get(GET_SESSION.removeprefix("/")).json()["did"] == did
    assert real_pds.proxy.refreshes() == []

    client.restore(did, refresh=True)
    assert real_pds.proxy.refresh_tokens() == [theirs["tokenSet"]["refresh_token"]]
    assert client.restore(did).get(GET_SESSION).status_code == 200


def test_a_session_is_handed_over_to_the_reference_client(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, node: NodeClient
) -> None:
    did = session.did
    client.restore(did, refresh=True)
    ours = stored(client, did)
    real_pds.proxy.reset()

    node.put(did, to_document(did, ours))
    status, body = node.call(did)
    assert (status, json.loads(body)["did"]) == (200, did)
    assert node.restore(did).token_info["expired"] is False
    assert real_pds.proxy.refreshes() == []

    theirs = node.restore(did, refresh=True)
    assert theirs.token_info["expired"] is False
    assert real_pds.proxy.refresh_tokens() == [ours.token_set.refresh_token]
    assert node.call(did)[0] == 200

    # And back again, as often as you like.
    client._store.set(did, from_document(did, theirs.document))
    client.restore(did, refresh=True)
    node.put(did, to_document(did, stored(client, did)))
    node.restore(did, refresh=True)
    assert {refresh.status for refresh in real_pds.proxy.refreshes()} == {200}
    assert len(set(real_pds.proxy.refresh_tokens())) == 3


def test_what_the_reference_client_stores_is_what_is_stored_here(
    browser: Browser, client: OAuthClient, session: OAuthSession, node: NodeClient, pds_account: Account
) -> None:
    """But for the library's own member, and the slash that the reference client may end ``aud`` with."""
    ours = to_document(session.did, stored(client, session.did))
    theirs = node.callback(browser.authorize(node.authorize(pds_account.handle), pds_account)).document
    assert {*ours} - {"atprotoSession"} == {*theirs}
    for name in ("dpopJwk", "authMethod", "tokenSet"):
        assert {*ours[name]} == {*theirs[name]}
    for name in ("iss", "sub", "scope", "token_type"):
        assert ours["tokenSet"][name] == theirs["tokenSet"][name]
    assert urljoin(ours["tokenSet"]["aud"], "/") == urljoin(theirs["tokenSet"]["aud"], "/")
    assert ours["authMethod"] == theirs["authMethod"] == {"method": "none"}
    parse = datetime.fromisoformat
    assert len(ours["tokenSet"]["expires_at"]) == len(theirs["tokenSet"]["expires_at"])
    assert abs(parse(ours["tokenSet"]["expires_at"]) - parse(theirs["tokenSet"]["expires_at"])) < timedelta(minutes=1)


@pytest.mark.parametrize("aud", ["{pds}", "{pds}/"])
def test_the_audience_may_end_with_a_slash(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, aud: str
) -> None:
    store_tokens(client, session.did, aud=aud.format(pds=real_pds.pds_url))
    session = client.restore(session.did)
    for url in (GET_SESSION, GET_SESSION.removeprefix("/"), real_pds.pds_url + GET_SESSION):
        assert session.get(url).json()["did"] == session.did
    answer = requests.get(real_pds.pds_url + GET_SESSION, auth=client.auth(session.did), timeout=PATIENCE)
    assert answer.status_code == 200


# Requests


EAGER = Retry(3, status_forcelist=[503])


@pytest.mark.parametrize("way", ["client", "mounted", "auth"])
def test_each_try_has_a_proof_of_its_own(
    real_pds: RealPDS, browser: Browser, pds_account: Account, session: OAuthSession, client: OAuthClient, way: str
) -> None:
    """The PDS sees each proof; what it answers is lost."""
    with OAuthClient(client.metadata, store="memory:", retries=EAGER, **real_pds.client_options()) as retrying:
        get: Callable[[], requests.Response]
        if way == "client":
            get = partial(log_in(browser, retrying, pds_account).get, GET_SESSION)
        elif way == "mounted":
            session.mount("http://", HTTPAdapter(max_retries=EAGER))
            get = partial(session.get, GET_SESSION)
        else:
            own = requests.Session()
            own.mount("http://", HTTPAdapter(max_retries=EAGER))
            url = real_pds.pds_url + GET_SESSION
            get = partial(own.get, url, auth=client.auth(session.did), timeout=PATIENCE)
        assert get().status_code == 200
        real_pds.proxy.reset()
        real_pds.proxy.arm(GET_SESSION, proxy.status_after(503), times=2)
        response = get()
        assert (response.status_code, response.history) == (200, [])
        assert real_pds.proxy.count(GET_SESSION) == 3


def test_a_proof_that_was_repeated_on_the_way_is_replaced(
    real_pds: RealPDS, session: OAuthSession, client: OAuthClient
) -> None:
    """As by a proxy that sends a request again when its answer is lost."""

    class Repeating(HTTPAdapter):
        def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
            request.headers["DPoP"] = str(request.headers["DPoP"])
            super().send(request, *args, **options).close()
            self.send = super().send  # type: ignore[method-assign]
            response = super().send(request, *args, **options)
            assert error_of(response) == ("invalid_dpop_proof", "DPoP proof replayed")
            return response

    assert session.get(GET_SESSION).status_code == 200
    session.mount("http://", Repeating())
    assert session.get(GET_SESSION).status_code == 200
    assert real_pds.proxy.refreshes() == []


@pytest.mark.parametrize("way", ["session", "auth"])
def test_a_body_that_can_be_sent_once_follows_a_nonce(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, way: str
) -> None:
    client._nonces._nonces.clear()
    url, headers = "/xrpc/com.atproto.repo.uploadBlob", {"Content-Type": "text/plain"}
    body = (piece for piece in (b"read ", b"once"))
    if way == "session":
        response = session.post(url, data=body, headers=headers)
    else:
        auth = client.auth(session.did)
        response = requests.post(real_pds.pds_url + url, data=body, headers=headers, auth=auth, timeout=PATIENCE)
    assert response.status_code == 200
    assert response.json()["blob"]["size"] == 9
    assert real_pds.proxy.count(url) == 1


def test_a_refusal_for_a_moment_costs_one_refresh(real_pds: RealPDS, session: OAuthSession) -> None:
    """A replica that lags behind: the PDS itself issues, another part of it refuses."""
    refusal = {"WWW-Authenticate": 'DPoP error="invalid_token"'}
    real_pds.proxy.arm(GET_SESSION, proxy.status_before(401, refusal), times=4)
    pauses: list[float] = []
    session._signer._sleep = pauses.append
    assert session.get(GET_SESSION).status_code == 200
    assert len(pauses) == 3
    assert len(real_pds.proxy.refreshes()) == 1
