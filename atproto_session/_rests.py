"""How long a server is left alone after a failed refresh, and what those are told who come meanwhile.

One worker that meets a sick server is enough. It leaves its error in the record, and for a short while every other one
gets that error without asking the server.
"""

from __future__ import annotations

from . import errors
from ._terms import Times
from .errors import (
    DiscoveryError,
    IdentityError,
    OAuthResponseError,
    RefreshInterruptedError,
    SessionError,
    TransportError,
)
from .session import Rest

#: Error codes that an OAuth server gives (RFC 6749 section 5.2, RFC 9449, and those that AT Protocol servers add).
OAUTH_ERRORS = frozenset(
    (
        "access_denied",
        "invalid_client",
        "invalid_client_metadata",
        "invalid_dpop_proof",
        "invalid_grant",
        "invalid_request",
        "invalid_scope",
        "server_error",
        "slow_down",
        "temporarily_unavailable",
        "unauthorized_client",
        "unsupported_grant_type",
        "use_dpop_nonce",
    )
)


#: What says something about a server. Any other error is this process' own, and nothing for others to know.
_OF_SERVERS = (DiscoveryError, IdentityError, OAuthResponseError, RefreshInterruptedError, TransportError)


def rest_after(error: SessionError, earlier: Rest | None, now: float, times: Times) -> Rest | None:
    """The rest after ``error``: longer after each further failure, and as long as the server asks (``Retry-After``).

    :param now: seconds since the epoch.
    """
    if not isinstance(error, _OF_SERVERS):
        return earlier
    failures = 0 if earlier is None else earlier.failures
    is_asked = getattr(error, "status", 0) == 429  # any other server may be down only for a moment
    asked = min(error.retry_after or 0.0, times.longest_rest_asked if is_asked else times.longest_rest)
    seconds = max(asked, min(times.first_rest * 2.0 ** min(failures, 20), times.longest_rest))
    if seconds <= 0:
        return None
    details = {name: value for name, value in vars(error).items() if value is None or isinstance(value, str | int)}
    return Rest(now + seconds, failures + 1, type(error).__name__, str(error), details)


def check_rest(rest: Rest | None, now: float, times: Times) -> None:
    """Stop here if the server is left alone at the moment.

    :param now: seconds since the epoch.
    :raises SessionError: the error that the last refresh ended with.
    """
    left = 0.0 if rest is None else rest.until - now
    # Nobody rests for longer than the longest: what seems so is a clock that was set back.
    if rest is None or not 0 < left <= max(times.longest_rest_asked, times.longest_rest):
        return
    kind = getattr(errors, rest.error, SessionError)
    if not (isinstance(kind, type) and issubclass(kind, SessionError)):
        kind = SessionError
    raise errors.rebuild(kind, rest.message, {**rest.details, "retry_after": left})
