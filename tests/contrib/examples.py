"""The applications of ``docs/examples/``, as they are."""

from __future__ import annotations

import runpy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flask import Flask

from atproto_session.contrib.flask import ATProto

from ..processes import ROOT

EXAMPLES = ROOT / "docs" / "examples"


@contextmanager
def flask_example(store: str, options: Mapping[str, Any], **settings: Any) -> Iterator[Flask]:
    """``flask_app.py``, with an ``OAuthClient`` that is given ``options``."""
    create_app = runpy.run_path(str(EXAMPLES / "flask_app.py"))["create_app"]
    given = {"SECRET_KEY": "for tests", "ATPROTO_STORE": store, "ATPROTO_OPTIONS": options, **settings}
    app: Flask = create_app(**given)
    yield app
    with app.app_context():
        ATProto().client.close()
