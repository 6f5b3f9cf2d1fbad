"""From a PDS to its authorization server, and to what that server can do (RFC 9728, RFC 8414)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ._recent import Recent
from ._urls import NOBODY, TrustedHosts, check_origin, check_url, origin
from .cached_getter import Cache, CachedGetter, GetOptions
from .errors import DiscoveryError, TransportError, printable
from .transport import Transport, UnusableResponse, is_passing

#: The largest document, in bytes. Parsed, it may need fifty times as much.
_LARGEST_DOCUMENT = 64 * 1024
# How much of a document is kept. What a stranger's server says must not fill the memory.
_LONGEST_URL = 2048
_MOST_VALUES = 16
_LONGEST_VALUE = 64
_PROTECTED_RESOURCE = "/.well-known/oauth-protected-resource"
_AUTHORIZATION_SERVER = "/.well-known/oauth-authorization-server"


@dataclass(frozen=True)
class ServerMetadata:
    """What an authorization server publishes about itself, as far as a client needs it. The fields are those of RFC
    8414 and of the extensions that the AT Protocol requires; all have been checked. Lists hold the values that have to
    be there, and a few of the others."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    pushed_authorization_request_endpoint: str
    revocation_endpoint: str | None
    token_endpoint_auth_methods_supported: tuple[str, ...]
    token_endpoint_auth_signing_alg_values_supported: tuple[str, ...]
    dpop_signing_alg_values_supported: tuple[str, ...]
    scopes_supported: tuple[str, ...]


def parse_server_metadata(
    issuer: str, document: object, *, allow_http: bool = False, trusted: TrustedHosts = NOBODY
) -> ServerMetadata:
    """The metadata in ``document``, published by the authorization server ``issuer``.

    :param allow_http: for development: endpoints may be at ``http://localhost``.
    :param trusted: hosts of a private network, where endpoints may be.
    :raises DiscoveryError: the AT Protocol's rules do not hold. The message names the field.
    """
    if not isinstance(document, dict):
        raise DiscoveryError(f"the metadata of {issuer} are not a JSON object")
    fields = _Fields(f"the metadata of {issuer}", document, allow_http=allow_http, trusted=trusted)
    if document.get("issuer") != issuer:
        raise fields.fault("issuer", "is not the origin it was fetched from")
    fields.has("response_types_supported", "code")
    fields.has("grant_types_supported", "authorization_code", "refresh_token")
    fields.has("code_challenge_methods_supported", "S256")
    for name in (
        "authorization_response_iss_parameter_supported",
        "require_pushed_authorization_requests",
        "client_id_metadata_document_supported",
    ):
        if document.get(name) is not True:
            raise fields.fault(name, "is not true")
    if document.get("require_request_uri_registration", True) is not True:
        raise fields.fault("require_request_uri_registration", "is not true")
    algorithms = fields.has("token_endpoint_auth_signing_alg_values_supported", "ES256")
    if "none" in algorithms:
        raise fields.fault("token_endpoint_auth_signing_alg_values_supported", "holds none")
    return ServerMetadata(
        issuer=issuer,
        authorization_endpoint=fields.url("authorization_endpoint"),
        token_endpoint=fields.url("token_endpoint"),
        pushed_authorization_request_endpoint=fields.url("pushed_authorization_request_endpoint"),
        revocation_endpoint=None if document.get("revocation_endpoint") is None else fields.url("revocation_endpoint"),
        token_endpoint_auth_methods_supported=fields.has(
            "token_endpoint_auth_methods_supported", "none", "private_key_jwt"
        ),
        token_endpoint_auth_signing_alg_values_supported=algorithms,
        dpop_signing_alg_values_supported=fields.has("dpop_signing_alg_values_supported", "ES256"),
        scopes_supported=fields.has("scopes_supported", "atproto"),
    )


class _Fields(NamedTuple):
    of: str
    document: Mapping[str, Any]
    allow_http: bool
    trusted: TrustedHosts

    def fault(self, name: str, what: str) -> DiscoveryError:
        return DiscoveryError(f"{self.of} cannot be used: {name} {what}")

    def has(self, name: str, *required: str) -> tuple[str, ...]:
        """The list of strings ``name``, which has to hold ``required``."""
        values = self.document.get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.fault(name, "is not a list of strings")
        if missing := [value for value in required if value not in values]:
            raise self.fault(name, f"lacks {' and '.join(missing)}")
        others = (value for value in values if len(value) <= _LONGEST_VALUE)
        return tuple(dict.fromkeys((*required, *others)))[:_MOST_VALUES]

    def url(self, name: str) -> str:
        try:
            url = check_url(self.document.get(name), allow_http=self.allow_http, trusted=self.trusted)
        except ValueError as error:
            raise self.fault(name, str(error)) from None
        if len(url) > _LONGEST_URL:
            raise self.fault(name, "is too long")
        return url


class Discovery:
    """Finds authorization servers. Safe for threads and forks.

    :param allow_http: for development: servers may be at ``http://localhost``.
    :param cache_for: seconds for which an answer is good for those who do not ask for a fresh one.
    :param cache: where answers are kept. Default: in memory.
    :param clock: seconds, for the age of what is cached.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        allow_http: bool = False,
        cache_for: float = 300.0,
        cache: Cache[tuple[float, Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._allow_http = allow_http
        self._trusted = transport.trusted_hosts
        self._clock = clock
        kept: Cache[tuple[float, Any]] = Recent(cache_for) if cache is None else cache

        def is_stale(_: str, entry: tuple[float, object]) -> bool:
            return clock() - entry[0] >= cache_for

        self._known, self._is_stale = kept, is_stale
        # Only what can be used is kept: a wrong answer may be right the next time.
        self._issuers: CachedGetter[tuple[float, str]] = CachedGetter(
            self._fetch_issuer, kept, is_stale=is_stale, share_failures=True
        )
        self._servers: CachedGetter[tuple[float, ServerMetadata]] = CachedGetter(
            self._fetch_server, kept, is_stale=is_stale, share_failures=True
        )

    def authorization_server_of(self, pds_url: str, *, fresh: bool = False) -> str:
        """The issuer that speaks for the accounts of a PDS.

        :param fresh: ask now, whatever is known already.
        :raises DiscoveryError: there is none, or the PDS cannot say; ``retryable`` if it may later.
        """
        pds = self._origin(pds_url)
        return self._issuers.get(f"{pds}{_PROTECTED_RESOURCE}", no_cache=fresh)[1]

    def metadata(self, issuer: str, *, fresh: bool = False) -> ServerMetadata:
        """The metadata of an authorization server.

        :param fresh: ask now, whatever is known already.
        :raises DiscoveryError: there are none that can be used; ``retryable`` if there may be later.
        """
        try:
            check_origin(issuer, allow_http=self._allow_http, trusted=self._trusted)
        except ValueError as error:
            raise DiscoveryError(f"the issuer {printable(issuer)} {error}") from None
        return self._servers.get(f"{issuer}{_AUTHORIZATION_SERVER}", no_cache=fresh)[1]

    def knows(self, issuer: str) -> bool:
        """Whether :meth:`metadata` would answer from memory."""
        entry = self._known.get(key := f"{issuer}{_AUTHORIZATION_SERVER}")
        return entry is not None and not self._is_stale(key, entry)

    def from_server_url(self, url: str) -> str:
        """The issuer that a person means by the URL of a PDS, or of an authorization server itself.

        :raises DiscoveryError: it is neither.
        """
        server = self._origin(url.strip())
        try:
            return self.authorization_server_of(server)
        except DiscoveryError as error:
            as_pds = error
        try:
            return self.metadata(server).issuer
        except DiscoveryError as error:
            raise DiscoveryError(
                f"{server} is neither a PDS ({as_pds}) nor an authorization server ({error})",
                retryable=as_pds.retryable or error.retryable,
            ) from error

    def _origin(self, url: str) -> str:
        try:
            return origin(check_url(url, allow_http=self._allow_http, trusted=self._trusted))
        except ValueError as error:
            raise DiscoveryError(f"the address of the server {error}") from None

    def _fetch_issuer(self, url: str, options: GetOptions, stored: object) -> tuple[float, str]:
        pds = origin(url)
        document = self._document(url, f"{pds} offers no log-in by OAuth")
        what = f"the OAuth metadata of the PDS {pds}"
        if document.get("resource") != pds:
            raise DiscoveryError(f"{what} are those of another server")
        servers = document.get("authorization_servers")
        if not isinstance(servers, list) or len(servers) != 1:
            raise DiscoveryError(f"{what} do not name exactly one authorization server")
        try:
            return self._clock(), check_origin(servers[0], allow_http=self._allow_http, trusted=self._trusted)
        except ValueError as error:
            raise DiscoveryError(f"the authorization server in {what} {error}") from None

    def _fetch_server(self, url: str, options: GetOptions, stored: object) -> tuple[float, ServerMetadata]:
        issuer = origin(url)
        document = self._document(url, f"{issuer} publishes no metadata of an authorization server")
        metadata = parse_server_metadata(issuer, document, allow_http=self._allow_http, trusted=self._trusted)
        return self._clock(), metadata

    def _document(self, url: str, absent: str) -> dict[str, Any]:
        """
        :param absent: what it means that the server has no such document.
        """
        try:
            return self._transport.get_json(url, max_bytes=_LARGEST_DOCUMENT)
        except TransportError as error:
            raise DiscoveryError(str(error), retryable=is_passing(error)) from error
        except UnusableResponse as error:
            if error.status in (404, 410):
                raise DiscoveryError(absent, retryable=False) from error
            raise DiscoveryError(f"{url} answered {error}", retryable=error.retryable) from error
