"""The life of a session: rotation, replay, revocation, and what becomes of access tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import requests

from atproto_session.testing.network import LocalNetwork

from .conftest import Clock, log_in
from .raw import GET_SESSION, LoggedIn, RawClient, error_of, new_key, tokens_of

EXPIRED = '"exp" claim timestamp check failed'


def alive(network: LocalNetwork, token: str) -> bool:
    info = network.session_of(token)
    assert info is not None
    return not info.revoked


def test_a_refresh_replaces_both_tokens(network: LocalNetwork, alice: LoggedIn) -> None:
    client, first = alice.client, alice.tokens
    second = tokens_of(client.refresh(first.refresh))
    assert (second.refresh, second.access) != (first.refresh, first.access)
    refused = client.call(network.pds_url, GET_SESSION, first.access)
    assert (refused.status_code, *error_of(refused)) == (401, "invalid_token", "Invalid token")
    assert refused.headers["WWW-Authenticate"] == (
        'DPoP algs="ES256 ES256K", error="invalid_token", error_description="Invalid token"'
    )
    assert client.call(network.pds_url, GET_SESSION, second.access).status_code == 200
    assert (network.rotations, network.replays) == (1, 0)
    assert network.refresh_token_uses == {first.refresh: 1}
    old, new = network.session_of(first.refresh), network.session_of(second.refresh)
    assert old is not None
    assert new is not None
    assert (old.current, new.current) == (False, True)


def test_a_replay_ends_the_session(network: LocalNetwork, alice: LoggedIn) -> None:
    client, first = alice.client, alice.tokens
    second = tokens_of(client.refresh(first.refresh))
    response = client.refresh(first.refresh)
    assert (response.status_code, *error_of(response)) == (400, "invalid_grant", "Refresh token replayed")
    for token in (first.refresh, second.refresh):
        assert error_of(client.refresh(token)) == ("invalid_grant", "Invalid refresh token")
    assert client.call(network.pds_url, GET_SESSION, second.access).status_code == 401
    assert network.replays == 2
    assert network.refresh_token_uses == {first.refresh: 3, second.refresh: 1}
    assert not alive(network, second.refresh)


def test_an_unknown_token_is_refused(network: LocalNetwork, alice: LoggedIn) -> None:
    assert error_of(alice.client.refresh("ref-unknown")) == ("invalid_grant", "Invalid refresh token")
    assert network.replays == 0
    assert alive(network, alice.tokens.refresh)


def test_the_wrong_key_ends_the_session(network: LocalNetwork, alice: LoggedIn) -> None:
    alice.client.key = new_key()
    response = alice.client.refresh(alice.tokens.refresh)
    assert response.status_code == 400
    assert error_of(response) == ("invalid_grant", "DPoP proof does not match the expected JKT")
    assert not alive(network, alice.tokens.refresh)


def test_the_wrong_client_ends_the_session(network: LocalNetwork, alice: LoggedIn) -> None:
    response = alice.client.refresh(alice.tokens.refresh, client_id="http://localhost")
    assert (response.status_code, *error_of(response)) == (400, "invalid_grant", "Token was not issued to this client")
    assert not alive(network, alice.tokens.refresh)


def test_a_missing_nonce_or_a_bad_proof_spends_nothing(network: LocalNetwork, alice: LoggedIn) -> None:
    alice.client.nonces.clear()
    second = tokens_of(alice.client.refresh(alice.tokens.refresh))
    assert network.refresh_token_uses == {alice.tokens.refresh: 1}
    network.rotate_nonces()
    tokens_of(alice.client.refresh(second.refresh))
    assert network.rotations == 2


def test_of_many_uses_at_once_one_succeeds_and_the_session_is_gone(network: LocalNetwork, alice: LoggedIn) -> None:
    workers = 16
    barrier = Barrier(workers)

    def refresh(number: int) -> tuple[int, str]:
        client = RawClient(network.issuer)
        client.key, client.nonces = alice.client.key, dict(alice.client.nonces)
        barrier.wait(10)
        response = client.refresh(alice.tokens.refresh)
        return response.status_code, error_of(response)[1]

    with ThreadPoolExecutor(workers) as pool:
        answers = sorted(pool.map(refresh, range(workers)))
    assert [status for status, _ in answers] == [200] + [400] * (workers - 1)
    assert [text for _, text in answers].count("Refresh token replayed") == 1
    assert not alive(network, alice.tokens.refresh)
    assert network.refresh_token_uses == {alice.tokens.refresh: workers}
    assert (network.rotations, network.replays) == (1, workers - 1)


@pytest.mark.parametrize("kind", ["refresh", "access"])
def test_any_token_that_is_good_ends_its_session(network: LocalNetwork, alice: LoggedIn, kind: str) -> None:
    response = alice.client.revoke(getattr(alice.tokens, kind))
    assert (response.status_code, response.json()) == (200, {})
    assert not alive(network, alice.tokens.refresh)
    assert error_of(alice.client.refresh(alice.tokens.refresh)) == ("invalid_grant", "Invalid refresh token")
    assert alice.client.revoke(alice.tokens.refresh).status_code == 200
    assert network.revocations == 1


def test_a_spent_refresh_token_ends_its_session_too(network: LocalNetwork, alice: LoggedIn) -> None:
    second = tokens_of(alice.client.refresh(alice.tokens.refresh))
    assert alice.client.revoke(alice.tokens.refresh).status_code == 200
    assert not alive(network, second.refresh)


def test_an_access_token_from_before_a_rotation_ends_nothing(network: LocalNetwork, alice: LoggedIn) -> None:
    second = tokens_of(alice.client.refresh(alice.tokens.refresh))
    for token in (alice.tokens.access, "unknown"):
        response = alice.client.revoke(token)
        assert (response.status_code, response.json()) == (200, {})
    assert alive(network, second.refresh)
    assert network.revocations == 0


def test_a_revocation_with_another_key_or_none_ends_nothing(network: LocalNetwork, alice: LoggedIn) -> None:
    stranger = RawClient(network.issuer)
    assert stranger.revoke(alice.tokens.refresh).status_code == 200
    form = {"client_id": alice.client.client_id, "token": alice.tokens.refresh}
    assert requests.post(f"{network.issuer}/oauth/revoke", data=form, timeout=10).status_code == 200
    assert alive(network, alice.tokens.refresh)


def test_an_access_token_of_an_entryway_outlives_rotation_and_revocation(entryway: LocalNetwork) -> None:
    alice = log_in(entryway)
    client = alice.client
    assert entryway.issuer != entryway.pds_url
    second = tokens_of(client.refresh(alice.tokens.refresh))
    assert client.call(entryway.pds_url, GET_SESSION, alice.tokens.access).status_code == 200
    client.revoke(second.refresh)
    assert client.call(entryway.pds_url, GET_SESSION, second.access).status_code == 200
    entryway.expire_access_tokens(alice.account.did)
    assert client.call(entryway.pds_url, GET_SESSION, second.access).status_code == 401


def test_access_tokens_expire() -> None:
    clock = Clock()
    with LocalNetwork(access_token_lifetime=60, clock=clock) as network:
        alice = log_in(network)
        alice.client.clock = clock
        assert alice.tokens.response["expires_in"] == 60
        clock.offset = 61
        response = alice.client.call(network.pds_url, GET_SESSION, alice.tokens.access)
        assert (response.status_code, *error_of(response)) == (401, "invalid_token", EXPIRED)
        second = tokens_of(alice.client.refresh(alice.tokens.refresh))
        assert alice.client.call(network.pds_url, GET_SESSION, second.access).status_code == 200


@pytest.mark.parametrize(("days", "rotate", "problem"), [(15, False, "Session expired"), (13, True, "Session expired")])
def test_sessions_of_public_clients_last_two_weeks(days: int, rotate: bool, problem: str) -> None:
    clock = Clock()
    with LocalNetwork(clock=clock) as network:
        alice = log_in(network)
        alice.client.clock = clock
        token = alice.tokens.refresh
        clock.offset += days * 86_400
        if rotate:
            token = tokens_of(alice.client.refresh(token)).refresh
            clock.offset += days * 86_400
        assert error_of(alice.client.refresh(token)) == ("invalid_grant", problem)


def test_access_tokens_can_be_made_to_expire_now(network: LocalNetwork, alice: LoggedIn) -> None:
    other = RawClient(network.issuer)
    tokens = other.log_in(network, network.create_account())
    network.expire_access_tokens(alice.account.did)
    response = alice.client.call(network.pds_url, GET_SESSION, alice.tokens.access)
    assert error_of(response) == ("invalid_token", EXPIRED)
    assert other.call(network.pds_url, GET_SESSION, tokens.access).status_code == 200
    tokens_of(alice.client.refresh(alice.tokens.refresh))


def test_access_tokens_can_be_rejected_new_ones_included(network: LocalNetwork, alice: LoggedIn) -> None:
    network.reject_access_tokens(alice.account.did)
    second = tokens_of(alice.client.refresh(alice.tokens.refresh))
    assert alice.client.call(network.pds_url, GET_SESSION, second.access).status_code == 401
    network.accept_access_tokens(alice.account.did)
    assert alice.client.call(network.pds_url, GET_SESSION, second.access).status_code == 200


def test_sessions_can_be_ended(network: LocalNetwork, alice: LoggedIn) -> None:
    other = RawClient(network.issuer).log_in(network, network.create_account())
    network.revoke_sessions(alice.account.did)
    assert alice.client.call(network.pds_url, GET_SESSION, alice.tokens.access).status_code == 401
    assert error_of(alice.client.refresh(alice.tokens.refresh)) == ("invalid_grant", "Invalid refresh token")
    assert network.revocations == 0
    assert not alive(network, alice.tokens.access)
    assert alive(network, other.access)
