"""The Flask example for gunicorn: ``gunicorn tests.programs.site:application``. ``SITE_SCENE`` tells where it is."""

from __future__ import annotations

import json
import os
import runpy
from typing import Any

from atproto_session import OAuthClient
from atproto_session.contrib.flask import ATProto

from ..core import RESTLESS
from ..processes import ROOT

scene: dict[str, Any] = json.loads(os.environ["SITE_SCENE"])
create_app = runpy.run_path(str(ROOT / "docs" / "examples" / "flask_app.py"))["create_app"]
application: Any = create_app(
    SECRET_KEY="a secret of the tests",
    ATPROTO_STORE=scene["store"],
    ATPROTO_OPTIONS={"times": RESTLESS, **scene["options"]},
)


@application.after_request  # type: ignore[untyped-decorator]
def sign(response: Any) -> Any:
    """Tell which process has answered."""
    response.headers["X-Worker"] = str(os.getpid())
    return response


def client() -> OAuthClient:
    with application.app_context():
        return ATProto().client
