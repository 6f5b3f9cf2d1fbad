"""Many threads of many processes want a good token at the same moment: one refresh, and nobody loses a request."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from atproto_session import ClientMetadata, OAuthClient
from atproto_session.testing.network import LocalNetwork

from ..crew import Crew
from ..scenes import log_in, store_tokens, stored

ROUNDS = 20
#: Over a server; more are made by ``make machines``.
ROUNDS_ON_SERVERS = 4
SERVERS = ["redis", "postgresql", "mysql"]


@pytest.fixture(params=["json", "sqlite", *SERVERS])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in SERVERS:
        return str(request.getfixturevalue(f"{request.param}_url"))
    return f"{request.param}:///{tmp_path}/sessions"


def rounds_on(store: str) -> int:
    return ROUNDS if store.startswith(("json", "sqlite")) else ROUNDS_ON_SERVERS


@pytest.fixture
def network() -> Iterator[LocalNetwork]:
    with LocalNetwork() as network:
        yield network


@pytest.mark.duty(35)
def test_one_refresh_for_each_expiry_and_for_each_rejected_token(store: str, network: LocalNetwork) -> None:
    account = network.create_account()
    with OAuthClient(ClientMetadata.loopback(), store=store, **network.client_options()) as client:
        log_in(network, client, account)
        with Crew(store, account.did, network.client_options()) as crew:
            for round_ in range(rounds_on(store)):
                network.expire_access_tokens(account.did)
                token = stored(client, account.did).token_set.access_token
                if round_ % 2:
                    # As the clock would have it: everybody finds the stored token expired, before any request.
                    store_tokens(client, account.did, expires_at=datetime.fromtimestamp(1, UTC))
                    tokens = crew.do("restore")
                else:
                    crew.do("request")
                    tokens = crew.do("rejected", rejected=token)
                assert len(set(tokens)) == 1
                assert network.rotations == round_ + 1
    assert set(network.refresh_token_uses.values()) == {1}
    assert network.replays == 0


@pytest.mark.duty(35)
@pytest.mark.parametrize("store", ["sqlite", *SERVERS], indirect=True)
def test_one_refresh_for_each_expiry_without_any_lock(store: str, network: LocalNetwork) -> None:
    """As on several machines: the record in the store is all that the processes share."""
    account = network.create_account()
    with OAuthClient(ClientMetadata.loopback(), store=store, **network.client_options()) as client:
        log_in(network, client, account)
        with Crew(store, account.did, network.client_options(), apart=True) as crew:
            for round_ in range(rounds_on(store)):
                store_tokens(client, account.did, expires_at=datetime.fromtimestamp(1, UTC))
                assert len(set(crew.do("restore"))) == 1
                assert network.rotations == round_ + 1
    assert set(network.refresh_token_uses.values()) == {1}
    assert network.replays == 0


@pytest.mark.parametrize(
    ("fault", "options", "error"),
    [
        ("status", {"status": 500}, "OAuthResponseError"),
        ("status", {"status": 503, "processed": True}, "OAuthResponseError"),
        ("status", {"status": 429}, "OAuthResponseError"),
        ("cut_before", {}, "RefreshInterruptedError"),
        ("cut_after", {}, "RefreshInterruptedError"),
        ("html", {}, "RefreshInterruptedError"),
    ],
)
def test_a_sick_server_is_asked_once_and_all_are_told(
    tmp_path: Path, network: LocalNetwork, fault: str, options: dict[str, Any], error: str
) -> None:
    store = f"sqlite:///{tmp_path}/sessions"
    account = network.create_account()
    with OAuthClient(ClientMetadata.loopback(), store=store, **network.client_options()) as client:
        log_in(network, client, account)
        store_tokens(client, account.did, expires_at=datetime.fromtimestamp(1, UTC))
        with Crew(store, account.did, network.client_options()) as crew:
            sick = network.fault("refresh", fault, times=None, **options)
            ok, errors = crew.try_to_do("restore", threads=32)
    assert ok == []
    assert {each.partition(":")[0] for each in errors} == {error}
    assert len(errors) == 128
    assert sick.count <= 4, "each process at most once, and most of them not at all"
