"""DPoP, at the authorization server and at the PDS."""

from __future__ import annotations

import http.client
from contextlib import closing
from typing import Any
from urllib.parse import urlencode, urlsplit

import jwt
import pytest

from atproto_session.testing.network import LocalNetwork

from .conftest import Clock
from .raw import LoggedIn, error_of, new_key, public_jwk


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"header": {"jwk": None}}, "P-256"),
        ({"header": {"jwk": {"kty": "EC", "crv": "P-384", "x": "", "y": ""}}}, "P-256"),
        ({"header": {"jwk": {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}}}, "malformed"),
        ({"header": {"jwk": {"kty": "EC", "crv": "P-256", "x": 1}}}, "malformed"),
        ({"header": {"jwk": public_jwk(new_key(), d="AA")}}, "private"),
        ({"htu": None}, "htu"),
        ({"iat": None}, "iat"),
    ],
)
def test_a_bad_proof_is_refused_for_a_reason(
    network: LocalNetwork, alice: LoggedIn, changes: dict[str, Any], reason: str
) -> None:
    """In words that are not the real PDS's."""
    form = {"grant_type": "refresh_token", "refresh_token": alice.tokens.refresh}
    proof = alice.client.proof("POST", f"{network.issuer}/oauth/token", **changes)
    assert reason in error_of(alice.client.post("/oauth/token", form, proof=proof))[1]
    assert network.refresh_token_uses == {}


def test_there_is_exactly_one_proof_and_it_is_one(network: LocalNetwork, alice: LoggedIn) -> None:
    url, form = f"{network.issuer}/oauth/token", {"grant_type": "refresh_token", "client_id": alice.client.client_id}
    form["refresh_token"] = alice.tokens.refresh
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
