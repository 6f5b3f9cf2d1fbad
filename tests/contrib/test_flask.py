"""Log-in for Flask, as a browser without scripts sees it. In Chromium: ``test_flask_browser.py``."""

from __future__ import annotations

import json
import logging
import runpy
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from cachelib import SimpleCache
from cryptography.fernet import Fernet
from flask import Flask, abort, render_template_string, session
from flask.sessions import SecureCookieSessionInterface
from flask_session import Session
from flask_wtf import CSRFProtect
from werkzeug.test import TestResponse

from atproto_session import (
    ClientMetadataError,
    OAuthClient,
    SessionError,
    SessionNotFoundError,
    StoreError,
    TransportError,
)
from atproto_session.contrib.flask import (
    ATProto,
    current_account,
    logged_in,
    logged_out,
    login_required,
    session_over,
)
from atproto_session.keys import generate_jwk
from atproto_session.testing.network import Account, LocalNetwork

from ..core import RESTLESS, Worker
from ..processes import ROOT, in_child
from ..scenes import GET_SESSION
from .examples import EXAMPLES
from .test_web import PEM

HERE = "http://127.0.0.1:5000"
PUBLIC = "https://app.example.com"
EVIL = {"Origin": "http://127.0.0.1:5001", "Sec-Fetch-Site": "same-site"}


def make_app(network: LocalNetwork, store: str = "memory:", **settings: Any) -> Flask:
    """An application with a page for everybody, one for those who are logged in, and one that uses their account."""
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY="for tests",
        ATPROTO_STORE=store,
        ATPROTO_OPTIONS={"times": RESTLESS, **network.client_options()},
        **settings,
    )
    ATProto(app)

    @app.get("/")
    def home() -> str:
        return f"Hello {current_account.handle}" if current_account else "Who are you?"

    @app.get("/members")
    @login_required
    def members() -> str:
        return f"secret of {current_account.did}"

    @app.get("/data")
    def data() -> Any:
        answer = current_account.session.get(GET_SESSION)
        answer.raise_for_status()
        return dict(answer.json())

    return app


class Visitor:
    """Somebody with a browser."""

    def __init__(self, app: Flask, network: LocalNetwork, base: str = HERE) -> None:
        self.app = app
        self.network = network
        self.base = base
        self.browser = app.test_client()

    def get(self, path: str, **headers: str) -> TestResponse:
        return self._open("GET", path, headers=headers)

    def post(self, path: str, headers: Mapping[str, str] | None = None, **form: str) -> TestResponse:
        own = {"Origin": self.base, "Sec-Fetch-Site": "same-origin"}
        return self._open("POST", path, headers=own if headers is None else headers, data=form)

    def _open(self, method: str, path: str, **options: Any) -> TestResponse:
        return self.browser.open(path, method=method, base_url=self.base, **options)

    def begin(self, account: Account, next: str = "") -> str:
        """The URL of the authorization server that the form leads to."""
        answer = self.post("/atproto/login", account=account.handle, next=next)
        assert answer.status_code == 303, answer.text
        return answer.location

    def come_back(self, url: str) -> TestResponse:
        parts = urlsplit(url)
        assert f"{parts.scheme}://{parts.netloc}" == self.base
        return self.get(f"{parts.path}?{parts.query}")

    def log_in(self, account: Account, next: str = "") -> TestResponse:
        answer = self.come_back(self.network.authorize(self.begin(account, next), account))
        assert answer.status_code == 303, answer.text
        return answer

    def cookie(self) -> str:
        """Flask's own."""
        cookie = self.browser.get_cookie("session", urlsplit(self.base).hostname or "")
        return "" if cookie is None else cookie.value

    def with_cookie(self, value: str) -> Visitor:
        """Somebody else, who has copied the cookie."""
        thief = Visitor(self.app, self.network, self.base)
        thief.browser.set_cookie("session", value, domain=urlsplit(self.base).hostname or "")
        return thief

    def ids(self) -> list[str]:
        """What is in Flask's session."""
        with self.browser.session_transaction(base_url=self.base) as stored:
            return list(stored["atproto"])

    def tickets(self) -> list[str]:
        return [name for _, _, name in self.browser._cookies or {} if "atproto-login" in name]


@pytest.fixture
def app(network: LocalNetwork) -> Iterator[Flask]:
    app = make_app(network)
    yield app
    client_of(app).close()


def client_of(app: Flask) -> OAuthClient:
    with app.app_context():
        return ATProto().client


@pytest.fixture
def visitor(app: Flask, network: LocalNetwork) -> Visitor:
    return Visitor(app, network)


# Logging in and out


def test_a_visitor_logs_in_and_out(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    assert visitor.get("/").text == "Who are you?"
    page = visitor.get("/atproto/login?next=/members&account=alice.test")
    assert 'value="alice.test"' in page.text
    assert 'name="next" value="/members"' in page.text
    assert page.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert page.headers["Cache-Control"] == "no-store"
    assert visitor.log_in(account, next="/members?a=b").location == "/members?a=b"
    assert visitor.get("/members").text == f"secret of {account.did}"
    assert visitor.get("/").text == "Hello alice.test"
    assert visitor.get("/data").json == {"did": account.did, "handle": "alice.test", "active": True} | (
        visitor.get("/data").json or {}
    )
    did, session_id = visitor.ids()
    assert did == account.did
    with visitor.browser.session_transaction(base_url=HERE) as stored:
        assert set(stored) == {"atproto"}, "nothing but ids is in the cookie"
    assert len(session_id) >= 22
    assert visitor.tickets() == []
    assert visitor.post("/atproto/logout").location == "/"
    assert network.revocations == 1
    assert visitor.get("/").text == "Who are you?"


def test_a_visitor_comes_to_the_log_in_and_back(visitor: Visitor, account: Account) -> None:
    answer = visitor.get("/members?q=a%20b%5C&r=%C3%A4")
    assert answer.status_code == 303
    assert urlsplit(answer.location).path == "/atproto/login"
    (target,) = parse_qs(urlsplit(answer.location).query)["next"]
    assert visitor.log_in(account, target).location == target
    assert visitor.get(target).text == f"secret of {account.did}"


def test_forms_and_programs_do_not_come_back_to_where_they_were(visitor: Visitor) -> None:
    @visitor.app.post("/write")
    @login_required
    def write() -> str:
        raise AssertionError

    assert visitor.post("/write").location == "/atproto/login"
    answer = visitor.get("/members", Accept="application/json")
    assert answer.status_code == 401
    assert answer.json == {"error": "login_required", "message": "Please log in."}
    assert visitor._open("OPTIONS", "/members").status_code == 200


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example/", "/\\evil.example", "\t//evil.example"])
def test_a_log_in_leads_to_no_other_site(visitor: Visitor, account: Account, target: str) -> None:
    assert "evil" not in visitor.get("/atproto/login", **{}).text
    assert "evil" not in visitor.browser.get("/atproto/login", query_string={"next": target}, base_url=HERE).text
    assert visitor.log_in(account, target).location == "/"
    assert visitor.post("/atproto/logout", next=target).location == "/"


def test_a_log_out_leads_where_the_form_says(visitor: Visitor) -> None:
    assert visitor.post("/atproto/logout", next="/bye").location == "/bye"


def test_who_asks_for_the_headers_alone_ends_no_log_in(app: Flask, network: LocalNetwork, account: Account) -> None:
    browser = app.test_client()
    begun = browser.post("/atproto/login", data={"account": account.handle}, base_url="http://127.0.0.1")
    callback = network.authorize(begun.location, account)
    assert browser.head(callback).status_code == 405
    assert browser.get(callback).status_code == 303


def test_only_a_form_logs_in_and_out(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    visitor.log_in(account)
    assert visitor.get("/atproto/logout").status_code == 405
    assert visitor.get(f"/atproto/login?account={account.handle}").status_code == 200
    assert visitor.get("/members").status_code == 200
    assert network.par_requests <= 2  # of the log-in, the first without a nonce


@pytest.mark.parametrize(
    "headers",
    [
        EVIL,
        {"Origin": "http://localhost:5000", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
    ids=str,
)
def test_a_foreign_page_neither_begins_nor_ends_a_log_in(
    visitor: Visitor, network: LocalNetwork, account: Account, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    visitor.log_in(account)
    before = network.par_requests
    assert visitor.post("/atproto/login", headers, account=account.handle).status_code == 403
    assert visitor.post("/atproto/logout", headers).status_code == 403
    refused = visitor.post("/atproto/logout", {**headers, "Accept": "application/json"})
    assert (refused.status_code, refused.json and refused.json["error"]) == (403, "foreign_page")
    assert visitor.get("/members").status_code == 200
    assert network.par_requests == before
    assert "a page of somebody else has sent a form to /atproto/login" in caplog.text


def test_what_comes_from_no_browser_may_log_in(visitor: Visitor, account: Account) -> None:
    assert visitor.post("/atproto/login", {}, account=account.handle).status_code == 303


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "Please enter the name of your account."),
        ("  ", "Please enter the name of your account."),
        ("nobody.test", "no account has the handle nobody.test; check its spelling"),
        ("a<b>c", "&#39;a&lt;b&gt;c&#39; is not a handle such as alice.example.com"),
    ],
)
def test_what_is_no_account_is_said_beside_the_form(visitor: Visitor, typed: str, message: str) -> None:
    page = visitor.post("/atproto/login", account=typed, next="/members")
    assert page.status_code == 400
    assert message in page.text
    assert 'name="next" value="/members"' in page.text
    assert "<b>" not in page.text
    answer = visitor.post("/atproto/login", {"Accept": "application/json"}, account=typed)
    assert answer.json is not None
    assert answer.json["error"] in ("no_account", "login_failed")


def test_a_refusal_leads_back_to_the_form(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    url = network.authorize(visitor.begin(account, "/members"), account, approve=False)
    page = visitor.come_back(url)
    assert page.status_code == 400
    assert "access_denied" in page.text
    assert 'name="next" value="/members"' in page.text
    assert visitor.tickets() == []
    assert visitor.log_in(account).status_code == 303


def test_two_tabs_with_one_account(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    first, second = visitor.begin(account, "/a"), visitor.begin(account, "/b")
    assert visitor.come_back(network.authorize(second, account)).location == "/b"
    assert visitor.come_back(network.authorize(first, account)).location == "/a"
    assert visitor.get("/data").status_code == 200
    assert network.revocations == 1, "the session that no tab has any more was ended"


def test_two_tabs_with_two_accounts(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    other = network.create_account("bob.test")
    elsewhere = Visitor(visitor.app, network)
    elsewhere.log_in(account)
    first, second = visitor.begin(account, "/a"), visitor.begin(other, "/b")
    visitor.come_back(network.authorize(first, account))
    assert visitor.get("/").text == "Hello alice.test"
    visitor.come_back(network.authorize(second, other))
    assert visitor.get("/").text == "Hello bob.test"
    assert visitor.get("/data").json == visitor.get("/data").json
    assert elsewhere.get("/data").status_code == 200, "nobody is logged out elsewhere"


def test_another_browser_cannot_end_a_log_in(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    victim = Visitor(visitor.app, network)
    victim.begin(network.create_account())
    page = victim.come_back(network.authorize(visitor.begin(account, "/mine"), account))
    assert page.status_code == 400
    assert "another browser" in page.text
    assert "/mine" not in page.text
    assert victim.get("/").text == "Who are you?"
    assert network.token_requests == 0, "the code was not spent"


def test_a_callback_that_comes_again_changes_nothing(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    url = network.authorize(visitor.begin(account), account)
    visitor.come_back(url)
    assert visitor.come_back(url).status_code == 400
    assert visitor.get("/data").status_code == 200


def test_a_log_out_ends_the_session_of_this_browser_alone(
    visitor: Visitor, network: LocalNetwork, account: Account
) -> None:
    elsewhere = Visitor(visitor.app, network)
    visitor.log_in(account)
    elsewhere.log_in(account)
    copied = visitor.with_cookie(visitor.cookie())
    assert copied.get("/members").status_code == 200
    visitor.post("/atproto/logout")
    assert elsewhere.get("/data").status_code == 200
    assert copied.get("/").text == "Who are you?"
    assert urlsplit(copied.get("/members").location).path == "/atproto/login"
    assert urlsplit(copied.get("/data").location).path == "/atproto/login"
    visitor.log_in(account)
    assert copied.get("/members").status_code == 303, "nor after the next log-in"


def test_a_cookie_of_before_opens_nothing_after_another_log_in(
    visitor: Visitor, network: LocalNetwork, account: Account
) -> None:
    visitor.log_in(account)
    copied = visitor.with_cookie(visitor.cookie())
    visitor.log_in(account)
    assert copied.get("/members").status_code == 303
    assert visitor.get("/members").status_code == 200


def test_a_log_out_that_the_store_refuses_is_an_error(
    visitor: Visitor, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise StoreError("full")

    visitor.log_in(account)
    with monkeypatch.context() as patch:
        patch.setattr(OAuthClient, "revoke", full)
        visitor.log_in(account)  # goes well, and leaves a line in the log
        assert visitor.post("/atproto/logout").status_code == 500
    assert visitor.get("/").text == "Who are you?"


def test_a_log_out_of_nobody_is_none(visitor: Visitor, network: LocalNetwork) -> None:
    assert visitor.post("/atproto/logout").status_code == 303
    assert network.requests("/oauth/revoke") == 0


def test_a_session_that_is_gone_is_logged_out_all_the_same(
    visitor: Visitor, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: object, **options: object) -> None:
        raise SessionNotFoundError("gone")

    visitor.log_in(account)
    monkeypatch.setattr(OAuthClient, "revoke", gone)
    assert visitor.post("/atproto/logout").status_code == 303


# What is asked of whom


def test_who_is_logged_in_costs_no_request(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    visitor.log_in(account)
    network.expire_access_tokens(account.did)
    before = sum(network._requests.values())
    assert visitor.get("/members").status_code == 200
    assert sum(network._requests.values()) == before
    assert visitor.get("/data").status_code == 200


def test_a_handle_that_is_only_claimed_is_none(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    network.change_handle(account.did, "celebrity.test", resolves=False)
    begun = visitor.post("/atproto/login", account=account.did)
    visitor.come_back(network.authorize(begun.location, account))
    assert visitor.get("/").text == "Hello None"


def test_a_handle_that_cannot_be_looked_up_is_none(
    visitor: Visitor, account: Account, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    visitor.log_in(account)

    def down(*args: object, **options: object) -> None:
        raise TransportError("the directory is down")

    monkeypatch.setattr("atproto_session.identity.IdentityResolver.resolve", down)
    assert visitor.get("/").text == "Hello None"
    assert "the directory is down" in caplog.text


def test_nobody_has_no_handle(visitor: Visitor) -> None:
    with visitor.app.test_request_context("/"):
        assert current_account.handle is None
        assert current_account.did is None
        assert repr(current_account) == "<Account None>"


def test_documents_need_neither_the_store_nor_the_network(network: LocalNetwork) -> None:
    jwk = generate_jwk() | {"kid": "one"}
    app = make_app(network, "nonsense://", ATPROTO_PUBLIC_URL=PUBLIC, ATPROTO_KEYS=jwk, ATPROTO_NAME="Example")
    browser = app.test_client()
    answer = browser.get("/atproto/oauth-client-metadata.json")
    document = answer.json
    assert answer.content_type == "application/json"
    assert document is not None
    assert document["client_id"] == f"{PUBLIC}/atproto/oauth-client-metadata.json"
    assert document["client_name"] == "Example"
    keys = browser.get("/atproto/jwks.json").json
    assert keys is not None
    assert [key["kid"] for key in keys["keys"]] == ["one"]
    assert "d" not in keys["keys"][0]
    assert "Set-Cookie" not in answer.headers
    assert network._requests.total() == 0


# One configuration


def test_in_production_it_is_a_confidential_client(network: LocalNetwork, account: Account, tmp_path: Path) -> None:
    app = make_app(
        network,
        f"sqlite:///{tmp_path}/sessions.db",
        ATPROTO_PUBLIC_URL=PUBLIC,
        ATPROTO_KEYS=generate_jwk(),
        ATPROTO_ENCRYPTION_KEYS=Fernet.generate_key().decode(),
    )
    visitor = Visitor(app, network, PUBLIC)
    for path in ("oauth-client-metadata.json", "jwks.json"):
        network.publish(f"{PUBLIC}/atproto/{path}", visitor.get(f"/atproto/{path}").json)
    begun = visitor.post("/atproto/login", account=account.handle)
    (ticket,) = [cookie for cookie in begun.headers.getlist("Set-Cookie") if "atproto-login" in cookie]
    assert ticket.startswith("__Host-")
    assert {"Secure", "HttpOnly", "Path=/", "SameSite=Lax"} <= {part.strip() for part in ticket.split(";")}
    assert "Domain" not in ticket
    done = visitor.come_back(network.authorize(begun.location, account))
    (cookie,) = [cookie for cookie in done.headers.getlist("Set-Cookie") if cookie.startswith("session=")]
    assert {"Secure", "HttpOnly", "SameSite=Lax"} <= {part.strip() for part in cookie.split(";")}
    assert visitor.get("/data").status_code == 200
    assert visitor.tickets() == []
    client_of(app).close()


def test_a_proxy_may_hide_the_public_address(network: LocalNetwork, account: Account) -> None:
    app = make_app(network, ATPROTO_PUBLIC_URL=PUBLIC)
    network.publish(
        f"{PUBLIC}/atproto/oauth-client-metadata.json",
        Visitor(app, network).get("/atproto/oauth-client-metadata.json").json,
    )
    inside = Visitor(app, network, "http://inside:8000")
    assert inside.post("/atproto/login", {"Origin": PUBLIC}, account=account.handle).status_code == 303
    assert inside.post("/atproto/login", {"Origin": "http://evil:8000"}, account=account.handle).status_code == 403
    client_of(app).close()


@pytest.mark.parametrize("keys", [json.dumps(generate_jwk()), PEM], ids=["jwk", "pem"])
def test_settings_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    key = Fernet.generate_key().decode()
    given = {
        "SECRET_KEY": "for tests",
        "ATPROTO_PUBLIC_URL": PUBLIC,
        "ATPROTO_SCOPE": "atproto transition:generic",
        "ATPROTO_KEYS": keys,
        "ATPROTO_ENCRYPTION_KEYS": json.dumps([key]),
        "ATPROTO_STORE": f"sqlite:///{tmp_path}/sessions.db",
        "ATPROTO_PREFIX": "/account",
        "ATPROTO_OPTIONS__timeout": "7",
        "ATPROTO_METADATA__tos_uri": f"{PUBLIC}/terms",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"FLASK_{name}", value)
    app = Flask(__name__)
    app.config.from_prefixed_env()
    atproto = ATProto(app)
    document = app.test_client().get("/account/oauth-client-metadata.json").json
    assert document is not None
    assert document["scope"] == "atproto transition:generic"
    assert document["tos_uri"] == f"{PUBLIC}/terms"
    assert document["token_endpoint_auth_method"] == "private_key_jwt"
    with app.app_context():
        assert atproto.client._timeout == 7
        atproto.client.close()
    assert (tmp_path / "sessions.db").exists()


def test_in_development_it_needs_no_settings(tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path / "instance"))
    atproto = ATProto()
    atproto.init_app(app)
    assert not (tmp_path / "instance").exists(), "nothing is opened before it is needed"
    with app.app_context():
        assert atproto.settings.client_metadata.is_loopback
        atproto.client.close()
    assert (tmp_path / "instance" / "atproto.db").exists()
    assert app.config["SESSION_COOKIE_SECURE"] is False
    assert app.config["SESSION_COOKIE_SAMESITE"] == "Lax"


def test_what_the_application_says_of_its_cookie_counts(network: LocalNetwork) -> None:
    app = make_app(network, SESSION_COOKIE_SAMESITE="None", ATPROTO_PUBLIC_URL=PUBLIC)
    assert (app.config["SESSION_COOKIE_SAMESITE"], app.config["SESSION_COOKIE_SECURE"]) == ("None", True)


def test_a_wrong_setting_is_named(network: LocalNetwork) -> None:
    app = make_app(network, ATPROTO_SCOPES="atproto")
    with app.app_context(), pytest.raises(ClientMetadataError, match=r"ATPROTO_SCOPES is no setting; is it ATPROTO_SC"):
        ATProto().client  # noqa: B018
    with pytest.raises(ClientMetadataError, match="ATPROTO_PREFIX"):
        make_app(network, ATPROTO_PREFIX="account")


def test_without_the_extension_it_says_so() -> None:
    app = Flask(__name__)
    with app.app_context(), pytest.raises(RuntimeError, match=r"call ATProto\(app\)"):
        ATProto().client  # noqa: B018


def test_without_a_secret_key_nothing_begins(network: LocalNetwork, account: Account) -> None:
    app = make_app(network)
    app.config.update(SECRET_KEY=None, TESTING=True)
    with pytest.raises(RuntimeError, match="SECRET_KEY"):
        Visitor(app, network).begin(account)
    assert network.par_requests == 0


def test_development_moves_to_the_address_that_log_ins_return_to(app: Flask, network: LocalNetwork) -> None:
    visitor = Visitor(app, network, "http://localhost:5000")
    moved = visitor.get("/atproto/login?next=/members")
    assert (moved.status_code, moved.location) == (303, f"{HERE}/atproto/login?next=/members")
    moved = visitor.post("/atproto/login", account="alice.test")
    assert moved.location == f"{HERE}/atproto/login?account=alice.test"
    app.testing = True
    with pytest.raises(ClientMetadataError, match=r"only; set the public URL"):
        Visitor(app, network, "http://app.example.com").get("/atproto/login")


def test_threads_share_one_client(network: LocalNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(network)
    together = threading.Barrier(2)
    made: list[OAuthClient] = []
    opened = ATProto(app=None)
    with app.app_context():
        settings = opened.settings
    real = type(settings).open_client

    def slowly(self: Any) -> OAuthClient:
        client = real(self)
        made.append(client)
        together.wait(30)
        return client

    monkeypatch.setattr(type(settings), "open_client", slowly)
    workers = [Worker(lambda: client_of(app)) for _ in range(2)]
    one, two = (worker.outcome() for worker in workers)
    assert one is two
    assert len(made) == 2
    client_of(app).close()


def test_workers_may_be_forked_from_it(network: LocalNetwork, account: Account, tmp_path: Path) -> None:
    """As gunicorn does with ``--preload``: before the client is made, and afterwards."""
    app = make_app(network, f"sqlite:///{tmp_path}/sessions.db")

    def status(visitor: Visitor) -> Callable[[], int]:
        return lambda: visitor.get("/data").status_code

    visitor = Visitor(app, network)
    assert in_child(status(visitor)) == 303
    visitor.log_in(account)
    network.expire_access_tokens(account.did)
    assert in_child(status(visitor)) == 200
    assert visitor.get("/data").status_code == 200
    client_of(app).close()


# When something goes wrong


def test_a_browser_whose_session_is_over_logs_in_anew(
    visitor: Visitor, network: LocalNetwork, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "atproto_session")
    elsewhere = Visitor(visitor.app, network)
    heard: list[tuple[str, type]] = []

    def hear(sender: Flask, did: str, error: SessionError) -> None:
        assert sender is visitor.app
        heard.append((did, type(error)))

    visitor.log_in(account)
    network.revoke_sessions(account.did)
    elsewhere.log_in(account)
    with session_over.connected_to(hear):
        answer = visitor.get("/data?a=b")
    assert urlsplit(answer.location).path == "/atproto/login"
    assert parse_qs(urlsplit(answer.location).query) == {"next": ["/data?a=b"]}
    assert [did for did, _ in heard] == [account.did]
    assert f"the session of {account.did} in this browser is over" in caplog.text
    assert visitor.get("/").text == "Who are you?"
    assert elsewhere.get("/data").status_code == 200
    visitor.log_in(account)
    assert visitor.get("/data").status_code == 200


def test_a_program_whose_session_is_over_is_told(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    visitor.log_in(account)
    network.revoke_sessions(account.did)
    answer = visitor.get("/data", Accept="application/json")
    assert (answer.status_code, answer.json and answer.json["error"]) == (401, "login_required")


def test_an_old_answer_leaves_a_new_cookie_alone(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    """A request that is answered late, when its browser has logged in again, would overwrite the new cookie."""
    visitor.log_in(account)
    network.revoke_sessions(account.did)
    assert "Set-Cookie" not in visitor.get("/data").headers
    assert "Set-Cookie" not in visitor.get("/members").headers


def test_an_error_of_another_account_logs_nobody_out(
    visitor: Visitor, network: LocalNetwork, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    service = network.create_account("service.test")

    @visitor.app.get("/news")
    def news() -> str:
        client_of(visitor.app).restore(service.did)
        return "none"

    visitor.log_in(account)
    assert visitor.get("/news").status_code == 500
    assert service.did in caplog.text
    assert visitor.get("/data").status_code == 200
    # Nor one of another session of the same account.
    visitor.app.view_functions["news"] = lambda: str(client_of(visitor.app).restore(account.did))
    assert visitor.get("/news").status_code == 500
    assert visitor.get("/data").status_code == 200


@pytest.mark.parametrize(
    ("status", "headers", "expected", "after"),
    [
        (503, {}, 503, "5"),
        (429, {"Retry-After": "7"}, 503, "7"),
        (500, {}, 502, None),
        (400, {}, 502, None),
    ],
)
def test_a_server_that_is_in_trouble_is_no_error_of_ours(
    visitor: Visitor,
    network: LocalNetwork,
    account: Account,
    status: int,
    headers: dict[str, str],
    expected: int,
    after: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    visitor.log_in(account)
    network.fault("resource", "status", status=status, headers=headers, times=None)
    page = visitor.get("/data?code=secret")
    assert (page.status_code, page.headers.get("Retry-After")) == (expected, after)
    assert 'role="alert"' in page.text
    assert f"GET /data was answered with {expected}" in caplog.text
    assert "Traceback" in caplog.text
    assert "code=secret" not in caplog.text
    answer = visitor.get("/data", Accept="application/json")
    assert answer.status_code == expected
    assert answer.json is not None
    assert answer.json["error"] == ("try_again" if expected == 503 else "bad_gateway")
    assert visitor.get("/members").status_code == 200


def test_a_server_that_is_down_is_no_error_of_ours(
    visitor: Visitor, network: LocalNetwork, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    visitor.log_in(account)
    network.expire_access_tokens(account.did)
    network.stop()
    assert visitor.get("/data").status_code in (502, 503)
    assert visitor.post("/atproto/login", account=account.did).status_code in (502, 503)
    assert visitor.get("/members").status_code == 200
    assert visitor.post("/atproto/logout").status_code == 303
    assert visitor.get("/members").status_code == 303


def test_a_server_that_cuts_the_connection(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    visitor.log_in(account)
    network.fault("resource", "cut_before", times=None)
    assert visitor.get("/data").status_code == 502


def test_a_refusal_of_the_authorization_server(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    visitor.log_in(account)
    network.expire_access_tokens(account.did)
    network.fault("refresh", "oauth_error", error="invalid_client", times=None)
    assert visitor.get("/data").status_code == 502
    assert visitor.get("/members").status_code == 200
    network.fault("par", "oauth_error", error="invalid_scope", times=None)
    page = visitor.post("/atproto/login", account=account.handle)
    assert page.status_code == 502
    assert "<form" in page.text


def test_a_refusal_of_the_code(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    url = network.authorize(visitor.begin(account), account)
    network.fault("token", "oauth_error", error="invalid_grant")
    assert visitor.come_back(url).status_code == 502
    assert visitor.get("/").text == "Who are you?"


def test_a_callback_may_come_again_if_nothing_was_spent(
    visitor: Visitor, network: LocalNetwork, account: Account
) -> None:
    url = network.authorize(visitor.begin(account, "/data"), account)
    fault = network.fault("plc", "status", status=503, times=None)
    assert visitor.come_back(url).status_code == 503
    fault.disarm()
    assert visitor.come_back(url).location == "/data"
    assert visitor.get("/data").status_code == 200


def test_a_log_in_that_was_begun_in_another_way(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    redirect_uri = f"{HERE}/atproto/callback"
    for state in ("mine", "[1, 2, 3]", None):
        url = client_of(visitor.app).authorize(account.did, state=state, redirect_uri=redirect_uri)
        assert visitor.come_back(network.authorize(url, account)).status_code == 400


def test_a_session_of_another_client_is_none(network: LocalNetwork, account: Account, tmp_path: Path) -> None:
    """In development, another scope makes another client."""
    store = f"sqlite:///{tmp_path}/sessions.db"
    before, now = make_app(network, store), make_app(network, store, ATPROTO_SCOPE="atproto transition:generic")
    visitor = Visitor(before, network)
    visitor.log_in(account)
    same = Visitor(now, network).with_cookie(visitor.cookie())
    assert same.get("/").text == "Who are you?"
    assert same.get("/data").status_code == 303
    same.log_in(account)
    assert same.get("/data").status_code == 200
    assert visitor.get("/data").status_code == 200, "and is left alone"
    for app in (before, now):
        client_of(app).close()


def test_a_handler_of_the_application_comes_first(network: LocalNetwork, account: Account) -> None:
    app = make_app(network)
    app.register_error_handler(SessionError, lambda error: ("my own", 418))
    app.register_error_handler(requests.RequestException, lambda error: ("my own", 418))
    visitor = Visitor(app, network)
    visitor.log_in(account)
    network.fault("resource", "status", status=500, times=None)
    assert visitor.get("/data").status_code == 418
    network.expire_access_tokens(account.did)
    network.fault("refresh", "oauth_error", error="invalid_client", times=None)
    assert visitor.get("/data").status_code == 418
    client_of(app).close()


def test_bugs_stay_errors(visitor: Visitor, account: Account) -> None:
    @visitor.app.get("/bug")
    def bug() -> str:
        return requests.get("nonsense", timeout=1).text

    visitor.log_in(account)

    visitor.app.testing = True
    with pytest.raises(requests.exceptions.MissingSchema):
        visitor.get("/bug")


def test_a_store_that_fails_is_no_log_out(visitor: Visitor, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise StoreError("broken")

    visitor.log_in(account)
    with monkeypatch.context() as patch:
        patch.setattr(OAuthClient, "restore", broken)
        patch.setattr(OAuthClient, "authorize", broken)
        assert visitor.post("/atproto/login", account=account.handle).status_code == 500
        assert visitor.get("/members").status_code == 500
    assert visitor.get("/members").status_code == 200


# What an application can change


def test_signals_tell_who_came_and_went(visitor: Visitor, account: Account) -> None:
    heard: list[object] = []

    def came(sender: Flask, account: Any, handle: str) -> None:
        heard.append((sender, account.did, account.session_id, handle, current_account.did))

    def went(sender: Flask, did: str) -> None:
        heard.append((sender, did, bool(current_account)))

    with logged_in.connected_to(came), logged_out.connected_to(went):
        visitor.log_in(account)
        _, session_id = visitor.ids()
        visitor.post("/atproto/logout")
    did = account.did
    assert heard == [(visitor.app, did, session_id, "alice.test", did), (visitor.app, did, False)]


def test_a_receiver_may_turn_an_account_away(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    def refuse(sender: Flask, account: Any, handle: str) -> None:
        if handle == "mallory.test":
            abort(403)

    mallory = network.create_account("mallory.test")
    with logged_in.connected_to(refuse):
        url = network.authorize(visitor.begin(mallory), mallory)
        assert visitor.come_back(url).status_code == 403
        assert visitor.get("/").text == "Who are you?"
        assert network.revocations == 1
        visitor.log_in(account)
        url = network.authorize(visitor.begin(mallory), mallory)
        assert visitor.come_back(url).status_code == 403
        assert visitor.get("/").text == "Hello alice.test", "who was there before, stays"


def test_templates_can_be_overridden(network: LocalNetwork, tmp_path: Path) -> None:
    (tmp_path / "atproto").mkdir()
    (tmp_path / "atproto" / "login.html").write_text(
        'My own. {{ problem.message }} {% include "atproto/login_form.html" %}'
    )
    app = make_app(network)
    app.template_folder = str(tmp_path)
    page = Visitor(app, network).post("/atproto/login", account="")
    assert page.text.startswith("My own. Please enter")
    assert 'name="account"' in page.text
    client_of(app).close()


def test_the_forms_are_for_any_page(visitor: Visitor, account: Account) -> None:
    @visitor.app.get("/forms")
    def forms() -> str:
        return render_template_string(
            "{{ current_account.did }}{% set atproto_next = request.path %}"
            "{% include 'atproto/login_form.html' %}{% include 'atproto/logout_form.html' %}"
        )

    visitor.log_in(account)
    page = visitor.get("/forms").text
    assert account.did in page
    assert 'action="/atproto/login"' in page
    assert 'name="next" value="/forms"' in page
    assert 'action="/atproto/logout"' in page
    assert "csrf_token" not in page


def test_sessions_kept_on_the_server_get_another_id(visitor: Visitor, network: LocalNetwork, account: Account) -> None:
    regenerated: list[bool] = []

    class ServerSide(SecureCookieSessionInterface):
        def regenerate(self, kept: Any) -> None:
            regenerated.append("atproto" in kept)

    visitor.app.session_interface = ServerSide()
    visitor.log_in(account)
    assert regenerated == [True]


def test_an_id_that_somebody_planted_is_not_that_of_a_session_on_the_server(
    network: LocalNetwork, account: Account
) -> None:
    """With Flask-Session. An attacker has a session, and puts its id into the browser of a victim."""
    app = make_app(network)
    app.config.update(SESSION_TYPE="cachelib", SESSION_CACHELIB=SimpleCache())
    Session(app)
    app.add_url_rule("/cart", view_func=lambda: str(session.setdefault("cart", "full")))
    attacker = Visitor(app, network)
    attacker.get("/cart")
    victim = attacker.with_cookie(attacker.cookie())
    victim.log_in(account)
    assert victim.get("/members").status_code == 200
    assert attacker.get("/members").status_code == 303
    client_of(app).close()


def test_a_view_of_ones_own_begins_a_log_in(network: LocalNetwork, account: Account) -> None:
    app = make_app(network, ATPROTO_SCOPE="atproto transition:generic")
    app.add_url_rule(
        "/more",
        methods=["POST"],
        view_func=lambda: ATProto().begin_login(account.did, "/data", scope="atproto", state="overridden"),
    )
    visitor = Visitor(app, network)
    assert visitor.post("/more", EVIL).status_code == 403
    done = visitor.come_back(network.authorize(visitor.post("/more").location, account))
    assert done.location == "/data"
    with app.app_context():
        assert ATProto().client.restore(account.did, session_id=visitor.ids()[1]).token_info().scope == "atproto"
    network.fault("par", "oauth_error", error="invalid_scope", times=None)
    assert visitor.post("/more").status_code == 502
    client_of(app).close()


def test_below_a_mount_point(network: LocalNetwork, account: Account) -> None:
    app = make_app(network, ATPROTO_PUBLIC_URL=f"{PUBLIC}/there")
    base = f"{PUBLIC}/there"
    browser = app.test_client()
    document = browser.get("/atproto/oauth-client-metadata.json", base_url=base).json
    network.publish(f"{base}/atproto/oauth-client-metadata.json", document)
    asked = browser.get("/members?a=b", base_url=base).location
    assert asked == "/there/atproto/login?next=/there/members?a%3Db"
    begun = browser.post("/atproto/login", data={"account": account.handle}, base_url=base)
    parts = urlsplit(network.authorize(begun.location, account))
    assert parts.path == "/there/atproto/callback"
    done = browser.get(f"/atproto/callback?{parts.query}", base_url=base)
    assert done.location == "/there/"
    assert browser.get("/members", base_url=base).status_code == 200
    client_of(app).close()


# Beside other extensions


def test_flask_wtf_may_be_switched_off_for_tests(network: LocalNetwork, account: Account) -> None:
    app = make_app(network, WTF_CSRF_ENABLED=False)
    CSRFProtect(app)
    Visitor(app, network).log_in(account)
    client_of(app).close()


@pytest.mark.parametrize("by_default", [True, False])
def test_flask_wtf_has_its_say(network: LocalNetwork, account: Account, by_default: bool) -> None:
    app = make_app(network, WTF_CSRF_CHECK_DEFAULT=by_default)
    CSRFProtect(app)
    app.add_url_rule("/out", view_func=lambda: render_template_string('{% include "atproto/logout_form.html" %}'))
    visitor = Visitor(app, network)
    assert visitor.post("/atproto/login", account=account.handle).status_code == 400
    assert network.par_requests == 0

    def token(page: str) -> str:
        return page.partition('name="csrf_token" value="')[2].partition('"')[0]

    sent = token(visitor.get("/atproto/login").text)
    begun = visitor.post("/atproto/login", account=account.handle, csrf_token=sent)
    assert visitor.come_back(network.authorize(begun.location, account)).status_code == 303
    assert visitor.post("/atproto/logout").status_code == 400
    assert visitor.get("/members").status_code == 200
    assert visitor.post("/atproto/logout", csrf_token=token(visitor.get("/out").text)).status_code == 303
    assert visitor.get("/members").status_code == 303
    client_of(app).close()


@pytest.fixture
def members(network: LocalNetwork) -> Iterator[Flask]:
    """The application of ``docs/examples/flask_members.py``, whose only member is Alice."""
    create_app = runpy.run_path(str(EXAMPLES / "flask_members.py"))["create_app"]
    app = create_app(SECRET_KEY="for tests", ATPROTO_STORE="memory:", ATPROTO_OPTIONS=network.client_options())
    yield app
    client_of(app).close()


def test_flask_login_knows_who_is_logged_in(members: Flask, network: LocalNetwork, account: Account) -> None:
    members.config["MEMBERS"] = [account.did]
    visitor = Visitor(members, network)
    asked = visitor.get("/?a=b").location
    assert urlsplit(asked).path == "/atproto/login"
    (target,) = parse_qs(urlsplit(asked).query)["next"]
    assert visitor.log_in(account, target).location == "/?a=b"
    assert visitor.get("/").text == f"Hello {account.did}"
    copied = visitor.with_cookie(visitor.cookie())
    visitor.post("/atproto/logout")
    assert visitor.get("/").status_code == 302
    assert copied.get("/").status_code == 302


def test_flask_login_knows_whose_session_is_over(members: Flask, network: LocalNetwork, account: Account) -> None:
    members.config["MEMBERS"] = [account.did]
    members.add_url_rule("/data", view_func=lambda: dict(current_account.session.get(GET_SESSION).json()))
    visitor = Visitor(members, network)
    visitor.log_in(account)
    network.revoke_sessions(account.did)
    assert visitor.get("/data").status_code == 303
    assert visitor.get("/").status_code == 302


def test_only_members_log_in(members: Flask, network: LocalNetwork, account: Account) -> None:
    members.config["MEMBERS"] = []
    visitor = Visitor(members, network)
    assert visitor.come_back(network.authorize(visitor.begin(account), account)).status_code == 403
    assert visitor.get("/").status_code == 302


def test_a_log_in_takes_ten_lines() -> None:
    """The tutorial counts them."""
    hello = (EXAMPLES / "flask_hello.py").read_text(encoding="utf-8")
    tutorial = (ROOT / "docs" / "flask.rst").read_text(encoding="utf-8")
    shown = textwrap.indent(f"# docs/examples/flask_hello.py\n{hello}", "    ")
    assert shown in tutorial, "all of it"
    assert len([line for line in hello.splitlines() if line.strip()]) == 9
    assert "It has nine lines, without the empty ones:" in tutorial
