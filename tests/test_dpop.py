"""DPoP proofs, the flow that makes them, the nonces, PKCE."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from atproto_session.dpop import (
    Answer,
    NonceCache,
    challenge_error,
    challenge_of,
    dpop_flow,
    generate_verifier,
    next_proof,
    proof,
)
from atproto_session.keys import generate_jwk, public_jwk

KEY = generate_jwk()
URL = "https://pds.example.com/xrpc/app.test.echo?limit=1#part"
NONCE_BODY = b'{"error": "use_dpop_nonce"}'
JSON = {"Content-Type": "application/json"}


def opened(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    header = jwt.get_unverified_header(text)
    return header, jwt.decode(text, jwt.PyJWK(header["jwk"]), algorithms=["ES256"])


@pytest.mark.duty(26)
def test_a_proof() -> None:
    header, claims = opened(proof(KEY, "GET", URL, nonce="n", access_token="token", clock=lambda: 1000.9))
    assert header == {"typ": "dpop+jwt", "alg": "ES256", "jwk": public_jwk(KEY)}
    assert "d" not in header["jwk"]
    ath = base64.urlsafe_b64encode(hashlib.sha256(b"token").digest()).rstrip(b"=").decode()
    assert len(claims.pop("jti")) >= 20
    assert claims == {
        "htm": "GET",
        "htu": "https://pds.example.com/xrpc/app.test.echo",
        "iat": 1000,
        "nonce": "n",
        "ath": ath,
    }


@pytest.mark.duty(26)
def test_a_proof_without_token_and_nonce() -> None:
    _, claims = opened(proof(KEY, "POST", "https://pds.example.com"))
    assert sorted(claims) == ["htm", "htu", "iat", "jti"]
    assert claims["htu"] == "https://pds.example.com/"


@pytest.mark.duty(26)
def test_no_two_proofs_share_an_id() -> None:
    assert len({opened(proof(KEY, "GET", URL))[1]["jti"] for _ in range(100)}) == 100


def test_a_key_of_the_reference_client() -> None:
    private = ec.generate_private_key(ec.SECP256K1())
    text = jwt.algorithms.ECAlgorithm.to_jwk(private)
    key = json.loads(text)
    header = jwt.get_unverified_header(proof(key, "GET", URL))
    assert header["alg"] == "ES256K"
    jwt.decode(proof(key, "GET", URL), private.public_key(), algorithms=["ES256K"])


def nonce_in(text: str | None) -> object:
    assert text is not None
    return opened(text)[1].get("nonce")


@pytest.mark.duty(27)
@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (400, JSON, NONCE_BODY),
        (401, JSON, NONCE_BODY),
        (401, {"WWW-Authenticate": 'DPoP algs="ES256", error="use_dpop_nonce"'}, b""),
        (400, {"WWW-Authenticate": 'Bearer error="use_dpop_nonce"'}, b""),
    ],
)
def test_a_wanted_nonce_is_used_at_once(status: int, headers: dict[str, str], body: bytes) -> None:
    nonces = NonceCache()
    flow = dpop_flow(KEY, "GET", URL, nonces)
    first = next(flow)
    assert nonce_in(first) is None
    second = next_proof(flow, Answer.of(status, headers | {"DPoP-Nonce": "one"}, lambda: body))
    assert nonce_in(second) == "one"
    assert opened(first)[1]["jti"] != opened(second or "")[1]["jti"]
    assert next_proof(flow, Answer("two", wants_nonce=True)) is None, "once is enough"
    assert nonces.get("https://pds.example.com") == "two"
    assert nonce_in(next(dpop_flow(KEY, "GET", "https://PDS.example.com:443/other", nonces))) == "two"


@pytest.mark.duty(27)
def test_every_answer_brings_a_nonce_for_the_next_request() -> None:
    nonces = NonceCache()
    flow = dpop_flow(KEY, "GET", URL, nonces)
    next(flow)
    assert next_proof(flow, Answer.of(200, {"DPoP-Nonce": "one"}, b"")) is None
    assert nonces.get("https://pds.example.com") == "one"


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (400, JSON, b'{"error": "invalid_grant"}'),
        (400, JSON, b"[]"),
        (400, JSON, b"not JSON"),
        (400, JSON, b"[" * 100_000),
        (400, {"Content-Type": "text/html"}, NONCE_BODY),
        (400, {}, NONCE_BODY),
        (403, JSON, NONCE_BODY),
        (401, {"WWW-Authenticate": 'Basic error="use_dpop_nonce"'}, b""),
        (401, {"WWW-Authenticate": 'DPoP error="invalid_token"'}, b""),
    ],
)
def test_other_answers_are_final(status: int, headers: dict[str, str], body: bytes) -> None:
    flow = dpop_flow(KEY, "GET", URL, NonceCache())
    next(flow)
    assert next_proof(flow, Answer.of(status, headers | {"DPoP-Nonce": "one"}, body)) is None


@pytest.mark.parametrize("nonce", [None, "known"])
def test_no_new_nonce_no_new_try(nonce: str | None) -> None:
    nonces = NonceCache()
    nonces.set("https://pds.example.com", "known")
    flow = dpop_flow(KEY, "GET", URL, nonces)
    next(flow)
    assert next_proof(flow, Answer(nonce, wants_nonce=True)) is None
    flow = dpop_flow(KEY, "GET", URL, nonces)
    next(flow)
    assert next_proof(flow, Answer("other", wants_nonce=True)) is not None
    assert next_proof(flow, Answer(None, wants_nonce=False)) is None


def test_nonces_are_bounded_in_number_and_size() -> None:
    nonces = NonceCache(max_entries=2)
    for number in range(3):
        nonces.set(f"https://{number}.example.com", "nonce")
    assert nonces.get("https://0.example.com") is None
    assert nonces.get("https://2.example.com") == "nonce"
    nonces.set("https://2.example.com", "x" * 1000)
    nonces.set("https://2.example.com", "")
    assert nonces.get("https://2.example.com") == "nonce"


@pytest.mark.parametrize(
    ("challenge", "error"),
    [
        ('DPoP algs="ES256", error="invalid_token", error_description="a, \\"b\\", error=\\"c\\""', "invalid_token"),
        ('DPoP error_description="x, error=no", error="yes"', "yes"),
        ("bearer error=invalid_token", "invalid_token"),
        ('DPoP algs="ES256"', None),
        ("DPoP", None),
        ("", None),
        ('Basic realm="x", error="invalid_token"', None),
    ],
)
def test_challenges(challenge: str, error: str | None) -> None:
    assert challenge_error(challenge) == error


@given(st.text())
def test_any_challenge_can_be_read(challenge: str) -> None:
    assert challenge_error(f"DPoP {challenge}") is None or "error" in challenge.lower()


@pytest.mark.duty(24)
def test_pkce() -> None:
    # The example of RFC 7636, appendix B.
    assert challenge_of("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk") == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
    assert len(generate_verifier()) >= 43
    assert generate_verifier() != generate_verifier()
