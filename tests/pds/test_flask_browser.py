"""The Flask application of the documents in Chromium, with the real PDS's own sign-in and consent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from atproto_session.testing.network import Account
from tests.browser import Chromium, served
from tests.contrib.examples import flask_example
from tests.pds.harness import RealPDS


@pytest.fixture
def origin(real_pds: RealPDS, tmp_path: Path) -> Iterator[str]:
    with flask_example(f"sqlite:///{tmp_path}/sessions.db", real_pds.client_options()) as app, served(app) as origin:
        yield origin


def test_a_person_signs_in_consents_posts_and_logs_out(
    real_pds: RealPDS, pds_account: Account, chromium: Chromium, origin: str
) -> None:
    chromium.sign_in(origin, real_pds.pds_url, pds_account)
    chromium.press("Authorize")
    chromium.wait_for(f"Hello {pds_account.handle}")
    chromium.press("Your account")
    chromium.wait_for(f"{pds_account.handle} is {pds_account.did}")
    chromium.open(origin)
    chromium.fill("text", "Hello from a browser")
    chromium.press("Post")
    chromium.wait_for("Posted.")
    chromium.press("Log out")
    chromium.wait_for("Log in")
    chromium.open(f"{origin}/account")
    chromium.wait_for_url(f"{origin}/atproto/login?next=/account")


def test_a_person_refuses(real_pds: RealPDS, pds_account: Account, chromium: Chromium, origin: str) -> None:
    chromium.sign_in(origin, real_pds.pds_url, pds_account)
    chromium.press("Deny access")
    chromium.wait_for("access_denied")
    assert chromium.url.startswith(f"{origin}/atproto/callback")
