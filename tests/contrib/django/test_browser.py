"""Log-in for Django in Chromium: the project of the documents, and who would like to trick its users."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from html import escape
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import trustme
from django.conf import settings
from django.core import signing
from django.core.wsgi import get_wsgi_application
from django.test import override_settings

from atproto_session.contrib.django.conf import NAME, get_settings
from atproto_session.contrib.django.models import Account as KnownAccount
from atproto_session.contrib.django.models import StoredSession
from atproto_session.testing.network import Account, LocalNetwork

from ...browser import Chromium, foreign, served
from .conftest import users

PUBLIC = "https://app.example.com"


class Site:
    """The project, at an address of its own."""

    def __init__(self, network: LocalNetwork, origin: str) -> None:
        self.network = network
        self.origin = origin

    def begin(self, chromium: Chromium, account: Account, page: str = "/") -> None:
        """From the form to the page of the authorization server."""
        chromium.open(f"{self.origin}{page}")
        chromium.fill("account", account.handle)
        chromium.press("Link" if page.startswith("/atproto/link") else "Log in")
        chromium.wait_for_url(self.network.issuer)

    def consent(self, chromium: Chromium, account: Account, decision: str = "Approve") -> None:
        chromium.fill("password", account.password)
        chromium.press(decision)
        chromium.wait_for_url(self.origin)

    def log_in(self, chromium: Chromium, account: Account, page: str = "/") -> None:
        self.begin(chromium, account, page)
        self.consent(chromium, account)

    def is_at_home(self, chromium: Chromium, account: Account | None) -> None:
        """Who is logged in: the home page asks the account's server."""
        chromium.open(self.origin)
        chromium.wait_for(f"Hello, {account.handle}." if account else "Handle")


@contextmanager
def project(network: LocalNetwork, *, without: str = "", **changed: Any) -> Iterator[Site]:
    """The project with other settings.

    :param without: the class of a middleware that it does not have.
    """
    middleware = [path for path in settings.MIDDLEWARE if not without or not path.endswith(f".{without}")]
    with override_settings(MIDDLEWARE=middleware, **changed), served(get_wsgi_application()) as origin:
        yield Site(network, origin)


@pytest.fixture
def pages(site: LocalNetwork) -> Iterator[Site]:
    with project(site) as pages:
        yield pages


@pytest.mark.parametrize("without", ["", "CsrfViewMiddleware"])
def test_a_person_refuses_and_changes_their_mind(
    site: LocalNetwork, chromium: Chromium, account: Account, without: str
) -> None:
    with project(site, without=without) as pages:
        pages.begin(chromium, account)
        pages.consent(chromium, account, "Deny")
        chromium.wait_for("access_denied")
        chromium.fill("account", account.handle)
        chromium.press("Log in")
        pages.consent(chromium, account)
        chromium.wait_for(f"Hello, {account.handle}.")


def test_a_person_logs_in_sees_data_and_logs_out(pages: Site, chromium: Chromium, account: Account) -> None:
    pages.log_in(chromium, account)
    chromium.wait_for(f"Hello, {account.handle}.")
    assert set(chromium.cookies()) == {"csrftoken", "sessionid"}
    bob = pages.network.create_account("bob.test")
    chromium.press("Your accounts")
    chromium.press("Link another account")
    chromium.fill("account", bob.handle)
    chromium.press("Link")
    pages.consent(chromium, bob)
    chromium.wait_for("@bob.test (in use)")
    pages.is_at_home(chromium, bob)
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
    pages.is_at_home(elsewhere, account)
    assert pages.network.revocations == 1, "the session that no tab has any more"


@pytest.mark.parametrize("page", ["/", "/atproto/link"], ids=["log in", "link"])
def test_another_browser_ends_no_log_in(
    pages: Site, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account, page: str
) -> None:
    """An attacker begins a log-in with an account of their own, and leads a victim to its end: who would then work in
    that account, or have it among their own."""
    mallory, accomplice = (pages.network.create_account(f"{name}.test") for name in ("mallory", "accomplice"))
    if page == "/atproto/link":
        pages.log_in(chromium, accomplice)
    pages.begin(chromium, mallory, page)
    callback = pages.network.authorize(chromium.url, mallory)
    victim = new_chromium()
    pages.log_in(victim, account)
    victim.wait_for("Hello")
    pages.begin(victim, account, "/atproto/login")  # a ticket of its own does not help
    codes = pages.network.token_requests
    victim.open(callback)
    victim.wait_for("another browser has begun it")
    pages.is_at_home(victim, account)
    assert pages.network.token_requests == codes, "the code was spent"
    assert not KnownAccount.objects.filter(did=mallory.did).exists()


@pytest.mark.parametrize("without", ["", "CsrfViewMiddleware"])
def test_a_foreign_page_sends_a_form(site: LocalNetwork, chromium: Chromium, account: Account, without: str) -> None:
    """It has found out the token. A page of the project's own, which posts, needs the middleware; ours do not."""
    fields = {"account": account.handle, "did": account.did, "text": "Spam", "csrfmiddlewaretoken": "%token%"}
    inputs = "".join(f'<input name="{name}" value="{escape(value)}">' for name, value in fields.items())
    with project(site, without=without) as pages:
        pages.log_in(chromium, account)
        pages.log_in(chromium, site.create_account("bob.test"), "/atproto/link")
        chromium.wait_for("in use")
        asked, called = site.par_requests, site.resource_requests
        for path in ("login", "link", "logout", "unlink", *([] if without else ["../post"])):
            action = f"{pages.origin}/atproto/{path}"
            with foreign(f'<form method="post" action="{action}">{inputs}<button>You have won</button></form>') as evil:
                chromium.open(evil)
                chromium.press("You have won")
                chromium.wait_for("CSRF verification failed")
        assert (site.par_requests, site.resource_requests, site.revocations) == (asked, called, 0)
        chromium.open(f"{pages.origin}/atproto/accounts")
        chromium.wait_for(f"@{account.handle}")
        chromium.wait_for("@bob.test (in use)")


def test_a_foreign_page_leads_to_a_page(pages: Site, chromium: Chromium, account: Account) -> None:
    """A link brings all cookies, too."""
    bob = pages.network.create_account("bob.test")
    pages.log_in(chromium, account)
    pages.log_in(chromium, bob, "/atproto/link")
    chromium.wait_for("in use")
    asked = pages.network.par_requests
    for path in (f"login?account={bob.handle}", f"link?account={bob.handle}", "logout", f"unlink?did={account.did}"):
        with foreign(f'<a href="{pages.origin}/atproto/{path}">You have won</a>') as evil:
            chromium.open(evil)
            chromium.press("You have won")
            chromium.wait_for_url(pages.origin)
    assert (pages.network.par_requests, pages.network.revocations) == (asked, 0)
    assert KnownAccount.objects.count() == 2
    pages.is_at_home(chromium, bob)


def test_a_foreign_page_shows_ours_in_a_frame(site: LocalNetwork, chromium: Chromium, account: Account) -> None:
    """And leads people to press its buttons. The project has no ``XFrameOptionsMiddleware``."""
    with project(site, without="XFrameOptionsMiddleware") as pages:
        pages.log_in(chromium, account)
        chromium.wait_for("Hello")
        for path in ("login", "link", "accounts"):
            with foreign(f'<iframe src="{pages.origin}/atproto/{path}"></iframe>') as evil:
                chromium.open(evil)
                assert chromium.framed.startswith("chrome-error:"), path


def test_a_log_in_leads_to_no_other_place(pages: Site, chromium: Chromium, account: Account) -> None:
    for target in (
        "https://evil.test/whoami",
        "//evil.test/",
        "/\\evil.test",
        "/\t/evil.test",
    ):
        pages.log_in(chromium, account, f"/atproto/login?next={quote(target, safe='')}")
        chromium.wait_for(f"Hello, {account.handle}.")
        assert chromium.url == f"{pages.origin}/"
    chromium.open(f"{pages.origin}/atproto/login")
    chromium.send_form("/atproto/login", account=account.handle, next=f"{pages.origin}//evil.test")
    pages.consent(chromium, account)
    chromium.wait_for(f"Hello, {account.handle}.")
    pages.log_in(chromium, account, "/atproto/login?next=/whoami")
    chromium.wait_for_url(f"{pages.origin}/whoami")


@pytest.mark.parametrize("engine", ["db", "signed_cookies"])
def test_a_copied_cookie_opens_nothing_later(
    site: LocalNetwork, new_chromium: Callable[[], Chromium], account: Account, engine: str
) -> None:
    """After the browser has logged in anew, or out. A third one stays as it is."""
    chromium, thief, elsewhere = new_chromium(), new_chromium(), new_chromium()
    with project(site, SESSION_ENGINE=f"django.contrib.sessions.backends.{engine}") as pages:

        def copy() -> None:
            thief.open(f"{pages.origin}/atproto/login")
            thief.set_cookie("sessionid", chromium.cookies()["sessionid"])
            pages.is_at_home(thief, account)

        pages.log_in(elsewhere, account)
        pages.log_in(chromium, account)
        copy()
        pages.log_in(chromium, account, "/atproto/login")
        chromium.wait_for("Hello")
        pages.is_at_home(thief, None)
        copy()
        chromium.press("Log out")
        chromium.wait_for("Handle")
        pages.is_at_home(thief, None)
        thief.open(f"{pages.origin}/whoami")
        thief.wait_for('"user": null')
        pages.is_at_home(elsewhere, account)


def test_a_copied_cookie_has_no_account_that_was_unlinked(
    site: LocalNetwork, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account
) -> None:
    """The page asks no server, and Django's sessions are in signed cookies, which remember all."""
    bob, thief = site.create_account("bob.test"), new_chromium()
    with project(site, SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies") as pages:
        pages.log_in(chromium, account)
        pages.log_in(chromium, bob, "/atproto/link")
        chromium.wait_for("in use")
        thief.open(f"{pages.origin}/atproto/login")
        thief.set_cookie("sessionid", chromium.cookies()["sessionid"])
        thief.open(f"{pages.origin}/by-class")
        thief.wait_for(bob.did)
        chromium.send_form("/atproto/unlink", did=bob.did)
        chromium.wait_for(f"@{account.handle}")
        thief.open(f"{pages.origin}/by-class")
        thief.wait_for("Handle")


def test_a_session_that_was_planted_is_not_that_of_the_log_in(
    pages: Site, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account
) -> None:
    """A neighbour may set cookies. This one knows the cookie, and waits for somebody to log in with it."""
    mallory, victim = pages.network.create_account("mallory.test"), new_chromium()
    pages.log_in(chromium, mallory)
    chromium.wait_for("Hello")
    victim.open(f"{pages.origin}/atproto/login")
    victim.set_cookie("sessionid", chromium.cookies()["sessionid"])
    pages.log_in(victim, account, "/atproto/login")
    victim.wait_for(f"Hello, {account.handle}.")
    pages.is_at_home(chromium, None)


def test_a_ticket_that_a_neighbour_sets_is_none(site: LocalNetwork, account: Account) -> None:
    """In production, over https. The neighbour has begun a log-in, and would have a visitor end it."""
    mallory = site.create_account("mallory.test")
    authority, tls = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("*.example.com").configure_cert(tls)
    planted: list[str] = []

    def neighbour(environ: Any, start_response: Any) -> list[bytes]:
        cookies = [("Set-Cookie", f"{cookie}; Domain=example.com; Path=/; Secure") for cookie in planted]
        start_response("200 OK", [("Content-Type", "text/html"), *cookies])
        return [b"You have won"]

    with (
        override_settings(**{NAME: {**getattr(settings, NAME), "PUBLIC_URL": PUBLIC}}),
        served(get_wsgi_application(), tls=tls) as own,
        served(neighbour, tls=tls) as evil,
        closing(
            Chromium({"app.example.com": urlsplit(own).port or 0, "evil.example.com": urlsplit(evil).port or 0})
        ) as chromium,
    ):
        site.publish(f"{PUBLIC}/atproto/oauth-client-metadata.json", get_settings().metadata_document())
        pages = Site(site, PUBLIC)
        pages.begin(chromium, mallory)
        callback = site.authorize(chromium.url, mallory)
        chromium.open(f"{PUBLIC}/atproto/login")
        planted += [f"{name}={value}" for name, value in chromium.cookies().items() if "login" in name]
        assert len(planted) == 1
        chromium.forget()
        chromium.open("https://evil.example.com/")
        chromium.wait_for("You have won")
        chromium.open(callback)
        chromium.wait_for("another browser has begun it")
        pages.is_at_home(chromium, None)
        pages.log_in(chromium, account)
        chromium.wait_for(f"Hello, {account.handle}.")
        assert set(chromium.cookies()) == {"csrftoken", "sessionid"}


def test_an_account_that_is_dead_ends_no_other_session(
    pages: Site, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account
) -> None:
    """A page uses the account of somebody else, or that of another browser."""
    bob, elsewhere = pages.network.create_account("bob.test"), new_chromium()
    pages.log_in(elsewhere, bob)
    pages.network.revoke_sessions(bob.did)
    pages.log_in(chromium, account)
    for did in (bob.did, account.did):
        chromium.open(f"{pages.origin}/other/{did}")
        chromium.wait_for("Server Error (500)")
        pages.is_at_home(chromium, account)


def test_an_account_is_not_linked_to_who_came_meanwhile(pages: Site, chromium: Chromium, account: Account) -> None:
    """In another tab, somebody else has logged in."""
    bob, carol = pages.network.create_account("bob.test"), pages.network.create_account("carol.test")
    pages.log_in(chromium, account)
    pages.begin(chromium, bob, "/atproto/link")
    with chromium.tab():
        pages.log_in(chromium, carol, "/atproto/login")
        chromium.wait_for("Hello, carol.test.")
    pages.consent(chromium, bob)
    chromium.wait_for("You have been logged out meanwhile")
    pages.is_at_home(chromium, carol)
    assert not KnownAccount.objects.filter(did=bob.did).exists()


def test_a_link_that_somebody_has_made_up_links_nothing(pages: Site, chromium: Chromium, account: Account) -> None:
    """A visitor follows it to the log-in, to be another user."""
    pages.log_in(chromium, account)
    chromium.wait_for("Hello")
    made_up = signing.dumps([str(KnownAccount.objects.get().user.pk), "/"], key="a guess", salt="a guess")
    bob = pages.network.create_account("bob.test")
    pages.log_in(chromium, bob, f"/atproto/login?next=/atproto/link?{made_up}")
    chromium.wait_for("link the account again")
    assert not KnownAccount.objects.filter(did=bob.did).exists()


def test_an_account_of_somebody_else_is_neither_linked_nor_unlinked(
    pages: Site, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account
) -> None:
    bob, elsewhere = pages.network.create_account("bob.test"), new_chromium()
    pages.log_in(elsewhere, bob)
    pages.log_in(chromium, account)
    pages.log_in(chromium, bob, "/atproto/link")
    chromium.wait_for("belongs to another user")
    pages.log_in(chromium, pages.network.create_account("carol.test"), "/atproto/link")
    chromium.wait_for("in use")
    chromium.send_form("/atproto/unlink", did=bob.did)
    chromium.wait_for("This account is not linked")
    pages.is_at_home(elsewhere, bob)
    assert KnownAccount.objects.get(did=bob.did).user != KnownAccount.objects.get(did=account.did).user


def test_a_user_who_is_locked_out_stays_out(pages: Site, chromium: Chromium, account: Account) -> None:
    """Whose account is as good as ever."""
    pages.log_in(chromium, account)
    chromium.wait_for("Hello")
    users().update(is_active=False)
    pages.is_at_home(chromium, None)
    chromium.open(f"{pages.origin}/data")
    chromium.wait_for("Handle")
    pages.log_in(chromium, account)
    chromium.wait_for("There is no user here for this account")
    pages.is_at_home(chromium, None)


def test_who_may_only_look_ends_no_session_in_the_admin(
    pages: Site, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account
) -> None:
    elsewhere = new_chromium()
    pages.log_in(elsewhere, account)
    elsewhere.wait_for("Hello")
    from django.contrib.auth.models import Permission

    clerk = users().create_user("clerk", password="secret", is_staff=True)
    clerk.user_permissions.add(Permission.objects.get(codename="view_storedsession"))
    sessions = "/admin/atproto_session/storedsession/"
    chromium.open(f"{pages.origin}{sessions}")
    chromium.fill("username", "clerk")
    chromium.fill("password", "secret\n")
    chromium.wait_for(account.did)
    row = StoredSession.objects.get()
    chromium.send_form(sessions, action="delete_selected", _selected_action=row.pk, index="0")
    chromium.send_form(f"{sessions}{row.pk}/delete/", post="yes")
    chromium.wait_for("403 Forbidden")
    pages.is_at_home(elsewhere, account)
