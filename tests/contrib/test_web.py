"""What the web integrations share."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import pytest
import requests
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from atproto_session import (
    ClientMetadataError,
    DiscoveryError,
    IdentityError,
    Keyset,
    OAuthCallbackError,
    OAuthClient,
    OAuthResponseError,
    SessionError,
    SessionNotFoundError,
    StoreError,
    TransportError,
)
from atproto_session.contrib._web import (
    EndedLogin,
    FailedLogin,
    Settings,
    begin_login,
    end_login,
    is_foreign,
    is_over,
    problem_of,
    problem_of_login,
    safe_next,
    wants_json,
)
from atproto_session.keys import generate_jwk
from atproto_session.testing.network import Account, LocalNetwork

HERE = "http://127.0.0.1:5000"
PEM = (
    ec.generate_private_key(ec.SECP256R1())
    .private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    .decode("ascii")
)


# Settings


def test_without_a_public_url_it_is_a_client_for_development() -> None:
    settings = Settings.read({"SCOPE": "atproto transition:generic", "KEYS": PEM, "NAME": "Example"})
    assert settings.is_development
    assert settings.client_metadata.is_loopback
    assert settings.client_metadata.redirect_uris == (
        "http://127.0.0.1/atproto/callback",
        "http://[::1]/atproto/callback",
    )
    assert settings.keyset is None, "such a client is public"
    assert settings.jwks() == {"keys": []}
    assert settings.redirect_uri(HERE) == f"{HERE}/atproto/callback"
    assert settings.origins(HERE) == {HERE}


def test_with_a_public_url_and_keys_it_is_a_confidential_client() -> None:
    settings = Settings.read(
        {
            "PUBLIC_URL": "https://app.example.com/there/",
            "NAME": "Example",
            "KEYS": PEM,
            "PREFIX": "/account/",
            "METADATA": {"tos_uri": "https://app.example.com/there/terms"},
        }
    )
    document = settings.metadata_document()
    assert document["client_id"] == "https://app.example.com/there/account/oauth-client-metadata.json"
    assert document["client_uri"] == "https://app.example.com/there/"
    assert document["redirect_uris"] == ["https://app.example.com/there/account/callback"]
    assert document["jwks_uri"] == "https://app.example.com/there/account/jwks.json"
    assert document["tos_uri"] == "https://app.example.com/there/terms"
    assert document["token_endpoint_auth_method"] == "private_key_jwt"
    assert settings.jwks() == Keyset.from_pem(PEM).jwks()
    assert settings.redirect_uri("http://inside:8000") is None
    assert settings.origin_for_login("http://inside:8000") is None
    assert settings.origins("http://Inside:8000") == {"http://inside:8000", "https://app.example.com"}


@pytest.mark.parametrize("timeout", ["5", -1])
def test_what_the_client_does_not_take_is_a_wrong_setting(timeout: object) -> None:
    with pytest.raises(ClientMetadataError, match="timeout is a number of seconds"):
        Settings.read({"OPTIONS": {"timeout": timeout}}).open_client()


def test_a_page_is_ready_before_gunicorn_ends_its_worker() -> None:
    """Which is after 30 seconds."""
    for given, expected in ({}, 25.0), ({"OPTIONS": {"timeout": 7}}, 7):
        with Settings.read(given).open_client() as client:
            assert client._timeout == expected


def test_with_a_public_url_alone_it_is_a_public_client() -> None:
    document = Settings.read({"PUBLIC_URL": "https://app.example.com", "KEYS": "", "NAME": None}).metadata_document()
    assert document["token_endpoint_auth_method"] == "none"
    assert "jwks_uri" not in document
    assert "client_name" not in document


ONE, TWO = generate_jwk(), generate_jwk()


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        (PEM, 1),
        (PEM.replace("\n", "\\n"), 1),
        (PEM.encode(), 1),
        (ONE, 1),
        ({"keys": [ONE, TWO]}, 2),
        ([PEM, ONE, {"keys": [TWO]}], 3),
        (Keyset([ONE]), 1),
    ],
    ids=["pem", "pem on one line", "bytes", "jwk", "jwks", "list", "keyset"],
)
def test_keys_are_pem_or_jwk(keys: Any, number: int) -> None:
    settings = Settings.read({"PUBLIC_URL": "https://app.example.com", "KEYS": keys})
    assert len(settings.jwks()["keys"]) == number


def test_encryption_keys_are_a_list_or_a_text() -> None:
    one, two = Fernet.generate_key(), Fernet.generate_key().decode()
    assert Settings.read({"ENCRYPTION_KEYS": [one, two]}).encryption_keys == (one, two)
    assert Settings.read({"ENCRYPTION_KEYS": one}).encryption_keys == (one,)
    assert Settings.read({"ENCRYPTION_KEYS": f"{one.decode()}, {two}"}).encryption_keys == (one.decode(), two)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"SCOPES": "atproto"}, r"ATPROTO_SCOPES is no setting; is it ATPROTO_SCOPE\?"),
        ({"XYZ": 1}, "ATPROTO_XYZ is no setting; there are ATPROTO_PUBLIC_URL, "),
        ({"PUBLIC_URL": "http://app.example.com"}, "ATPROTO_PUBLIC_URL: it does not use https; it is such as"),
        ({"PUBLIC_URL": "https://app.example.com?a=b"}, "ATPROTO_PUBLIC_URL: it has a query"),
        ({"PUBLIC_URL": 7}, "ATPROTO_PUBLIC_URL: it is not a URL"),
        ({"SCOPE": 7}, "ATPROTO_SCOPE: it is not a text"),
        ({"SCOPE": "transition:generic"}, "ATPROTO_SCOPE: .*atproto"),
        ({"PREFIX": "atproto"}, "ATPROTO_PREFIX: it is a path such as /atproto"),
        ({"PREFIX": 1}, "ATPROTO_PREFIX: it is a path"),
        ({"OPTIONS": "timeout"}, "ATPROTO_OPTIONS: it is not a mapping"),
        ({"OPTIONS": {"timeuot": 5}}, r"ATPROTO_OPTIONS: .*no option 'timeuot' here; is it 'timeout'\?"),
        ({"OPTIONS": {"store": "memory:"}}, "ATPROTO_OPTIONS: .*no option 'store' here"),
        ({"KEYS": "a secret that is none"}, "ATPROTO_KEYS: this is neither a JWKS nor a JWK"),
        ({"STORE": 5}, "ATPROTO_STORE: a session store has the methods"),
        ({"KEYS": 5}, "ATPROTO_KEYS: keys are PEM text, a JWK, or a list of them"),
        ({"KEYS": [5]}, "ATPROTO_KEYS: each of the keys is PEM text or a JWK"),
        ({"ENCRYPTION_KEYS": "a secret"}, "ATPROTO_ENCRYPTION_KEYS: the key 1 is not a Fernet key"),
        ({"ENCRYPTION_KEYS": [5]}, "ATPROTO_ENCRYPTION_KEYS: the key 1 is not a Fernet key"),
        ({"ENCRYPTION_KEYS": 5}, "ATPROTO_ENCRYPTION_KEYS: they are not a list"),
        (
            {"PUBLIC_URL": "https://app.example.com", "METADATA": {"logo": "x"}},
            "ATPROTO_METADATA: .*client metadata have no 'logo'",
        ),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named_without_its_value(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ClientMetadataError, match=match) as caught:
        Settings.read(given, lambda name: f"ATPROTO_{name}")
    assert "a secret" not in repr(caught.value)
    assert "a secret" not in repr(caught.value.__cause__)


def test_settings_show_no_key() -> None:
    key = Fernet.generate_key().decode()
    shown = repr(Settings.read({"KEYS": ONE, "ENCRYPTION_KEYS": [key], "OPTIONS": {"encryption_keys": [key]}}))
    assert key not in shown
    assert ONE["d"] not in shown


def test_development_is_at_the_address_that_log_ins_return_to() -> None:
    settings = Settings()
    assert settings.origin_for_login("http://127.0.0.1:5000") is None
    assert settings.origin_for_login("http://[::1]:5000") is None
    assert settings.origin_for_login("http://localhost:5000") == "http://127.0.0.1:5000"
    assert settings.origin_for_login("http://localhost") == "http://127.0.0.1"
    for elsewhere in ("http://app.example.com", "https://localhost:5000", "http://192.168.1.2:5000"):
        with pytest.raises(ClientMetadataError, match="only; set the public URL"):
            settings.origin_for_login(elsewhere)
    with pytest.raises(ClientMetadataError, match="below /there; set the public URL"):
        settings.origin_for_login("http://127.0.0.1:5000", "/there")


# Pages


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, False),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "null"}, False),  # a page without referrers
        ({"Sec-Fetch-Site": "none"}, False),
        ({"Sec-Fetch-Site": "same-site"}, True),
        ({"Sec-Fetch-Site": "cross-site"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Origin": HERE}, True),
        ({"Sec-Fetch-Site": ""}, True),
        ({"Origin": HERE}, False),
        ({"Origin": "http://127.0.0.1:5001"}, True),
        ({"Origin": "http://localhost:5000"}, True),
        ({"Origin": "https://127.0.0.1:5000"}, True),
        ({"Origin": "null"}, True),
        ({"Origin": ""}, True),
        ({}, False),
    ],
    ids=str,
)
def test_foreign_pages_are_told_from_ones_own(headers: dict[str, str], expected: bool) -> None:
    assert is_foreign(headers, {HERE}) is expected


@pytest.mark.parametrize("target", ["/", "/posts?page=2#top", "/a//b", "/%2e%2e/x", "/\u00e4", "/a:b@c"])
def test_paths_of_ones_own_are_safe(target: str) -> None:
    assert safe_next(target) == target


@pytest.mark.parametrize(
    "target",
    [
        *("", "posts", "//evil.example", "/\\evil.example", "\\\\evil.example", "https://evil.example", "javascript:1"),
        *("/\t/evil.example", "/\n/evil.example", "/\r\nSet-Cookie: a=b", " /x", "/ x", "\t//evil.example", "///e"),
        *("/a\\b", "/\x00", "/\x7f", "/\u2028", "/\u200b/evil.example", "/" + "a" * 2000, None, 7, b"/x"),
    ],
    ids=repr,
)
def test_other_places_are_not(target: object) -> None:
    assert safe_next(target) is None


@pytest.mark.parametrize(
    ("accept", "content_type", "expected"),
    [
        ("application/json", "", True),
        ("application/json, text/plain, */*", "", True),
        ("application/vnd.api+json", "", True),
        ("text/html;q=0.9, application/json", "", True),
        ("text/html, application/xhtml+xml, application/xml;q=0.9, */*;q=0.8", "", False),
        ("application/json;q=0.5, text/html", "", False),
        ("application/json, text/html", "", False),
        ("text/html", "application/json", False),
        ("*/*", "application/json", True),
        ("*/*", "application/json; charset=utf-8", True),
        ("*/*", "application/x-www-form-urlencoded", False),
        ("*/*", "", False),
        ("", "", False),
        ("application/json;q=0", "", False),
        ("text/jsonp;;q=x,,;", "", False),
    ],
)
def test_who_asks_for_json(accept: str, content_type: str, expected: bool) -> None:
    assert wants_json(accept, content_type) is expected


# Log-ins


SETTINGS = Settings()


def begun(client: OAuthClient, account: Account, cookies: dict[str, str], next: object = None) -> str:
    """Begin a log-in in the browser with these cookies."""
    login = begin_login(SETTINGS, client, account.handle, own=HERE, cookies=cookies, next=next)
    for name in login.stale:
        del cookies[name]
    cookies[login.ticket.name] = login.ticket.secret
    assert not login.ticket.secure
    assert login.ticket.secret not in repr(login)
    return login.url


@pytest.fixture
def client(network: LocalNetwork) -> Any:
    with Settings.read({"OPTIONS": network.client_options()}).open_client() as client:
        yield client


def test_the_log_ins_of_two_tabs_do_not_meet(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    cookies: dict[str, str] = {"other": "cookie"}
    first, second = begun(client, account, cookies, "/first"), begun(client, account, cookies, "//second")
    two = end_login(SETTINGS, client, network.authorize(second, account), cookies)
    one = end_login(SETTINGS, client, network.authorize(first, account), cookies)
    assert isinstance(one, EndedLogin)
    assert isinstance(two, EndedLogin)
    assert one.session_id != two.session_id
    assert (one.next, two.next) == ("/first", None)
    assert {*one.stale, *two.stale} == set(cookies) - {"other"}
    for ended in (one, two):
        assert client.restore(account.did, session_id=ended.session_id).did == account.did


def test_another_browser_cannot_end_a_log_in(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    mine: dict[str, str] = {}
    theirs: dict[str, str] = {}
    begun(client, account, theirs)
    callback = network.authorize(begun(client, account, mine, "/mine"), account)
    for cookies in (theirs, {}):
        ended = end_login(SETTINGS, client, callback, cookies)
        assert isinstance(ended, FailedLogin)
        assert isinstance(ended.error, OAuthCallbackError)
        assert (ended.next, ended.stale) == (None, [])
        callback = network.authorize(begun(client, account, mine, "/mine"), account)
    assert network.requests("/oauth/token") == 0


def test_a_refused_log_in_leads_back(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    cookies: dict[str, str] = {}
    callback = network.authorize(begun(client, account, cookies, "/there"), account, approve=False)
    ended = end_login(SETTINGS, client, callback, cookies)
    assert isinstance(ended, FailedLogin)
    assert "access_denied" in str(ended.error)
    assert ended.next == "/there"
    assert ended.stale == list(cookies)


def test_a_browser_keeps_few_tickets(client: OAuthClient, account: Account) -> None:
    cookies: dict[str, str] = {}
    for _ in range(10):
        begun(client, account, cookies)
    assert len(cookies) == 8


def test_a_neighbouring_host_cannot_set_the_ticket(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    public = Settings(public_url="https://app.example.com")
    cookies: dict[str, str] = {}
    url = begun(client, account, cookies)
    assert isinstance(end_login(public, client, network.authorize(url, account), cookies), FailedLogin)
    assert begin_login(public, client, account.did, own=HERE, cookies={}).ticket.name.startswith("__Host-")


# Errors


def test_whose_session_is_over() -> None:
    error = SessionNotFoundError("gone").about("did:plc:a#one")
    assert is_over(error, "did:plc:a", "one")
    assert not is_over(error, "did:plc:a", "two")
    assert not is_over(error, "did:plc:b", "one")
    assert not is_over(SessionNotFoundError("gone"), None, None)
    assert not is_over(TransportError("down").about("did:plc:a#one"), "did:plc:a", "one")
    assert not is_over(ValueError("x"), "did:plc:a", "one")


def http_error(status: int, **headers: str) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    response.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return requests.HTTPError("refused", response=response)


@pytest.mark.parametrize(
    ("error", "status", "after"),
    [
        (TransportError("down"), 503, 5),
        (TransportError("odd", retryable=False), 502, None),
        (SessionError("x", retryable=True, retry_after=1.2), 503, 2),
        (SessionError("x", retryable=True, retry_after=0.0), 503, 1),
        (OAuthResponseError("no", status=400, error="invalid_client"), 502, None),
        (OAuthResponseError("no", status=429, retry_after=9.0), 503, 9),
        (DiscoveryError("no server"), 502, None),
        (OAuthCallbackError("twice"), 400, None),
        (requests.ConnectionError("down"), 502, None),
        (requests.ReadTimeout("slow"), 504, None),
        (requests.JSONDecodeError("not JSON", "x", 0), 502, None),
        (http_error(400), 502, None),
        (http_error(500), 502, None),
        (http_error(503), 503, 5),
        (http_error(429, Retry_After="7"), 503, 7),
        (http_error(429, Retry_After="soon"), 503, 5),
        (requests.HTTPError("made by hand"), 502, None),
    ],
    ids=repr,
)
def test_what_the_other_side_did_is_no_error_of_ours(error: Exception, status: int, after: int | None) -> None:
    problem = problem_of(error)
    assert problem is not None
    assert (problem.status, problem.retry_after) == (HTTPStatus(status), after)


def test_what_a_person_can_mend_is_said_in_the_words_of_the_error() -> None:
    spelling = problem_of_login(IdentityError("no account has the handle x; check its spelling"))
    assert spelling is not None
    assert (spelling.status, spelling.message) == (400, "no account has the handle x; check its spelling")
    slow = problem_of_login(IdentityError("its domain does not answer", retryable=True))
    assert slow is not None
    assert slow.status == 503
    assert problem_of_login(StoreError("full")) is None


@pytest.mark.parametrize(
    "error",
    [
        StoreError("full"),
        ClientMetadataError("wrong"),
        SessionNotFoundError("of another account"),
        requests.exceptions.MissingSchema("x"),
        requests.exceptions.InvalidJSONError("NaN"),
        ValueError("x"),
    ],
    ids=repr,
)
def test_what_is_ours_stays_an_error(error: Exception) -> None:
    assert problem_of(error) is None
