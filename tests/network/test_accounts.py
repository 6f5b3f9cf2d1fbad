"""Accounts: the documents that lead to them, their moves and their handles."""

from __future__ import annotations

import pytest
import requests

from atproto_session.testing.network import LocalNetwork

from ..scenes import ECHO
from .conftest import log_in
from .raw import RawClient, error_of, tokens_of


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


def test_a_moved_account_is_served_by_its_new_pds_alone(entryway: LocalNetwork) -> None:
    alice = log_in(entryway)
    client, old = alice.client, entryway.pds_url
    new = entryway.move_account(alice.account.did)
    document = requests.get(f"{entryway.plc_url}/{alice.account.did}", timeout=10).json()
    assert document["service"][0]["serviceEndpoint"] == new != old
    resource = requests.get(f"{new}/.well-known/oauth-protected-resource", timeout=10).json()
    assert resource["authorization_servers"] == [entryway.issuer]
    refused = client.call(new, ECHO, alice.tokens.access)
    assert (refused.status_code, *error_of(refused)) == (401, "invalid_token", "Invalid audience")
    second = tokens_of(client.refresh(alice.tokens.refresh))
    assert client.call(new, ECHO, second.access).status_code == 200
    assert client.call(old, ECHO, second.access).status_code == 401


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
        assert other.call(pds, ECHO, tokens.access).status_code == 200
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
