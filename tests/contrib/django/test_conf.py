"""The settings, and what is made of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth import logout
from django.http import HttpRequest
from django.test import Client, override_settings
from django.urls import clear_script_prefix, set_script_prefix

from atproto_session import MemoryStore
from atproto_session.contrib.django import conf
from atproto_session.contrib.django.conf import NAME, get_client, get_settings, get_store
from atproto_session.contrib.django.models import Account, StoredSession
from atproto_session.contrib.django.store import DjangoStore
from atproto_session.contrib.django.test import log_in
from atproto_session.session import Session
from atproto_session.testing.network import LocalNetwork

GIVEN = getattr(settings, NAME)


def test_a_worker_and_a_page_below_a_prefix_are_the_same_client() -> None:
    """Only the web server knows the prefix; the public URL has it."""
    with override_settings(**{NAME: {"PUBLIC_URL": "https://app.example.com/site"}}):
        in_worker = get_settings().client_metadata.client_id
        set_script_prefix("/site/")
        try:
            in_view = get_settings().client_metadata.client_id
        finally:
            clear_script_prefix()
    assert in_view == in_worker == "https://app.example.com/site/atproto/oauth-client-metadata.json"


def test_there_is_one_client_for_each_process(site: LocalNetwork) -> None:
    with ThreadPoolExecutor(8) as threads:
        clients = set(threads.map(lambda _: get_client(), range(8)))
        assert clients == {get_client()}
    assert isinstance(get_store(), DjangoStore)
    assert repr(get_store()) == "DjangoStore('default')"


def test_of_two_threads_that_make_a_client_one_does(site: LocalNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_client()
    made: list[Any] = []

    class Slow(dict[str, Any]):
        """Where another thread has just put its own."""

        def get(self, *key: Any) -> Any:
            return None

        def setdefault(self, key: str, client: Any = None) -> Any:
            made.append(client)
            return first

    monkeypatch.setattr(conf, "_clients", Slow())
    assert get_client() is first
    (spare,) = made
    assert spare is not first
    assert spare._flights._closed


@pytest.mark.parametrize("store", ["memory:", MemoryStore[Session]()])
def test_another_store(site: LocalNetwork, browser: Client, store: object) -> None:
    given = {**getattr(settings, NAME), "STORE": store}
    with override_settings(**{NAME: given}):
        alice, bob = site.create_account(), site.create_account()
        log_in(browser, site, alice)
        log_in(browser, site, bob, link=True)
        assert len(list(get_store())) == 2
        assert StoredSession.objects.count() == 0
        assert browser.get("/data").status_code == 200
        browser.post("/atproto/unlink", {"did": bob.did})
        assert [key.partition("#")[0] for key in get_store()] == [alice.did]
        browser.post("/atproto/logout")
        assert list(get_store()) == []


def test_a_log_out_that_is_no_browser_s(site: LocalNetwork, browser: Client) -> None:
    """Without the middleware, as in a test of a view, there is nothing to end."""
    request = HttpRequest()
    request.session = browser.session
    logout(request)


def test_a_log_in_of_a_test_that_does_not_begin_says_why(site: LocalNetwork, browser: Client) -> None:
    unknown = type("", (), {"handle": "nobody.test"})
    with pytest.raises(AssertionError, match="the log-in did not begin: 400"):
        log_in(browser, site, unknown)  # type: ignore[arg-type]
    assert Account.objects.count() == 0
