"""The Django project of the documents in Chromium, with the real PDS's own sign-in and consent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
from django.core.wsgi import get_wsgi_application

from atproto_session.testing.network import Account
from tests.browser import Chromium, served
from tests.contrib.django import project
from tests.contrib.django.conftest import django_database  # noqa: F401
from tests.core import SOON, wait_until
from tests.pds.harness import RealPDS


@pytest.fixture
def origin(real_pds: RealPDS, django_database: None) -> Iterator[str]:  # noqa: F811
    from atproto_session.contrib.django.test import local_network

    with project.emptied(), local_network(real_pds), served(get_wsgi_application()) as origin:  # type: ignore[arg-type]
        yield origin


def posts_of(real_pds: RealPDS, account: Account) -> str:
    """As anybody can read them."""
    query = {"repo": account.did, "collection": "app.bsky.feed.post"}
    return requests.get(f"{real_pds.pds_url}/xrpc/com.atproto.repo.listRecords", query, timeout=SOON).text


def test_a_person_signs_in_consents_posts_and_logs_out(
    real_pds: RealPDS, pds_account: Account, chromium: Chromium, origin: str
) -> None:
    chromium.sign_in(origin, real_pds.pds_url, pds_account)
    chromium.press("Authorize")
    chromium.wait_for(f"Hello, {pds_account.handle}.")
    chromium.fill("text", "Hello from Django")
    chromium.press("Post")
    wait_until(lambda: "Hello from Django" in posts_of(real_pds, pds_account))
    chromium.press("Your accounts")
    chromium.wait_for(f"@{pds_account.handle} (in use)")
    chromium.open(origin)
    chromium.press("Log out")
    chromium.wait_for_url(f"{origin}/atproto/login?next=/")


def test_a_person_refuses(real_pds: RealPDS, pds_account: Account, chromium: Chromium, origin: str) -> None:
    chromium.sign_in(origin, real_pds.pds_url, pds_account)
    chromium.press("Deny access")
    chromium.wait_for("access_denied")
    assert chromium.url.startswith(f"{origin}/atproto/callback")
