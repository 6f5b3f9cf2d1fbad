"""DPoP proofs, the flow that makes them, the nonces, PKCE."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import jwt
import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from atproto_session.dpop import (
    Answer,
    NonceCache,
    challenge_errors,
    challenge_of,
    dpop_flow,
    generate_verifier,
    next_proof,
    proof,
)
from atproto_session.errors import TransportError
from atproto_session.keys import generate_jwk, public_jwk

from .loopback import ScriptedServer, read_request

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
        (400, {"Content-Type": "text/html"}, NONCE_BODY),
        (400, {}, NONCE_BODY),
        (401, {"WWW-Authenticate": 'Basic realm="a, b", DPoP error="use_dpop_nonce"'}, b""),
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


def test_nonces_are_kept_without_a_lock() -> None:
    """A signal handler may find the cache in the middle of anything."""
    nonces = NonceCache(max_entries=2)
    lock = type(threading.Lock())
    assert not any(isinstance(value, lock) for value in vars(nonces).values())

    class Interrupted(OrderedDict[str, str]):
        def move_to_end(self, key: str, last: bool = True) -> None:
            del self[key]  # as another thread may, which has put in many others
            super().move_to_end(key, last)

    nonces._nonces = Interrupted()
    nonces.set("https://1.example.com", "nonce")
    assert nonces.get("https://1.example.com") is None


def test_threads_that_fill_the_cache_at_once() -> None:
    nonces = NonceCache(max_entries=5)

    def fill(thread: int) -> None:
        for number in range(2000):
            nonces.set(f"https://{thread * number % 17}.example.com", f"{thread} {number}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(fill, range(8)))
    assert len(nonces._nonces) <= 5


WITHOUT = Answer(None, wants_nonce=False)


@pytest.mark.duty(28)
def test_an_answer_without_a_nonce_is_used_and_told_once_for_each_server(caplog: pytest.LogCaptureFixture) -> None:
    nonces = NonceCache(max_entries=2)
    for path in ("token", "par"):
        nonces.check(WITHOUT, f"https://{path}.example.com/{path}")
        nonces.check(WITHOUT, f"https://{path}.example.com/other")
        nonces.check(Answer("nonce", wants_nonce=False), "https://third.example.com/")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "https://token.example.com answers without DPoP nonces" in caplog.messages[0]
    nonces.check(WITHOUT, "https://third.example.com/")
    assert len(nonces._without) == 2


@pytest.mark.duty(28)
def test_a_strict_client_rejects_it_for_good_but_never_refreshed_tokens(caplog: pytest.LogCaptureFixture) -> None:
    nonces = NonceCache(strict=True)
    nonces.check(Answer("nonce", wants_nonce=False), URL)
    with pytest.raises(
        TransportError, match=r"https://pds\.example\.com answered without a DPoP nonce.*strict"
    ) as caught:
        nonces.check(WITHOUT, URL)
    assert caught.value.sent
    assert not caught.value.retryable
    nonces.check(WITHOUT, URL, may_refuse=False)
    assert len(caplog.records) == 1


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
    ("challenge", "errors"),
    [
        ('DPoP algs="ES256", error="invalid_token", error_description="a, \\"b\\", error=\\"c\\""', {"invalid_token"}),
        ('DPoP error_description="x, error=no", error="yes"', {"yes"}),
        ("bearer error=invalid_token", {"invalid_token"}),
        ('DPOP  ERROR = "Invalid_Token"', {"invalid_token"}),
        ('\tDPoP\talgs="ES256",error=\t"invalid_token" ', {"invalid_token"}),
        ('DPoP error="inv\\alid_token"', {"invalid_token"}),
        ('Basic realm="DPoP error=x", DPoP error="invalid_token"', {"invalid_token"}),
        ('Bearer realm="a, b", DPoP algs="ES256 ES256K", error="use_dpop_nonce"', {"use_dpop_nonce"}),
        ('DPoP error="use_dpop_nonce", Bearer error="invalid_token"', {"use_dpop_nonce", "invalid_token"}),
        ('Negotiate, Basic YWxhZGRpbg==, , DPoP error="invalid_token"', {"invalid_token"}),
        ('DPoP error="invalid_token", Basic realm="x", error="other"', {"invalid_token"}),
        ('DPoP algs="ES256"', set()),
        ("DPoP", set()),
        ("", set()),
        ("error=invalid_token", set()),
        ('Basic realm="x", error="invalid_token"', set()),
    ],
)
def test_every_challenge_counts(challenge: str, errors: set[str]) -> None:
    assert challenge_errors({"WWW-Authenticate": challenge}) == errors


def test_challenges_in_several_fields(server_of: Callable[[bytes], str]) -> None:
    """As urllib3 and requests hand them on."""
    url = server_of(
        b'HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm="x"\r\n'
        b'www-authenticate: DPoP algs="ES256"\r\nWWW-Authenticate: Bearer error="invalid_token"\r\n\r\n'
    )
    assert challenge_errors(requests.get(url, timeout=20).headers) == {"invalid_token"}


@pytest.fixture
def server_of() -> Iterator[Callable[[bytes], str]]:
    with ExitStack() as stack:

        def start(said: bytes) -> str:
            def script(connection: socket.socket) -> None:
                read_request(connection)
                connection.sendall(said)

            return f"http://127.0.0.1:{stack.enter_context(ScriptedServer(script)).port}/"

        yield start


def test_without_a_challenge() -> None:
    assert challenge_errors({}) == set()


@given(st.text())
def test_any_challenge_can_be_read(challenge: str) -> None:
    assert not challenge_errors({"WWW-Authenticate": f"DPoP {challenge}"}) or "error" in challenge.lower()


@pytest.mark.duty(24)
def test_pkce() -> None:
    # The example of RFC 7636, appendix B.
    assert challenge_of("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk") == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
    assert len(generate_verifier()) >= 43
    assert generate_verifier() != generate_verifier()


def test_a_key_whose_members_are_lists_makes_proofs() -> None:
    key = {**generate_jwk(), "key_ops": ["sign"]}
    made = proof(key, "GET", "https://pds.example.com/")
    assert jwt.get_unverified_header(made)["jwk"] == public_jwk(key)
    with pytest.raises(ValueError, match="key_ops does not hold sign"):
        proof({**key, "key_ops": ["verify"]}, "GET", "https://pds.example.com/")


def test_a_key_that_was_changed_makes_other_proofs() -> None:
    key = generate_jwk()
    proof(key, "GET", "https://pds.example.com/")
    other = generate_jwk()
    key.update(other)
    made = proof(key, "GET", "https://pds.example.com/")
    assert jwt.get_unverified_header(made)["jwk"] == public_jwk(other)
