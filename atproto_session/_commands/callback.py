"""The web server on the loopback that a log-in comes back to."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

from ..client import CallbackResult, OAuthClient
from ..errors import OAuthCallbackError, SessionError

#: How long a connection may be silent, in seconds: browsers open some that they do not use.
_SILENCE = 5.0
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>body {{ font: 1.1rem/1.5 system-ui, sans-serif; max-width: 30rem; margin: 4rem auto;
padding: 0 1rem; color-scheme: light dark }}</style></head><body><h1>{title}</h1><p>{text}</p></body></html>
"""


class Stranger(Exception):
    """An address that belongs to no log-in of this command."""


class LogIn:
    """One log-in, from the URL for the browser to the session."""

    def __init__(self, client: OAuthClient, session_id: str | None) -> None:
        self._client = client
        self._session_id = session_id
        self._state = secrets.token_urlsafe(16)

    def begin(self, account: str, scope: str, redirect_uri: str | None = None) -> str:
        """The URL for the browser."""
        return self._client.authorize(account, scope=scope, state=self._state, redirect_uri=redirect_uri)

    def end(self, address: str) -> CallbackResult:
        """
        :raises Stranger: ``address`` is that of another log-in, or of none.
        :raises SessionError: the log-in has failed.
        """
        try:
            result = self._client.callback(address, session_id=self._session_id)
        except OAuthCallbackError as error:
            if error.state != self._state:
                raise Stranger(str(error)) from error
            raise
        return result


class CallbackServer:
    """Waits on a free port of this machine for the request that ends a log-in. Whatever else comes is answered, and
    changes nothing. A context manager.

    :param end: ends the log-in with the whole address of a request; called in the request's thread, so that the page in
        the browser can tell how it ended.
    """

    def __init__(self, end: Callable[[str], CallbackResult]) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.end = end
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.redirect_uri = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait(self, seconds: float) -> CallbackResult | None:
        """How the log-in ended; ``None`` if it has not within so many seconds.

        :raises SessionError: it failed.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                # In pieces: on Windows, Ctrl-C does not end a wait.
                outcome = self._server.outcomes.get(timeout=min(left, 0.5))
            except queue.Empty:
                continue
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    end: Callable[[str], CallbackResult]

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.outcomes: queue.SimpleQueue[CallbackResult | Exception] = queue.SimpleQueue()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # HTTPServer asks the resolver for this machine's full name, which can take seconds and is not needed.
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "127.0.0.1", self.socket.getsockname()[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a browser that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _SILENCE

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        given = parse_qs(parts.query)
        if parts.path != "/" or "state" not in given or not {"code", "error"} & set(given):
            self._answer(404, "Nothing is here", "This page waits for the end of a log-in.")
            return
        try:
            result = self.server.end(f"http://127.0.0.1:{self.server.server_port}{self.path}")
        except Stranger as error:
            self._answer(400, "This is another log-in", str(error))
        except SessionError as error:
            self._answer(400, "The log-in has failed", str(error))
            self.server.outcomes.put(error)
        except Exception as error:  # noqa: BLE001 - raised where the log-in is waited for
            self._answer(500, "The log-in has failed", "The terminal says more.")
            self.server.outcomes.put(error)
        else:
            who = result.handle or result.session.did
            self._answer(200, f"{who} is logged in", "You can close this window and go back to the terminal.")
            self.server.outcomes.put(result)

    def _answer(self, status: int, title: str, text: str) -> None:
        page = _PAGE.format(title=escape(title), text=escape(text)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the address holds the authorization code."""
