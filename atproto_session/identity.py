"""Who an account is: from a handle or a DID to the DID document, and from there to the account's PDS.

An account is its DID. A handle is a name that points to it, and counts only if it is *verified*: the DID document
claims the handle, and the handle resolves to the DID (AT Protocol, ``specs/handle`` and ``specs/did``).
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from ._adapter import look_up_aside
from ._fork import importing
from ._recent import Recent
from ._threads import Promise
from ._urls import LOOPBACK_HOSTS, NOBODY, TrustedHosts, check_url, is_host_name, origin
from .cached_getter import Cache, CachedGetter, GetOptions
from .errors import ClientMetadataError, IdentityError, TransportError, printable
from .transport import Transport, UnusableResponse, is_passing

if TYPE_CHECKING:
    import dns.resolver

#: Top-level domains that are no part of the public DNS; ``.test`` is good in development.
_RESERVED_DOMAINS = frozenset({"alt", "arpa", "example", "internal", "invalid", "local", "localhost", "onion"})

_DID = re.compile(r"did:(?P<method>[a-z]+):(?P<id>[A-Za-z0-9._:%-]*[A-Za-z0-9._-])")
_PLC_ID = re.compile(r"[a-z2-7]{24}")
_LOCALHOST = re.compile(r"localhost(?:%3A[0-9]{1,5})?")
_LONGEST_DID = 2048

#: Seconds for the DNS at most, so that a name server which is away leaves time for what HTTPS has to say.
_DNS_TIMEOUT = 4.0
#: The largest DID document and the largest answer of a resolver, in bytes. Parsed, they may need fifty times as much.
_LARGEST_DOCUMENT = 64 * 1024
#: How much of the time the account's own domain gets, where there are handle resolvers to be asked after it.
_SHARE_OF_OWN_DOMAIN = 0.6

# What people paste.
_LONGEST_INPUT = 4096
_QUOTES = "\"'`\u00b4\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\u300c\u300d<>(){},; \t"
_DID_OF_ANY_CASE = r"(?i)did:(?:plc|web):"
_PROFILE = r"(?i)(?:https?://)?[^/?#\s]+/profile/([^/?#]+)"


@dataclass(frozen=True)
class Identity:
    """An account.

    :ivar handle: a verified handle; ``None`` if the account has none, or none that was verified.
    :ivar pds: the origin of the account's PDS.
    """

    did: str
    handle: str | None
    pds: str


# Syntax


class Account(NamedTuple):
    """What a person named to log in with.

    :ivar kind: what ``name`` is: a ``"handle"``, a ``"did"``, or the URL of a ``"server"``.
    """

    kind: Literal["handle", "did", "server"]
    name: str


def parse_account(text: str, *, allow_http: bool = False, trusted: TrustedHosts = NOBODY) -> Account:
    """What ``text`` names, as a person types or pastes it: a handle (``alice.example.com``, ``@alice.example.com``,
    with letters beyond ASCII too), a DID, an ``at://`` URI, the page of a profile
    (``https://.../profile/alice.example.com``), or the URL of a server.

    Quotes and spaces around it, characters that cannot be seen, and dots and slashes at its end do not count. The
    address of a server is not checked here.

    :param allow_http: for development; see :func:`check_handle`.
    :param trusted: see :func:`check_handle`.
    :raises IdentityError: it is none of these.
    :raises TypeError: ``text`` is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"account is a handle, a DID or the URL of a server, as a string; not {type(text).__name__}")
    if len(text) > _LONGEST_INPUT:
        raise IdentityError(f"{printable(text, 40)!r} is too long for a handle or a DID", reason="malformed")
    name = _cleaned(text)
    if name[:5].lower() == "at://":
        name = re.split("[/?#]", name[5:])[0]
    elif page := re.match(_PROFILE, name):
        name = unquote(page[1])
    elif "://" in name:
        return Account("server", name)
    name = name.removeprefix("@").strip().rstrip("./")
    if did := re.match(_DID_OF_ANY_CASE, name):
        return Account("did", check_did(did[0].lower() + name[did.end() :]))
    if name.startswith("did:"):
        return Account("did", check_did(name))
    if not name.isascii():
        try:
            with importing():
                import idna  # the tables of Unicode come with it

                name = idna.encode(name.lower()).decode("ascii")
        except UnicodeError:  # IDNAError is one
            raise IdentityError(
                f"{printable(name)!r} is not a handle such as alice.example.com", reason="malformed"
            ) from None
    return Account("handle", check_handle(name, allow_http=allow_http, trusted=trusted))


def _cleaned(text: str) -> str:
    visible = "".join(character for character in text if unicodedata.category(character) not in ("Cc", "Cf"))
    plain = unicodedata.normalize("NFKC", visible.strip().strip(_QUOTES)).replace("\u3002", ".")
    return plain.strip(_QUOTES)


def check_handle(handle: str, *, allow_http: bool = False, trusted: TrustedHosts = NOBODY) -> str:
    """``handle`` in lower case, the form in which handles are compared and sent.

    :param allow_http: for development: ``.test`` is a domain like any other.
    :param trusted: hosts of a private network, whose names may be under a reserved domain.
    :raises IdentityError: it is ``malformed``, or ``unsupported`` because its top-level domain is reserved.
    """
    if not is_host_name(handle):
        raise IdentityError(f"{printable(handle)!r} is not a handle such as alice.example.com", reason="malformed")
    _check_domain(handle, allow_http=allow_http, trusted=trusted)
    return handle.lower()


def check_did(did: str) -> str:
    """``did`` itself, if it is one that accounts have: ``did:plc:...`` or ``did:web:`` and a host name.

    :raises IdentityError: it is ``malformed``, or its method is ``unsupported``.
    """
    match = _DID.fullmatch(did)
    if match is None or len(did) > _LONGEST_DID:
        raise IdentityError(f"{printable(did)!r} is not a DID", reason="malformed")
    name = match["id"]
    if match["method"] == "plc":
        if not _PLC_ID.fullmatch(name):
            raise IdentityError(f"{printable(did)} is not a did:plc of 24 characters a-z, 2-7", reason="malformed")
    elif match["method"] == "web":
        if ":" in name:
            raise IdentityError(f"{printable(did)} has a path, which accounts cannot have", reason="unsupported")
        if not is_host_name(name) and not _LOCALHOST.fullmatch(name):
            raise IdentityError(f"{printable(did)} is not a did:web of a host name", reason="malformed")
    else:
        raise IdentityError(f"{printable(did)} is neither did:plc nor did:web", reason="unsupported")
    return did


def _check_domain(host: str, *, allow_http: bool, trusted: TrustedHosts) -> None:
    domain = host.lower().rpartition(".")[2]
    if host in trusted:
        return
    if domain in _RESERVED_DOMAINS or (domain == "test" and not allow_http):
        raise IdentityError(f"{printable(host)}: .{domain} is not a domain of the Internet", reason="unsupported")


# The DID document


def parse_did_document(
    did: str, document: object, *, allow_http: bool = False, trusted: TrustedHosts = NOBODY
) -> Identity:
    """What the DID document of ``did`` says. The handle in it is a claim, verified by nobody yet.

    :param allow_http: for development: the PDS may be at ``http://localhost``.
    :param trusted: hosts of a private network, where the PDS may be.
    :raises IdentityError: it is another DID's document, or names no usable PDS.
    """
    if not isinstance(document, dict) or document.get("id") != did:
        raise IdentityError(f"what {did} resolves to is not its DID document")
    service = next((service for service in _entries(document, "service") if _is_pds(did, service)), None)
    if service is None:
        raise IdentityError(f"the DID document of {did} names no PDS")
    try:
        endpoint = check_url(service.get("serviceEndpoint"), allow_http=allow_http, trusted=trusted)
    except ValueError as error:
        raise IdentityError(f"the PDS in the DID document of {did} {error}") from None
    parts = urlsplit(endpoint)
    if parts.path not in ("", "/") or parts.query:
        raise IdentityError(f"the PDS in the DID document of {did} is more than an origin")
    return Identity(did, _claimed_handle(document), origin(endpoint))


def _is_pds(did: str, service: object) -> bool:
    return (
        isinstance(service, dict)
        and service.get("id") in ("#atproto_pds", f"{did}#atproto_pds")
        and service.get("type") == "AtprotoPersonalDataServer"
    )


def _claimed_handle(document: dict[str, Any]) -> str | None:
    for alias in _entries(document, "alsoKnownAs"):
        if isinstance(alias, str) and alias.startswith("at://") and is_host_name(alias.removeprefix("at://")):
            return alias.removeprefix("at://").lower()
    return None


def _entries(document: dict[str, Any], name: str) -> list[Any]:
    value = document.get(name)
    return value if isinstance(value, list) else []


# Resolution


class IdentityResolver:
    """Resolves handles and DIDs. Safe for threads and forks.

    :param plc_directory: where ``did:plc`` is resolved.
    :param handle_resolver: servers that resolve handles (``com.atproto.identity.resolveHandle``): a URL, or several.
        They are asked, one after the other, where the account's own domain has no answer, neither by DNS nor by HTTPS.
        In development they are asked instead of it: for ``.test`` handles, and where one of them is on this machine.
    :param allow_http: for development: ``.test`` handles, ``did:web:localhost`` and servers at ``http://localhost``.
    :param timeout: seconds for one resolution, all told.
    :param cache_for: seconds for which :meth:`resolve` answers from memory.
    :param dns_resolver: replaces that of the operating system's configuration, for tests and unusual networks.
    :param cache: where :meth:`resolve` keeps its answers. Default: in memory.
    :param clock: seconds, for the age of what is cached.
    :raises ClientMetadataError: ``plc_directory`` or ``handle_resolver`` is not a URL that may be asked.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        plc_directory: str = "https://plc.directory",
        handle_resolver: str | Sequence[str] | None = None,
        allow_http: bool = False,
        timeout: float = 10.0,
        cache_for: float = 300.0,
        dns_resolver: dns.resolver.Resolver | None = None,
        cache: Cache[tuple[float, Identity]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._plc_directory = _service_url("plc_directory", plc_directory, transport, allow_http=allow_http)
        self._handle_resolvers = tuple(
            _service_url("handle_resolver", url, transport, allow_http=allow_http) for url in _several(handle_resolver)
        )
        self._is_local = any(urlsplit(url).hostname in LOOPBACK_HOSTS for url in self._handle_resolvers)
        self._allow_http = allow_http
        self._trusted = transport.trusted_hosts
        self._timeout = timeout
        self._dns_resolver = dns_resolver
        self._clock = clock
        self._cached: CachedGetter[tuple[float, Identity]] = CachedGetter(
            self._fetch,
            Recent(cache_for) if cache is None else cache,
            is_stale=lambda _, entry: clock() - entry[0] >= cache_for,
            share_failures=True,
        )

    def parse(self, account: str) -> Account:
        """:func:`parse_account` by the rules of this resolver."""
        return parse_account(account, allow_http=self._allow_http, trusted=self._trusted)

    def resolve(self, account: str, *, timeout: float | None = None) -> Identity:
        """The account that a person names by handle or DID (:func:`parse_account`), for logging in.

        An account named by its DID is found even if its handle cannot be verified, and is then without one.

        :raises IdentityError: it is no handle or DID, or does not resolve; ``reason`` and ``retryable`` say more.
        :raises LockTimeoutError: it did not resolve within ``timeout``.
        """
        kind, name = self.parse(account)
        if kind == "server":
            raise IdentityError(f"{printable(name)!r} is the URL of a server, not of an account", reason="malformed")
        return self._cached.get(name, timeout=timeout)[1]

    def resolve_did(self, did: str, *, timeout: float | None = None) -> Identity:
        """What the DID document says now: nothing is cached, and no handle looked up. For the check before a refresh.

        :raises IdentityError: see :meth:`resolve`.
        """
        return replace(self._document(check_did(did), self._deadline(timeout)), handle=None)

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self._timeout if timeout is None else timeout)

    def _fetch(self, key: str, options: GetOptions, stored: tuple[float, Identity] | None) -> tuple[float, Identity]:
        deadline = self._deadline(options.timeout)
        by_did = key.startswith("did:")
        identity = self._by_did(key, deadline) if by_did else self._by_handle(key, deadline)
        return self._clock(), identity

    def _by_handle(self, handle: str, deadline: float) -> Identity:
        did = self._did_of(handle, deadline)
        identity = self._document(did, deadline)
        if identity.handle != handle:
            raise IdentityError(f"the handle {handle} points to {did}, which does not claim it; log in with the DID")
        return identity

    def _by_did(self, did: str, deadline: float) -> Identity:
        identity = self._document(did, deadline)
        if identity.handle is None:
            return identity
        try:
            handle = check_handle(identity.handle, allow_http=self._allow_http, trusted=self._trusted)
            is_verified = self._did_of(handle, deadline) == did
        except IdentityError:
            is_verified = False
        return identity if is_verified else replace(identity, handle=None)

    # DID documents

    def _document(self, did: str, deadline: float) -> Identity:
        try:
            document = self._transport.get_json(
                self._document_url(did),
                media_type=None,
                timeout=deadline - time.monotonic(),
                max_bytes=_LARGEST_DOCUMENT,
            )
        except TransportError as error:
            raise IdentityError(f"{did} does not resolve: {error}", retryable=is_passing(error)) from error
        except UnusableResponse as error:
            if error.status in (404, 410):
                why = "is there no more" if error.status == 410 else "does not exist; check its spelling"
                raise IdentityError(f"the account {did} {why}", retryable=False) from error
            raise IdentityError(
                f"{did} does not resolve: its directory answered {error}", retryable=error.retryable
            ) from error
        return parse_did_document(did, document, allow_http=self._allow_http, trusted=self._trusted)

    def _document_url(self, did: str) -> str:
        if did.startswith("did:plc:"):
            return f"{self._plc_directory}/{did}"
        host = did.removeprefix("did:web:")
        if self._allow_http and _LOCALHOST.fullmatch(host):
            return f"http://{host.replace('%3A', ':')}/.well-known/did.json"
        _check_domain(host.partition("%")[0], allow_http=self._allow_http, trusted=self._trusted)
        return f"https://{host}/.well-known/did.json"

    # Handles

    def _did_of(self, handle: str, deadline: float) -> str:
        resolvers = self._handle_resolvers
        failures: list[_NotFound] = []
        if not resolvers or not (self._is_local or handle.endswith(".test")):
            now = time.monotonic()
            share = _SHARE_OF_OWN_DOMAIN if resolvers else 1.0
            try:
                return self._ask_domain(handle, now + (deadline - now) * share)
            except _NotFound as error:
                failures.append(error)
        for number, resolver in enumerate(resolvers):
            now = time.monotonic()
            try:
                return self._ask_resolver(resolver, handle, now + (deadline - now) / (len(resolvers) - number))
            except _NotFound as error:
                failures.append(error)
        reasons = "; ".join(map(str, failures))
        if any(failure.retryable for failure in failures):
            raise IdentityError(f"the handle {handle} does not resolve at the moment: {reasons}", retryable=True)
        raise IdentityError(f"no account has the handle {handle}; check its spelling ({reasons})")

    def _ask_domain(self, handle: str, deadline: float) -> str:
        over_https = look_up_aside(lambda: self._ask_https(handle, deadline))
        try:
            return self._ask_dns(handle, deadline)  # the DNS is right even if HTTPS says otherwise
        except _NotFound as error:
            by_dns = error
        try:
            return _result(over_https, deadline)
        except _NotFound as by_https:
            raise _NotFound(f"{by_dns}; {by_https}", retryable=by_dns.retryable or by_https.retryable) from by_https

    def _ask_dns(self, handle: str, deadline: float) -> str:
        with importing():
            from ._dns import NoRecords, txt_records
        lifetime = min(_DNS_TIMEOUT, deadline - time.monotonic())
        try:
            texts = txt_records(f"_atproto.{handle}", lifetime, self._dns_resolver)
        except NoRecords as error:
            raise _NotFound(str(error), retryable=error.retryable) from error
        dids = {text.removeprefix("did=") for text in texts if text.startswith("did=")}
        if not dids:
            raise _NotFound("no DNS record with a DID")
        if len(dids) > 1:
            raise IdentityError(f"the DNS records of the handle {handle} contradict each other")
        return _did_given(dids.pop(), f"the DNS record of the handle {handle}")

    def _ask_https(self, handle: str, deadline: float) -> str:
        url = f"https://{handle}/.well-known/atproto-did"
        try:
            response = self._transport.request(
                "GET", url, timeout=deadline - time.monotonic(), max_bytes=2 * _LONGEST_DID, redirects=3
            )
        except TransportError as error:
            raise _NotFound(str(error), retryable=is_passing(error)) from error
        if not 200 <= response.status < 300:
            is_for_now = response.status >= 500 or response.status in (408, 429)
            raise _NotFound(f"its web server answered {response.status}", retryable=is_for_now)
        # Editors add byte order marks, and people comments below the DID.
        lines = response.body.decode("utf-8-sig", "replace").split()
        try:
            return check_did(lines[0] if lines else "")
        except IdentityError:
            raise _NotFound("its web server answered without a DID") from None

    def _ask_resolver(self, resolver: str, handle: str, deadline: float) -> str:
        url = f"{resolver}/xrpc/com.atproto.identity.resolveHandle?handle={handle}"
        name = origin(resolver)
        try:
            answer = self._transport.get_json(url, timeout=deadline - time.monotonic(), max_bytes=_LARGEST_DOCUMENT)
        except TransportError as error:
            raise _NotFound(str(error), retryable=is_passing(error)) from error
        except UnusableResponse as error:
            what = "does not know it" if error.status in (400, 404) else f"answered {error}"
            raise _NotFound(f"{name} {what}", retryable=error.retryable) from error
        did = answer.get("did")
        try:
            return check_did(did if isinstance(did, str) else "")
        except IdentityError as error:
            raise _NotFound(f"{name} has no usable DID for it: {error}") from None


class _NotFound(Exception):
    """One of the ways from a handle to its DID has come to nothing. The text says how."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


def _result(lookup: Promise[str], deadline: float) -> str:
    try:
        return lookup.get(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        raise _NotFound("its web server did not answer in time", retryable=True) from None


def _did_given(did: object, where: str) -> str:
    try:
        return check_did(did if isinstance(did, str) else "")
    except IdentityError as error:
        raise IdentityError(f"{where} has no usable DID: {error}", reason=error.reason) from None


def _several(urls: Any) -> Sequence[Any]:
    if urls is None:
        return ()
    return urls if isinstance(urls, list | tuple) else (urls,)


def _service_url(name: str, url: object, transport: Transport, *, allow_http: bool) -> str:
    try:
        return check_url(url, allow_http=allow_http, trusted=transport.trusted_hosts).rstrip("/")
    except ValueError as error:
        raise ClientMetadataError(f"{name} {error}", field=name) from None
