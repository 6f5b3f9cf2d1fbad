"""The PDS as a resource server, and the documents that lead to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import requests

from atproto_session.testing.network import LocalNetwork

from .conftest import log_in
from .raw import LoggedIn, RawClient, error_of, new_key, tokens_of


def test_the_documents_lead_from_the_handle_to_the_issuer(entryway: LocalNetwork) -> None:
    account = entryway.create_account("alice.test")
    answer = requests.get(
        f"{entryway.pds_url}/xrpc/com.atproto.identity.resolveHandle", params={"handle": "Alice.test"}, timeout=10
    )
    assert answer.json() == {"did": account.did}
    document = requests.get(f"{entryway.plc_url}/{account.did}", timeout=10).json()
    assert document["id"] == account.did
    assert document["alsoKnownAs"] == ["at://alice.test"]
    assert document["service"] == [
        {"id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": entryway.pds_url}
    ]
    resource = requests.get(f"{entryway.pds_url}/.well-known/oauth-protected-resource", timeout=10)
    assert resource.headers["Content-Type"] == "application/json"
    assert resource.json()["resource"] == entryway.pds_url
    assert resource.json()["authorization_servers"] == [entryway.issuer]
    metadata = requests.get(f"{entryway.issuer}/.well-known/oauth-authorization-server", timeout=10).json()
    assert metadata["issuer"] == entryway.issuer
    for name in ("authorization", "token", "pushed_authorization_request", "revocation"):
        assert metadata[f"{name}_endpoint"].startswith(entryway.issuer)
    for name, value in (
        *(("response_types", "code"), ("grant_types", "refresh_token"), ("code_challenge_methods", "S256")),
        *(("token_endpoint_auth_methods", "none"), ("token_endpoint_auth_methods", "private_key_jwt")),
        *(("token_endpoint_auth_signing_alg_values", "ES256"), ("scopes", "atproto")),
        *(("dpop_signing_alg_values", "ES256"), ("grant_types", "authorization_code")),
    ):
        assert value in metadata[f"{name}_supported"]
    for name in (
        *("authorization_response_iss_parameter_supported", "require_pushed_authorization_requests"),
        *("client_id_metadata_document_supported", "require_request_uri_registration"),
    ):
        assert metadata[name] is True


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
        url = f"{network.pds_url}/xrpc/app.test.echo"
        proof = alice.client.proof("POST", url, token=alice.tokens.access)
        answer = alice.client.call(
            *(network.pds_url, "app.test.echo?a=1&a=2", alice.tokens.access),
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
    assert network.requests("/xrpc/app.test.echo") == network.resource_requests == 2


def test_a_token_is_needed_with_its_scheme_and_its_key(network: LocalNetwork, alice: LoggedIn) -> None:
    client, access = alice.client, alice.tokens.access
    for authorization, status, error in (
        (None, 401, ("AuthMissing", "Authentication Required")),
        ("DPoP", 400, ("InvalidToken", "Malformed authorization header")),
        (f"Bearer {access}", 400, ("InvalidToken", "Malformed token")),
    ):
        headers = {"Authorization": authorization}
        refused = requests.get(f"{network.pds_url}/xrpc/app.test.echo", headers=headers, timeout=10)
        assert (refused.status_code, error_of(refused)) == (status, error)
        assert not {"WWW-Authenticate", "DPoP-Nonce"} & {*refused.headers}
    assert error_of(client.call(network.pds_url, "app.test.echo", "unknown")) == ("invalid_token", "Malformed token")
    client.key = new_key()
    stranger = client.call(network.pds_url, "app.test.echo", access)
    assert (stranger.status_code, *error_of(stranger)) == (401, "invalid_token", "Invalid DPoP key binding")


def test_the_challenge_may_have_the_bearer_scheme() -> None:
    with LocalNetwork(challenge_scheme="Bearer") as network:
        alice = log_in(network)
        network.expire_access_tokens(alice.account.did)
        refused = alice.client.call(network.pds_url, "app.test.echo", alice.tokens.access)
        # What would have to be escaped is left out.
        assert error_of(refused) == ("invalid_token", '"exp" claim timestamp check failed')
        assert refused.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
        network.rotate_nonces()
        proof = alice.client.proof("GET", f"{network.pds_url}/xrpc/app.test.echo", token=alice.tokens.access)
        refused = alice.client.call(network.pds_url, "app.test.echo", alice.tokens.access, proof=proof)
        assert refused.headers["WWW-Authenticate"].startswith("DPoP ")


def test_methods_for_what_a_client_must_survive(network: LocalNetwork, alice: LoggedIn) -> None:
    client, access = alice.client, alice.tokens.access
    answer = client.call(network.pds_url, "app.test.redirect?status=307&to=/xrpc/app.test.echo", access)
    assert (answer.status_code, answer.headers["Location"]) == (307, "/xrpc/app.test.echo")
    answer = client.call(network.pds_url, "app.test.redirect?to=http://evil.example/%0D%0AX-Evil:%201", access)
    assert (answer.status_code, answer.headers["Location"]) == (302, "http://evil.example/X-Evil: 1")
    answer = client.call(network.pds_url, "app.test.scoped?scope=transition:email", access)
    assert (answer.status_code, error_of(answer)[0]) == (403, "ScopeMissingError")
    assert "WWW-Authenticate" not in answer.headers
    assert client.call(network.pds_url, "app.test.scoped", access).status_code == 200
    assert client.call(network.pds_url, "app.bsky.feed.getTimeline", access).status_code == 501


def test_a_moved_account_is_served_by_its_new_pds_alone(entryway: LocalNetwork) -> None:
    alice = log_in(entryway)
    client, old = alice.client, entryway.pds_url
    new = entryway.move_account(alice.account.did)
    document = requests.get(f"{entryway.plc_url}/{alice.account.did}", timeout=10).json()
    assert document["service"][0]["serviceEndpoint"] == new != old
    resource = requests.get(f"{new}/.well-known/oauth-protected-resource", timeout=10).json()
    assert resource["authorization_servers"] == [entryway.issuer]
    refused = client.call(new, "app.test.echo", alice.tokens.access)
    assert (refused.status_code, *error_of(refused)) == (401, "invalid_token", "Invalid audience")
    second = tokens_of(client.refresh(alice.tokens.refresh))
    assert client.call(new, "app.test.echo", second.access).status_code == 200
    assert client.call(old, "app.test.echo", second.access).status_code == 401


@pytest.mark.parametrize("apart", [False, True])
def test_an_account_may_move_to_another_issuer(apart: bool) -> None:
    with LocalNetwork(entryway=apart) as network:
        alice = log_in(network)
        pds = network.move_account_to_other_issuer(alice.account.did)
        resource = requests.get(f"{pds}/.well-known/oauth-protected-resource", timeout=10).json()
        (issuer,) = resource["authorization_servers"]
        assert issuer != network.issuer
        assert (issuer == pds) is not apart
        other = RawClient(issuer)
        assert error_of(other.refresh(alice.tokens.refresh)) == ("invalid_grant", "Invalid refresh token")
        tokens = other.log_in(network, alice.account)
        assert other.call(pds, "app.test.echo", tokens.access).status_code == 200
        info = network.session_of(alice.tokens.refresh)
        assert info is not None
        assert info.current


def test_handles_change(network: LocalNetwork) -> None:
    alice, bob = network.create_account("alice.test"), network.create_account()
    assert bob.handle == "user2.test"
    network.change_handle(alice.did, "alice2.test")
    network.change_handle(bob.did, "bob.test")
    network.change_handle(bob.did, "bob.test", resolves=False)

    def resolve(handle: str) -> int:
        url = f"{network.pds_url}/xrpc/com.atproto.identity.resolveHandle"
        return requests.get(url, params={"handle": handle}, timeout=10).status_code

    assert [resolve(h) for h in ("alice.test", "alice2.test", "bob.test", "user2.test")] == [400, 200, 400, 400]
    document = requests.get(f"{network.plc_url}/{bob.did}", timeout=10).json()
    assert document["alsoKnownAs"] == ["at://bob.test"]
    for handle, problem in (("alice2.test", "taken"), ("x.example", "under .test"), ("-.test", "under .test")):
        with pytest.raises(ValueError, match=problem):
            network.create_account(handle)
