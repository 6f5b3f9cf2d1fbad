"""The real PDS, started once for a run, and installed before the first test's clock starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from atproto_session import ClientMetadata, OAuthClient, OAuthSession
from atproto_session.testing.network import Account, LocalNetwork
from tests.network.raw import REDIRECT_URI, SCOPE, LoggedIn, RawClient
from tests.pds.by_hand import take_over
from tests.pds.harness import Browser, RealPDS
from tests.pds.install import InstallError, ensure_installed, is_installed

from ..core import RESTLESS

_HERE = Path(__file__).parent
_problem = pytest.StashKey[InstallError]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    can_install = is_installed() or shutil.which("npm") is not None
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.pds)
        # In CI nobody would notice.
        if _needs_pds(item) and not can_install and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip("the real PDS is installed with npm, which is not on PATH"))


def pytest_collection_finish(session: pytest.Session) -> None:
    # Here, since an install takes longer than one test may, and only if a test that was selected needs it.
    wanted = any(_needs_pds(item) and item.get_closest_marker("skip") is None for item in session.items)
    if not wanted or is_installed() or session.config.option.collectonly:
        return
    if reporter := session.config.pluginmanager.get_plugin("terminalreporter"):
        reporter.write_line("installing the real PDS: one to four minutes, once for this machine")
    try:
        ensure_installed()
    except InstallError as error:
        session.config.stash[_problem] = error


def _needs_pds(item: pytest.Item) -> bool:
    if "real_pds" in getattr(item, "fixturenames", ()):
        return True
    callspec = getattr(item, "callspec", None)  # what runs against the local network as well asks for it by a parameter
    return callspec is not None and callspec.params.get("server") == "real"


@pytest.fixture(scope="session")
def real_pds(pytestconfig: pytest.Config) -> Iterator[RealPDS]:
    """The PDS that all tests of a run share; ``pds_account`` makes a test independent of the others."""
    if (problem := pytestconfig.stash.get(_problem, None)) is not None:
        pytest.fail(str(problem), pytrace=False)
    with RealPDS() as pds:
        yield pds


@pytest.fixture(scope="session")
def browser(real_pds: RealPDS) -> Browser:
    """A browser that remembers who has signed in."""
    return Browser(real_pds.pds_url)


@pytest.fixture(scope="session")
def _account(real_pds: RealPDS) -> Account:
    return real_pds.create_account()


@pytest.fixture
def pds_account(real_pds: RealPDS, _account: Account) -> Iterator[Account]:
    """An account, on a proxy that has counted nothing yet. It is the same one for all tests; what makes them
    independent is that every log-in begins a session of its own."""
    real_pds.proxy.reset()
    yield _account
    real_pds.proxy.reset()


@pytest.fixture
def alice(real_pds: RealPDS, browser: Browser, pds_account: Account) -> LoggedIn:
    """Logged in by hand, and the proxy has counted nothing since."""
    client = RawClient(real_pds.pds_url)
    alice = LoggedIn(pds_account, client, client.log_in(browser, pds_account))
    real_pds.proxy.reset()
    return alice


@pytest.fixture
def client(real_pds: RealPDS, tmp_path: Path) -> Iterator[OAuthClient]:
    """The library, with its sessions on the disk."""
    metadata = ClientMetadata.loopback(SCOPE, [REDIRECT_URI])
    options = {"times": RESTLESS, **real_pds.client_options()}
    with OAuthClient(metadata, store=f"sqlite:///{tmp_path}/sessions.db", **options) as client:
        yield client


@pytest.fixture
def session(real_pds: RealPDS, browser: Browser, client: OAuthClient, pds_account: Account) -> OAuthSession:
    """An account that the library has logged in; the proxy has counted nothing since."""
    result = client.callback(browser.authorize(client.authorize(pds_account.handle), pds_account))
    real_pds.proxy.reset()
    return result.session


@pytest.fixture
def by_hand(client: OAuthClient, session: OAuthSession, pds_account: Account) -> LoggedIn:
    """That session, to be used behind the library's back."""
    return take_over(client, pds_account)


@dataclass(frozen=True)
class World:
    """A server and an account, for what has to work on the local network and on the real PDS alike."""

    url: str
    account: Account
    authorize: Callable[[str, Account], str]
    client_options: dict[str, Any]


@pytest.fixture(params=["local", "real"])
def server(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "local":
        with LocalNetwork() as network:
            yield World(network.pds_url, network.create_account(), network.authorize, network.client_options())
    else:
        pds, browser = request.getfixturevalue("real_pds"), request.getfixturevalue("browser")
        account = request.getfixturevalue("pds_account")
        yield World(pds.pds_url, account, browser.authorize, pds.client_options())
