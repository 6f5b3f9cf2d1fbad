"""OAuth clients: their metadata documents and how they authenticate.

Documents of ``https`` clients come from a pretend web (:meth:`Clients.publish`); no request leaves the machine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jwt

from .errors import OAuthError, invalid_client, invalid_grant
from .nonces import UsedIdentifiers
from .proofs import public_key, thumbprint, verify

#: How long a client assertion is good for after its ``iat``, in seconds.
ASSERTION_MAX_AGE = 60.0
ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

_LOOPBACK_HOSTS = ("127.0.0.1", "::1")


@dataclass(frozen=True)
class Client:
    """What the authorization server knows about a client.

    :ivar keys: its public JWKs by ``kid``; empty for a public client.
    """

    id: str
    redirect_uris: tuple[str, ...]
    scopes: frozenset[str]
    auth_method: str = "none"
    keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def allows_redirect(self, uri: str) -> bool:
        return any(_matches(registered, uri) for registered in self.redirect_uris)


@dataclass(frozen=True)
class ClientAuth:
    """How a client proved who it is."""

    method: str
    kid: str | None = None
    thumbprint: str | None = None


def _matches(registered: str, requested: str) -> bool:
    if registered == requested:
        return True
    ours, theirs = urlsplit(registered), urlsplit(requested)
    try:
        theirs_port = theirs.port
    except ValueError:
        return False
    # RFC 8252 section 7.3: a loopback address may be used with any port, unless one was registered.
    return (
        ours.hostname in _LOOPBACK_HOSTS
        and ours.port is None
        and theirs_port is not None
        and theirs.netloc in (f"127.0.0.1:{theirs_port}", f"[::1]:{theirs_port}")
        and theirs._replace(netloc=ours.netloc) == ours
        and theirs.hostname == ours.hostname
    )


class Clients:
    """Finds clients and authenticates them. Safe to share between threads."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._documents: dict[str, tuple[bytes, str]] = {}
        self._used = UsedIdentifiers(ASSERTION_MAX_AGE, clock)
        self._lock = threading.Lock()

    def publish(self, url: str, document: object, content_type: str) -> None:
        """Put a document where the authorization server finds it. JSON is made of anything but ``bytes``."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        with self._lock:
            self._documents[url] = body, content_type

    def find(self, client_id: str) -> Client:
        """The client of this id.

        :raises OAuthError: ``invalid_client_metadata``.
        """
        try:
            url = urlsplit(client_id)
            if url.scheme == "http" and url.netloc == "localhost":
                return _loopback_client(client_id)
            if url.scheme == "https" and ":" not in url.netloc and "@" not in url.netloc:
                return self._from_document(client_id, self._fetch(client_id))
        except ValueError as error:
            raise OAuthError("invalid_client_metadata", f"Unable to obtain client metadata: {error}") from None
        raise OAuthError("invalid_client_metadata", "The client id is not an https URL")

    def _fetch(self, url: str) -> Mapping[str, Any]:
        with self._lock:
            if url not in self._documents:
                raise ValueError("nothing is published at that URL")
            body, content_type = self._documents[url]
        if content_type != "application/json":
            raise ValueError("the document is not application/json")
        document = json.loads(body)
        if not isinstance(document, dict):
            raise ValueError("the document is not a JSON object")  # noqa: TRY004 - bad data, not a bad call
        return document

    def _from_document(self, client_id: str, document: Mapping[str, Any]) -> Client:
        native = document.get("application_type", "web") == "native"
        method = document.get("token_endpoint_auth_method", "client_secret_basic")
        scopes = frozenset(str(document.get("scope", "")).split())
        redirect_uris = tuple(str(uri) for uri in document.get("redirect_uris", ()))
        for holds, problem in (
            (document.get("client_id") == client_id, "client_id is not the document's URL"),
            (method in ("none", "private_key_jwt"), "token_endpoint_auth_method is not supported"),
            (not native or method == "none", "a native client cannot be confidential"),
            ("atproto" in scopes, "scope lacks atproto"),
            (document.get("dpop_bound_access_tokens") is True, "dpop_bound_access_tokens is not true"),
            ("authorization_code" in document.get("grant_types", ()), "grant_types lacks authorization_code"),
            ("refresh_token" in document.get("grant_types", ()), "grant_types lacks refresh_token"),
            ("code" in document.get("response_types", ()), "response_types lacks code"),
            (bool(redirect_uris), "redirect_uris is empty"),
            (native or all(uri.startswith("https://") for uri in redirect_uris), "a redirect URI is not https"),
        ):
            if not holds:
                raise ValueError(problem)
        keys = self._keys(document) if method == "private_key_jwt" else {}
        return Client(client_id, redirect_uris, scopes, method, keys)

    def _keys(self, document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        if ("jwks" in document) == ("jwks_uri" in document):
            raise ValueError("exactly one of jwks and jwks_uri is needed")
        if document.get("token_endpoint_auth_signing_alg") != "ES256":
            raise ValueError("token_endpoint_auth_signing_alg is not ES256")
        jwks = document["jwks"] if "jwks" in document else self._fetch(str(document["jwks_uri"]))
        keys = {}
        for jwk in jwks.get("keys", ()):
            public_key(jwk)
            if not isinstance(kid := jwk.get("kid"), str) or kid in keys:
                raise ValueError("a key has no kid, or one that is not unique")
            keys[kid] = jwk
        return keys

    def authenticate(self, form: Mapping[str, str], issuer: str, dpop_jkt: str) -> tuple[Client, ClientAuth]:
        """Find out which client sent this form, and whether it is that client (RFC 7523 section 3).

        :raises OAuthError: ``invalid_client`` and its kin; ``invalid_grant`` for an assertion that was used before.
        """
        client = self.find(form["client_id"])
        if client.auth_method == "none":
            return client, ClientAuth("none")
        if form.get("client_assertion_type") != ASSERTION_TYPE or "client_assertion" not in form:
            raise invalid_client('client authentication method "private_key_jwt" requires a client_assertion')
        try:
            auth, jti = self._check_assertion(client, form["client_assertion"], issuer)
        except ValueError as error:
            raise invalid_client(f"Validation of client_assertion failed: {error}") from None
        if auth.thumbprint == dpop_jkt:
            raise OAuthError(
                "invalid_request", "The DPoP proof must be signed with a different key than the client assertion"
            )
        if not self._used.use(f"{client.id} {jti}"):
            raise invalid_grant("private_key_jwt jti reused")
        return client, auth

    def _check_assertion(self, client: Client, assertion: str, issuer: str) -> tuple[ClientAuth, str]:
        try:
            kid = str(jwt.get_unverified_header(assertion).get("kid"))
        except jwt.PyJWTError:
            raise ValueError("malformed") from None
        if kid not in client.keys:
            raise ValueError("no applicable key found in the JSON Web Key Set")
        jwk = client.keys[kid]
        claims = verify(assertion, public_key(jwk)).claims
        for name, expected in (("iss", client.id), ("sub", client.id), ("aud", issuer)):
            if claims.get(name) not in (expected, [expected]):
                raise ValueError(f"unexpected {name} claim value")
        self._check_times(claims)
        jti = claims.get("jti")
        if not isinstance(jti, str) or not jti:
            raise ValueError("missing required jti claim")
        return ClientAuth("private_key_jwt", kid, thumbprint(jwk)), jti

    def _check_times(self, claims: Mapping[str, Any]) -> None:
        now = int(self._clock())
        iat, exp = claims.get("iat"), claims.get("exp")
        if not isinstance(iat, int | float) or not isinstance(exp, int | float):
            raise ValueError("iat and exp claims are required")  # noqa: TRY004 - bad data, not a bad call
        # No tolerance: the reference server refuses a clock that is one second ahead of its own.
        if iat > now:
            raise ValueError("iat claim timestamp check failed (it should be in the past)")
        if now - iat > ASSERTION_MAX_AGE:
            raise ValueError("iat claim timestamp check failed (too far in the past)")
        if exp <= now:
            raise ValueError("exp claim timestamp check failed")


def _loopback_client(client_id: str) -> Client:
    """The development client: its id says everything there is to know about it."""
    url = urlsplit(client_id)
    if url.path not in ("", "/") or url.fragment:
        raise ValueError("a loopback client id has no path and no fragment")
    redirect_uris, scopes = [], []
    for name, value in parse_qsl(url.query, keep_blank_values=True):
        if name == "redirect_uri":
            target = urlsplit(value)
            if target.scheme != "http" or target.hostname not in _LOOPBACK_HOSTS or "@" in target.netloc:
                raise ValueError("a loopback client's redirect URIs are http://127.0.0.1 or http://[::1]")
            redirect_uris.append(value)
        elif name == "scope":
            scopes.append(value)
        else:
            raise ValueError("a loopback client id has only the parameters redirect_uri and scope")
    if len(scopes) > 1:
        raise ValueError("a loopback client id has at most one scope parameter")
    granted = frozenset((scopes[0] if scopes else "atproto").split())
    if "atproto" not in granted:
        raise ValueError("scope lacks atproto")
    return Client(client_id, tuple(redirect_uris) or ("http://127.0.0.1/", "http://[::1]/"), granted)
