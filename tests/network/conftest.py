from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from atproto_session.testing.network import LocalNetwork

from .raw import LoggedIn, RawClient


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


@pytest.fixture
def alice(network: LocalNetwork) -> LoggedIn:
    """Alice, logged in at ``network``."""
    return log_in(network)


def log_in(network: LocalNetwork) -> LoggedIn:
    account = network.create_account("alice.test")
    client = RawClient(network.issuer)
    return LoggedIn(account, client, client.log_in(network, account))
