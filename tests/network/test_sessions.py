"""The life of a session: rotation, replay, revocation, and what becomes of access tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from atproto_session.testing.network import LocalNetwork

from ..scenes import GET_SESSION
from .conftest import Clock, log_in
from .raw import LoggedIn, RawClient, error_of, tokens_of

EXPIRED = '"exp" claim timestamp check failed'


def alive(network: LocalNetwork, token: str) -> bool:
    info = network.session_of(token)
    assert info is not None
    return not info.revoked


def test_uses_rotations_and_replays_are_counted(network: LocalNetwork, alice: LoggedIn) -> None:
    client, first = alice.client, alice.tokens
    client.refresh("ref-unknown")
    assert network.replays == 0
    assert alive(network, first.refresh)

    second = tokens_of(client.refresh(first.refresh))
    assert (network.rotations, network.replays) == (1, 0)
    assert network.refresh_token_uses == {"ref-unknown": 1, first.refresh: 1}
    old, new = network.session_of(first.refresh), network.session_of(second.refresh)
    assert old is not None
    assert new is not None
    assert (old.current, new.current) == (False, True)

    for token in (first.refresh, first.refresh, second.refresh):
        assert client.refresh(token).status_code == 400
    assert network.replays == 2
    assert network.refresh_token_uses == {"ref-unknown": 1, first.refresh: 3, second.refresh: 1}
    assert not alive(network, second.refresh)


def test_revocations_are_counted_once_and_where_they_end_something(network: LocalNetwork, alice: LoggedIn) -> None:
    second = tokens_of(alice.client.refresh(alice.tokens.refresh))
    for token in (alice.tokens.access, "unknown"):
        alice.client.revoke(token)
    RawClient(network.issuer).revoke(second.refresh)
    assert alive(network, second.refresh)
    assert network.revocations == 0

    for token in (second.access, second.refresh):
        alice.client.revoke(token)
    assert not alive(network, second.refresh)
    assert network.revocations == 1


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
