"""What the web integrations share, whatever the framework: settings, how a log-in is bound to its browser, which pages
may begin one, and what an error means to the person in front of it."""

from __future__ import annotations

import difflib
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from http import HTTPStatus
from inspect import signature
from typing import Any, Protocol
from urllib.parse import urlsplit

import requests
from cryptography.fernet import Fernet

from .._urls import check_url, origin
from ..client import CallbackResult, OAuthClient
from ..errors import (
    AuthMethodUnsatisfiableError,
    ClientMetadataError,
    DiscoveryError,
    IdentityError,
    OAuthCallbackError,
    OAuthResponseError,
    SessionError,
    StoreError,
    TransportError,
)
from ..keys import Keyset
from ..metadata import ClientMetadata
from ..oauth_session import retry_after
from ..stores import SessionStore, complete

#: Paths below the prefix.
LOGIN, LOGOUT, CALLBACK = "/login", "/logout", "/callback"
METADATA, JWKS = "/oauth-client-metadata.json", "/jwks.json"

#: What begins the name of a cookie that binds a log-in to its browser; and how long such a log-in may take, in seconds.
_TICKET = "atproto-login-"
TICKET_LIFETIME = 3600
#: So many log-ins of one browser may be under way. A new one takes the place of the oldest.
_MOST_TICKETS = 8
_LONGEST_NEXT = 2000
#: How long a log-in or a refresh is waited for, and how long a request to an account's server may take, in seconds,
#: unless it is said otherwise: less than the 30 after which gunicorn takes a worker for dead.
_TIMEOUT = 25.0
TOTAL_TIMEOUT = 25.0
#: How long a person who logs out waits for the server of the account, in seconds. It is told in the background then.
END_WITHIN = 5.0
#: ASCII without controls, spaces and backslashes, from which browsers make something else than the server does; beyond
#: it, all that is printable.
_NEXT = re.compile(r"/(?!/)[^\x00-\x20\\\x7f]*")
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")


# Settings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Who the application is, and where its sessions are. In production it has a ``public_url``. Without one it is a
    client for development, which is reached at ``http://127.0.0.1``; its keys are not used then, since such a client is
    public.

    :ivar public_url: where people reach the application, such as ``https://app.example.com``.
    :ivar name: what the authorization server calls the application.
    :ivar scope: all scopes that it may ask for, separated by spaces.
    :ivar store: a URL for :func:`.open_store`, or a store.
    :ivar keys: the keys of a confidential client.
    :ivar encryption_keys: Fernet keys, with ``store`` as a URL.
    :ivar prefix: what the paths of the log-in's pages begin with.
    :ivar metadata: further members of :class:`.ClientMetadata`.
    :ivar options: further arguments of :class:`.OAuthClient`.
    """

    public_url: str | None = None
    name: str | None = None
    scope: str = "atproto"
    store: str | SessionStore = "memory:"
    keys: Keyset | None = field(default=None, repr=False)
    encryption_keys: tuple[str | bytes, ...] = field(default=(), repr=False)
    prefix: str = "/atproto"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, given: Mapping[str, Any], called: Callable[[str], str] = str, **defaults: Any) -> Settings:
        """The settings in ``given``, by their names in upper case. What is ``None`` or empty counts as not given.

        :param called: what users know a setting by, for messages.
        :param defaults: for those that are not given.
        :raises ClientMetadataError: one is wrong; the message names it and holds no value that may be secret.
        """
        known = {each.name.upper(): each.name for each in fields(cls)}
        for name in given:
            if name not in known:
                raise ClientMetadataError(f"{called(name)} is no setting{_hint(name, known, called)}", field=name)
        values = {known[name]: value for name, value in given.items() if value is not None and value != ""}
        for name, check in _CHECKS.items():
            if name in values:
                try:
                    values[name] = check(values[name])
                except (ValueError, ClientMetadataError) as error:
                    # Nothing of the cause: it may hold a key.
                    raise ClientMetadataError(f"{called(name.upper())}: {error}", field=name.upper()) from None
        settings = cls(**{**defaults, **values})
        try:
            settings.client_metadata.check_with_keyset(settings.keyset)
        except ClientMetadataError as error:
            at = {"client_name": "NAME", "scope": "SCOPE"}.get(error.field or "", "METADATA")
            raise ClientMetadataError(f"{called(at)}: {error}", field=at) from error
        return settings

    @property
    def is_development(self) -> bool:
        """Whether this is a client for development."""
        return self.public_url is None

    @property
    def keyset(self) -> Keyset | None:
        """The keys, where they are used."""
        return None if self.is_development else self.keys

    @cached_property
    def client_metadata(self) -> ClientMetadata:
        """What the client says of itself. Costs neither a request nor a look into the store."""
        if self.public_url is None:
            hosts = ("http://127.0.0.1", "http://[::1]")
            return ClientMetadata.loopback(self.scope, [f"{host}{self.prefix}{CALLBACK}" for host in hosts])
        base = f"{self.public_url}{self.prefix}"
        said: dict[str, Any] = {
            "client_id": f"{base}{METADATA}",
            "client_uri": f"{self.public_url}/",
            "redirect_uris": [f"{base}{CALLBACK}"],
            "scope": self.scope,
            "client_name": self.name,
            **self.metadata,
        }
        if self.keys is not None:
            said |= {"token_endpoint_auth_method": "private_key_jwt", "jwks_uri": f"{base}{JWKS}"}
        unknown = set(said) - {each.name for each in fields(ClientMetadata)}
        if unknown:
            raise ClientMetadataError(f"client metadata have no {sorted(unknown)[0]!r}", field="metadata")
        return ClientMetadata(**said)

    def metadata_document(self) -> dict[str, Any]:
        """The document to serve at the ``client_id``."""
        return self.client_metadata.document(self.keyset)

    def jwks(self) -> dict[str, Any]:
        """The public keys, to serve beside it."""
        return {"keys": []} if self.keyset is None else self.keyset.jwks()

    def open_client(self, **options: Any) -> OAuthClient:
        """The client. Made when it is needed, since it opens the store.

        :param options: take precedence over :attr:`options`.
        :raises SessionError: see :class:`.OAuthClient`.
        :raises ClientMetadataError: an option is wrong.
        """
        keyed = {"encryption_keys": self.encryption_keys} if self.encryption_keys else {}
        always: dict[str, Any] = {"timeout": _TIMEOUT, "store": self.store, "keyset": self.keyset}
        given: dict[str, Any] = {**always, **keyed, **self.options, **options}
        try:
            return OAuthClient(self.client_metadata, **given)
        except (TypeError, ValueError) as error:
            raise ClientMetadataError(str(error), field="OPTIONS") from error

    def origins(self, own: str) -> set[str]:
        """The origins of the application's pages, for :func:`is_foreign`.

        :param own: the origin that a request came to. Behind a proxy it may be another than the public one.
        """
        return {own.lower()} if self.public_url is None else {own.lower(), origin(self.public_url)}

    def origin_for_login(self, own: str, root: str = "") -> str | None:
        """Where a browser has to be to log in, if that is not ``own``, the origin that its request came to. A browser
        keeps cookies by host, and the client for development returns to ``127.0.0.1``, never to ``localhost``.

        :param root: the path that the application is below.
        :raises ClientMetadataError: this is a client for development, and ``own`` is not on this machine, or not the
            whole of its host.
        """
        if self.public_url is not None:
            return None
        if root:
            raise ClientMetadataError(
                "without a public URL, log-ins come back to the root of the host, and the application is below "
                f"{root}; set the public URL, or leave the path out in development",
                field="PUBLIC_URL",
            )
        parts = urlsplit(own)
        if parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1"):
            return None
        port = "" if parts.port is None else f":{parts.port}"
        if parts.scheme == "http" and parts.hostname == "localhost":
            return f"http://127.0.0.1{port}"
        raise ClientMetadataError(
            f"without a public URL, people can log in at http://127.0.0.1{port} only; set the public URL",
            field="PUBLIC_URL",
        )

    def redirect_uri(self, own: str) -> str | None:
        """Where a log-in that begins at ``own`` returns to; ``None`` for the only one there is."""
        return f"{own}{self.prefix}{CALLBACK}" if self.is_development else None


def _hint(name: object, known: Iterable[str], called: Callable[[str], str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"; is it {called(near[0])}?" if near else f"; there are {', '.join(map(called, known))}"


def _checked_public_url(value: object) -> str:
    url = value.rstrip("/") if isinstance(value, str) else value
    try:
        checked = check_url(url)
    except ValueError as error:
        raise ValueError(f"it {error}; it is such as https://app.example.com, or left out for development") from None
    if "?" in checked:
        raise ValueError("it has a query")
    return checked


def _checked_prefix(value: object) -> str:
    prefix = value.rstrip("/") if isinstance(value, str) else ""
    if not _PREFIX.fullmatch(prefix):
        raise ValueError("it is a path such as /atproto")
    return prefix


def _checked_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("it is not a text")  # noqa: TRY004 - as all wrong settings
    return value


def _checked_mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError("it is not a mapping")
    return value


def _checked_options(value: object) -> Mapping[str, Any]:
    checked = _checked_mapping(value)
    known = [name for name in signature(OAuthClient).parameters if name not in ("metadata", "store", "keyset")]
    for name in checked:
        if name not in known:
            raise ValueError(f"OAuthClient has no option {name!r} here{_hint(name, known, repr)}")
    return checked


def _checked_store(value: Any) -> str | SessionStore:
    """Whether it could be one. Which kind a URL names is not looked at before it is opened."""
    if not isinstance(value, str):
        try:
            complete(value)
        except TypeError as error:
            raise ValueError(str(error)) from None
    store: str | SessionStore = value
    return store


def _checked_keys(value: Any) -> Keyset:
    return value if isinstance(value, Keyset) else Keyset.of(value)


def _checked_encryption_keys(value: object) -> tuple[str | bytes, ...]:
    """A list, or one text with commas, as environment variables have it."""
    keys = re.split(r"[\s,]+", value.strip()) if isinstance(value, str) else value
    keys = [keys] if isinstance(keys, bytes) else keys
    if not isinstance(keys, Iterable):
        raise ValueError("they are not a list of Fernet keys")  # noqa: TRY004 - as all wrong settings
    checked = tuple(keys)
    for number, key in enumerate(checked, start=1):
        try:
            Fernet(key)
        except (ValueError, TypeError):
            raise ValueError(f"the key {number} is not a Fernet key (Fernet.generate_key() makes one)") from None
    return checked


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "public_url": _checked_public_url,
    "name": _checked_text,
    "scope": _checked_text,
    "keys": _checked_keys,
    "encryption_keys": _checked_encryption_keys,
    "prefix": _checked_prefix,
    "metadata": _checked_mapping,
    "options": _checked_options,
    "store": _checked_store,
}


# Browsers and pages


class Headers(Protocol):
    """The headers of a request, whose names may be in any case."""

    def get(self, name: str, /) -> str | None: ...


def is_foreign(headers: Headers, own: Iterable[str]) -> bool:
    """Whether a request was caused by a page of somebody else. Such a page may have a browser send a form, with all its
    cookies, but cannot choose these headers.

    ``Sec-Fetch-Site`` (Fetch Metadata Request Headers, section 2.4) is what browsers say over https and on this
    machine, else ``Origin`` (RFC 6454 section 7). What has neither comes from no browser of today, and so from no page.

    :param own: the origins of the application's own pages.
    """
    site = headers.get("Sec-Fetch-Site")
    if site is not None:
        return site not in ("same-origin", "none")
    sent = headers.get("Origin")
    return sent is not None and sent not in own


def safe_next(target: object) -> str | None:
    """``target``, if it is a path of this application, where a log-in may lead; else ``None``."""
    if isinstance(target, str) and len(target) <= _LONGEST_NEXT and _NEXT.fullmatch(target):
        return target if all(character.isprintable() for character in target) else None
    return None


def wants_json(accept: str, content_type: str = "") -> bool:
    """Whether a request with these headers is better answered with JSON than with a page: it asks for JSON, and not as
    readily for HTML; or it brings JSON and does not say what it wants."""
    weights = {"json": 0.0, "html": 0.0, "*/*": 0.0}
    for part in accept.lower().split(","):
        kind, _, rest = part.partition(";")
        weight = re.search(r"(?:^|;)\s*q\s*=\s*([01](?:\.\d*)?)\s*(?:;|$)", rest)
        name = "json" if re.fullmatch(r"application/(?:.*\+)?json", kind.strip()) else kind.strip()
        name = "html" if name in ("text/html", "application/xhtml+xml") else name
        if name in weights:
            weights[name] = max(weights[name], float(weight[1]) if weight else 1.0)
    if weights["json"] or weights["html"]:
        return weights["json"] > weights["html"]
    return re.match(r"application/(?:.*\+)?json\b", content_type.strip().lower()) is not None


# Log-ins


@dataclass(frozen=True)
class Ticket:
    """What binds a log-in to the browser that begins it: a cookie of its own, so that the log-ins of two tabs do not
    meet. The cookie is for ``path="/"``, ``HttpOnly`` and ``SameSite=Lax``, and lives for ``TICKET_LIFETIME``.

    :ivar name: of the cookie. It begins with when it was made, so that the oldest comes first.
    :ivar secret: its value.
    :ivar secure: whether the cookie is ``Secure``: whenever there is a public URL.
    """

    name: str
    secret: str = field(repr=False)
    secure: bool

    @property
    def cookie(self) -> dict[str, Any]:
        """The arguments of ``set_cookie``, which the frameworks call by the same names."""
        given = {"key": self.name, "value": self.secret, "secure": self.secure}
        return {**given, "max_age": TICKET_LIFETIME, "httponly": True, "samesite": "Lax"}


@dataclass(frozen=True)
class BegunLogin:
    """A log-in on its way.

    :ivar url: where to send the browser.
    :ivar ticket: the cookie to set.
    :ivar stale: the names of cookies to delete.
    """

    url: str
    ticket: Ticket
    stale: list[str]


@dataclass(frozen=True)
class EndedLogin:
    """A log-in that ended well.

    :ivar result: the account.
    :ivar session_id: which of the account's sessions is this browser's.
    :ivar next: where to send the browser, as was said when the log-in began.
    :ivar stale: the names of cookies to delete.
    """

    result: CallbackResult
    session_id: str
    next: str | None
    stale: list[str]


@dataclass(frozen=True)
class FailedLogin:
    """A log-in that did not.

    :ivar error: why; :func:`problem_of_login` says what to tell people.
    :ivar next: as with :class:`EndedLogin`, so that another try may lead there.
    :ivar stale: the names of cookies to delete.
    """

    error: SessionError
    next: str | None
    stale: list[str]


def _tickets(settings: Settings, cookies: Mapping[str, str]) -> dict[str, str]:
    """The cookies of log-ins under way, the oldest first."""
    prefix = _cookie_prefix(settings)
    return {name: cookies[name] for name in sorted(cookies) if name.startswith(prefix)}


def _cookie_prefix(settings: Settings) -> str:
    # "__Host-": no page of a neighbouring host name can set it.
    return _TICKET if settings.is_development else f"__Host-{_TICKET}"


def begin_login(
    settings: Settings,
    client: OAuthClient,
    account: str,
    *,
    own: str,
    cookies: Mapping[str, str],
    next: object = None,
    **options: Any,
) -> BegunLogin:
    """Begin a log-in in a browser.

    :param own: the origin that its request came to.
    :param cookies: those of its request.
    :param next: where to go after the log-in; only a path of this application counts.
    :param options: those of :meth:`.OAuthClient.authorize`.
    :raises SessionError: see there.
    """
    name = f"{_cookie_prefix(settings)}{int(time.time()):010x}-{secrets.token_hex(4)}"
    ticket = Ticket(name, secrets.token_urlsafe(32), not settings.is_development)
    state = json.dumps([ticket.name, safe_next(next)])
    bound = {"redirect_uri": settings.redirect_uri(own), "state": state, "bound_to": ticket.secret}
    url = client.authorize(account, **{**options, **bound})
    return BegunLogin(url, ticket, list(_tickets(settings, cookies))[: 1 - _MOST_TICKETS])


def end_login(
    settings: Settings, client: OAuthClient, params: Mapping[str, Any] | str, cookies: Mapping[str, str]
) -> EndedLogin | FailedLogin:
    """End a log-in with what its browser brings back. The session is stored under a ``session_id`` of its own.

    :param params: of the request, each with a list of its values; or its URL.
    :param cookies: those of the request.
    """
    tickets = _tickets(settings, cookies)
    session_id = secrets.token_urlsafe(24)
    try:
        result = client.callback(params, session_id=session_id, bound_to=tuple(tickets.values()))
    except SessionError as error:
        name, target = _read_state(getattr(error, "state", None))
        if name not in tickets:  # of another browser, whose affairs are none of this one's
            return FailedLogin(error, None, [])
        return FailedLogin(error, target, [name])
    name, target = _read_state(result.state)
    return EndedLogin(result, session_id, target, [name])


def _read_state(state: str | None) -> tuple[str, str | None]:
    """The name of the ticket and ``next``. A log-in that was begun in another way has neither."""
    try:
        name, target = json.loads(state or "")
    except (ValueError, TypeError):
        return "", None
    return str(name), safe_next(target)


# Errors


@dataclass(frozen=True)
class Problem:
    """What to tell a person, or a program, of an error.

    :ivar status: of HTTP.
    :ivar error: a word for programs.
    :ivar message: for people. Says nothing about the inside of the application.
    :ivar retry_after: in how many seconds to try again, where that may help.
    """

    status: HTTPStatus
    error: str
    message: str
    retry_after: int | None = None


NO_ACCOUNT = Problem(HTTPStatus.BAD_REQUEST, "no_account", "Please enter the name of your account.")
#: What is not the other side's fault is a bug of the application, or of who runs it, and stays an error.
_OURS = (StoreError, ClientMetadataError, AuthMethodUnsatisfiableError)
_THEIRS = (OAuthResponseError, TransportError, IdentityError, DiscoveryError)
#: Requests that were never fit to be sent.
_OUR_REQUESTS = (
    requests.exceptions.InvalidHeader,
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
    requests.exceptions.URLRequired,
    requests.exceptions.UnrewindableBodyError,
    requests.exceptions.StreamConsumedError,
)
_LATER = "The account's server does not answer at the moment. Please try again."


def is_over(error: BaseException, did: str | None, session_id: str | None) -> bool:
    """Whether ``error`` says that this very session is over: the browser's own, and not that of another account or of
    another browser, which the same page may use."""
    return (
        isinstance(error, SessionError)
        and error.login_required
        and did is not None
        and (error.did, error.session_id) == (did, session_id)
    )


def problem_of(error: Exception) -> Problem | None:
    """What to answer when ``error`` ended a request, unless it says that the browser's own session :func:`is_over`.
    ``None`` for what is no fault of the other side: the framework answers 500, as ever."""
    if isinstance(error, OAuthCallbackError):
        return Problem(HTTPStatus.BAD_REQUEST, "login_failed", str(error))
    if isinstance(error, SessionError):
        if error.retryable:
            return _later(error.retry_after)
        if isinstance(error, _THEIRS):
            return Problem(HTTPStatus.BAD_GATEWAY, "bad_gateway", "The account's server has refused this.")
        return None
    if isinstance(error, requests.RequestException):
        return _problem_of_request(error)
    return None


def problem_of_login(error: SessionError) -> Problem | None:
    """What to answer when ``error`` ended a log-in: as :func:`problem_of`, but what the person can mend is said in the
    words of the error, which are fit for people."""
    if isinstance(error, IdentityError | OAuthCallbackError) and not error.retryable:
        return Problem(HTTPStatus.BAD_REQUEST, "login_failed", str(error))
    return problem_of(error)


def _problem_of_request(error: requests.RequestException) -> Problem | None:
    if isinstance(error, _OUR_REQUESTS):
        return None
    if isinstance(error, requests.exceptions.InvalidJSONError) and not isinstance(error, ValueError):
        return None  # what could not be written as JSON; what cannot be read is a ValueError as well
    response = error.response
    if isinstance(error, requests.HTTPError) and response is not None:
        if response.status_code in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            after = retry_after(response.headers, time.time())
            return _later(float(after) if after is not None and after.isascii() and after.isdecimal() else None)
        message = _LATER if response.status_code >= 500 else "The account's server has refused this."
        return Problem(HTTPStatus.BAD_GATEWAY, "bad_gateway", message)
    if isinstance(error, requests.Timeout):
        return Problem(HTTPStatus.GATEWAY_TIMEOUT, "gateway_timeout", _LATER)
    return Problem(HTTPStatus.BAD_GATEWAY, "bad_gateway", _LATER)


def _later(seconds: float | None) -> Problem:
    wait = 5 if seconds is None else max(1, math.ceil(seconds))
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, "try_again", _LATER, wait)
