"""Fixtures that more than one room of the tests uses. The network and a client come with the library's own plugin."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from atproto_session import ClientMetadata, OAuthClient, OAuthSession
from atproto_session.testing.network import Account, LocalNetwork

from .core import RESTLESS

# A shell that starts the tests in the background has them ignore SIGINT, and with them every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def network(atproto_network: LocalNetwork) -> LocalNetwork:
    return atproto_network


@pytest.fixture
def client(network: LocalNetwork) -> Iterator[OAuthClient]:
    metadata = ClientMetadata.loopback(scope="atproto transition:generic")
    with OAuthClient(metadata, store="memory:", times=RESTLESS, **network.client_options()) as client:
        yield client


@pytest.fixture
def account(network: LocalNetwork) -> Account:
    return network.create_account("alice.test")


@pytest.fixture
def session(network: LocalNetwork, client: OAuthClient, account: Account) -> OAuthSession:
    return client.callback(network.authorize(client.authorize(account.handle), account)).session
