"""Fixtures that more than one room of the tests uses. The network and a client come with the library's own plugin."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from atproto_session import ClientMetadata, OAuthClient, OAuthSession
from atproto_session.testing.network import Account, LocalNetwork

from .core import RESTLESS
from .servers import mysql_server, mysql_url, postgresql_server, postgresql_url, redis_server, redis_url  # noqa: F401

if TYPE_CHECKING:
    from .browser import Chromium

HERE = Path(__file__).parent

# A shell that starts the tests in the background has them ignore SIGINT, and with them every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


class OnePDS(LoadScopeScheduling):  # type: ignore[misc]
    """Gives every test to the next process that is free, but all tests that may need the real PDS to one, where it is
    started once; and those of a module ``test_..._browser`` to another. (``--dist loadgroup`` would do so, but not with
    pytest 9.2 and pytest-xdist 3.8.)"""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith("tests/pds/") and "[local" not in nodeid:
            return "pds"
        return "browser" if "_browser.py::" in nodeid else nodeid


@pytest.hookimpl(optionalhook=True)  # so that ``-p no:xdist`` is possible
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OnePDS:
    """For ``pytest -n NUMBER``, which runs tests in so many processes side by side."""
    return OnePDS(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders come first, which hold the tests that take long: tests that run side by side then end together."""
    items.sort(key=lambda item: item.path.parent == HERE)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Test processes that work side by side have to give a test the same name: no random key, no time is part of it."""
    return argname if isinstance(val, str | bytes) and (len(val) > 30 or not val.isascii()) else None


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


@pytest.fixture(scope="session")
def _chromiums() -> Iterator[list[Any]]:
    chromiums: list[Any] = []
    yield chromiums
    for chromium in chromiums:
        chromium.close()


@pytest.fixture
def new_chromium(_chromiums: list[Any]) -> Callable[[], Chromium]:
    """A function that gives a browser that knows nobody. Another call gives another browser."""
    from .browser import Chromium

    used: list[Chromium] = []

    def get() -> Chromium:
        if len(used) == len(_chromiums):
            _chromiums.append(Chromium())
        chromium: Chromium = _chromiums[len(used)]
        chromium.forget()
        used.append(chromium)
        return chromium

    return get


@pytest.fixture
def chromium(new_chromium: Callable[[], Chromium]) -> Chromium:
    """Headless Chromium."""
    return new_chromium()
