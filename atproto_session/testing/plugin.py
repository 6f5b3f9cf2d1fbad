"""pytest fixtures, there for every project that has this library installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest loads this module in every run: what it brings is imported where it is used
    from ..client import OAuthClient
    from ..oauth_session import OAuthSession
    from .network import LocalNetwork


@pytest.fixture
def atproto_network() -> Iterator[LocalNetwork]:
    """A :class:`.LocalNetwork`: a PLC directory, a PDS and an authorization server on loopback."""
    from .network import LocalNetwork

    with LocalNetwork() as network:
        yield network


@pytest.fixture
def atproto_client(atproto_network: LocalNetwork) -> Iterator[OAuthClient]:
    """An :class:`.OAuthClient` on that network, with its sessions in memory. After a refresh that failed, it asks the
    server again at once."""
    from .._terms import Times
    from ..client import OAuthClient
    from ..metadata import ClientMetadata

    metadata = ClientMetadata.loopback(scope="atproto transition:generic")
    times = Times(first_rest=0.0, longest_rest=0.0)
    with OAuthClient(metadata, store="memory:", times=times, **atproto_network.client_options()) as client:
        yield client


@pytest.fixture
def atproto_login(atproto_network: LocalNetwork, atproto_client: OAuthClient) -> Callable[[str | None], OAuthSession]:
    """A function that makes an account, of the handle that it is given if any, and logs it in."""

    def login(handle: str | None = None) -> OAuthSession:
        account = atproto_network.create_account(handle)
        callback = atproto_network.authorize(atproto_client.authorize(account.did), account)
        return atproto_client.callback(callback).session

    return login
