"""The fixtures that every project with this library gets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from atproto_session import OAuthClient, OAuthSession
from atproto_session.testing.network import LocalNetwork

from .scenes import GET_SESSION

Login = Callable[[str | None], OAuthSession]


def test_an_account_logs_in_by_its_handle(
    atproto_network: LocalNetwork, atproto_client: OAuthClient, atproto_login: Login
) -> None:
    session = atproto_login("alice.test")
    assert session.get(GET_SESSION).json()["handle"] == "alice.test"
    assert atproto_client.restore(session.did).did == session.did
    assert atproto_network.rotations == 0


def test_accounts_without_a_handle_are_different_ones(atproto_client: OAuthClient, atproto_login: Login) -> None:
    dids = {atproto_login(None).did, atproto_login(None).did}
    assert len(dids) == 2
    assert set(atproto_client._store) == dids


def test_what_it_brings_is_imported_by_those_who_use_it() -> None:
    """pytest loads the plugin in every run of every project that has the library installed."""
    code = (
        "import sys, atproto_session.testing.plugin\n"
        "print([name for name in ('atproto_session.testing.network', 'http.server') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
