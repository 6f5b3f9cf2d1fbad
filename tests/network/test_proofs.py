"""DPoP, at the authorization server and at the PDS."""

from __future__ import annotations

import http.client
from contextlib import closing
from typing import Any
from urllib.parse import urlencode, urlsplit

import jwt
import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import ec

from atproto_session.testing.network import LocalNetwork

from .conftest import Clock
from .raw import LoggedIn, RawClient, error_of, new_key, public_jwk, tokens_of

BAD_PROOFS: list[tuple[dict[str, Any], str]] = [
    ({"header": {"typ": "JWT"}}, "typ"),
    ({"header": {"typ": None}}, "typ"),
    ({"header": {"jwk": None}}, "P-256"),
    ({"header": {"jwk": {"kty": "EC", "crv": "P-384", "x": "", "y": ""}}}, "P-256"),
    ({"header": {"jwk": {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}}}, "malformed"),
    ({"header": {"jwk": {"kty": "EC", "crv": "P-256", "x": 1}}}, "malformed"),
    ({"header": {"jwk": public_jwk(new_key(), d="AA")}}, "private"),
    ({"header": {"jwk": public_jwk(new_key())}}, "signature"),
    ({"jti": None}, "jti"),
    ({"jti": 7}, "jti"),
    ({"htm": "PUT"}, "htm"),
    ({"htm": None}, "htm"),
    ({"htu": "http://localhost:1/"}, "htu"),
    ({"htu": None}, "htu"),
    ({"iat": None}, "iat"),
    ({"iat": "now"}, "number"),
    ({"iat": True}, "iat"),
    ({"nonce": 7}, "nonce"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD_PROOFS)
def test_a_bad_proof_is_refused(network: LocalNetwork, alice: LoggedIn, changes: dict[str, Any], reason: str) -> None:
    client, tokens = alice.client, alice.tokens
    url = f"{network.issuer}/oauth/token"
    form = {"grant_type": "refresh_token", "refresh_token": tokens.refresh}
    response = client.post("/oauth/token", form, proof=client.proof("POST", url, **changes))
    assert (response.status_code, error_of(response)[0]) == (401, "invalid_dpop_proof"), response.text
    assert reason in error_of(response)[1]

    url = f"{network.pds_url}/xrpc/app.test.echo"
    proof = client.proof("GET", url, token=tokens.access, **changes)
    response = client.call(network.pds_url, "app.test.echo", tokens.access, proof=proof)
    assert (response.status_code, error_of(response)[0]) == (401, "invalid_dpop_proof")
    assert response.headers["WWW-Authenticate"].startswith('DPoP algs="ES256 ES256K", error="invalid_dpop_proof"')

    tokens_of(client.refresh(tokens.refresh))  # nothing of this has spent the token


def test_there_is_exactly_one_proof_and_it_is_one(network: LocalNetwork, alice: LoggedIn) -> None:
    url, form = f"{network.issuer}/oauth/token", {"grant_type": "refresh_token", "client_id": alice.client.client_id}
    form["refresh_token"] = alice.tokens.refresh
    response = requests.post(url, data=form, timeout=10)
    assert (response.status_code, *error_of(response)) == (401, "invalid_dpop_proof", "DPoP proof required")
    assert "malformed" in error_of(alice.client.post("/oauth/token", form, proof="x.y.z"))[1]
    unsigned = jwt.encode({}, "k" * 32, "HS256", headers={"typ": "dpop+jwt"})
    assert "alg" in error_of(alice.client.post("/oauth/token", form, proof=unsigned))[1]
    not_claims = jwt.PyJWS().encode(
        b"7", alice.client.key, "ES256", {"typ": "dpop+jwt", "jwk": public_jwk(alice.client.key)}
    )
    assert "JSON object" in error_of(alice.client.post("/oauth/token", form, proof=not_claims))[1]
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    with closing(connection):
        connection.putrequest("POST", "/oauth/token")
        body = urlencode(form).encode()
        for name, value in (
            *(("Content-Type", "application/x-www-form-urlencoded"), ("Content-Length", str(len(body)))),
            *(("DPoP", alice.client.proof("POST", url)), ("DPoP", alice.client.proof("POST", url))),
        ):
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        assert (answer.status, b"single proof" in answer.read()) == (401, True)
    assert network.refresh_token_uses == {}


@pytest.mark.parametrize(("offset", "accepted"), [(-192, False), (-188, True), (178, True), (182, False)])
def test_the_time_of_a_proof_has_a_window(
    network: LocalNetwork, alice: LoggedIn, offset: float, accepted: bool
) -> None:
    alice.client.clock = Clock()
    alice.client.clock.offset = offset
    response = alice.client.refresh(alice.tokens.refresh)
    if accepted:
        assert response.status_code == 200
    else:
        assert (response.status_code, error_of(response)[0]) == (401, "invalid_dpop_proof")


def test_keys_may_be_of_either_kind(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    client.key = new_key(ec.SECP256K1)
    tokens = client.log_in(network, network.create_account())
    assert client.call(network.pds_url, "app.test.echo", tokens.access).status_code == 200
    tokens_of(client.refresh(tokens.refresh))


def test_a_proof_works_once(network: LocalNetwork, alice: LoggedIn) -> None:
    client = alice.client
    url, form = f"{network.issuer}/oauth/token", {"grant_type": "refresh_token"}
    proof = client.proof("POST", url)
    first = client.post("/oauth/token", {**form, "refresh_token": alice.tokens.refresh}, proof=proof)
    response = client.post("/oauth/token", {**form, "refresh_token": tokens_of(first).refresh}, proof=proof)
    assert (response.status_code, *error_of(response)) == (401, "invalid_dpop_proof", "DPoP proof replayed")
    tokens_of(client.refresh(tokens_of(first).refresh))


def test_a_proof_of_a_resource_request_names_its_token(network: LocalNetwork, alice: LoggedIn) -> None:
    client, access = alice.client, alice.tokens.access
    url = f"{network.pds_url}/xrpc/app.test.echo"
    for ath in (None, "AAAA"):
        response = client.call(
            network.pds_url, "app.test.echo", access, proof=client.proof("GET", url, token=access, ath=ath)
        )
        assert error_of(response) == ("invalid_dpop_proof", 'DPoP "ath" mismatch')
    proof = client.proof("POST", f"{network.issuer}/oauth/token", token=access)
    response = client.post("/oauth/token", {"grant_type": "refresh_token", "refresh_token": "x"}, proof=proof)
    assert error_of(response) == ("invalid_dpop_proof", 'DPoP "ath" claim not allowed')


def test_nonces_are_demanded_each_server_in_its_own_way(entryway: LocalNetwork) -> None:
    account, client = entryway.create_account(), RawClient(entryway.issuer)
    client.post("/oauth/par", {}, retry=False)
    tokens = client.log_in(entryway, account)
    assert list(client.nonces) == [entryway.issuer]
    for nonce, description in ((None, "requires nonce"), ("made-up", "mismatch")):
        client.nonces = {} if nonce is None else {entryway.issuer: nonce, entryway.pds_url: nonce}
        refused = client.post(
            "/oauth/token", {"grant_type": "refresh_token", "refresh_token": tokens.refresh}, retry=False
        )
        assert (refused.status_code, error_of(refused)[0]) == (400, "use_dpop_nonce")
        assert description in error_of(refused)[1]
        assert refused.headers["DPoP-Nonce"]
        assert "WWW-Authenticate" not in refused.headers

        proof = client.proof("GET", f"{entryway.pds_url}/xrpc/app.test.echo", token=tokens.access)
        refused = client.call(entryway.pds_url, "app.test.echo", tokens.access, proof=proof)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"].startswith('DPoP algs="ES256 ES256K", error="use_dpop_nonce"')
        assert refused.headers["DPoP-Nonce"]

    # The nonce of one server is nothing to another.
    client.nonces[entryway.pds_url] = client.nonces[entryway.issuer]
    proof = client.proof("GET", f"{entryway.pds_url}/xrpc/app.test.echo", token=tokens.access)
    refused = client.call(entryway.pds_url, "app.test.echo", tokens.access, proof=proof)
    assert "use_dpop_nonce" in refused.headers["WWW-Authenticate"]
    assert entryway.refresh_token_uses == {}
    assert client.call(entryway.pds_url, "app.test.echo", tokens.access).status_code == 200


def test_nonces_rotate_and_live_for_three_intervals() -> None:
    clock = Clock()
    with LocalNetwork(clock=clock, nonce_lifetime=60) as network:
        client = RawClient(network.issuer, clock=clock)
        client.push()
        for age, status in ((0, 201), (119, 201), (62, 400)):  # 0, 119, 181 seconds old
            nonce = dict(client.nonces)
            clock.offset += age
            response = client.post("/oauth/par", form_of(client), retry=False)
            assert response.status_code == status, response.text
            if status == 201:
                client.nonces = nonce
        assert client.nonces != nonce


def form_of(client: RawClient) -> dict[str, str | None]:
    return {
        **{"response_type": "code", "code_challenge": "x" * 43, "code_challenge_method": "S256", "state": "s"},
        **{"redirect_uri": client.redirect_uri, "scope": "atproto"},
    }


def test_nonces_can_be_made_stale(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    assert client.push().status_code == 201
    network.rotate_nonces()
    assert client.post("/oauth/par", form_of(client), retry=False).status_code == 400
    assert client.push().status_code == 201
