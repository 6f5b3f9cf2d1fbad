"""A site whose users log in with their AT Protocol accounts, write a post, and log out.

``FLASK_SECRET_KEY=... flask --app flask_app run``, then open http://127.0.0.1:5000. In production, set
``FLASK_ATPROTO_PUBLIC_URL`` and ``FLASK_ATPROTO_KEYS`` as well.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from flask import Flask, flash, redirect, render_template_string, request, url_for

from atproto_session.contrib.flask import ATProto, current_account, login_required

HOME = """<!doctype html>
<title>Example</title>
{% for message in get_flashed_messages() %}<p role="status">{{ message }}</p>{% endfor %}
{% if current_account %}
  <p>Hello {{ current_account.handle or current_account.did }}</p>
  <p><a href="{{ url_for('account') }}">Your account</a></p>
  <form method="post" action="{{ url_for('post') }}">
    <label>What is up? <input name="text" maxlength="300" required></label>
    <button>Post</button>
  </form>
  {% include "atproto/logout_form.html" %}
{% else %}
  {% include "atproto/login_form.html" %}
{% endif %}
"""

ACCOUNT = """<!doctype html>
<title>Your account</title>
<p>{{ account.handle }} is {{ account.did }}</p>
"""


def create_app(**settings: Any) -> Flask:
    app = Flask(__name__)
    app.config.update(ATPROTO_NAME="Example", ATPROTO_SCOPE="atproto transition:generic")
    app.config.from_prefixed_env()
    app.config.update(settings)
    ATProto(app)

    @app.get("/")
    def home() -> str:
        return render_template_string(HOME)

    @app.get("/account")
    @login_required
    def account() -> str:
        answer = current_account.session.get("/xrpc/com.atproto.server.getSession")
        answer.raise_for_status()
        return render_template_string(ACCOUNT, account=answer.json())

    @app.post("/post")
    @login_required
    def post() -> Any:
        record = {"text": request.form["text"], "createdAt": datetime.now(UTC).isoformat()}
        call = {"repo": current_account.did, "collection": "app.bsky.feed.post", "record": record}
        current_account.session.post("/xrpc/com.atproto.repo.createRecord", json=call).raise_for_status()
        flash("Posted.")
        return redirect(url_for("home"))

    return app
