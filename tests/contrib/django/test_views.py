"""The pages of the log-in, in Django's own test browser and on the local network."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from django.test import Client, override_settings

from atproto_session import ClientMetadataError
from atproto_session.contrib.django import signals
from atproto_session.contrib.django.conf import get_client
from atproto_session.contrib.django.models import Account, StoredSession
from atproto_session.contrib.django.test import log_in
from atproto_session.testing.network import LocalNetwork

from .conftest import Browser, users


def who(browser: Client) -> dict[str, Any]:
    return browser.get("/whoami").json()  # type: ignore[no-any-return]


def begin(browser: Client, account: Any, **fields: str) -> str:
    """The address that the browser is sent to."""
    begun = browser.post("/atproto/login", {"account": account.handle, **fields})
    assert begun.status_code == 302, begun.content
    return str(begun["Location"])


def finish(browser: Client, url: str) -> Any:
    parts = urlsplit(url)
    return browser.get(f"{parts.path}?{parts.query}")


def test_a_log_in(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account("alice.test")
    assert browser.get("/")["Location"] == "/atproto/login?next=/"
    page = browser.get("/atproto/login?next=/")
    assert b'name="account"' in page.content
    assert b'name="next" value="/"' in page.content
    assert site.par_requests == 0, "a page that is looked at begins nothing"
    back = log_in(browser, site, alice, next="/")
    assert (back.status_code, back["Location"]) == (302, "/")
    assert b"Hello, alice.test." in browser.get("/").content
    said = who(browser)
    assert (said["did"], said["handle"]) == (alice.did, "alice.test")
    account = Account.objects.get()
    assert (account.did, account.user.get_username()) == (alice.did, said["user"])
    assert not account.user.has_usable_password()
    assert str(account) == "@alice.test"


def test_without_next_it_leads_to_the_page_of_the_settings(site: LocalNetwork, browser: Client) -> None:
    assert log_in(browser, site, site.create_account())["Location"] == "/"


def test_only_ids_are_in_the_session(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account("alice.test")
    log_in(browser, site, alice)
    kept = {name: value for name, value in browser.session.items() if name.startswith("_atproto")}
    ((did, session_id),) = kept.pop("_atproto_accounts")
    assert (did, kept) == (alice.did, {"_atproto_login": alice.did})
    stored = get_client().sessions.get_stored(f"{did}#{session_id}")
    assert stored is not None
    assert stored.token_set.access_token not in str(dict(browser.session))
    assert [name for name in browser.cookies if browser.cookies[name].value and "atproto" in name] == []


@pytest.mark.parametrize("page", ["login", "logout", "link", "unlink"])
def test_a_foreign_page_can_send_no_form(site: LocalNetwork, page: str) -> None:
    browser = Browser(enforce_csrf_checks=True)
    browser.force_login(users().create_user("user"))
    answer = browser.post(
        f"/atproto/{page}", {"account": site.create_account().handle}, HTTP_ORIGIN="https://evil.test"
    )
    assert answer.status_code == 403
    assert site.par_requests == 0
    assert who(browser)["user"] == "user"


@pytest.mark.parametrize("page", ["logout", "unlink"])
def test_a_page_that_is_looked_at_changes_nothing(site: LocalNetwork, browser: Client, page: str) -> None:
    log_in(browser, site, site.create_account())
    before = who(browser)
    assert browser.get(f"/atproto/{page}").status_code == 405
    assert who(browser) == before


def test_another_browser_does_not_finish_a_log_in(site: LocalNetwork, browser: Client, another_browser: Client) -> None:
    """Or somebody could have other people work in an account of theirs."""
    mallory = site.create_account("mallory.test")
    url = site.authorize(begin(browser, mallory), mallory)
    begin(another_browser, site.create_account())  # a log-in of its own does not help
    answer = finish(another_browser, url)
    assert answer.status_code == 400
    assert b"another browser" in answer.content
    assert site.token_requests == 0, "the code was spent"
    assert who(another_browser)["did"] is None


def test_a_callback_counts_once(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account()
    url = site.authorize(begin(browser, alice), alice)
    assert finish(browser, url).status_code == 302
    again = finish(browser, url)
    assert again.status_code == 400
    assert who(browser)["did"] == alice.did


def test_somebody_declines(site: LocalNetwork, browser: Client) -> None:
    answer = log_in(browser, site, site.create_account("alice.test"), next="/whoami", approve=False)
    assert answer.status_code == 400
    assert b'value="/whoami"' in answer.content, "another try leads there, too"
    assert who(browser)["did"] is None
    assert Account.objects.count() == 0


def test_two_tabs_with_one_account(site: LocalNetwork, browser: Client, another_browser: Client) -> None:
    alice = site.create_account()
    log_in(another_browser, site, alice)
    first, second = begin(browser, alice), begin(browser, alice, next="/whoami")
    assert finish(browser, site.authorize(second, alice))["Location"] == "/whoami"
    assert finish(browser, site.authorize(first, alice))["Location"] == "/"
    assert browser.get("/data").status_code == 200
    assert another_browser.get("/data").status_code == 200, "a log-in has signed another browser out"
    assert StoredSession.objects.count() == 2, "the session of the first tab is left over"


def test_two_tabs_with_two_accounts(site: LocalNetwork, browser: Client) -> None:
    """The later one is who is logged in. They are two users."""
    alice, bob = site.create_account("alice.test"), site.create_account("bob.test")
    first, second = begin(browser, alice), begin(browser, bob)
    finish(browser, site.authorize(second, bob))
    finish(browser, site.authorize(first, alice))
    assert (who(browser)["did"], who(browser)["all"]) == (alice.did, [alice.did])
    assert Account.objects.get(did=alice.did).user != Account.objects.get(did=bob.did).user
    assert StoredSession.objects.count() == 1, "the session of bob is left over"


def test_a_log_out_ends_the_session_of_this_browser_only(
    site: LocalNetwork, browser: Client, another_browser: Client
) -> None:
    alice = site.create_account()
    for each in (browser, another_browser):
        log_in(each, site, alice)
    assert browser.post("/atproto/logout")["Location"] == "/"
    assert who(browser) == {"user": None, "did": None, "handle": None, "all": []}
    assert another_browser.get("/data").status_code == 200
    assert StoredSession.objects.count() == 1
    assert site.revocations == 1


@pytest.mark.parametrize("engine", ["db", "signed_cookies"])
def test_a_copied_cookie_opens_nothing_after_the_log_out(
    site: LocalNetwork, browser: Client, another_browser: Client, engine: str
) -> None:
    with override_settings(SESSION_ENGINE=f"django.contrib.sessions.backends.{engine}"):
        log_in(browser, site, site.create_account())
        another_browser.cookies["sessionid"] = browser.cookies["sessionid"].value
        assert another_browser.get("/data").status_code == 200
        browser.post("/atproto/logout")
        assert who(another_browser)["user"] is None
        assert another_browser.get("/later").content == b"nobody"
        for page in ("/", "/data", "/by-class"):
            answer = another_browser.get(page)
            assert (answer.status_code, answer["Location"]) == (302, f"/atproto/login?next={page}")


def test_who_unlinks_the_account_of_the_log_in_is_logged_in_by_another(
    site: LocalNetwork, browser: Client, another_browser: Client
) -> None:
    """So that a cookie that is copied then opens nothing after the log-out, either."""
    alice, bob = site.create_account(), site.create_account()
    with override_settings(SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies"):
        log_in(browser, site, alice)
        log_in(browser, site, bob, link=True)
        assert browser.post("/atproto/unlink", {"did": alice.did}).status_code == 302
        assert who(browser)["user"] is not None
        another_browser.cookies["sessionid"] = browser.cookies["sessionid"].value
        assert who(another_browser)["user"] is not None
        browser.post("/atproto/logout")
        assert who(another_browser)["user"] is None


def test_every_log_out_of_django_is_one(site: LocalNetwork, browser: Client) -> None:
    log_in(browser, site, site.create_account())
    user = Account.objects.get().user
    user.is_staff = user.is_superuser = True
    user.save()
    assert browser.post("/admin/logout/").status_code == 200
    assert StoredSession.objects.count() == 0
    assert site.revocations == 1


def test_a_log_out_without_the_server(site: LocalNetwork, browser: Client) -> None:
    log_in(browser, site, site.create_account())
    site.stop()
    assert browser.post("/atproto/logout").status_code == 302
    assert StoredSession.objects.count() == 0


def test_a_log_out_does_not_wait_long_for_the_server(
    site: LocalNetwork, browser: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(browser, site, site.create_account())
    revoke, waits = get_client().revoke, []

    def noted(*arguments: Any, timeout: float | None = None, **named: Any) -> None:
        waits.append(timeout)
        revoke(*arguments, **named)

    monkeypatch.setattr(get_client(), "revoke", noted)
    assert browser.post("/atproto/logout").status_code == 302
    assert waits == [5.0]


def test_what_next_may_be(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account()
    for target, leads_to in {
        "/whoami?a=1#b": "/whoami?a=1#b",
        "http://127.0.0.1/data": "/data",
        "https://evil.test/": "/",
        "//evil.test/": "/",
        "/\\evil.test": "/",
        "http://127.0.0.1//evil.test": "/",
        "http:///evil.test": "/",
        "javascript:alert(1)": "/",
        "/a\r\nSet-Cookie: a=b": "/",
        "data": "/",
    }.items():
        assert log_in(browser, site, alice, next=target)["Location"] == leads_to, target
    for target in ("https://evil.test/", "//evil.test/"):
        assert b"evil" not in browser.get(f"/atproto/login?next={target}").content
    assert browser.post("/atproto/logout", {"next": "//evil.test"})["Location"] == "/"
    assert browser.post("/atproto/logout", {"next": "/whoami"})["Location"] == "/whoami"


def test_what_is_no_account(site: LocalNetwork, browser: Client) -> None:
    assert b"Please enter the name" in browser.post("/atproto/login", {"account": " "}).content
    for given in ("", "not a handle", "nobody.test", "did:plc:nothing", "<script>.test"):
        answer = browser.post("/atproto/login", {"account": given, "next": "/whoami"})
        assert answer.status_code == 400, given
        assert b'role="alert"' in answer.content
        assert b'value="/whoami"' in answer.content
        assert b"<script>" not in answer.content
    said = browser.post("/atproto/login", {"account": "nobody.test"}, HTTP_ACCEPT="application/json")
    assert (said.status_code, said.json()["error"]) == (400, "login_failed")


def test_from_localhost_the_browser_is_sent_to_where_the_callback_is(site: LocalNetwork) -> None:
    browser = Browser(HTTP_HOST="localhost:8000")
    for method in (browser.get, browser.post):
        answer = method("/atproto/login?next=/whoami")
        assert answer.status_code == 302
        assert answer["Location"] == "http://127.0.0.1:8000/atproto/login?next=/whoami"
    url = Browser(HTTP_HOST="127.0.0.1:8000").post("/atproto/login", {"account": site.create_account().did})["Location"]
    assert "request_uri" in parse_qs(urlsplit(url).query)


def test_a_host_that_no_log_in_comes_back_to(site: LocalNetwork) -> None:
    browser = Browser(HTTP_HOST="testserver", raise_request_exception=True)
    assert browser.get("/atproto/login").status_code == 200
    with pytest.raises(ClientMetadataError, match=r"127\.0\.0\.1"):
        browser.post("/atproto/login", {"account": "alice.test"})


def test_pages_are_shown_in_no_frame_and_kept_in_no_cache(site: LocalNetwork, browser: Client) -> None:
    log_in(browser, site, site.create_account())
    for page in ("login", "link", "accounts"):
        answer = browser.get(f"/atproto/{page}")
        assert answer["X-Frame-Options"] == "DENY"
        assert "Content-Security-Policy" not in answer, "that is the project's"
        assert "no-store" in answer["Cache-Control"]


# Users


def test_users_who_may_not_come_in(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account()
    log_in(browser, site, alice)
    browser.post("/atproto/logout")
    users().update(is_active=False)
    answer = log_in(browser, site, alice)
    assert answer.status_code == 403
    assert StoredSession.objects.count() == 0, "a session is left over that nobody has"
    assert who(browser)["user"] is None


def test_a_new_log_in_of_the_same_user_keeps_the_handle_up_to_date(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account("alice.test")
    log_in(browser, site, alice)
    site.change_handle(alice.did, "alice2.test")
    url = begin(browser, type("", (), {"handle": alice.did}))
    finish(browser, site.authorize(url, alice))
    assert Account.objects.get().handle == "alice2.test"
    assert users().count() == 1


def test_a_receiver_that_fails_leaves_no_session(site: LocalNetwork, browser: Client) -> None:
    def refuse(**what: Any) -> None:
        raise ZeroDivisionError

    signals.logged_in.connect(refuse)
    try:
        assert log_in(browser, site, site.create_account()).status_code == 500
    finally:
        signals.logged_in.disconnect(refuse)
    assert StoredSession.objects.count() == 0


# Several accounts of one user


def test_accounts_are_linked_and_unlinked(site: LocalNetwork, browser: Client, another_browser: Client) -> None:
    alice, bob = site.create_account("alice.test"), site.create_account("bob.test")
    log_in(browser, site, alice)
    user = who(browser)["user"]
    answer = log_in(browser, site, bob, link=True, next="/whoami")
    assert (answer.status_code, answer["Location"]) == (302, "/whoami")
    assert who(browser) == {"user": user, "did": bob.did, "handle": "bob.test", "all": [bob.did, alice.did]}
    assert users().count() == 1
    page = browser.get("/atproto/accounts").content
    assert b"@alice.test" in page
    assert b"@bob.test (in use)" in page
    assert browser.get(f"/use/{alice.did}").content == alice.did.encode()
    assert who(browser)["did"] == alice.did
    # Either of the two leads to the same user.
    log_in(another_browser, site, bob)
    assert who(another_browser)["user"] == user
    # Unlinked, an account has no session any more, in no browser.
    assert browser.post("/atproto/unlink", {"did": bob.did})["Location"] == "/atproto/accounts"
    assert who(browser)["all"] == [alice.did]
    assert another_browser.get("/data").status_code == 302
    assert who(another_browser)["user"] is None
    assert browser.get("/data").json()["did"] == alice.did
    assert StoredSession.objects.count() == 1


def test_the_last_account_of_a_user_without_a_password_stays(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account()
    log_in(browser, site, alice)
    assert browser.post("/atproto/unlink", {"did": alice.did}).status_code == 409
    user = Account.objects.get().user
    user.set_password("secret")
    user.save()
    browser.force_login(user, "django.contrib.auth.backends.ModelBackend")
    assert browser.post("/atproto/unlink", {"did": alice.did}).status_code == 302
    assert who(browser)["user"] == user.get_username()


def test_nobody_unlinks_the_account_of_somebody_else(
    site: LocalNetwork, browser: Client, another_browser: Client
) -> None:
    alice, bob = site.create_account(), site.create_account()
    log_in(browser, site, alice)
    log_in(another_browser, site, bob)
    assert browser.post("/atproto/unlink", {"did": bob.did}).status_code == 404
    assert another_browser.get("/data").status_code == 200


def test_an_account_of_another_user_is_not_linked(site: LocalNetwork, browser: Client, another_browser: Client) -> None:
    alice, bob = site.create_account(), site.create_account()
    log_in(another_browser, site, bob)
    log_in(browser, site, alice)
    answer = log_in(browser, site, bob, link=True)
    assert answer.status_code == 403
    assert who(browser)["all"] == [alice.did]
    assert another_browser.get("/data").status_code == 200
    assert StoredSession.objects.count() == 2


def test_an_account_is_linked_to_the_user_who_began_it(site: LocalNetwork, browser: Client) -> None:
    alice, bob = site.create_account(), site.create_account()
    log_in(browser, site, alice)
    begun = browser.post("/atproto/link", {"account": bob.handle})
    browser.post("/atproto/logout")
    answer = finish(browser, site.authorize(begun["Location"], bob))
    assert answer.status_code == 403
    assert Account.objects.filter(did=bob.did).count() == 0
    assert StoredSession.objects.count() == 0


def test_who_made_up_a_link_has_linked_nothing(site: LocalNetwork, browser: Client) -> None:
    alice, bob = site.create_account(), site.create_account()
    log_in(browser, site, alice)
    assert log_in(browser, site, bob, next="/atproto/link?made-up").status_code == 403
    assert Account.objects.get().did == alice.did


def test_a_link_that_was_declined_can_be_tried_again(site: LocalNetwork, browser: Client) -> None:
    log_in(browser, site, site.create_account())
    answer = log_in(browser, site, site.create_account(), link=True, next="/whoami", approve=False)
    assert answer.status_code == 400
    assert b"Link an account" in answer.content
    assert b'value="/whoami"' in answer.content


def test_to_link_one_has_to_be_logged_in(site: LocalNetwork, browser: Client) -> None:
    for page in ("link", "accounts"):
        assert browser.get(f"/atproto/{page}")["Location"].startswith("/atproto/login?next=")


# What authorization servers fetch


def test_the_documents(site: LocalNetwork, browser: Client) -> None:
    from atproto_session.contrib.django.conf import NAME
    from atproto_session.keys import generate_jwk

    key = generate_jwk()
    public = {"PUBLIC_URL": "https://app.example.com", "SCOPE": "atproto", "NAME": "Example", "KEYS": [key]}
    with override_settings(**{NAME: public}):
        document = browser.get("/atproto/oauth-client-metadata.json").json()
        assert document["client_id"] == "https://app.example.com/atproto/oauth-client-metadata.json"
        assert document["redirect_uris"] == ["https://app.example.com/atproto/callback"]
        assert document["token_endpoint_auth_method"] == "private_key_jwt"
        (published,) = browser.get(urlsplit(document["jwks_uri"]).path).json()["keys"]
        assert published["x"] == key["x"]
        assert "d" not in published


def test_in_production(site: LocalNetwork) -> None:
    """The cookie of the log-in is for https and this host alone."""
    from django.conf import settings

    from atproto_session.contrib.django.conf import NAME, get_settings

    changed = {**getattr(settings, NAME), "PUBLIC_URL": "https://app.example.com"}
    with override_settings(**{NAME: changed}):
        site.publish("https://app.example.com/atproto/oauth-client-metadata.json", get_settings().metadata_document())
        browser = Browser(SERVER_NAME="app.example.com")
        alice = site.create_account()
        begun = browser.post("/atproto/login", {"account": alice.handle}, secure=True)
        (cookie,) = [each for name, each in begun.cookies.items() if name.startswith("__Host-atproto-login-")]
        assert (cookie["secure"], cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, True, "Lax", "/")
        back = urlsplit(site.authorize(begun["Location"], alice))
        assert back.netloc == "app.example.com"
        answer = browser.get(f"{back.path}?{back.query}", secure=True)
        assert answer.status_code == 302
        assert answer.cookies[cookie.key]["max-age"] == 0
        assert answer.cookies[cookie.key]["secure"], "a browser would not delete it"
        assert browser.get("/whoami", secure=True).json()["did"] == alice.did


def test_a_request_that_is_a_transaction(site: LocalNetwork, browser: Client, another_browser: Client) -> None:
    """Each in one: the log-in, a view that has read and refreshes, unlinking, the log-out."""
    from django.db import connections

    settings = connections["default"].settings_dict
    settings["ATOMIC_REQUESTS"] = True
    try:
        alice, bob = site.create_account(), site.create_account()
        for _ in range(2):
            log_in(browser, site, alice)
        log_in(browser, site, bob, link=True)
        site.expire_access_tokens(bob.did)
        assert browser.get("/data").json()["did"] == bob.did
        assert browser.get("/rolled-back").status_code == 200
        assert browser.get("/data").json()["did"] == bob.did
        assert (site.rotations, site.replays) == (2, 0)
        assert browser.post("/atproto/unlink", {"did": bob.did}).status_code == 302
        assert browser.post("/atproto/logout").status_code == 302
    finally:
        settings["ATOMIC_REQUESTS"] = False
    assert StoredSession.objects.count() == 0


def test_where_all_pages_are_for_those_who_are_logged_in(site: LocalNetwork) -> None:
    """By Django's ``LoginRequiredMiddleware``: nobody could log in, if the pages of the log-in were."""
    from django.conf import settings

    guard = "django.contrib.auth.middleware.LoginRequiredMiddleware"
    with override_settings(MIDDLEWARE=[*settings.MIDDLEWARE, guard]):
        browser = Browser()
        assert browser.get("/whoami")["Location"] == "/atproto/login?next=/whoami"
        for page in ("login", "oauth-client-metadata.json", "jwks.json"):
            assert browser.get(f"/atproto/{page}").status_code == 200
        log_in(browser, site, site.create_account(), next="/whoami")
        assert browser.get("/whoami").status_code == 200
        assert browser.get("/atproto/accounts").status_code == 200
        assert browser.post("/atproto/logout")["Location"] == "/"
        assert browser.post("/atproto/logout")["Location"] == "/", "it is done already"


@pytest.mark.usefixtures("site")
def test_programs_and_forms_of_nobody(browser: Client) -> None:
    for page in ("accounts", "link"):
        said = browser.get(f"/atproto/{page}", HTTP_ACCEPT="application/json")
        assert (said.status_code, said.json()["error"]) == (401, "login_required")
    assert browser.post("/atproto/unlink")["Location"] == "/atproto/login?next=/atproto/accounts"


@pytest.mark.usefixtures("site")
def test_who_asks_for_the_headers_alone_gets_them(browser: Client) -> None:
    for page in ("login", "oauth-client-metadata.json", "jwks.json"):
        assert browser.head(f"/atproto/{page}").status_code == 200
    assert browser.head("/atproto/callback").status_code == 405, "it would spend the code"


def test_below_a_path_in_production(site: LocalNetwork) -> None:
    """As a web server tells: ``SCRIPT_NAME``. A client for development says that it needs to know its address."""
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from werkzeug.test import Client as Caller

    from atproto_session.contrib.django.conf import NAME, get_settings

    alice, https = site.create_account(), "https://app.example.com/there"
    development = Caller(get_wsgi_application())
    assert development.get("/atproto/login", base_url="http://127.0.0.1/there").status_code == 200
    with override_settings(**{NAME: {**getattr(settings, NAME), "PUBLIC_URL": https}}):
        site.publish(f"{https}/atproto/oauth-client-metadata.json", get_settings().metadata_document())
        caller = Caller(get_wsgi_application())
        asked = caller.get("/data", base_url=https)
        assert asked.location == "/there/atproto/login?next=/there/data"
        form = caller.get("/atproto/login?next=/there/data", base_url=https).text
        token = form.partition('name="csrfmiddlewaretoken" value="')[2].partition('"')[0]
        fields = {"csrfmiddlewaretoken": token, "account": alice.handle, "next": "/there/data"}
        headers = {"Origin": "https://app.example.com"}
        begun = caller.post("/atproto/login", data=fields, base_url=https, headers=headers)
        back = urlsplit(site.authorize(begun.location, alice))
        assert back.path == "/there/atproto/callback"
        done = caller.get(f"/atproto/callback?{back.query}", base_url=https)
        assert done.location == "/there/data"
        assert alice.did in caller.get("/data", base_url=https).text


def test_in_development_it_is_not_below_a_path(site: LocalNetwork, browser: Client) -> None:
    from django.urls import set_script_prefix

    set_script_prefix("/there/")
    browser.raise_request_exception = True
    try:
        with pytest.raises(ClientMetadataError, match="below /there; set the public URL"):
            browser.post("/atproto/login", {"account": site.create_account().handle})
    finally:
        set_script_prefix("/")
