"""HTTP as the local network speaks it: requests and responses as plain data, and a listener for each origin.

Everything above this module turns a :class:`Request` into a :class:`Response` and never sees a socket.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, parse_qsl

logger = logging.getLogger(__name__)

#: What becomes of a connection.
Ending = Literal["keep", "close", "reset"]

_CHUNK = 64 * 1024
_FORM = "application/x-www-form-urlencoded"


class ConnectionCut(Exception):
    """Raised instead of returning a response: close the connection without a word."""


@dataclass(frozen=True)
class Request:
    """One HTTP request.

    :ivar origin: the origin of the listener that got it, such as ``http://localhost:49152``.
    :ivar path: as it came, percent-encoding included, without the query.
    :ivar query: the query string without its question mark.
    :ivar headers: names in any case.
    :ivar marks: orders that a fault left for the code that processes the request.
    """

    method: str
    origin: str
    path: str
    query: str = field(default="", repr=False)
    headers: Message = field(default_factory=Message, repr=False)
    body: bytes = field(default=b"", repr=False)
    marks: frozenset[str] = frozenset()

    @property
    def url(self) -> str:
        """The URL without its query, which is what a DPoP proof names as ``htu``."""
        return self.origin + self.path

    @property
    def parameters(self) -> dict[str, list[str]]:
        """The query's parameters."""
        return parse_qs(self.query, keep_blank_values=True)

    @property
    def form(self) -> dict[str, str]:
        """The form-encoded body.

        :raises ValueError: the body is not form-encoded, or a parameter comes twice (RFC 6749 section 3.2).
        """
        if self.headers.get_content_type() != _FORM:
            raise ValueError(f"Expected a body of type {_FORM}")
        pairs = parse_qsl(self.body.decode("utf-8"), keep_blank_values=True, strict_parsing=True)
        form = dict(pairs)
        if len(form) != len(pairs):
            raise ValueError("A parameter is repeated")
        return form


@dataclass(frozen=True)
class Drip:
    """Sends an answer one byte every ``interval`` seconds until ``release`` is set, then the rest at once.

    :ivar body_only: whether the status line and the headers go out at once.
    """

    interval: float
    release: threading.Event
    body_only: bool = False


@dataclass(frozen=True)
class Response:
    """One HTTP response.

    :ivar chunked: sent in chunks, without a ``Content-Length``.
    :ivar drip: how slowly it is sent, or ``None`` for at once.
    :ivar rewrite: makes what is really sent of the bytes of the head and of the body.
    :ivar ending: what becomes of the connection after that: ``"keep"``, ``"close"`` or ``"reset"``.
    """

    status: int = 200
    body: bytes = field(default=b"", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    chunked: bool = False
    drip: Drip | None = None
    rewrite: Callable[[bytes, bytes], bytes] | None = None
    ending: Ending = "close"

    @classmethod
    def of_json(cls, value: object, status: int = 200, content_type: str = "application/json") -> Response:
        return cls(status, json.dumps(value).encode(), {"Content-Type": content_type})

    @classmethod
    def of_text(cls, text: str, status: int = 200, content_type: str = "text/plain; charset=utf-8") -> Response:
        return cls(status, text.encode(), {"Content-Type": content_type})

    def with_headers(self, **headers: str) -> Response:
        """The same with these headers as well; an underscore stands for a hyphen."""
        added = {name.replace("_", "-"): value for name, value in headers.items()}
        return replace(self, headers={**self.headers, **added})

    def json(self) -> Any:
        return json.loads(self.body)

    def encoded(self, *, with_body: bool) -> tuple[bytes, bytes]:
        """The bytes of the head and of the body."""
        try:
            phrase = HTTPStatus(self.status).phrase
        except ValueError:
            phrase = "Unknown"
        length = "Transfer-Encoding: chunked" if self.chunked else f"Content-Length: {len(self.body)}"
        lines = [
            f"HTTP/1.1 {self.status} {phrase}",
            *(f"{name}: {value}" for name, value in self.headers.items()),
            length,
        ]
        # One line each, whatever a value holds: some of them are echoed from a request.
        lines = [line.replace("\r", "").replace("\n", "") for line in lines]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
        if not with_body:
            return head, b""
        return head, _in_chunks(self.body) if self.chunked else self.body


def _in_chunks(body: bytes) -> bytes:
    pieces = [body[start : start + _CHUNK] for start in range(0, len(body), _CHUNK)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


class Listener:
    """An HTTP/1.1 server at an origin of its own, reachable from this machine alone.

    :param respond: called in a thread of the connection's; may block, and may raise :class:`ConnectionCut`.
    """

    def __init__(self, respond: Callable[[Request], Response]) -> None:
        self._server = _Server(respond)
        self.origin = self._server.origin
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True, name=self.origin)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and close every connection."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.close_connections()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Clients of several processes may all connect in the same instant.
    request_queue_size = 1024

    def __init__(self, respond: Callable[[Request], Response]) -> None:
        self.respond = respond
        self._connections: set[socket.socket] = set()
        self._changed = threading.Condition()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.origin = f"http://localhost:{self.server_port}"

    def server_bind(self) -> None:
        # HTTPServer asks the resolver for this machine's full name, which can take seconds and is not needed.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._changed:
            self._connections.discard(request)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up is no news here; several faults provoke exactly that.
        logger.debug("connection ended by an error", exc_info=True)

    def close_connections(self, timeout: float = 5.0) -> None:
        with self._changed:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._connections, timeout)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        request = Request(self.command, self.server.origin, path, query, self.headers, self._read_body())
        try:
            response = self.server.respond(request)
        except ConnectionCut:
            self._hang_up()
            return
        except Exception:
            logger.exception("the local network failed to answer %s %s", self.command, path)
            response = Response.of_json({"error": "server_error", "error_description": "Server error"}, 500)
        self._send(response)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()  # the empty line; no client sends trailers
        return b"".join(pieces)

    def _send(self, response: Response) -> None:
        head, body = response.encoded(with_body=self.command != "HEAD")
        if response.rewrite is not None:
            self.wfile.write(response.rewrite(head, body))
            self._end(response.ending)
        elif response.drip is None:
            self.wfile.write(head + body)
        else:
            self._drip(head, body, response.drip)

    def _drip(self, head: bytes, body: bytes, drip: Drip) -> None:
        slow = body if drip.body_only else head + body
        if drip.body_only:
            self.wfile.write(head)
        for sent in range(len(slow)):
            if drip.release.wait(drip.interval):
                self.wfile.write(slow[sent:])
                return
            self.wfile.write(slow[sent : sent + 1])

    def _end(self, ending: Ending) -> None:
        if ending == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
            self.connection.close()
        elif ending == "close":
            self._hang_up()
        else:
            self.close_connection = False

    def _hang_up(self) -> None:
        self.close_connection = True
        # A process forked meanwhile may hold this socket too, so closing it would not end the connection.
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: request lines belong to no log of the tests."""
