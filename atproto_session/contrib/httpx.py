"""httpx over one of our sessions: every request is signed, refreshed and retried as those of an ``OAuthSession`` are.

Needs the extra ``httpx``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import httpx
import requests
import urllib3
from requests.utils import default_headers

from .._adapter import Bounds
from ..oauth_session import OAuthSession

#: As a request of an ``OAuthSession`` has them: 10 seconds to connect, 60 for each wait for more of the answer.
DEFAULT_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_PIECE = 65536
#: What belongs to a connection or to an address, and is set anew where the request is sent.
_LEFT_OUT = frozenset({"host", "connection", "authorization"})
_ONLY_SYNCHRONOUS = (
    "sessions of atproto_session are synchronous; use an httpx.Client, and from asynchronous code "
    "`await asyncio.to_thread(http.get, url)`"
)


class OAuthTransport(httpx.BaseTransport):
    """The transport of an ``httpx.Client`` whose requests are an account's::

        http = httpx.Client(transport=OAuthTransport(session), base_url=session.token_info(refresh=False).aud)

    Requests go to the account's server alone. Headers, cookies and redirects are httpx's own; ``total_timeout``,
    retries, proxies and certificates are those of ``session``. May be shared by threads. A body that httpx streams
    (a generator, a file, a form with files) is sent once: where it would have to be sent again, the 401 is the answer.

    Failures on the way are httpx's errors, with those of requests or urllib3 as their cause. What is about the session
    is a :class:`.SessionError`: see :meth:`.SessionGetter.get_session`.

    :param session: the account.
    """

    def __init__(self, session: OAuthSession) -> None:
        self._session = session

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """As in httpx.

        :raises SessionError: there is no good token, or the request would go elsewhere.
        """
        with _errors_of_httpx(request):
            prepared = _prepared(request)
            settings: Any = self._session.merge_environment_settings(prepared.url, {}, False, None, None)
            adapter = self._session.get_adapter(prepared.url or "")
            response = adapter.send(prepared, timeout=self._timeout(request), **settings)
        return _response(response, request)

    def _timeout(self, request: httpx.Request) -> Any:
        waits = request.extensions.get("timeout") or DEFAULT_TIMEOUT.as_dict()
        connect, read = waits.get("connect"), waits.get("read")
        if self._session.total_timeout is None:
            return connect, read
        return Bounds(within=self._session.total_timeout, connect=connect, read=read)

    async def handle_async_request(self, request: httpx.Request) -> NoReturn:
        """:raises TypeError: always, since a session is synchronous."""
        raise TypeError(_ONLY_SYNCHRONOUS)

    async def __aenter__(self) -> NoReturn:
        raise TypeError(_ONLY_SYNCHRONOUS)

    async def aclose(self) -> None:
        """Nothing: the connections are the ``OAuthClient``'s."""

    def __repr__(self) -> str:
        return f"<OAuthTransport {self._session!r}>"


class Client(httpx.Client):
    """An ``httpx.Client`` for one account: relative URLs go to its server, as with an ``OAuthSession``::

        with Client(client.restore(did)) as http:
            http.get("/xrpc/app.bsky.feed.getTimeline", params={"limit": 10}).json()

    :param session: the account. See :class:`OAuthTransport`.
    :param options: those of ``httpx.Client``; ``timeout`` is by default 10 seconds to connect and 60 for each wait.
    :raises SessionNotFoundError: the session is gone.
    """

    def __init__(self, session: OAuthSession, **options: Any) -> None:
        base_url = session.token_info(refresh=False).aud
        super().__init__(
            **{"base_url": base_url, "timeout": DEFAULT_TIMEOUT, "transport": OAuthTransport(session), **options}
        )


def _prepared(request: httpx.Request) -> requests.PreparedRequest:
    """The same request, for requests."""
    prepared = requests.PreparedRequest()
    prepared.prepare_method(request.method)
    prepared.prepare_url(str(request.url), None)
    coding = request.headers.encoding
    kept = [(name, value) for name, value in request.headers.items() if name not in _LEFT_OUT]
    prepared.prepare_headers({name: value.encode(coding).decode("latin-1") for name, value in kept})  # the same bytes
    # Who undoes the coding may be either of them, so it is one that both know.
    prepared.headers["Accept-Encoding"] = _known_codings(request.headers.get("Accept-Encoding", ""))
    try:
        prepared.body = request.content or None
    except httpx.RequestNotRead:
        stream: Any = request.stream
        prepared.body = iter(stream)
    return prepared


def _known_codings(wanted: str) -> str:
    known = {"identity", *(coding.strip() for coding in default_headers()["Accept-Encoding"].split(","))}
    both = [coding.strip() for coding in wanted.split(",") if coding.partition(";")[0].strip().lower() in known]
    return ", ".join(both) or "identity"


def _response(response: requests.Response, request: httpx.Request) -> httpx.Response:
    """The same answer, for httpx."""
    headers = [(name, value) for name, value in response.raw.headers.items()]
    reason = {"reason_phrase": (response.reason or "").encode("ascii", "ignore")}
    if not getattr(response, "_content_consumed", False):
        return httpx.Response(response.status_code, headers=headers, stream=_Body(response, request), extensions=reason)
    # It had to be read, to see what it says of the token; that has undone its coding.
    decoded = ("content-encoding", "content-length", "transfer-encoding")
    kept = [(name, value) for name, value in headers if name.lower() not in decoded]
    return httpx.Response(response.status_code, headers=kept, content=response.content, extensions=reason)


class _Body(httpx.SyncByteStream):
    """A body that is still on its way."""

    def __init__(self, response: requests.Response, request: httpx.Request) -> None:
        self._response = response
        self._request = request

    def __iter__(self) -> Iterator[bytes]:
        with _errors_of_httpx(self._request):
            yield from self._response.raw.stream(_PIECE, decode_content=False)

    def close(self) -> None:
        self._response.close()


#: What requests and urllib3 raise, in the words of httpx. The first that fits counts.
_ERRORS: tuple[tuple[type[Exception], type[httpx.RequestError]], ...] = (
    (requests.exceptions.ConnectTimeout, httpx.ConnectTimeout),
    (requests.exceptions.Timeout, httpx.ReadTimeout),
    (requests.exceptions.ProxyError, httpx.ProxyError),
    (requests.exceptions.SSLError, httpx.ConnectError),
    (requests.exceptions.ContentDecodingError, httpx.DecodingError),
    (requests.exceptions.ChunkedEncodingError, httpx.RemoteProtocolError),
    (requests.exceptions.InvalidSchema, httpx.UnsupportedProtocol),
    (requests.exceptions.MissingSchema, httpx.UnsupportedProtocol),
    (requests.exceptions.InvalidURL, httpx.LocalProtocolError),
    (requests.exceptions.InvalidHeader, httpx.LocalProtocolError),
    (requests.exceptions.RequestException, httpx.ReadError),
    (urllib3.exceptions.ReadTimeoutError, httpx.ReadTimeout),
    (urllib3.exceptions.ProtocolError, httpx.RemoteProtocolError),
    (urllib3.exceptions.HTTPError, httpx.ReadError),
)


@contextmanager
def _errors_of_httpx(request: httpx.Request) -> Iterator[None]:
    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        kind = next(kind for ours, kind in _ERRORS if isinstance(error, ours))
        first = error.args[0] if error.args else None
        if kind is httpx.ReadError and isinstance(first, urllib3.exceptions.MaxRetryError):
            kind = httpx.ConnectError
        raise kind(str(error), request=request) from error
