"""The browser of the tests itself."""

from __future__ import annotations

from atproto_session import OAuthClient
from atproto_session.testing.network import Account, LocalNetwork

from .browser import Chromium


def test_a_person_consents_in_a_browser(
    network: LocalNetwork, client: OAuthClient, account: Account, chromium: Chromium
) -> None:
    chromium.open(client.authorize(account.handle))
    chromium.fill("password", account.password)
    chromium.press("Approve")
    chromium.wait_for_url("http://127.0.0.1/")
