"""The PDS as a resource server, and the documents that lead to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import requests

from atproto_session.testing.network import LocalNetwork

from ..scenes import ECHO
from .conftest import log_in
from .raw import LoggedIn, error_of


def test_what_is_not_there_is_not_found(network: LocalNetwork) -> None:
    unknown = f"{network.pds_url}/xrpc/com.atproto.identity.resolveHandle?handle=nobody.test"
    for method, url, status in (
        ("GET", f"{network.plc_url}/did:plc:unknown", 404),
        ("GET", f"{network.plc_url}/", 404),
        ("GET", unknown, 400),
        ("GET", f"{network.issuer}/oauth/par", 405),
        ("GET", f"{network.issuer}/oauth/jwks", 200),
        ("HEAD", f"{network.issuer}/oauth/jwks", 405),
    ):
        assert requests.request(method, url, timeout=10).status_code == status, url


def test_an_echo_tells_what_was_sent(network: LocalNetwork, alice: LoggedIn) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"one "
        yield b"two"

    for body in (b"one two", pieces()):
        url = f"{network.pds_url}{ECHO}"
        proof = alice.client.proof("POST", url, token=alice.tokens.access)
        answer = alice.client.call(
            *(network.pds_url, f"{ECHO}?a=1&a=2", alice.tokens.access),
            method="POST",
            proof=proof,
            data=body,
            headers={"Atproto-Proxy": "did:web:x"},
        ).json()
        assert (answer["did"], answer["method"]) == (alice.account.did, "POST")
        assert answer["query"] == {"a": ["1", "2"]}
        assert answer["headers"]["atproto-proxy"] == "did:web:x"
        assert answer["headers"]["authorization"] == "DPoP"
        assert (answer["length"], answer["sha256"]) == (7, hashlib.sha256(b"one two").hexdigest())
    assert network.requests(ECHO) == network.resource_requests == 2


def test_the_challenge_may_have_the_bearer_scheme() -> None:
    with LocalNetwork(challenge_scheme="Bearer") as network:
        alice = log_in(network)
        network.expire_access_tokens(alice.account.did)
        refused = alice.client.call(network.pds_url, ECHO, alice.tokens.access)
        # What would have to be escaped is left out.
        assert error_of(refused) == ("invalid_token", '"exp" claim timestamp check failed')
        assert refused.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
        network.rotate_nonces()
        proof = alice.client.proof("GET", f"{network.pds_url}{ECHO}", token=alice.tokens.access)
        refused = alice.client.call(network.pds_url, ECHO, alice.tokens.access, proof=proof)
        assert refused.headers["WWW-Authenticate"].startswith("DPoP ")


def test_methods_for_what_a_client_must_survive(network: LocalNetwork, alice: LoggedIn) -> None:
    client, access = alice.client, alice.tokens.access
    answer = client.call(network.pds_url, f"/xrpc/app.test.redirect?status=307&to={ECHO}", access)
    assert (answer.status_code, answer.headers["Location"]) == (307, ECHO)
    answer = client.call(network.pds_url, "/xrpc/app.test.redirect?to=http://evil.example/%0D%0AX-Evil:%201", access)
    assert (answer.status_code, answer.headers["Location"]) == (302, "http://evil.example/X-Evil: 1")
    answer = client.call(network.pds_url, "/xrpc/app.test.scoped?scope=transition:email", access)
    assert (answer.status_code, error_of(answer)[0]) == (403, "ScopeMissingError")
    assert "WWW-Authenticate" not in answer.headers
    assert client.call(network.pds_url, "/xrpc/app.test.scoped", access).status_code == 200
    assert client.call(network.pds_url, "/xrpc/app.bsky.feed.getTimeline", access).status_code == 501
