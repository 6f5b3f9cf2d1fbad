"""The hardened HTTP client, for everything that is fetched from an address that somebody else chose.

A handle, a DID document or a server's metadata can hold any URL. Whatever it says, it has to be a proper https URL
(:func:`check_url`) of a public host, no unexpected redirect is followed, and the answer has to come within one bound of
time and one of size (:mod:`.adapter`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import urljoin

import requests
from urllib3.exceptions import HTTPError

from ._adapter import Exchange, HardenedAdapter, Network, Refused, spawn
from ._urls import check_origin, check_url, origin
from .errors import TransportError, printable

__all__ = [
    "Exchange",
    "HardenedAdapter",
    "Network",
    "Response",
    "Transport",
    "UnusableResponse",
    "check_origin",
    "check_url",
    "origin",
    "shown",
    "spawn",
]

#: Text from outside as a message may carry it.
shown = printable

#: How much an answer may hold beside its body: status line, headers, chunk sizes. In bytes.
_OVERHEAD = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)


class UnusableResponse(ValueError):
    """An answer came, and is not what was asked for. The text completes "HOST answered ...".

    :ivar retryable: the server said that it is only for now (429, 5xx).
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


@dataclass(frozen=True)
class Response:
    """An answer, read to its end.

    :ivar headers: by name in any case.
    :ivar body: after a content coding has been undone.
    :ivar url: where it came from, redirects included.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    url: str

    @property
    def content_type(self) -> str:
        """The media type in lower case, without parameters; empty if there is none."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    def json(self) -> Any:
        """The body as JSON (RFC 8259).

        :raises ValueError: it is not JSON.
        """
        try:
            return json.loads(self.body.decode(), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            # Without the parser's own words and error, which hold the document, and so tokens.
            raise ValueError("is not JSON") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Transport:
    """Requests to addresses from outside, each on a connection of its own: one that has been idle may be closed by the
    server just as a request leaves, and then nobody knows whether the request was seen. Without cookies, ``~/.netrc``
    and retries. Safe for threads and forks: nothing lives longer than its request.

    :param allow_http: for development: http and loopback addresses are allowed, for loopback hosts.
    :param timeout: seconds for one exchange, all told: looking up, connecting, sending, receiving, redirects.
    :param connect_timeout: seconds of these for looking up and connecting, and for the TLS handshake.
    :param max_bytes: how large a body may be.
    :param ca_bundle: a file with the certificates to trust instead of the usual ones, for tests and private networks.
        Default: what ``REQUESTS_CA_BUNDLE`` or ``CURL_CA_BUNDLE`` names, else those that ``requests`` brings.
    :param network: as for :class:`HardenedAdapter`.
    """

    def __init__(
        self,
        *,
        allow_http: bool = False,
        timeout: float = 10.0,
        connect_timeout: float = 5.0,
        max_bytes: int = 512 * 1024,
        user_agent: str = "atproto-session",
        ca_bundle: str | None = None,
        network: Network | None = None,
    ) -> None:
        self.allow_http = allow_http
        self.timeout = timeout
        self._connect_timeout = connect_timeout
        self._max_bytes = max_bytes
        self._user_agent = user_agent
        self._ca_bundle = ca_bundle
        self._network = network

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        data: Mapping[str, str] | bytes | None = None,
        timeout: float | None = None,
        max_bytes: int | None = None,
        redirects: int = 0,
    ) -> Response:
        """Make one request and read its answer, whatever its status.

        :param data: a mapping is sent as a form.
        :param redirects: how many to follow. By default a redirect is an answer as any other. Of ``headers`` and
            ``data`` nothing goes along.
        :raises TransportError: no answer; ``sent`` says whether the server may have seen the request.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        limit = self._max_bytes if max_bytes is None else max_bytes
        try:
            check_url(url, allow_http=self.allow_http)
        except ValueError as error:
            raise TransportError(f"not fetched, because the address {error}", retryable=False) from None
        response = self._exchange(requests.Request(method, url, headers=headers, data=data), deadline, limit)
        for _ in range(redirects):
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return response
            try:
                target = check_url(urljoin(response.url, location), allow_http=self.allow_http)
            except ValueError as error:
                message = f"{origin(response.url)} redirects to an address that {error}"
                raise TransportError(message, sent=True, retryable=False) from None
            response = self._exchange(requests.Request("GET", target), deadline, limit)
        return response

    def get_json(
        self,
        url: str,
        *,
        media_type: str | None = "application/json",
        timeout: float | None = None,
        max_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Fetch a document: status 200, no redirect, a JSON object.

        :param media_type: the content type it must have; ``None``: any.
        :raises TransportError: no answer.
        :raises UnusableResponse: another answer.
        """
        response = self.request(
            "GET", url, headers={"Accept": media_type or "*/*"}, timeout=timeout, max_bytes=max_bytes
        )
        if response.status != 200:
            is_passing = response.status in (408, 429) or response.status >= 500
            raise UnusableResponse(f"with status {response.status} instead of 200", retryable=is_passing)
        if media_type is not None and response.content_type != media_type:
            raise UnusableResponse(f"with {printable(response.content_type) or 'no type'} instead of {media_type}")
        try:
            document = response.json()
        except ValueError as error:
            raise UnusableResponse(f"with something that {error}") from None
        if not isinstance(document, dict):
            raise UnusableResponse("with JSON that is not an object")
        return document

    def _exchange(self, request: requests.Request, deadline: float, limit: int) -> Response:
        # Nothing compressed is asked for. Some servers send it nevertheless.
        request.headers = {"User-Agent": self._user_agent, "Accept-Encoding": "identity", **(request.headers or {})}
        exchange = Exchange(timeout=deadline - time.monotonic(), max_bytes=limit + _OVERHEAD)
        handled = sys.exception()
        try:
            # Prepared and sent without a requests.Session, which is where cookies, ~/.netrc and redirects live.
            prepared = request.prepare()
            with contextlib.ExitStack() as stack:
                stack.enter_context(exchange)
                adapter = HardenedAdapter(allow_http=self.allow_http, pool_maxsize=1, network=self._network)
                stack.callback(adapter.close)
                answer = adapter.send(
                    prepared,
                    stream=True,
                    timeout=(self._connect_timeout, None),
                    verify=self._ca_bundle or _ca_bundle_of_environment() or True,
                    proxies=requests.utils.get_environ_proxies(request.url),
                )
                stack.callback(answer.close)
                body = _read_body(answer, limit)
        except (requests.RequestException, HTTPError, OSError) as error:
            raise _transport_error(error, handled, request.url, sent=exchange.sent) from error
        return Response(answer.status_code, answer.headers, body, request.url)


def _ca_bundle_of_environment() -> str | None:
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")


def _read_body(answer: requests.Response, limit: int) -> bytes:
    body = bytearray()
    for piece in answer.raw.stream(16 * 1024, decode_content=False):
        body += piece
        if len(body) > limit:
            raise Refused("its answer is too large")
    coding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if coding == "identity" or not body:
        return bytes(body)
    if coding != "gzip":
        raise Refused("its answer is in a coding that was not asked for")
    return _gunzip(bytes(body), limit)


def _gunzip(body: bytes, limit: int) -> bytes:
    # urllib3 would do it, but not all its releases do so within a bound.
    decompressor = zlib.decompressobj(wbits=31)
    try:
        plain = decompressor.decompress(body, limit + 1)
    except zlib.error:
        raise Refused("its answer is not the gzip it says it is") from None
    if len(plain) > limit:
        raise Refused("its answer is too large")
    if not decompressor.eof:
        raise Refused("its answer was cut off")
    return plain


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ if error.__suppress_context__ else error.__context__


def _transport_error(error: BaseException, handled: BaseException | None, url: str, *, sent: bool) -> TransportError:
    """``error`` of requests or urllib3 in plain words, without the URL's path and query."""
    # Down to what happened first, but not to what the caller was handling already.
    while (cause := _cause(error)) is not None and cause is not handled:
        error = cause
    reason = next((text for kind, text in _REASONS if isinstance(error, kind)), printable(str(error)))
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"{reason} ({printable(error.verify_message)})"
    where = "no usable answer from" if sent else "cannot reach"
    is_final = isinstance(error, Refused | requests.exceptions.InvalidURL)
    return TransportError(f"{where} {origin(url)}: {reason}", sent=sent, retryable=not is_final)


_REASONS: list[tuple[type[BaseException], str]] = [
    (TimeoutError, "timed out"),
    (socket.gaierror, "the name does not resolve"),
    (ConnectionRefusedError, "connection refused"),
    (ssl.SSLCertVerificationError, "its certificate is not valid"),
    (ssl.SSLError, "the TLS connection failed"),
    (ConnectionError, "the connection was cut off"),  # http.client.RemoteDisconnected is one
    (http.client.IncompleteRead, "the connection was cut off"),
    (http.client.HTTPException, "that is not HTTP"),
]
