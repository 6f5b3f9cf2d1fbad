"""``request.atproto``."""

from __future__ import annotations

import pytest
from django.http import HttpRequest
from django.test import Client

from atproto_session.contrib.django.accounts import BrowserAccounts, NobodyLoggedInError
from atproto_session.contrib.django.models import Account
from atproto_session.contrib.django.test import log_in
from atproto_session.testing.network import LocalNetwork


def of(browser: Client) -> BrowserAccounts:
    request = HttpRequest()
    request.session = browser.session
    return BrowserAccounts(request)


@pytest.mark.usefixtures("site")
def test_of_nobody(browser: Client) -> None:
    accounts = of(browser)
    assert not accounts
    assert (accounts.did, accounts.session_id, accounts.account, accounts.handle) == (None, None, None, None)
    assert (list(accounts), accounts.items(), accounts.login) == ([], [], None)
    assert not accounts.is_there()
    for use in (
        lambda: accounts.session,
        lambda: accounts.get("/xrpc/x"),
        lambda: accounts["did:plc:x"],
        lambda: accounts.use("did:plc:x"),
    ):
        with pytest.raises(NobodyLoggedInError) as caught:
            use()
        assert caught.value.login_required
    assert not hasattr(accounts, "__html__")


def test_of_somebody(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account("alice.test")
    log_in(browser, site, alice)
    requests = site.resource_requests
    accounts = of(browser)
    assert accounts
    assert repr(accounts) == f"<BrowserAccounts {[alice.did]}>"
    assert (accounts.did, accounts.login, accounts.handle) == (alice.did, alice.did, "alice.test")
    assert accounts.account == Account.objects.get()
    assert accounts.is_there()
    assert accounts.session is accounts[alice.did]
    assert accounts.session.total_timeout == 25.0
    assert site.resource_requests == requests, "a request was made before one was needed"
    assert accounts.get("/xrpc/com.atproto.server.getSession").json()["did"] == alice.did
    assert accounts.token_info().sub == alice.did
    assert accounts.session_id is not None
    assert len(accounts.session_id) >= 20
    Account.objects.all().delete()
    assert accounts.handle is None


def test_a_handle_that_is_not_verified_is_not_shown(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account("alice.test")
    log_in(browser, site, alice)
    Account.objects.update(handle="")
    assert of(browser).handle is None
    assert str(Account.objects.get()) == alice.did
