"""From the pushed request to the tokens."""

from __future__ import annotations

from urllib.parse import urlencode

import pytest

from atproto_session.testing.network import LocalNetwork

from ..scenes import GET_SESSION
from .conftest import Clock
from .raw import LoggedIn, RawClient, error_of, query_of, tokens_of


def test_a_log_in_ends_with_tokens_that_work(network: LocalNetwork, alice: LoggedIn) -> None:
    session = alice.client.call(network.pds_url, GET_SESSION, alice.tokens.access)
    assert session.json() == {"did": alice.account.did, "handle": "alice.test", "active": True}
    info = network.session_of(alice.tokens.refresh)
    assert info is not None
    assert (info.did, info.client_id, info.revoked, info.current) == (
        *(alice.account.did, alice.client.client_id),
        *(False, True),
    )
    assert network.session_of("ref-unknown") is None


def test_fewer_scopes_may_be_granted(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    callback = network.authorize(client.authorize_url(), network.create_account(), scope="atproto")
    tokens = tokens_of(client.exchange(query_of(callback)["code"]))
    assert tokens.response["scope"] == "atproto"
    assert (
        client.call(network.pds_url, "/xrpc/app.test.scoped?scope=transition:generic", tokens.access).status_code == 403
    )


def test_more_scopes_may_not_be_granted(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    with pytest.raises(ValueError, match="did not ask for"):
        network.authorize(client.authorize_url(), network.create_account(), scope="atproto transition:email")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"code_challenge": "short"}, "invalid_request"),
        ({"state": None}, "invalid_request"),
        ({"redirect_uri": None}, "invalid_request"),
        ({"response_mode": "form_post"}, "invalid_request"),
        ({"client_id": "https://unpublished.example/client.json"}, "invalid_client_metadata"),
    ],
)
def test_a_request_that_the_real_pds_would_take_or_refuse_otherwise(
    network: LocalNetwork, changes: dict[str, str | None], error: str
) -> None:
    """Stricter than the real PDS: no client should do that."""
    response = RawClient(network.issuer).push(**changes)
    assert (response.status_code, error_of(response)[0]) == (400, error), response.text
    assert response.headers["DPoP-Nonce"]


def test_a_port_that_is_registered_is_not_ignored(network: LocalNetwork) -> None:
    """Stricter than the real PDS."""
    client_id = "http://localhost?" + urlencode({"redirect_uri": "http://127.0.0.1:80/"})
    client = RawClient(network.issuer, client_id=client_id)
    assert client.push(redirect_uri="http://127.0.0.1:4711/", scope="atproto").status_code == 400
    assert client.push(redirect_uri="http://127.0.0.1:80/", scope="atproto").status_code == 201


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
