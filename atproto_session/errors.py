"""Every error this library raises, in one tree.

::

    SessionError
    ├── SessionNotFoundError          no session is stored for this account      login_required
    ├── TokenRefreshError             the server refused the refresh token       login_required
    ├── TokenRevokedError             the session was signed out                 login_required
    ├── TokenInvalidError             a token just issued was refused            login_required
    ├── AuthMethodUnsatisfiableError  the client lost the key the session needs  (session kept)
    ├── OAuthResponseError            an OAuth error answer                      (session kept)
    ├── OAuthCallbackError            a log-in that did not end well
    ├── RefreshInterruptedError       a refresh was sent, its answer never came  retryable
    ├── TransportError                a request could not be made                mostly retryable
    ├── LockTimeoutError              waited long enough (also a TimeoutError)   retryable
    ├── CancelledError                the caller's ``cancel`` event was set      retryable
    ├── StoreError                    the store cannot be read or written        (retryable: ask it)
    ├── IdentityError                 a handle or DID does not resolve
    ├── DiscoveryError                no usable authorization server was found
    └── ClientMetadataError           the client's own configuration is wrong

A program needs to ask an error only two things: ``retryable`` (nothing was lost, the same call may succeed later;
``retry_after`` says when, where the server said so) and ``login_required`` (the account has to log in again).
All errors can be pickled, so they survive the way from one process to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self


def printable(text: str, limit: int = 120) -> str:
    """``text`` as a message may carry it: control and other unprintable characters escaped, cut after ``limit``.
    For whatever came from outside."""
    cut = text[:limit]
    shown = cut if cut.isprintable() else repr(cut)[1:-1]
    return shown if len(text) <= limit else f"{shown}..."


def rebuild(cls: type[SessionError], message: str, state: dict[str, Any]) -> SessionError:
    """An error made from its parts."""
    error = cls.__new__(cls, message)
    error.args = (message,)
    error.__dict__.update(state)
    return error


class SessionError(Exception):
    """The root of the tree.

    :ivar retryable: nothing was lost; the same call may succeed later.
    :ivar retry_after: seconds to wait before that, where that is known, or ``None``.
    :ivar login_required: the account has to log in again: as a rule, since the session is gone.
    :ivar did: the account, where the error is about a session, or ``None``.
    :ivar session_id: which of the account's sessions, where it has several, or ``None``.
    """

    login_required: ClassVar[bool] = False
    retryable: bool = False
    retry_after: float | None = None
    did: str | None = None
    session_id: str | None = None

    def __init__(self, message: str, *, retryable: bool | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        if retryable is not None:
            self.retryable = retryable
        if retry_after is not None:
            self.retry_after = retry_after

    def about(self, key: str) -> Self:
        """This error, as one about the session that is stored under ``key``."""
        self.did, _, session_id = key.partition("#")
        self.session_id = session_id or None
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way calls cls(*args) again, which no constructor with keywords survives.
        return rebuild, (type(self), str(self), self.__dict__.copy())


class SessionNotFoundError(SessionError):
    """No session is stored under this key. The account has not logged in, or its session has ended. Where this process
    has ended it, the message says when and why, until the account logs in again.

    :ivar ended_at: when the session ended, seconds since the epoch, or ``None`` where that is not known.
    :ivar error: the OAuth error code of the server that ended it, or ``None`` where no server spoke.
    :ivar error_description: the server's own words, or ``None``.
    """

    login_required = True
    ended_at: float | None = None
    error: str | None = None
    error_description: str | None = None


class TokenRefreshError(SessionError):
    """The session cannot be refreshed any more: the authorization server refused its refresh token
    (``invalid_grant``, RFC 6749 section 5.2), or the record itself cannot be refreshed.

    :ivar answer_lost: the answer to an earlier refresh never arrived, so the token had most likely been used up then.
    :ivar error: the OAuth error code of the server, or ``None`` where no server spoke.
    :ivar error_description: the server's own words, or ``None``.
    """

    login_required = True

    def __init__(
        self,
        message: str,
        *,
        answer_lost: bool = False,
        error: str | None = None,
        error_description: str | None = None,
    ) -> None:
        super().__init__(message)
        self.answer_lost = answer_lost
        self.error = error
        self.error_description = error_description


class TokenRevokedError(SessionError):
    """The session was signed out, here or by another worker."""

    login_required = True


class TokenInvalidError(SessionError):
    """The account's server refused an access token that had just been issued."""

    login_required = True


class AuthMethodUnsatisfiableError(SessionError):
    """The client cannot authenticate the way it did when the session began, for instance because a key is missing
    from its keyset. The session is kept: it works again as soon as the configuration does."""


class OAuthResponseError(SessionError):
    """An OAuth server answered with an error (RFC 6749 section 5.2) or with something that is not OAuth.

    :ivar status: the HTTP status; 0 where that is not known, as in a copy made from the message alone.
    :ivar error: the OAuth error code, or ``None`` when the answer carried none.
    :ivar error_description: the server's own words, cut short, or ``None``.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        error: str | None = None,
        error_description: str | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
    ) -> None:
        if retryable is None:
            retryable = status >= 500 or status in (408, 429)
        super().__init__(message, retryable=retryable, retry_after=retry_after)
        self.status = status
        self.error = error
        self.error_description = error_description


class OAuthCallbackError(SessionError):
    """A log-in did not end with a session.

    :ivar params: the callback's parameters without the authorization code.
    :ivar state: the application's own ``state``, when the log-in it belongs to is known, or ``None``.
    """

    def __init__(self, message: str, *, params: Mapping[str, str] | None = None, state: str | None = None) -> None:
        super().__init__(message)
        # Anybody may send them: what is kept is bounded.
        kept = [(name[:100], value[:1000]) for name, value in list((params or {}).items())[:20]]
        self.params = {name: value for name, value in kept if name not in ("code", "response")}
        self.state = state


class RefreshInterruptedError(SessionError):
    """A refresh request was sent and its answer never arrived, so nobody knows whether the refresh token still works.
    The session is kept, and the next use of it finds out."""

    retryable = True


class TransportError(SessionError):
    """A request could not be made, or its answer could not be read.

    :ivar sent: whether the server may have seen the request. ``False`` only where it provably has not.
    """

    retryable = True

    def __init__(self, message: str, *, sent: bool = False, retryable: bool | None = None) -> None:
        super().__init__(message, retryable=retryable)
        self.sent = sent


class LockTimeoutError(SessionError, TimeoutError):
    """The caller's time was over before the answer was there. A refresh that had been sent goes on without it, and
    its result is stored."""

    retryable = True


class CancelledError(SessionError):
    """The caller's ``cancel`` event was set."""

    retryable = True


class StoreError(SessionError):
    """The store, or one record in it, cannot be read or written. Never means "there is no session"."""


class IdentityError(SessionError):
    """A handle or a DID is malformed, unsupported, or does not resolve.

    :ivar reason: ``"malformed"``, ``"unsupported"`` or ``"failed"``.
    """

    def __init__(self, message: str, *, reason: str = "failed", retryable: bool | None = None) -> None:
        super().__init__(message, retryable=retryable)
        self.reason = reason


class DiscoveryError(SessionError):
    """No usable authorization server was found: metadata is missing, malformed, contradictory, or no longer the
    authority for the account."""


class ClientMetadataError(SessionError):
    """The client's own metadata or keys break a rule.

    :ivar field: the field at fault, or ``None``.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
