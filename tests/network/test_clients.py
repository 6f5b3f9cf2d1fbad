"""Clients that publish a metadata document, and clients that authenticate."""

from __future__ import annotations

import json
from typing import Any

import jwt
import pytest

from atproto_session.testing.network import LocalNetwork

from .conftest import Clock
from .raw import SCOPE, RawClient, error_of, new_key, public_jwk, tokens_of

CLIENT_ID = "https://app.example/client-metadata.json"
REDIRECT_URI = "https://app.example/callback"
JWKS_URI = "https://app.example/jwks.json"
KEY = new_key()
JWKS = {"keys": [public_jwk(KEY, kid="key-1"), public_jwk(new_key(), kid="key-2")]}


def metadata(**changes: Any) -> dict[str, Any]:
    document = {
        "client_id": CLIENT_ID,
        "redirect_uris": [REDIRECT_URI],
        "scope": SCOPE,
        "grant_types": ["authorization_code", "refresh_token"],
        "response_types": ["code"],
        "dpop_bound_access_tokens": True,
        "token_endpoint_auth_method": "private_key_jwt",
        "token_endpoint_auth_signing_alg": "ES256",
        "jwks": JWKS,
    } | changes
    return {name: value for name, value in document.items() if value is not None}


def confidential(network: LocalNetwork) -> RawClient:
    network.publish(CLIENT_ID, metadata())
    return RawClient(network.issuer, client_id=CLIENT_ID, redirect_uri=REDIRECT_URI, signing_key=KEY)


def test_a_confidential_client_logs_in_refreshes_and_revokes(network: LocalNetwork) -> None:
    client = confidential(network)
    tokens = client.log_in(network, network.create_account())
    tokens = tokens_of(client.refresh(tokens.refresh))
    assert client.revoke(tokens.refresh).status_code == 200
    assert network.revocations == 1


def test_keys_may_be_published_at_a_url_of_their_own(network: LocalNetwork) -> None:
    client = confidential(network)
    network.publish(CLIENT_ID, metadata(jwks=None, jwks_uri=JWKS_URI))
    assert error_of(client.push())[0] == "invalid_client_metadata"
    network.publish(JWKS_URI, json.dumps(JWKS).encode())
    client.log_in(network, network.create_account())


def test_a_public_client_may_have_a_document(network: LocalNetwork) -> None:
    document = metadata(
        jwks=None, token_endpoint_auth_method="none", application_type="native", redirect_uris=["example.app:/callback"]
    )
    network.publish(CLIENT_ID, document)
    client = RawClient(network.issuer, client_id=CLIENT_ID, redirect_uri="example.app:/callback")
    assert network.authorize(client.authorize_url(), network.create_account()).startswith("example.app:/callback?")


@pytest.mark.parametrize(
    "changes",
    [
        {"client_id": "https://other.example/"},
        {"redirect_uris": []},
        {"redirect_uris": ["http://app.example/callback"]},
        {"scope": "transition:generic"},
        {"grant_types": ["authorization_code"]},
        {"grant_types": ["refresh_token"]},
        {"response_types": []},
        {"dpop_bound_access_tokens": None},
        {"token_endpoint_auth_method": None},
        {"token_endpoint_auth_signing_alg": "RS256"},
        {"application_type": "native"},
        {"jwks": None},
        {"jwks_uri": JWKS_URI},
        {"jwks": {"keys": [public_jwk(KEY)]}},
        {"jwks": {"keys": [public_jwk(KEY, kid="a"), public_jwk(KEY, kid="a")]}},
        {"jwks": {"keys": [public_jwk(KEY, kid="a", d="AAAA")]}},
    ],
)
def test_a_document_that_breaks_a_rule_is_refused(network: LocalNetwork, changes: dict[str, Any]) -> None:
    client = confidential(network)
    network.publish(CLIENT_ID, metadata(**changes))
    response = client.push()
    assert (response.status_code, error_of(response)[0]) == (400, "invalid_client_metadata"), response.text


def test_a_document_is_a_json_object_and_says_so(network: LocalNetwork) -> None:
    client = confidential(network)
    network.publish(CLIENT_ID, metadata(), content_type="text/html")
    assert error_of(client.push())[0] == "invalid_client_metadata"
    for document in (b"[", b"[]"):
        network.publish(CLIENT_ID, document)
        assert error_of(client.push())[0] == "invalid_client_metadata"


BAD_ASSERTIONS: list[dict[str, Any]] = [
    *({"iss": "https://other.example/"}, {"sub": "https://other.example/"}, {"aud": "https://other.example"}),
    *({"iss": None}, {"sub": None}, {"aud": None}, {"jti": None}, {"jti": 7}, {"iat": None}, {"exp": None}),
    *({"iat": 1, "exp": 61}, {"iat": 4_000_000_000}, {"exp": 1}),
]


@pytest.mark.parametrize("claims", BAD_ASSERTIONS)
def test_a_bad_assertion_spends_nothing(network: LocalNetwork, claims: dict[str, Any]) -> None:
    client = confidential(network)
    tokens = client.log_in(network, network.create_account())
    response = client.refresh(tokens.refresh, client_assertion=client.assertion(**claims))
    assert (response.status_code, error_of(response)[0]) == (400, "invalid_client"), response.text
    assert network.refresh_token_uses == {}
    tokens_of(client.refresh(tokens.refresh))


def test_the_audience_may_be_a_list(network: LocalNetwork) -> None:
    client = confidential(network)
    assert client.push(client_assertion=client.assertion(aud=[network.issuer])).status_code == 201


def test_an_assertion_is_needed_and_signed_by_a_published_key(network: LocalNetwork) -> None:
    client = confidential(network)
    assert client.push().status_code == 201
    for changes in (
        {"client_assertion": None},
        {"client_assertion_type": "password"},
        {"client_assertion": "nonsense"},
        {"client_assertion": jwt.encode({}, KEY, "ES256")},
        {"client_assertion": jwt.encode({}, KEY, "ES256", headers={"kid": "key-2"})},
    ):
        response = client.push(**changes)
        assert (response.status_code, error_of(response)[0]) == (400, "invalid_client"), response.text


def test_an_assertion_works_once(network: LocalNetwork) -> None:
    client = confidential(network)
    assert client.push().status_code == 201
    assertion = client.assertion()
    assert client.push(client_assertion=assertion).status_code == 201
    response = client.push(client_assertion=assertion)
    assert (response.status_code, *error_of(response)) == (400, "invalid_grant", "private_key_jwt jti reused")


def test_a_key_has_one_purpose(network: LocalNetwork) -> None:
    client = confidential(network)
    client.key = KEY
    assert error_of(client.push())[0] == "invalid_request"


def test_a_session_keeps_the_key_it_began_with(network: LocalNetwork) -> None:
    client = confidential(network)
    tokens = client.log_in(network, network.create_account())
    client.signing_key, client.kid = new_key(), "key-3"
    network.publish(CLIENT_ID, metadata(jwks={"keys": [public_jwk(client.signing_key, kid="key-3")]}))
    response = client.refresh(tokens.refresh)
    assert (response.status_code, error_of(response)[0]) == (400, "invalid_grant")
    assert "different key" in error_of(response)[1]
    info = network.session_of(tokens.refresh)
    assert info is not None
    assert info.revoked


def test_a_client_may_become_confidential_but_not_public(network: LocalNetwork) -> None:
    client = confidential(network)
    account = network.create_account()
    public = metadata(jwks=None, token_endpoint_auth_method="none")
    tokens = client.log_in(network, account)
    network.publish(CLIENT_ID, public)
    assert "method mismatch" in error_of(client.refresh(tokens.refresh))[1]

    tokens = client.log_in(network, account)
    network.publish(CLIENT_ID, metadata())
    tokens_of(client.refresh(tokens.refresh))


def test_sessions_of_confidential_clients_last_longer() -> None:
    clock = Clock()
    with LocalNetwork(clock=clock) as network:
        client = confidential(network)
        client.clock = clock
        tokens = client.log_in(network, network.create_account())
        clock.offset += 89 * 86_400
        tokens = tokens_of(client.refresh(tokens.refresh))
        clock.offset += 91 * 86_400
        assert error_of(client.refresh(tokens.refresh)) == ("invalid_grant", "Refresh token expired")


def test_a_silent_log_in_needs_a_log_in(network: LocalNetwork) -> None:
    client = confidential(network)
    url = client.authorize_url(prompt="none")
    response = client.http.get(url, allow_redirects=False, timeout=10)
    assert response.status_code == 303
    assert "error=login_required" in response.headers["Location"]
