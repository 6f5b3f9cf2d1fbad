from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from atproto_session.testing.network import Account, LocalNetwork

from .raw import RawClient, Tokens


@pytest.fixture
def network() -> Iterator[LocalNetwork]:
    with LocalNetwork() as network:
        yield network


@pytest.fixture
def entryway() -> Iterator[LocalNetwork]:
    with LocalNetwork(entryway=True) as network:
        yield network


class Clock:
    """The time of day, which a test may change."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


@dataclass(frozen=True)
class LoggedIn:
    account: Account
    client: RawClient
    tokens: Tokens


@pytest.fixture
def alice(network: LocalNetwork) -> LoggedIn:
    """Alice, logged in at ``network``."""
    return log_in(network)


def log_in(network: LocalNetwork) -> LoggedIn:
    account = network.create_account("alice.test")
    client = RawClient(network.issuer)
    return LoggedIn(account, client, client.log_in(network, account))
