"""The Python SDK (``atproto`` on PyPI) over one of our sessions.

Needs the extra ``sdk``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import atproto  # type: ignore[import-untyped]
import httpx
from atproto import exceptions, models

from ..errors import LockTimeoutError, SessionError
from ..oauth_session import OAuthSession
from .httpx import DEFAULT_TIMEOUT, OAuthTransport

#: Answers to a request for the profile that say: not here, or not for this client.
_NO_PROFILE = (400, 403, 404, 501)


class SessionEndedError(exceptions.UnauthorizedError, exceptions.LoginRequiredError):  # type: ignore[misc]
    """The account has to log in again. It is both of the SDK's errors that may say so; its cause is ours."""


class Request(atproto.Request):  # type: ignore[misc]
    """What sends the requests of a :class:`Client`. Its errors are the SDK's, and have ours as their cause.

    :param session: the account.
    :param timeout: seconds for each wait; or what httpx takes for it.
    """

    def __init__(self, session: OAuthSession, *, timeout: Any = DEFAULT_TIMEOUT) -> None:
        super().__init__(transport=OAuthTransport(session), timeout=timeout)
        self._session = session
        self._timeout = timeout

    def get(self, *args: Any, **options: Any) -> Any:
        """As in the SDK."""
        with _errors_of_the_sdk():
            return super().get(*args, **options)

    def post(self, *args: Any, **options: Any) -> Any:
        """As in the SDK."""
        if isinstance(options.get("data"), bytes):  # which httpx wants to have another name
            options["content"] = options.pop("data")
        with _errors_of_the_sdk():
            return super().post(*args, **options)

    def clone(self) -> Self:
        """As in the SDK: the same account, with headers that may be changed apart."""
        cloned = type(self)(self._session, timeout=self._timeout)
        cloned._additional_headers = self._additional_headers.copy()
        cloned._additional_header_sources = self._additional_header_sources.copy()
        return cloned


class Client(atproto.Client):  # type: ignore[misc]
    """The SDK's ``Client``, logged in as the account of ``session``::

        client = Client(oauth_client.restore(did))
        client.send_post("Hello")

    Every call is signed, refreshed and retried as one of ``session`` is; nothing of the SDK's own sessions runs. What
    goes wrong is an error of the SDK (``atproto.exceptions``), with ours as its ``__cause__`` where it is about the
    session. May be shared by threads.

    :param session: the account.
    :param timeout: seconds for each wait, or what httpx takes for it; by default 10 to connect and 60 for more of the
        answer. ``session.total_timeout`` bounds each call in all.
    :raises SessionNotFoundError: the session is gone.
    :ivar oauth_session: the account's session.
    """

    def __init__(
        self, session: OAuthSession, *, timeout: Any = DEFAULT_TIMEOUT, request: Request | None = None
    ) -> None:
        self._me: Any = None
        self.oauth_session = session
        super().__init__(
            session.token_info(refresh=False).aud,
            request=Request(session, timeout=timeout) if request is None else request,
        )

    @property
    def me(self) -> Any:
        """The profile of the account, fetched when it is first asked for. Where there is none, or this client may not
        see it, a profile that has ``did`` and ``handle`` alone.

        :raises atproto.exceptions.AtProtocolError: the server cannot be asked at the moment.
        """
        if self._me is None:
            self._me = self._find_profile()
        return self._me

    @me.setter
    def me(self, profile: Any) -> None:
        self._me = profile

    def _find_profile(self) -> Any:
        did = self.oauth_session.did
        try:
            return self.get_profile(did)
        except exceptions.RequestErrorBase as error:
            if error.response is None or error.response.status_code not in _NO_PROFILE:
                raise
        handle = self.com.atproto.server.get_session().handle
        return models.AppBskyActorDefs.ProfileViewDetailed(did=did, handle=handle)

    def login(
        self,
        login: str | None = None,
        password: str | None = None,
        session_string: str | None = None,
        auth_factor_token: str | None = None,
        fetch_bsky_profile: bool = True,
    ) -> Any:
        """The profile, fetched anew. The account has logged in already, so there is nothing to log in with.

        :raises atproto.exceptions.AtProtocolError: a password or a session of the SDK was given.
        """
        if login or password or session_string or auth_factor_token:
            raise exceptions.AtProtocolError(
                "this client has an OAuth session, and logs in with no password and no session string: "
                "leave the call of login() out"
            )
        self.me = None
        return self.me if fetch_bsky_profile else None

    def export_session_string(self) -> NoReturn:
        """:raises atproto.exceptions.AtProtocolError: always, since the store has the session."""
        raise exceptions.AtProtocolError(
            "an OAuth session has no session string; keep the DID, and restore(did) brings the session back"
        )

    def on_session_change(self, callback: object) -> NoReturn:
        """:raises atproto.exceptions.AtProtocolError: always, since the store has the session."""
        raise exceptions.AtProtocolError(
            "the store keeps this session, so there is nothing to save; to hear of changes, give "
            "OAuthClient(on_session_updated=...) the callback"
        )

    def clone(self) -> Self:
        """As in the SDK: the same account, with headers that may be changed apart."""
        cloned = type(self)(self.oauth_session, request=self.request.clone())
        cloned.me = self._me
        return cloned


@contextmanager
def _errors_of_the_sdk() -> Iterator[None]:
    try:
        yield
    except (SessionError, httpx.RequestError, httpx.InvalidURL) as error:
        raise _translated(error) from error


def _translated(error: Exception) -> Exception:
    """The same in the words of the SDK."""
    translated: Exception
    if isinstance(error, SessionError) and error.login_required:
        translated = SessionEndedError()
    elif isinstance(error, LockTimeoutError):
        translated = exceptions.InvokeTimeoutError()
    elif isinstance(error, SessionError) and not error.retryable:
        translated = exceptions.RequestException()
    else:
        translated = exceptions.NetworkError()
    translated.args = (str(error),)
    return translated
