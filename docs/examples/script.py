"""Log in from a script, and call an API.

``python script.py alice.example.com`` opens a browser to log in with, and ``python script.py did:plc:...`` goes on with
the session that is stored: from whatever directory it is started, by cron too. Accounts that the command
``atproto-session login`` has logged in are there as well.
"""

from __future__ import annotations

import sys
import time
import webbrowser
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from atproto_session import OAuthClient, OAuthSession, SessionError

Browser = Callable[[str], object]


class CallbackServer(HTTPServer):
    """A web server on a free port of this machine, for the one request that ends a log-in."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CallbackHandler)
        self.origin = f"http://127.0.0.1:{self.server_port}"
        self.callback: str | None = None

    def wait(self, seconds: float = 300) -> str:
        deadline = time.monotonic() + seconds
        while self.callback is None:
            self.timeout = max(0, deadline - time.monotonic())
            if not self.timeout:
                raise TimeoutError("nobody came back from the browser")
            self.handle_request()
        return self.callback


class CallbackHandler(BaseHTTPRequestHandler):
    server: CallbackServer
    timeout = 2  # seconds: browsers open connections that they then do not use

    def do_GET(self) -> None:
        if not self.path.startswith("/?"):  # the browser's wish for an icon
            self.send_error(404)
            return
        self.server.callback = self.server.origin + self.path
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        self.wfile.write(b"You can close this window.\n")

    def log_message(self, *args: object) -> None:
        """Nothing: the address holds the authorization code."""


def log_in(client: OAuthClient, account: str, open_browser: Browser = webbrowser.open) -> OAuthSession:
    with CallbackServer() as server:
        url = client.authorize(account, redirect_uri=f"{server.origin}/")
        print("Log in at", url)
        open_browser(url)
        return client.callback(server.wait()).session


def restore(client: OAuthClient, did: str) -> OAuthSession | None:
    try:
        return client.restore(did)
    except SessionError as error:
        if not error.login_required:
            raise
        return None


def main(account: str, *, open_browser: Browser = webbrowser.open, **options: Any) -> None:
    with OAuthClient.for_scripts(**options) as client:
        session = restore(client, account) if account.startswith("did:") else None
        if session is None and not sys.stdin.isatty():  # cron: nobody is there who could
            sys.exit(f"{account} has to log in: run this at a terminal, or atproto-session login {account}")
        if session is None:
            session = log_in(client, account, open_browser)
        session.total_timeout = 30  # seconds for a request, all told
        print(session.get("/xrpc/com.atproto.server.getSession").json())
        print(f"The next time: python script.py {session.did}")


if __name__ == "__main__":
    main(sys.argv[1])
