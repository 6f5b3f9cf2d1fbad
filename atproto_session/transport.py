"""The hardened HTTP client, for everything that is fetched from an address that somebody else chose.

A handle, a DID document or a server's metadata can hold any URL. Whatever it says, it has to be a proper https URL
(:func:`check_url`) of a public host, no unexpected redirect is followed, and the answer has to come within one bound of
time and one of size (:mod:`.adapter`).
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import logging
import socket
import ssl
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import urlencode, urljoin

import requests
from urllib3.exceptions import HTTPError, InvalidHeader

from ._adapter import Bounds, HardenedAdapter, Network, Refused, TooLate
from ._bodies import find_answer, undo_coding
from ._environment import Environment
from ._tls import Contexts
from ._urls import TrustedHosts, check_origin, check_url, origin
from .errors import TransportError, printable

__all__ = [
    "Bounds",
    "HardenedAdapter",
    "Network",
    "Response",
    "Transport",
    "TrustedHosts",
    "UnusableResponse",
    "check_origin",
    "check_url",
    "is_passing",
    "origin",
    "shown",
]

_log = logging.getLogger("atproto_session")

#: Text from outside as a message may carry it.
shown = printable

#: How much an answer may hold beside its body: status line, headers, chunk sizes. In bytes.
_OVERHEAD = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
#: Before the second try of what came to nothing by chance, in seconds.
_PAUSE = 0.25
#: Connections that are kept for another GET: of one server, of all, and for how many seconds. What lies between forgets
#: connections that are silent for longer, without a word.
_IDLE_OF_SERVER = 4
_IDLE = 64
_IDLE_FOR = 30.0
#: How long to wait for the rest of an answer that seems to be over and is no JSON, in seconds.
_REST_WITHIN = 0.5
#: What makes a second try worth while. Name servers that are busy, and connections that were reset before the TLS
#: handshake, are told by their numbers.
_BY_CHANCE = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)

#: The numbers by which the C library says that there is no such name. Not all systems have the second.
_UNKNOWN_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


class UnusableResponse(ValueError):
    """An answer came, and is not what was asked for. The text completes "HOST answered ...".

    :ivar retryable: the server said that it is only for now (429, 5xx).
    :ivar status: the status of the answer, where that is what was wrong.
    """

    def __init__(self, message: str, *, retryable: bool = False, status: int | None = None) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.status = status


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

    @property
    def is_object(self) -> bool:
        """Whether the body is a JSON object."""
        try:
            return isinstance(self.json(), dict)
        except ValueError:
            return False


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Transport:
    """Requests to addresses from outside, without cookies, ``~/.netrc`` and retries. Safe for threads and forks.

    A GET, which may be repeated, goes over a connection that was kept, if there is one. Every other request has a new
    one: a connection that was idle may be closed by the server just as a request leaves, and then nobody knows whether
    the request was seen.

    :param allow_http: for development: http and loopback addresses are allowed, for loopback hosts.
    :param timeout: seconds for one request, all told: looking up, connecting, sending, receiving, redirects.
    :param connect_timeout: seconds of these for connecting, and for the TLS handshake.
    :param look_up_timeout: seconds of these for looking up. The C library gives a name server that is dead 5 seconds
        before it asks the next.
    :param max_bytes: how large a body may be.
    :param ca_bundle: a file with the certificates to trust instead of the usual ones, for tests and private networks.
        Default: what ``REQUESTS_CA_BUNDLE`` or ``CURL_CA_BUNDLE`` names, or those that ``requests`` brings. Read once.
    :param network: as for :class:`HardenedAdapter`.
    :param trusted_hosts: names, addresses and networks (CIDR) that may be private; with ``allow_http`` over http, too.
    :param environment: what the environment says about proxies and certificates; by default it is read now.
    :ivar contexts: the TLS contexts of the connections, to be shared.
    :raises ValueError: an entry of ``trusted_hosts`` is none of these.
    """

    def __init__(
        self,
        *,
        allow_http: bool = False,
        timeout: float = 10.0,
        connect_timeout: float = 5.0,
        look_up_timeout: float = 8.0,
        max_bytes: int = 512 * 1024,
        user_agent: str = "atproto-session",
        ca_bundle: str | None = None,
        network: Network | None = None,
        trusted_hosts: TrustedHosts | Iterable[str] = (),
        environment: Environment | None = None,
    ) -> None:
        self.allow_http = allow_http
        self.timeout = timeout
        self._connect_timeout = connect_timeout
        self._look_up_timeout = look_up_timeout
        self._max_bytes = max_bytes
        self._user_agent = user_agent
        self._environment = environment or Environment()
        self._verify = ca_bundle or (self._environment.trusted and self._environment.ca_bundle) or True
        self._network = (network or Network.default(allow_http=allow_http)).trusting(trusted_hosts)
        self.trusted_hosts = self._network.trusted
        self.contexts = Contexts()
        self._kept = self._adapter(pool_maxsize=_IDLE_OF_SERVER, max_idle=_IDLE, idle_for=_IDLE_FOR)
        self._fresh = self._adapter(max_idle=0)

    def _adapter(self, **options: Any) -> HardenedAdapter:
        return HardenedAdapter(network=self._network, contexts=self.contexts, **options)

    def close(self) -> None:
        """Close the connections that are kept."""
        self._kept.close()

    def check_url(self, url: object) -> str:
        """:func:`check_url` by the rules of this transport."""
        return check_url(url, allow_http=self.allow_http, trusted=self.trusted_hosts)

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
        lenient: bool = False,
    ) -> Response:
        """Make one request and read its answer, whatever its status. Where the connection was cut or refused before
        anything was sent, there is a second try.

        :param data: a mapping is sent as a form.
        :param redirects: how many to follow. By default a redirect is an answer as any other. Of ``headers`` and
            ``data`` nothing goes along.
        :param lenient: read any answer with a whole JSON object in it, whatever else is wrong with it: for answers that
            come once. Its body is then that object. What was wrong is logged.
        :raises TransportError: no answer; ``sent`` says whether the server may have seen the request.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        limit = self._max_bytes if max_bytes is None else max_bytes
        try:
            self.check_url(url)
        except ValueError as error:
            raise TransportError(f"not fetched, because the address {error}", retryable=False) from None
        if isinstance(data, Mapping):
            headers = {"Content-Type": "application/x-www-form-urlencoded", **(headers or {})}
            data = urlencode(data).encode()
        # With "" requests does not try to encode a query that is not there. With None it does, which takes long.
        request = requests.Request(method, url, headers=headers, data=data, params="")
        response = self._send(request, deadline, limit, lenient=lenient)
        for _ in range(redirects):
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return response
            try:
                target = self.check_url(urljoin(response.url, location))
            except ValueError as error:
                message = f"{origin(response.url)} redirects to an address that {printable(str(error))}"
                raise TransportError(message, sent=True, retryable=False) from None
            response = self._send(requests.Request("GET", target, params=""), deadline, limit, lenient=lenient)
        return response

    def get_json(
        self,
        url: str,
        *,
        media_type: str | None = "application/json",
        timeout: float | None = None,
        max_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Fetch a document: status 200, no redirect, a JSON object. A server that has a passing trouble (5xx) is asked
        once more.

        :param media_type: the content type it must have; ``None``: any.
        :raises TransportError: no answer.
        :raises UnusableResponse: another answer.
        """
        headers = {"Accept": media_type or "*/*"}
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        response = self.request("GET", url, headers=headers, timeout=timeout, max_bytes=max_bytes)
        if response.status >= 500 and (left := deadline - time.monotonic() - _PAUSE) > 0:
            time.sleep(_PAUSE)
            response = self.request("GET", url, headers=headers, timeout=left, max_bytes=max_bytes)
        if response.status != 200:
            raise UnusableResponse(
                f"with status {response.status} instead of 200",
                retryable=response.status in (408, 429) or response.status >= 500,
                status=response.status,
            )
        if media_type is not None and response.content_type != media_type:
            raise UnusableResponse(f"with {printable(response.content_type) or 'no type'} instead of {media_type}")
        try:
            document = response.json()
        except ValueError as error:
            raise UnusableResponse(f"with something that {error}") from None
        if not isinstance(document, dict):
            raise UnusableResponse("with JSON that is not an object")
        return document

    def _send(self, request: requests.Request, deadline: float, limit: int, *, lenient: bool) -> Response:
        # Nothing compressed is asked for. Some servers send it nevertheless.
        is_kept = request.method == "GET"
        defaults = {"User-Agent": self._user_agent, "Accept-Encoding": "identity"}
        request.headers = {**defaults, **({} if is_kept else {"Connection": "close"}), **(request.headers or {})}
        handled = sys.exception()
        is_last = False
        while True:
            bounds = Bounds(
                within=deadline - time.monotonic(),
                connect=self._connect_timeout,
                look_up=self._look_up_timeout,
                max_bytes=limit + _OVERHEAD,
                is_whole=(lambda received: find_answer(received) is not None) if lenient else None,
            )
            with contextlib.closing(bounds):
                try:
                    response = self._receive(request, bounds, limit, self._kept if is_kept else self._fresh)
                except (requests.RequestException, HTTPError, OSError) as error:
                    reason = _root_of(error, handled)
                    if is_kept and bounds.reused and not bounds.answered and isinstance(reason, _BY_CHANCE):
                        is_kept = False  # its server had closed it
                        continue
                    if not is_last and _is_worth_another_try(reason, bounds, deadline):
                        is_last = True
                        time.sleep(_PAUSE)
                        continue
                    failure = _transport_error(reason, request.url, sent=bounds.sent)
                    found = _find_rest(bounds, request.url, str(failure)) if lenient else None
                    if found is None:
                        # What a server sent must not get into a log with the error's cause: it may hold an echo.
                        raise failure from (None if lenient and bounds.sent else error)
                    return found
                return _find_better(response, bounds) if lenient else response

    def _receive(self, request: requests.Request, bounds: Bounds, limit: int, adapter: HardenedAdapter) -> Response:
        # Prepared and sent without a requests.Session, which is where cookies, ~/.netrc and redirects live.
        prepared = requests.PreparedRequest()
        prepared.prepare_method(request.method)
        prepared.prepare_url(request.url, request.params)
        prepared.prepare_headers(request.headers)
        prepared.prepare_body(request.data, files=None)
        answer = adapter.send(
            prepared,
            stream=True,
            timeout=bounds,
            verify=self._verify,
            proxies=self._environment.proxies_for(request.url) if self._environment.trusted else None,
        )
        with contextlib.closing(answer):
            body = bytearray()
            for piece in answer.raw.stream(16 * 1024, decode_content=False):
                body += piece
                if len(body) > limit:
                    answer.raw.close()  # the connection with it
                    raise Refused("its answer is too large")
        try:
            plain = undo_coding(bytes(body), answer.headers.get("Content-Encoding", ""), limit)
        except ValueError as error:
            raise Refused(f"its answer {error}") from None
        return Response(answer.status_code, answer.headers, plain, request.url)


def _find_rest(bounds: Bounds, url: str, trouble: str) -> Response | None:
    """The answer among what arrived, although ``trouble`` ended its reading; or ``None``."""
    if not bounds.received.lstrip().upper().startswith(b"HTTP/"):
        return None
    found = find_answer(bytes(bounds.received))
    if found is None:
        bounds.read_rest()
        found = find_answer(bytes(bounds.received))
    if found is None:
        return None
    _log.warning("%s; what it had answered was read all the same", trouble)
    return Response(found.status, found.headers, found.body, url)


def _find_better(response: Response, bounds: Bounds) -> Response:
    """``response``, or what else is in its bytes if it is not JSON."""
    server = origin(response.url)
    if response.is_object:
        if response.content_type != "application/json":
            _log.warning("%s answered with JSON that it does not call so", server)
        elif bounds.ended_early:
            _log.warning("%s did not say where its answer ends", server)
        return response
    found = find_answer(bytes(bounds.received))
    if found is None and not response.body.lstrip().startswith(b"<"):
        bounds.read_rest(_REST_WITHIN)
        found = find_answer(bytes(bounds.received))
    if found is None:
        return response
    _log.warning("%s answered with JSON in an odd form; it was read all the same", server)
    return Response(found.status, found.headers, found.body, response.url)


def _is_worth_another_try(reason: BaseException, bounds: Bounds, deadline: float) -> bool:
    """Whether a request that came to nothing has provably not been seen, and a second may do better."""
    number = reason.errno if isinstance(reason, OSError) else None
    by_chance = isinstance(reason, _BY_CHANCE) or (
        number == (socket.EAI_AGAIN if isinstance(reason, socket.gaierror) else errno.ENOTCONN)
    )
    return by_chance and not bounds.sent and deadline - time.monotonic() > _PAUSE


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ if error.__suppress_context__ else error.__context__


def _root_of(error: BaseException, handled: BaseException | None) -> BaseException:
    """What happened first, but not what the caller was handling already."""
    while (cause := _cause(error)) is not None and cause is not handled:
        error = cause
    return error


def is_passing(error: TransportError) -> bool:
    """Whether to look up again may do better. It does not for a host whose name does not exist."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror) and cause.errno in _UNKNOWN_NAME:
            return False
        cause = _cause(cause)
    return error.retryable


def _transport_error(error: BaseException, url: str, *, sent: bool) -> TransportError:
    """``error`` of requests or urllib3 in plain words, without the URL's path and query."""
    reason = next((text for kind, text in _REASONS if isinstance(error, kind)), printable(str(error)))
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"{reason} ({printable(error.verify_message)})"
    where = "no usable answer from" if sent else "cannot reach"
    is_final = isinstance(error, Refused | requests.exceptions.InvalidURL)
    return TransportError(f"{where} {origin(url)}: {reason}", sent=sent, retryable=not is_final)


_REASONS: list[tuple[type[BaseException], str]] = [
    (TooLate, "it was too late to send the request"),
    (TimeoutError, "timed out"),
    (socket.gaierror, "the name does not resolve"),
    (ConnectionRefusedError, "connection refused"),
    (ssl.SSLCertVerificationError, "its certificate is not valid"),
    (ssl.SSLError, "the TLS connection failed"),
    (ConnectionError, "the connection was cut off"),  # http.client.RemoteDisconnected is one
    (http.client.IncompleteRead, "the connection was cut off"),
    (http.client.HTTPException, "that is not HTTP"),
    (InvalidHeader, "that is not HTTP"),
]
