"""DPoP nonces: each server has its own, and they live for a while."""

from __future__ import annotations

from atproto_session.testing.network import LocalNetwork

from ..scenes import ECHO
from .conftest import Clock
from .raw import RawClient, error_of


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

        proof = client.proof("GET", f"{entryway.pds_url}{ECHO}", token=tokens.access)
        refused = client.call(entryway.pds_url, ECHO, tokens.access, proof=proof)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"].startswith('DPoP algs="ES256 ES256K", error="use_dpop_nonce"')
        assert refused.headers["DPoP-Nonce"]

    # The nonce of one server is nothing to another.
    client.nonces[entryway.pds_url] = client.nonces[entryway.issuer]
    proof = client.proof("GET", f"{entryway.pds_url}{ECHO}", token=tokens.access)
    refused = client.call(entryway.pds_url, ECHO, tokens.access, proof=proof)
    assert "use_dpop_nonce" in refused.headers["WWW-Authenticate"]
    assert entryway.refresh_token_uses == {}
    assert client.call(entryway.pds_url, ECHO, tokens.access).status_code == 200


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
