"""A Flask application that its users log in to with their AT Protocol accounts.

``SECRET_KEY=... flask --app flask_app run``, then open http://127.0.0.1:5000 (not ``localhost``: the log-in comes back
to ``127.0.0.1``, and the browser must find its cookie there).
"""

from __future__ import annotations

import math
import os
import secrets
from typing import Any

from flask import Flask, redirect, request, session, url_for
from markupsafe import escape

from atproto_session import (
    ClientMetadata,
    DiscoveryError,
    IdentityError,
    OAuthCallbackError,
    OAuthClient,
    SessionError,
)

LOGIN_FORM = '<form method="post" action="/login"><input name="account"> <button>Log in</button></form>'
LOGOUT_FORM = '<form method="post" action="/logout"><button>Log out</button></form>'


def create_app(**options: Any) -> Flask:
    app = Flask(__name__)
    # Not "Strict": the browser comes back from another site, and has to bring its cookie along.
    app.config.update(SECRET_KEY=os.environ["SECRET_KEY"], SESSION_COOKIE_SAMESITE="Lax")
    client = OAuthClient(
        ClientMetadata.loopback(
            scope="atproto transition:generic",
            redirect_uris=["http://127.0.0.1:5000/oauth/callback"],
        ),
        **{"store": "sqlite:///sessions.db", **options},
    )

    @app.get("/")
    def home() -> Any:
        if "did" not in session:
            return LOGIN_FORM
        account = client.restore(session["did"])
        account.total_timeout = 10  # seconds for a request, all told
        handle = account.get("/xrpc/com.atproto.server.getSession").json()["handle"]
        return f"<p>Hello {escape(handle)}</p>{LOGOUT_FORM}"

    @app.post("/login")
    def login() -> Any:
        browser = session.setdefault("browser", secrets.token_urlsafe(16))
        try:
            return redirect(client.authorize(request.form["account"], bound_to=browser))
        except (IdentityError, DiscoveryError) as error:
            return f"<p>{escape(error)}</p>{LOGIN_FORM}", 400

    @app.get("/oauth/callback")
    def callback() -> Any:
        try:
            result = client.callback(request.args.to_dict(flat=False), bound_to=session.get("browser"))
        except OAuthCallbackError as error:  # declined, twice, or another browser's
            return f"<p>{escape(error)}</p>{LOGIN_FORM}", 400
        session.clear()
        session["did"] = result.session.did
        return redirect(url_for("home"))

    @app.post("/logout")
    def logout() -> Any:
        did = session.pop("did", None)
        if did is not None:
            client.revoke(did)
        return redirect(url_for("home"))

    @app.errorhandler(SessionError)
    def session_error(error: SessionError) -> Any:
        if error.login_required:
            session.clear()
            return redirect(url_for("home"))
        if error.retryable:
            wait = 5 if error.retry_after is None else math.ceil(error.retry_after)
            return "Please try again in a moment.", 503, {"Retry-After": str(wait)}
        raise error

    return app
