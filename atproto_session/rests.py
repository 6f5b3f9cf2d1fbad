"""How long a server is left alone after a failed refresh, and what those are told who come meanwhile.

One worker that meets a sick server is enough. It leaves its error in the record, and for a short while every other one
gets that error without asking the server.
"""

from __future__ import annotations

from . import errors
from .errors import SessionError
from .session import Rest
from .terms import Times

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


def rest_after(error: SessionError, earlier: Rest | None, now: float, times: Times) -> Rest:
    """The rest after ``error``: longer after each further failure, and as long as the server asks (``Retry-After``).

    :param now: seconds since the epoch.
    """
    failures = 0 if earlier is None else earlier.failures
    is_asked = getattr(error, "status", 0) == 429  # any other server may be down only for a moment
    asked = min(error.retry_after or 0.0, times.longest_rest_asked if is_asked else times.longest_rest)
    seconds = max(asked, min(times.first_rest * 2.0 ** min(failures, 20), times.longest_rest))
    details = {name: value for name, value in vars(error).items() if value is None or isinstance(value, str | int)}
    return Rest(now + seconds, failures + 1, type(error).__name__, str(error), details)


def error_again(rest: Rest, seconds: float) -> SessionError:
    """The error that the last refresh ended with.

    :param seconds: how much is left of the rest.
    """
    kind = getattr(errors, rest.error, SessionError)
    if not (isinstance(kind, type) and issubclass(kind, SessionError)):
        kind = SessionError
    return errors.rebuild(kind, rest.message, {**rest.details, "retry_after": seconds})
