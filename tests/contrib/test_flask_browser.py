"""Log-in for Flask in Chromium: the application of the documents, and who would like to trick its users."""

from __future__ import annotations

import shutil
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from html import escape
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import trustme
from flask.cli import ScriptInfo

from atproto_session.contrib.flask import ATProto
from atproto_session.keys import generate_jwk
from atproto_session.testing.network import Account, LocalNetwork

from ..browser import Chromium, foreign, served
from .examples import EXAMPLES, flask_example

PUBLIC = "https://app.example.com"


class Site:
    """The application of ``docs/examples/flask_app.py``, over the local network."""

    def __init__(self, network: LocalNetwork, origin: str) -> None:
        self.network = network
        self.origin = origin

    def begin(self, chromium: Chromium, account: Account) -> None:
        """From the form of the home page to the page of the authorization server."""
        chromium.open(f"{self.origin}/")
        chromium.fill("account", account.handle)
        chromium.press("Log in")
        chromium.wait_for_url(self.network.issuer)

    def consent(self, chromium: Chromium, account: Account, decision: str = "Approve") -> None:
        chromium.fill("password", account.password)
        chromium.press(decision)
        chromium.wait_for_url(self.origin)

    def log_in(self, chromium: Chromium, account: Account) -> None:
        self.begin(chromium, account)
        self.consent(chromium, account)
        chromium.wait_for(f"Hello {account.handle}")

    def read_data(self, chromium: Chromium, account: Account) -> None:
        """The page that asks the account's server."""
        chromium.open(f"{self.origin}/account")
        chromium.wait_for(f"{account.handle} is {account.did}")


@pytest.fixture
def site(network: LocalNetwork, tmp_path: Path) -> Iterator[Site]:
    with flask_example(f"sqlite:///{tmp_path}/sessions.db", network.client_options()) as app, served(app) as origin:
        yield Site(network, origin)


def test_a_person_logs_in_sees_data_and_logs_out(site: Site, chromium: Chromium, account: Account) -> None:
    chromium.open(f"{site.origin}/account")
    chromium.wait_for("Log in")
    chromium.fill("account", f"@{account.handle}")
    chromium.press("Log in")
    site.consent(chromium, account)
    chromium.wait_for(f"{account.handle} is {account.did}")
    chromium.open(f"{site.origin}/")
    chromium.press("Log out")
    chromium.wait_for("Log in")
    assert site.network.revocations == 1
    chromium.open(f"{site.origin}/account")
    chromium.wait_for_url(f"{site.origin}/atproto/login?next=/account")


def test_the_first_lines_of_the_tutorial(
    network: LocalNetwork, chromium: Chromium, account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``flask --app hello run``, in a folder with ``hello.py`` alone."""
    shutil.copy(EXAMPLES / "flask_hello.py", tmp_path / "hello.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    app = ScriptInfo("hello").load_app()
    app.config["ATPROTO_OPTIONS"] = network.client_options()  # the network of the tests
    with served(app) as origin:
        chromium.open(origin)
        chromium.fill("account", account.handle)
        chromium.press("Log in")
        chromium.fill("password", account.password)
        chromium.press("Approve")
        chromium.wait_for("Hello alice.test")
        assert chromium.url == f"{origin}/"
    assert (tmp_path / "instance" / "atproto.db").exists()
    with app.app_context():
        ATProto().client.close()
    del sys.modules["hello"]


def test_a_person_refuses_and_changes_their_mind(site: Site, chromium: Chromium, account: Account) -> None:
    site.begin(chromium, account)
    site.consent(chromium, account, "Deny")
    chromium.wait_for("access_denied")
    assert set(chromium.cookies()) == set()
    chromium.fill("account", account.handle)
    chromium.press("Log in")
    site.consent(chromium, account)
    chromium.wait_for(f"Hello {account.handle}")


def test_a_person_mistypes(site: Site, chromium: Chromium, account: Account) -> None:
    chromium.open(f"{site.origin}/")
    chromium.fill("account", "alcie.test")
    chromium.press("Log in")
    chromium.wait_for("no account has the handle alcie.test; check its spelling")
    chromium.fill("account", account.handle)
    chromium.press("Log in")
    site.consent(chromium, account)
    chromium.wait_for(f"Hello {account.handle}")


def test_a_person_opens_localhost(site: Site, chromium: Chromium, account: Account) -> None:
    chromium.open(site.origin.replace("127.0.0.1", "localhost"))
    chromium.fill("account", account.handle)
    chromium.press("Log in")
    chromium.wait_for_url(f"{site.origin}/atproto/login?account={account.handle}")
    chromium.press("Log in")
    site.consent(chromium, account)
    chromium.wait_for(f"Hello {account.handle}")


@pytest.mark.parametrize("handle", ["alice.test", "bob.test"], ids=["one account", "two accounts"])
def test_a_person_logs_in_in_two_tabs(
    site: Site, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account, handle: str
) -> None:
    other = account if handle == account.handle else site.network.create_account(handle)
    elsewhere = new_chromium()
    site.log_in(elsewhere, account)
    site.begin(chromium, account)
    with chromium.tab():
        site.begin(chromium, other)
        site.consent(chromium, other)
        chromium.wait_for(f"Hello {other.handle}")
    site.consent(chromium, account)
    chromium.wait_for(f"Hello {account.handle}")
    site.read_data(chromium, account)
    site.read_data(elsewhere, account)
    assert site.network.revocations == 1, "the session that no tab has any more"


def test_another_browser_ends_no_log_in(
    site: Site, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account
) -> None:
    """An attacker begins a log-in with an account of their own, and leads a victim to its end."""
    mallory = site.network.create_account("mallory.test")
    site.begin(chromium, mallory)
    callback = site.network.authorize(chromium.url, mallory)
    victim = new_chromium()
    site.begin(victim, account)
    victim.open(callback)
    victim.wait_for("another browser has begun it")
    victim.open(f"{site.origin}/")
    assert "Hello" not in victim.text
    assert site.network.token_requests == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("path", ["/atproto/login", "/atproto/logout"])
def test_a_foreign_page_sends_a_form(site: Site, chromium: Chromium, account: Account, host: str, path: str) -> None:
    page = f"""<form method="post" action="{escape(site.origin + path)}">
        <input name="account" value="{account.handle}"><button>You have won</button></form>"""
    site.log_in(chromium, account)
    asked = site.network.par_requests
    with foreign(page, host) as evil:
        chromium.open(evil)
        chromium.press("You have won")
        chromium.wait_for("sent by a page of another site")
        assert site.network.par_requests == asked
        site.read_data(chromium, account)


def test_a_copied_cookie_opens_nothing_after_the_log_out(
    site: Site, chromium: Chromium, new_chromium: Callable[[], Chromium], account: Account
) -> None:
    site.log_in(chromium, account)
    copied = chromium.cookies()
    assert set(copied) == {"session"}
    thief = new_chromium()
    thief.open(f"{site.origin}/")
    thief.set_cookie("session", copied["session"])
    thief.open(f"{site.origin}/")
    thief.wait_for(f"Hello {account.handle}")
    chromium.press("Log out")
    chromium.wait_for("Log in")
    thief.open(f"{site.origin}/")
    assert "Hello" not in thief.text
    thief.open(f"{site.origin}/account")
    thief.wait_for_url(f"{site.origin}/atproto/login")
    site.log_in(chromium, account)
    thief.open(f"{site.origin}/")
    assert "Hello" not in thief.text


def test_a_foreign_page_leads_to_a_page_and_shows_it_in_a_frame(
    site: Site, chromium: Chromium, account: Account
) -> None:
    site.log_in(chromium, account)
    asked = site.network.par_requests
    for path in (f"login?account={account.handle}", "logout"):
        with foreign(f'<a href="{site.origin}/atproto/{path}">You have won</a>') as evil:
            chromium.open(evil)
            chromium.press("You have won")
            chromium.wait_for_url(site.origin)
    with foreign(f'<iframe src="{site.origin}/atproto/login"></iframe>') as evil:
        chromium.open(evil)
        assert chromium.framed.startswith("chrome-error:")
    assert (site.network.par_requests, site.network.revocations) == (asked, 0)
    site.read_data(chromium, account)


def test_a_log_in_leads_to_no_other_place(site: Site, chromium: Chromium, account: Account) -> None:
    for target in ("https://evil.test/account", "//evil.test/", "/\\evil.test", "/\t/evil.test"):
        chromium.open(f"{site.origin}/atproto/login?next={quote(target, safe='')}")
        chromium.fill("account", account.handle)
        chromium.press("Log in")
        site.consent(chromium, account)
        chromium.wait_for(f"Hello {account.handle}")
        assert chromium.url == f"{site.origin}/"


def test_a_person_logs_in_in_production(network: LocalNetwork, account: Account) -> None:
    """At a public address, over https, with a key."""
    settings = {"ATPROTO_PUBLIC_URL": PUBLIC, "ATPROTO_KEYS": generate_jwk()}
    authority, tls = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("app.example.com").configure_cert(tls)
    with (
        flask_example("memory:", network.client_options(), **settings) as app,
        served(app, tls=tls) as origin,
        closing(Chromium({"app.example.com": urlsplit(origin).port or 0})) as chromium,
    ):
        browser = app.test_client()
        for path in ("/atproto/oauth-client-metadata.json", "/atproto/jwks.json"):
            network.publish(f"{PUBLIC}{path}", browser.get(path).json)
        site = Site(network, PUBLIC)
        site.begin(chromium, account)
        site.consent(chromium, account)
        chromium.wait_for("Hello alice.test")
        site.read_data(chromium, account)
        assert set(chromium.cookies()) == {"session"}
        chromium.open(PUBLIC)
        chromium.press("Log out")
        chromium.wait_for("Log in")


def test_a_server_that_is_down_is_a_page(site: Site, chromium: Chromium, account: Account) -> None:
    site.log_in(chromium, account)
    fault = site.network.fault("resource", "cut_before", times=None)
    chromium.open(f"{site.origin}/account")
    chromium.wait_for("does not answer at the moment")
    fault.disarm()
    site.read_data(chromium, account)
