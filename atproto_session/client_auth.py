"""How the client authenticates at an authorization server: not at all, or with a signed assertion (RFC 7523).

The method is settled when a session begins and kept for its whole life: the server binds the session to the key that
began it, so a keyset whose first key changed goes on using the older one for older sessions.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec

from .errors import AuthMethodUnsatisfiableError, printable
from .keys import Keyset, encoded, sign
from .metadata import ClientMetadata
from .session import ClientAuthMethod

_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
#: Seconds by which an assertion is backdated: servers refuse one from the future, and clocks differ.
_BACKDATED = 5
#: Seconds until an assertion expires.
_LIFETIME = 60


class Server(Protocol):
    """What of an authorization server's metadata (RFC 8414) matters here."""

    @property
    def issuer(self) -> str: ...

    @property
    def token_endpoint_auth_methods_supported(self) -> Collection[str]: ...

    @property
    def token_endpoint_auth_signing_alg_values_supported(self) -> Collection[str]: ...


def negotiate(metadata: ClientMetadata, keyset: Keyset | None, server: Server) -> ClientAuthMethod:
    """The method for a new session: the keyset's first key for a confidential client, none for a public one.

    :raises AuthMethodUnsatisfiableError: the server does not support it, or a confidential client has no keyset.
    """
    if not metadata.is_confidential:
        return _supported(ClientAuthMethod("none"), server)
    if keyset is None:
        raise AuthMethodUnsatisfiableError("the client authenticates with private_key_jwt, but there is no keyset")
    return _supported(ClientAuthMethod("private_key_jwt", keyset.first), server)


def resolve_stored(
    method: ClientAuthMethod | None, metadata: ClientMetadata, keyset: Keyset | None, server: Server
) -> ClientAuthMethod:
    """The method that a stored session goes on with: its own, or, where its record does not say (``None``), the
    keyset's first key if there is a keyset, otherwise none.

    :raises AuthMethodUnsatisfiableError: that is not possible any more: the client has become public or confidential,
        the key is not in the keyset, or the server does not support the method.
    """
    if method is None:
        method = ClientAuthMethod("none") if keyset is None else ClientAuthMethod("private_key_jwt", keyset.first)
    if method.method != metadata.token_endpoint_auth_method:
        raise AuthMethodUnsatisfiableError(
            f"the session authenticates with {method.method}, but the client metadata now says "
            f"{metadata.token_endpoint_auth_method}; undo that, or have the account log in again"
        )
    if method.method == "private_key_jwt":
        _signing_key(method, keyset)
    return _supported(method, server)


def authentication_params(
    method: ClientAuthMethod,
    metadata: ClientMetadata,
    keyset: Keyset | None,
    issuer: str,
    *,
    clock: Callable[[], float] = time.time,
) -> dict[str, str]:
    """The form parameters that authenticate one request to ``issuer``: ``client_id``, and for ``private_key_jwt`` an
    assertion (RFC 7523 sections 2.2 and 3). An assertion works once: every request, also one that is sent again after
    a nonce error, needs new parameters.

    :param clock: gives the seconds since the epoch.
    :raises AuthMethodUnsatisfiableError: the key is not in the keyset.
    """
    client_id = metadata.client_id
    if method.method == "none":
        return {"client_id": client_id}
    key = _signing_key(method, keyset)
    now = int(clock())
    claims = {
        "iss": client_id,
        "sub": client_id,
        "aud": issuer,
        "jti": secrets.token_urlsafe(16),
        "iat": now - _BACKDATED,
        "exp": now + _LIFETIME,
    }
    assertion = sign(key, encoded({"typ": "JWT", "alg": "ES256", "kid": method.kid}), claims)
    return {"client_id": client_id, "client_assertion_type": _ASSERTION_TYPE, "client_assertion": assertion}


def _signing_key(method: ClientAuthMethod, keyset: Keyset | None) -> ec.EllipticCurvePrivateKey:
    kid = method.kid or ""
    key = None if keyset is None else keyset.get(kid)
    if key is None:
        raise AuthMethodUnsatisfiableError(
            f"the session began with the client key {printable(kid)}, which is not in the keyset; put the key back: "
            "it has to stay for as long as a session uses it"
        )
    return key


def _supported(method: ClientAuthMethod, server: Server) -> ClientAuthMethod:
    issuer = printable(server.issuer)
    if method.method not in server.token_endpoint_auth_methods_supported:
        raise AuthMethodUnsatisfiableError(f"{issuer} does not support client authentication by {method.method}")
    if method.method == "private_key_jwt" and "ES256" not in server.token_endpoint_auth_signing_alg_values_supported:
        raise AuthMethodUnsatisfiableError(f"{issuer} does not support client assertions signed with ES256")
    return method
