"""Flask-Login, with AT Protocol accounts; and only those of members may log in.

``FLASK_SECRET_KEY=... FLASK_MEMBERS='["did:plc:..."]' flask --app flask_members run``
"""

from __future__ import annotations

from typing import Any

from flask import Flask, abort
from flask_login import LoginManager, UserMixin, current_user, login_required

from atproto_session.contrib.flask import ATProto, current_account, logged_in


class User(UserMixin):
    def __init__(self, did: str) -> None:
        self.id = did


def create_app(**settings: Any) -> Flask:
    app = Flask(__name__)
    app.config.from_prefixed_env()
    app.config.update(settings)
    ATProto(app)

    login_manager = LoginManager(app)
    login_manager.login_view = "atproto.login"

    @login_manager.request_loader
    def load_user(request: Any) -> User | None:
        return User(current_account.did) if current_account.did else None

    def only_members(sender: Flask, account: Any, handle: str | None) -> None:
        if account.did not in app.config["MEMBERS"]:
            abort(403)

    logged_in.connect(only_members, app, weak=False)

    @app.get("/")
    @login_required
    def home() -> str:
        return f"Hello {current_user.id}"

    return app
