"""Log-in for Django in Chromium: the project of the documents, and who would like to trick its users."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import pytest
from django.core.wsgi import get_wsgi_application

from atproto_session.contrib.django.models import StoredSession
from atproto_session.testing.network import Account, LocalNetwork

from ...browser import Chromium, served


class Site:
    """The project, at an address of its own."""

    def __init__(self, network: LocalNetwork, origin: str) -> None:
        self.network = network
        self.origin = origin

    def begin(self, chromium: Chromium, account: Account, page: str = "/") -> None:
        """From the form to the page of the authorization server."""
        chromium.open(f"{self.origin}{page}")
        chromium.fill("account", account.handle)
        chromium.press("Link" if "link" in page else "Log in")
        chromium.wait_for_url(self.network.issuer)

    def consent(self, chromium: Chromium, account: Account, decision: str = "Approve") -> None:
        chromium.fill("password", account.password)
        chromium.press(decision)
        chromium.wait_for_url(self.origin)

    def log_in(self, chromium: Chromium, account: Account, page: str = "/") -> None:
        self.begin(chromium, account, page)
        self.consent(chromium, account)


@pytest.fixture
def pages(site: LocalNetwork) -> Iterator[Site]:
    with served(get_wsgi_application()) as origin:
        yield Site(site, origin)


def test_a_person_logs_in_sees_data_and_logs_out(pages: Site, chromium: Chromium, account: Account) -> None:
    pages.begin(chromium, account)
    pages.consent(chromium, account, "Deny")
    chromium.wait_for("access_denied")
    chromium.fill("account", f"@{account.handle}")
    chromium.press("Log in")
    pages.consent(chromium, account)
    chromium.wait_for(f"Hello, {account.handle}.")
    assert set(chromium.cookies()) == {"csrftoken", "sessionid"}
    bob = pages.network.create_account("bob.test")
    chromium.press("Your accounts")
    chromium.press("Link another account")
    chromium.fill("account", bob.handle)
    chromium.press("Link")
    pages.consent(chromium, bob)
    chromium.wait_for("@bob.test (in use)")
    chromium.open(pages.origin)
    chromium.wait_for("Hello, bob.test.")
    chromium.press("Log out")
    chromium.wait_for("Handle")
    assert pages.network.revocations == 2
    assert StoredSession.objects.count() == 0


@pytest.mark.parametrize("handle", ["alice.test", "bob.test"], ids=["one account", "two accounts"])
def test_a_person_logs_in_in_two_tabs(
    pages: Site, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account, handle: str
) -> None:
    other = account if handle == account.handle else pages.network.create_account(handle)
    elsewhere = new_chromium()
    pages.log_in(elsewhere, account)
    pages.begin(chromium, account)
    with chromium.tab():
        pages.log_in(chromium, other)
        chromium.wait_for(f"Hello, {other.handle}.")
    pages.consent(chromium, account)
    chromium.wait_for(f"Hello, {account.handle}.")
    elsewhere.open(pages.origin)
    elsewhere.wait_for(f"Hello, {account.handle}.")
    assert pages.network.revocations == 1, "the session that no tab has any more"


def test_another_browser_ends_no_log_in(
    pages: Site, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account
) -> None:
    """An attacker begins a log-in with an account of their own, and leads a victim to its end."""
    mallory = pages.network.create_account("mallory.test")
    pages.begin(chromium, mallory)
    callback = pages.network.authorize(chromium.url, mallory)
    victim = new_chromium()
    pages.begin(victim, account)
    victim.open(callback)
    victim.wait_for("another browser has begun it")
    victim.open(pages.origin)
    victim.wait_for("Handle")
    assert pages.network.token_requests == 0


@pytest.mark.parametrize("path", ["/atproto/login", "/atproto/link", "/atproto/logout", "/atproto/unlink"])
def test_a_foreign_page_sends_a_form(pages: Site, chromium: Chromium, account: Account, path: str) -> None:
    """From another port of the same host it comes with all cookies, ``SameSite`` or not."""
    page = f"""<!doctype html><form method="post" action="{escape(pages.origin + path)}">
        <input name="account" value="{account.handle}"><input name="did" value="{account.did}">
        <input name="csrfmiddlewaretoken" value="{"x" * 32}"><button>You have won</button></form>"""

    def foreign(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/html")])
        return [page.encode()]

    pages.log_in(chromium, account)
    chromium.wait_for("Hello")
    asked = pages.network.par_requests
    with served(foreign) as evil:
        chromium.open(evil)
        chromium.press("You have won")
        chromium.wait_for("CSRF verification failed")
        assert pages.network.par_requests == asked
        chromium.open(pages.origin)
        chromium.wait_for(f"Hello, {account.handle}.")


def test_a_copied_cookie_opens_nothing_after_the_log_out(
    pages: Site, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account
) -> None:
    pages.log_in(chromium, account)
    chromium.wait_for("Hello")
    thief = new_chromium()
    thief.open(f"{pages.origin}/atproto/login")
    thief.set_cookie("sessionid", chromium.cookies()["sessionid"])
    thief.open(pages.origin)
    thief.wait_for(f"Hello, {account.handle}.")
    chromium.press("Log out")
    chromium.wait_for("Handle")
    thief.open(pages.origin)
    thief.wait_for("Handle")
    pages.log_in(chromium, account)
    chromium.wait_for("Hello")
    thief.open(pages.origin)
    thief.wait_for("Handle")
