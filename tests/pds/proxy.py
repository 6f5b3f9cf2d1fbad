"""A reverse proxy on loopback that counts what passes and breaks what it is told to break.

It stands where a load balancer stands: the client knows nothing else, and the server behind it cannot tell whether an
answer arrived. ``before`` actions act instead of the server, ``after`` actions once it has answered, so that a refresh
token is spent although nobody hears of it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

#: What concerns one connection only (RFC 9110 section 7.6.1), plus the length, which is computed anew.
_HOP_BY_HOP = frozenset({"connection", "content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})
_UPSTREAM_TIMEOUT = 60.0


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def refresh_token(self) -> str | None:
        """The token that it is about to spend, if it is a refresh request."""
        kind = next((value for name, value in self.headers if name.lower() == "content-type"), "")
        fields: Mapping[str, Any] = {}
        if kind.startswith("application/x-www-form-urlencoded"):
            fields = dict(parse_qsl(self.body.decode("latin-1")))
        elif kind.startswith("application/json") and b'"refresh_token"' in self.body:
            fields = json.loads(self.body)
        return fields.get("refresh_token") if fields.get("grant_type") == "refresh_token" else None


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer. Headers are pairs, since ``Set-Cookie`` may come several times."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = field(default=b"", repr=False)

    @property
    def is_nonce_challenge(self) -> bool:
        """Whether the server only asked for a nonce (RFC 9449 section 8): nothing is spent, the request comes again."""
        return self.status in (400, 401) and (
            b'"use_dpop_nonce"' in self.body
            or any(name.lower() == "www-authenticate" and "use_dpop_nonce" in value for name, value in self.headers)
        )


@dataclass(frozen=True)
class Action:
    """What is done to a request; made by the functions below.

    :ivar forward: whether the server sees the request.
    :ivar cut: the connection is closed without an answer.
    :ivar replacement: sent in place of the server's answer.
    :ivar hold: seconds for which the answer is held back, at most; ends early with its fault's ``release``.
    :ivar until: the event that is to be the fault's ``release``.
    :ivar change: makes what is sent of the server's answer.
    :ivar drip: seconds between the bytes of the answer's body; what is left comes at once with the fault's ``release``.
    """

    forward: bool
    cut: bool = False
    replacement: Answer | None = None
    hold: float = 0.0
    until: threading.Event | None = None
    change: Callable[[Answer], Answer] | None = None
    drip: float = 0.0


def cut_before() -> Action:
    """Close the connection; the server never sees the request."""
    return Action(forward=False, cut=True)


def cut_after() -> Action:
    """Let the server answer, then close the connection without passing the answer on."""
    return Action(forward=True, cut=True)


def late(seconds: float = 60.0, *, until: threading.Event | None = None) -> Action:
    """Let the server answer, and pass the answer on ``seconds`` later, or when ``until`` or the fault's ``release`` is
    set."""
    return Action(forward=True, hold=seconds, until=until)


def status_before(status: int, headers: Mapping[str, str] | None = None) -> Action:
    """Answer with ``status`` and a JSON body; the server never sees the request."""
    return Action(forward=False, replacement=_error(status, headers))


def status_after(status: int, headers: Mapping[str, str] | None = None) -> Action:
    """Let the server answer, then send ``status`` and a JSON body instead, as a gateway does that lost patience."""
    return Action(forward=True, replacement=_error(status, headers))


def html_after(status: int = 200) -> Action:
    """Let the server answer, then send a page of HTML instead."""
    page = b"<!doctype html><title>Gateway</title><p>Not what you asked for."
    return Action(forward=True, replacement=Answer(status, (("Content-Type", "text/html; charset=utf-8"),), page))


def changed_after(**members: Any) -> Action:
    """Let the server answer, and replace these members of its JSON; ``None`` takes one out."""

    def change(answer: Answer) -> Answer:
        changed = json.loads(answer.body) | members
        changed = {name: value for name, value in changed.items() if value is not None}
        return Answer(answer.status, answer.headers, json.dumps(changed).encode())

    return Action(forward=True, change=change)


def drip_after(seconds: float = 0.05) -> Action:
    """Let the server answer, and pass the body of the answer on byte by byte, one in ``seconds``."""
    return Action(forward=True, drip=seconds)


def nonce_before() -> Action:
    """Ask for a nonce; the server never sees the request."""
    return Action(forward=False, replacement=_error(400, {"DPoP-Nonce": "made-up"}, "use_dpop_nonce"))


def _error(status: int, headers: Mapping[str, str] | None, error: str = "injected") -> Answer:
    body = json.dumps({"error": error, "error_description": "Injected by the test"}).encode()
    return Answer(status, (("Content-Type", "application/json"), *(headers or {}).items()), body)


@dataclass
class Fault:
    """An armed action.

    :ivar arrived: set when a request met the fault; for an ``after`` action the server has then answered it.
    :ivar fired: set when the fault has acted: the connection is closed, the replacement or the held answer is sent.
    :ivar release: set it to let a held answer go.
    """

    path: str
    action: Action
    left: int
    arrived: threading.Event = field(default_factory=threading.Event)
    fired: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Refresh:
    """A refresh request that reached the proxy and was more than the prelude to a nonce.

    :ivar status: what the server answered, whatever the client got to see; ``None`` if the server never saw it.
    """

    refresh_token: str = field(repr=False)
    status: int | None


class FaultProxy:
    """Listens on a free port of 127.0.0.1 from the moment it is made; ``upstream`` is set before the first request.

    A context manager that ends with :meth:`close`.
    """

    def __init__(self, upstream: str = "") -> None:
        self.upstream = upstream
        self._guard = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._faults: list[Fault] = []
        self._armed: list[Fault] = []
        self._refreshes: list[Refresh] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.reset()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def count(self, path: str) -> int:
        """How many requests to ``path`` arrived, nonce challenges and broken ones included."""
        with self._guard:
            return self._counts[path]

    def refreshes(self) -> list[Refresh]:
        """Every refresh request, nonce challenges left out, in the order in which they were answered."""
        with self._guard:
            return list(self._refreshes)

    def refresh_tokens(self) -> list[str]:
        """The refresh tokens of :meth:`refreshes`. One that is in there twice was sent twice."""
        return [refresh.refresh_token for refresh in self.refreshes()]

    def arm(self, path: str, action: Action, times: int = 1) -> Fault:
        """Apply ``action`` to the next ``times`` requests to ``path``. Faults of one path act in the order of arming.

        An ``after`` action lets a nonce challenge pass and waits for the request that follows.
        """
        fault = Fault(path, action, times)
        if action.until is not None:
            fault.release = action.until
        with self._guard:
            self._faults.append(fault)
            self._armed.append(fault)
        return fault

    def reset(self) -> None:
        """Forget the counts and the faults, and let go of every answer that is still held."""
        with self._guard:
            self._counts.clear()
            self._refreshes.clear()
            self._armed.clear()
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.release.set()

    # Called by the handler

    def handle(self, request: Request) -> tuple[Answer | None, Fault | None]:
        """The answer to send, ``None`` to cut the connection, and the fault that decided it."""
        path = request.path
        with self._guard:
            self._counts[path] += 1
        answer = None
        fault = self._take(path, forward=False)
        if fault is None:
            answer = self._forward(request)
            if answer.is_nonce_challenge:
                return answer, None
            fault = self._take(path, forward=True)
        if (token := request.refresh_token) is not None:
            with self._guard:
                self._refreshes.append(Refresh(token, None if answer is None else answer.status))
        if fault is None:
            return answer, None
        fault.arrived.set()
        if fault.action.hold:
            fault.release.wait(fault.action.hold)
        if fault.action.change is not None and answer is not None:
            answer = fault.action.change(answer)
        return None if fault.action.cut else fault.action.replacement or answer, fault

    def _take(self, path: str, *, forward: bool) -> Fault | None:
        with self._guard:
            fault = next((fault for fault in self._armed if fault.path == path), None)
            if fault is None or fault.action.forward is not forward:
                return None
            fault.left -= 1
            if not fault.left:
                self._armed.remove(fault)
            return fault

    def _forward(self, request: Request) -> Answer:
        upstream = urlsplit(self.upstream)
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=_UPSTREAM_TIMEOUT)
        try:
            # The Host header stays the client's: the server takes itself to be at the proxy's address.
            connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers:
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            if request.body or request.method in ("POST", "PUT", "PATCH"):
                connection.putheader("Content-Length", str(len(request.body)))
            connection.endheaders(request.body or None)
            response = connection.getresponse()
            kept = tuple((name, value) for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP)
            return Answer(response.status, kept, response.read())
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a client may leave when it likes
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Header and body are two writes; with Nagle's algorithm the second one waits for the client's delayed ACK.
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        answer, fault = self.server.proxy.handle(
            Request(self.command, self.path, tuple(self.headers.items()), self._body())
        )
        try:
            if answer is None:
                self.close_connection = True
                with contextlib.suppress(OSError):  # the client may have left already
                    self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self._send(answer, fault)
        finally:
            if fault is not None:
                fault.fired.set()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if answer.status >= 200 and answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = 0
        if fault is not None and fault.action.drip:
            while sent < len(answer.body) and not fault.release.wait(fault.action.drip):
                self.wfile.write(answer.body[sent : sent + 1])
                sent += 1
        self.wfile.write(answer.body[sent:])

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests read the counts."""
