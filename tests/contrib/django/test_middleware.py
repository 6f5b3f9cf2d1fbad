"""What becomes of the errors of views."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import requests
from django.test import Client

from atproto_session import SessionError, StoreError, TransportError
from atproto_session.contrib.django import signals
from atproto_session.contrib.django.models import Account, StoredSession
from atproto_session.contrib.django.test import log_in
from atproto_session.testing.network import LocalNetwork

from .test_views import who

JSON: Any = {"HTTP_ACCEPT": "application/json"}


def test_nobody_is_logged_in(site: LocalNetwork, browser: Client) -> None:
    assert browser.get("/data")["Location"] == "/atproto/login?next=/data"
    said = browser.get("/data", **JSON)
    assert (said.status_code, said.json()["error"], said.json()["login"]) == (401, "login_required", "/atproto/login")
    posted = browser.post("/data")
    assert (posted.status_code, posted["Location"]) == (302, "/atproto/login"), "a form cannot be sent once more"


@pytest.mark.parametrize("how", ["revoked", "deleted"])
def test_the_session_of_this_browser_is_over(site: LocalNetwork, browser: Client, how: str) -> None:
    alice = site.create_account()
    log_in(browser, site, alice)
    if how == "revoked":
        site.revoke_sessions(alice.did)
    else:
        StoredSession.objects.all().delete()
    answer = browser.get("/data")
    assert (answer.status_code, answer["Location"]) == (302, "/atproto/login?next=/data")
    assert who(browser) == {"user": None, "did": None, "handle": None, "all": []}
    assert browser.get("/later").content == b"nobody"
    assert browser.get("/data", **JSON).status_code == 401


def test_one_of_several_accounts_is_over(site: LocalNetwork, browser: Client) -> None:
    """The user stays, who has logged in with the other one."""
    alice, bob = site.create_account(), site.create_account()
    log_in(browser, site, alice)
    log_in(browser, site, bob, link=True)
    site.revoke_sessions(bob.did)
    assert browser.get("/data").status_code == 302
    assert who(browser)["all"] == [alice.did]
    assert who(browser)["user"] is not None
    assert browser.get("/data").status_code == 200


def test_what_another_user_had_in_this_browser_is_not_left_over(site: LocalNetwork, browser: Client) -> None:
    """The account that the user has logged in with is over; the other one of the user is still there."""
    alice, bob, carol = (site.create_account() for _ in range(3))
    log_in(browser, site, alice)
    log_in(browser, site, bob, link=True)
    StoredSession.objects.filter(key__startswith=alice.did).delete()
    assert who(browser)["user"] is None
    log_in(browser, site, carol)
    assert who(browser)["all"] == [carol.did]
    assert StoredSession.objects.count() == 1


def test_the_session_of_another_account_is_over(site: LocalNetwork, browser: Client) -> None:
    alice, bob = site.create_account(), site.create_account()
    log_in(browser, site, alice)
    assert browser.get(f"/other/{bob.did}").status_code == 500
    assert browser.get(f"/other/{alice.did}").status_code == 500, "it is the account's, but not this browser's"
    assert browser.get("/data").status_code == 200


def test_the_server_does_not_answer(site: LocalNetwork, browser: Client, caplog: pytest.LogCaptureFixture) -> None:
    alice = site.create_account()
    log_in(browser, site, alice)
    site.stop()
    with caplog.at_level(logging.WARNING, "atproto_session.contrib.django"):
        answer = browser.get("/data")
    assert answer.status_code == 502
    assert b"does not answer" in answer.content
    assert "GET /data" in caplog.text
    assert browser.get("/data", **JSON).json()["error"] == "bad_gateway"
    assert who(browser)["did"] == alice.did


def test_the_server_refuses_to_refresh_for_now(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account()
    log_in(browser, site, alice)
    site.expire_access_tokens(alice.did)
    site.fault("token", "status", status=503, times=None)
    answer = browser.get("/data")
    assert answer.status_code == 503
    assert int(answer["Retry-After"]) >= 1
    assert "no-store" in answer["Cache-Control"]
    site.clear_faults()
    assert browser.get("/data").status_code == 200


def test_errors_that_are_not_ours_stay_what_they_are(site: LocalNetwork, browser: Client) -> None:
    browser.raise_request_exception = True
    with pytest.raises(ZeroDivisionError):
        browser.get("/fail")


def test_a_store_that_cannot_be_read_logs_nobody_out(
    site: LocalNetwork, browser: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(browser, site, site.create_account())

    def fail(self: object, key: str) -> None:
        raise StoreError("it is away", retryable=True)

    with monkeypatch.context() as patch:
        patch.setattr("atproto_session.contrib.django.store.DjangoRows.read", fail)
        for page in ("/data", "/", "/by-class"):
            answer = browser.get(page)
            assert (answer.status_code, answer["Retry-After"]) == (503, "5")
        assert browser.post("/atproto/logout").status_code == 503, "it is not said to be done"
    assert browser.get("/data").status_code == 200


def test_what_is_logged_of_requests_is_their_kind_alone(caplog: pytest.LogCaptureFixture) -> None:
    from atproto_session.contrib.django.middleware import _said

    assert _said(requests.ConnectionError("https://pds.test/?secret=1")) == "ConnectionError"
    assert _said(TransportError("it is away")) == "TransportError: it is away"


def test_an_asynchronous_view_knows_the_user(site: LocalNetwork, browser: Client) -> None:
    assert browser.get("/later").content == b"nobody"
    log_in(browser, site, site.create_account())
    assert browser.get("/later").content.decode() == Account.objects.get().user.get_username()


@pytest.mark.parametrize("page", ["/data-later", "/data-later-by-class"])
def test_asynchronous_views_that_need_an_account(site: LocalNetwork, browser: Client, page: str) -> None:
    assert browser.get(page)["Location"] == f"/atproto/login?next={page}"
    alice = site.create_account()
    log_in(browser, site, alice)
    assert browser.get(page).json()["did"] == alice.did
    site.revoke_sessions(alice.did)
    assert browser.get(page)["Location"] == f"/atproto/login?next={page}"


def test_a_view_that_streams(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account("alice.test")
    log_in(browser, site, alice)
    site.expire_access_tokens(alice.did)
    streamed: Any = browser.get("/stream")
    assert b"".join(streamed.streaming_content).count(b"alice.test") == 2
    assert site.rotations == 1


def test_signals(site: LocalNetwork, browser: Client) -> None:
    told: list[tuple[str, object]] = []

    def logged_in(account: Account, session: object, is_new: bool, **other: object) -> None:
        told.append(("in", (account.did, is_new)))

    def logged_out(did: str, **other: object) -> None:
        told.append(("out", did))

    def over(did: str, session_id: str, cause: SessionError, **other: object) -> None:
        told.append(("over", (did, bool(session_id), cause.login_required)))
        Account.objects.count()  # in a thread of the library, whose connection is closed afterwards

    signals.logged_in.connect(logged_in)
    signals.logged_out.connect(logged_out)
    signals.session_over.connect(over)
    try:
        alice = site.create_account()
        log_in(browser, site, alice)
        browser.post("/atproto/logout")
        log_in(browser, site, alice)
        site.revoke_sessions(alice.did)
        site.expire_access_tokens(alice.did)
        assert browser.get("/data").status_code == 302
    finally:
        signals.logged_in.disconnect(logged_in)
        signals.logged_out.disconnect(logged_out)
        signals.session_over.disconnect(over)
    assert told == [
        ("in", (alice.did, True)),
        ("out", alice.did),
        ("in", (alice.did, False)),
        ("over", (alice.did, True, True)),
    ]


def test_a_receiver_that_raises_keeps_no_session_alive(site: LocalNetwork, browser: Client) -> None:
    def fail(**told: object) -> None:
        raise ZeroDivisionError

    log_in(browser, site, site.create_account())
    log_in(browser, site, site.create_account(), link=True)
    signals.logged_out.connect(fail)
    try:
        assert browser.post("/atproto/logout").status_code == 500
    finally:
        signals.logged_out.disconnect(fail)
    assert StoredSession.objects.count() == 0
    assert who(browser)["user"] is None


def test_a_receiver_may_turn_an_account_away(site: LocalNetwork, browser: Client) -> None:
    """A log-in with it logs nobody in. A link leaves the others as they are."""
    from django.core.exceptions import PermissionDenied

    alice, bob = site.create_account(), site.create_account()

    def refuse(account: Account, **told: object) -> None:
        if account.did == bob.did:
            raise PermissionDenied

    signals.logged_in.connect(refuse)
    try:
        assert log_in(browser, site, bob).status_code == 403
        assert "_auth_user_id" not in browser.session
        log_in(browser, site, alice)
        Account.objects.filter(did=bob.did).delete()
        assert log_in(browser, site, bob, link=True).status_code == 403
    finally:
        signals.logged_in.disconnect(refuse)
    assert who(browser)["all"] == [alice.did]
    assert browser.get("/data").json()["did"] == alice.did
    assert StoredSession.objects.count() == 1
