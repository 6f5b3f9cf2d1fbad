"""From the pushed request to the tokens."""

from __future__ import annotations

from urllib.parse import urlencode

import pytest
import requests

from atproto_session.testing.network import LocalNetwork

from .conftest import Clock
from .raw import REDIRECT_URI, LoggedIn, RawClient, b64, error_of, query_of, tokens_of


def test_a_log_in_ends_with_tokens_that_work(network: LocalNetwork, alice: LoggedIn) -> None:
    response = alice.tokens.response
    assert (response["sub"], response["token_type"], response["expires_in"]) == (alice.account.did, "DPoP", 3600)
    assert response["scope"] == "atproto transition:generic"
    session = alice.client.call(network.pds_url, "com.atproto.server.getSession", alice.tokens.access)
    assert session.json() == {"did": alice.account.did, "handle": "alice.test", "active": True}
    info = network.session_of(alice.tokens.refresh)
    assert info is not None
    assert (info.did, info.client_id, info.revoked, info.current) == (
        *(alice.account.did, alice.client.client_id),
        *(False, True),
    )
    assert network.session_of("ref-unknown") is None


def test_the_callback_names_state_and_issuer(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    callback = network.authorize(client.authorize_url(), network.create_account())
    assert callback.startswith(REDIRECT_URI + "?")
    query = query_of(callback)
    assert (query["state"], query["iss"]) == (client.state, network.issuer)


def test_a_denied_log_in_comes_back_as_an_error(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    callback = network.authorize(client.authorize_url(), network.create_account(), approve=False)
    assert query_of(callback) == {
        **{"error": "access_denied", "error_description": "The user rejected the request"},
        **{"state": client.state, "iss": network.issuer},
    }


def test_fewer_scopes_may_be_granted(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    callback = network.authorize(client.authorize_url(), network.create_account(), scope="atproto")
    tokens = tokens_of(client.exchange(query_of(callback)["code"]))
    assert tokens.response["scope"] == "atproto"
    assert client.call(network.pds_url, "app.test.scoped?scope=transition:generic", tokens.access).status_code == 403


def test_more_scopes_may_not_be_granted(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    with pytest.raises(ValueError, match="did not ask for"):
        network.authorize(client.authorize_url(), network.create_account(), scope="atproto transition:email")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"code_challenge": None}, "invalid_request"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"code_challenge": "short"}, "invalid_request"),
        ({"state": None}, "invalid_request"),
        ({"redirect_uri": None}, "invalid_request"),
        ({"redirect_uri": "http://127.0.0.1:8001/callback"}, "invalid_request"),
        ({"redirect_uri": "http://127.0.0.1:8000/other"}, "invalid_request"),
        ({"redirect_uri": "http://localhost:8000/callback"}, "invalid_request"),
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"response_mode": "form_post"}, "invalid_request"),
        ({"scope": "transition:generic"}, "invalid_scope"),
        ({"scope": "atproto transition:email"}, "invalid_scope"),
        ({"login_hint": "not a handle"}, "invalid_request"),
        ({"prompt": "none"}, "invalid_request"),
        ({"prompt": "dance"}, "invalid_request"),
        ({"client_id": None}, "invalid_client"),
        ({"client_id": "http://localhost?scope=transition:generic"}, "invalid_client_metadata"),
        ({"client_id": "http://localhost?redirect_uri=http://localhost/"}, "invalid_client_metadata"),
        ({"client_id": "http://localhost?colour=red"}, "invalid_client_metadata"),
        ({"client_id": "http://localhost?scope=atproto&scope=atproto"}, "invalid_client_metadata"),
        ({"client_id": "http://localhost/path"}, "invalid_client_metadata"),
        ({"client_id": "https://unpublished.example/client.json"}, "invalid_client_metadata"),
        ({"client_id": "ftp://app.example/"}, "invalid_client_metadata"),
    ],
)
def test_a_wrong_request_is_refused(network: LocalNetwork, changes: dict[str, str | None], error: str) -> None:
    response = RawClient(network.issuer).push(**changes)
    assert (response.status_code, error_of(response)[0]) == (400, error), response.text
    assert response.headers["DPoP-Nonce"]


@pytest.mark.parametrize(
    ("registered", "requested", "accepted"),
    [
        ("http://127.0.0.1/", "http://127.0.0.1:4711/", True),
        ("http://[::1]/", "http://[::1]:4711/", True),
        ("http://127.0.0.1/a", "http://127.0.0.1:4711/b", False),
        ("http://127.0.0.1/", "http://[::1]:4711/", False),
        ("http://127.0.0.1/", "https://127.0.0.1:4711/", False),
        ("http://127.0.0.1:80/", "http://127.0.0.1:4711/", False),
        ("http://127.0.0.1/", "http://127.0.0.1:99999/", False),
        ("http://127.0.0.1/", "http://user@127.0.0.1:4711/", False),
        (None, "http://127.0.0.1:4711/", True),
        (None, "http://[::1]/", True),
        (None, "http://127.0.0.1:4711/callback", False),
    ],
)
def test_the_port_is_ignored_where_none_is_registered(
    network: LocalNetwork, registered: str | None, requested: str, accepted: bool
) -> None:
    client_id = "http://localhost" + ("" if registered is None else "?" + urlencode({"redirect_uri": registered}))
    response = RawClient(network.issuer, client_id=client_id).push(redirect_uri=requested, scope="atproto")
    assert response.status_code == (201 if accepted else 400), response.text


@pytest.mark.parametrize(
    ("changes", "description"),
    [
        ({"code_verifier": b64(b"x" * 48)}, "Invalid code_verifier"),
        ({"code_verifier": None}, "code_verifier is required"),
        ({"redirect_uri": "http://127.0.0.1:8000/"}, "The redirect_uri parameter must match"),
    ],
)
def test_a_wrong_exchange_uses_up_the_code(
    network: LocalNetwork, changes: dict[str, str | None], description: str
) -> None:
    client = RawClient(network.issuer)
    code = client.code(network, network.create_account())
    response = client.exchange(code, **changes)
    assert response.status_code == 400
    assert error_of(response)[0] == "invalid_grant"
    assert error_of(response)[1].startswith(description)
    assert error_of(client.exchange(code)) == ("invalid_grant", "Invalid code")


def test_a_verifier_that_cannot_be_one_is_refused_before_the_code_is_looked_at(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    code = client.code(network, network.create_account())
    assert error_of(client.exchange(code, code_verifier="short")) == ("invalid_grant", "code_verifier too short")
    tokens_of(client.exchange(code))


def test_a_code_used_twice_ends_its_session(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    code = client.code(network, network.create_account())
    tokens = tokens_of(client.exchange(code))
    assert error_of(client.exchange(code)) == ("invalid_grant", "Invalid code")
    assert error_of(client.refresh(tokens.refresh)) == ("invalid_grant", "Invalid refresh token")


def test_a_code_is_bound_to_the_key_of_its_request(network: LocalNetwork) -> None:
    client, thief = RawClient(network.issuer), RawClient(network.issuer)
    code = client.code(network, network.create_account())
    thief.verifier = client.verifier
    response = thief.exchange(code)
    assert response.status_code == 400
    assert error_of(response) == ("invalid_grant", "DPoP proof does not match the expected JKT")


def test_a_code_is_bound_to_its_client(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    code = client.code(network, network.create_account())
    response = client.exchange(code, client_id="http://localhost")
    assert error_of(response) == ("invalid_grant", "Token was not issued to this client")


def test_requests_and_codes_last_five_minutes() -> None:
    clock = Clock()
    with LocalNetwork(clock=clock) as network:
        account, client = network.create_account(), RawClient(network.issuer, clock=clock)
        url = client.authorize_url()
        clock.offset += 301
        with pytest.raises(ValueError, match="expired"):
            network.authorize(url, account)
        code = client.code(network, account)
        clock.offset += 301
        assert error_of(client.exchange(code)) == ("invalid_grant", "This code has expired")


def test_a_request_is_decided_once_and_by_its_client(network: LocalNetwork) -> None:
    account, client = network.create_account(), RawClient(network.issuer)
    url = client.authorize_url()
    network.authorize(url, account)
    with pytest.raises(ValueError, match="Unknown request_uri"):
        network.authorize(url, account)
    with pytest.raises(ValueError, match="another client"):
        network.authorize(client.authorize_url().replace("client_id=", "client_id=x"), account)
    with pytest.raises(ValueError, match="pushed authorization request is required"):
        network.authorize(f"{network.issuer}/oauth/authorize?client_id=x", account)


def test_an_account_of_another_issuer_cannot_log_in(network: LocalNetwork) -> None:
    account = network.create_account()
    network.move_account_to_other_issuer(account.did)
    with pytest.raises(ValueError, match="Invalid identifier or password"):
        network.authorize(RawClient(network.issuer).authorize_url(), account)


def test_the_consent_page_is_plain_html_that_a_browser_can_use(network: LocalNetwork) -> None:
    account = network.create_account()
    client = RawClient(network.issuer)
    url = client.authorize_url(login_hint=account.handle, state='"><script>alert(1)</script>')
    page = requests.get(url, timeout=10)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "script" not in page.text
    assert f'value="{account.handle}"' in page.text

    form = {**query_of(url), "identifier": account.handle, "password": '"><b>wrong', "decision": "approve"}
    answer = requests.post(f"{network.issuer}/oauth/authorize", data=form, timeout=10)
    assert answer.status_code == 401
    assert "Invalid identifier or password" in answer.text
    form["identifier"] = '"><b>nobody'
    answer = requests.post(f"{network.issuer}/oauth/authorize", data=form, timeout=10)
    assert "<b>" not in answer.text
    assert "&quot;&gt;&lt;b&gt;nobody" in answer.text

    form |= {"identifier": f" @{account.handle} ", "password": account.password}
    answer = requests.post(f"{network.issuer}/oauth/authorize", data=form, timeout=10, allow_redirects=False)
    assert answer.status_code == 303
    assert tokens_of(client.exchange(query_of(answer.headers["Location"])["code"])).response["sub"] == account.did
    assert requests.get(url, timeout=10).status_code == 400


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"grant_type=refresh_token&grant_type=x", "application/x-www-form-urlencoded"),
        (b"\xff=1", "application/x-www-form-urlencoded"),
        (b'{"grant_type": "refresh_token"}', "application/json"),
    ],
)
def test_a_malformed_body_is_refused(network: LocalNetwork, body: bytes, content_type: str) -> None:
    for path, error in (("token", "invalid_grant"), ("par", "invalid_client"), ("revoke", "invalid_request")):
        response = requests.post(
            f"{network.issuer}/oauth/{path}", data=body, headers={"Content-Type": content_type}, timeout=10
        )
        assert (response.status_code, error_of(response)[0]) == (400, error)


def test_a_request_without_what_it_is_about_is_refused(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    assert error_of(client.post("/oauth/token", {"client_id": None, "grant_type": "x"}))[0] == "invalid_grant"
    assert error_of(client.post("/oauth/token", {"grant_type": "password"}))[0] == "invalid_grant"
    assert error_of(client.post("/oauth/token", {"grant_type": "refresh_token"}))[0] == "invalid_grant"
    assert error_of(client.post("/oauth/revoke", {}))[0] == "invalid_request"
