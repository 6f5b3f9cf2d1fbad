"""The admin: what it shows, and what it ends."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from django.test import Client, override_settings

from atproto_session import StoreError
from atproto_session.contrib.django.admin import status_of
from atproto_session.contrib.django.conf import get_client, get_store
from atproto_session.contrib.django.models import Account, StoredSession
from atproto_session.contrib.django.test import log_in
from atproto_session.session import Attempt, Rest
from atproto_session.testing.contracts._common import make_session
from atproto_session.testing.network import LocalNetwork

from .conftest import users

SESSIONS = "/admin/atproto_session/storedsession/"
ACCOUNTS = "/admin/atproto_session/account/"


@pytest.fixture
def admin(site: LocalNetwork, another_browser: Client) -> Client:
    user = users().create_superuser("admin", password="secret")
    another_browser.force_login(user, "django.contrib.auth.backends.ModelBackend")
    another_browser.raise_request_exception = True
    return another_browser


def test_what_is_shown(site: LocalNetwork, browser: Client, admin: Client) -> None:
    alice = site.create_account("alice.test")
    log_in(browser, site, alice)
    (key,) = get_store()
    stored = get_store().get(key)
    assert stored is not None
    row = StoredSession.objects.get()
    pages = [
        admin.get(page).content.decode()
        for page in (SESSIONS, f"{SESSIONS}{row.pk}/change/", ACCOUNTS, f"{ACCOUNTS}{Account.objects.get().pk}/change/")
    ]
    assert all(alice.did in page for page in pages)
    assert "good" in pages[0]
    assert site.pds_url in pages[1]
    assert "alice.test" in pages[2]
    tokens = stored.token_set
    secrets = [tokens.access_token, tokens.refresh_token or "", stored.dpop_key["d"], key.partition("#")[2]]
    assert [page for page in pages for secret in secrets if secret in page] == []


def test_sessions_cannot_be_made_or_changed(site: LocalNetwork, browser: Client, admin: Client) -> None:
    log_in(browser, site, site.create_account())
    row = StoredSession.objects.get()
    assert admin.get(f"{SESSIONS}add/").status_code == 403
    assert admin.post(f"{SESSIONS}{row.pk}/change/", {"key": "did:plc:other"}).status_code == 403
    assert b"Delete selected" not in admin.get(SESSIONS).content


@pytest.mark.parametrize("atomic", [False, True])
def test_sessions_are_ended(site: LocalNetwork, browser: Client, admin: Client, atomic: bool) -> None:
    from django.db import connections

    alice, bob = site.create_account(), site.create_account()
    log_in(browser, site, alice)
    other = Client(SERVER_NAME="127.0.0.1")
    log_in(other, site, bob)
    mine, theirs = (StoredSession.objects.get(key__startswith=account.did) for account in (alice, bob))
    settings = connections["default"].settings_dict
    settings["ATOMIC_REQUESTS"] = atomic
    try:
        done = admin.post(SESSIONS, {"action": "delete_selected", "_selected_action": [mine.pk]}, follow=True)
        assert b"1 sessions are ended." in done.content
        assert admin.post(f"{SESSIONS}{theirs.pk}/delete/", {"post": "yes"}).status_code == 302
    finally:
        settings["ATOMIC_REQUESTS"] = False
    assert StoredSession.objects.count() == 0
    assert site.revocations == 2, "the servers still know the sessions"
    assert browser.get("/data")["Location"].startswith("/atproto/login")


def test_a_session_that_cannot_be_ended_is_said_so(
    site: LocalNetwork, browser: Client, admin: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(browser, site, site.create_account())

    def fail(did: str, session_id: str | None, timeout: float) -> None:
        raise StoreError("it cannot be written")

    monkeypatch.setattr(get_client(), "revoke", fail)
    chosen = {"action": "delete_selected", "_selected_action": [StoredSession.objects.get().pk]}
    assert b"it cannot be written" in admin.post(SESSIONS, chosen, follow=True).content
    assert StoredSession.objects.count() == 1


def test_an_account_is_deleted_with_its_sessions(site: LocalNetwork, browser: Client, admin: Client) -> None:
    log_in(browser, site, site.create_account())
    account = Account.objects.get()
    assert admin.post(f"{ACCOUNTS}{account.pk}/delete/", {"post": "yes"}).status_code == 302
    assert StoredSession.objects.count() == 0
    assert site.revocations == 1


def test_an_account_can_be_entered_by_hand(site: LocalNetwork, browser: Client, admin: Client) -> None:
    """To tie an account to a user who is known."""
    alice = site.create_account()
    user = users().create_user("alice")
    assert admin.post(f"{ACCOUNTS}add/", {"user": user.pk, "did": alice.did}).status_code == 302
    log_in(browser, site, alice)
    assert Account.objects.get().user == user
    assert users().count() == 2


def test_a_record_that_cannot_be_read_is_shown_as_that(site: LocalNetwork, browser: Client, admin: Client) -> None:
    log_in(browser, site, site.create_account())
    row = StoredSession.objects.get()
    StoredSession.objects.update(document=b"damaged")
    for page in (SESSIONS, f"{SESSIONS}{row.pk}/change/"):
        assert b"cannot be read" in admin.get(page).content


def test_sessions_in_a_database_of_their_own(
    site: LocalNetwork, browser: Client, admin: Client, own_database: dict[str, Any]
) -> None:
    from django.conf import settings

    from atproto_session.contrib.django.conf import NAME

    with override_settings(**{NAME: {**getattr(settings, NAME), "DATABASE": "own"}}):
        alice = site.create_account()
        log_in(browser, site, alice)
        assert StoredSession.objects.count() == 0
        assert StoredSession.objects.using("own").count() == 1
        assert alice.did.encode() in admin.get(SESSIONS).content
        browser.post("/atproto/logout")
        assert StoredSession.objects.using("own").count() == 0


def test_the_states_of_a_session() -> None:
    session = make_session()
    now = time.time()
    late = session.token_set.expires_at.timestamp() + 1  # type: ignore[union-attr]
    without = replace(session, token_set=replace(session.token_set, refresh_token=None))
    for_ever = replace(session, token_set=replace(session.token_set, expires_at=None))
    assert status_of(None, now) == "over"
    assert status_of(session, now) == "good"
    assert status_of(for_ever, late) == "good"
    assert status_of(session, late) == "to be refreshed when it is used"
    assert status_of(without, late) == "over: it cannot be refreshed"
    assert "under way" in status_of(replace(session, attempt=Attempt("a", "b", now, now + 30)), now)
    rest = Rest(now + 30, 1, "TransportError", "it is away")
    assert status_of(replace(session, rest=rest), now) == "its server rests after TransportError"
    assert status_of(replace(session, rest=rest), now + 60) == "good"
