"""The Django example for gunicorn: ``gunicorn tests.programs.django_site:application``. As a program, it makes the
tables. ``SITE_SCENE`` tells where it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from ..processes import ROOT

sys.path.insert(0, str(ROOT / "docs" / "examples" / "django_project"))
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.programs.django_settings"

from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application

from atproto_session import OAuthClient

site = get_wsgi_application()


def application(environ: Any, start_response: Any) -> Iterable[bytes]:
    """The site, which tells which process has answered."""

    def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
        return start_response(status, [*headers, ("X-Worker", str(os.getpid()))], *more)

    return site(environ, start)


def client() -> OAuthClient:
    from atproto_session.contrib.django.conf import get_client

    return get_client()


if __name__ == "__main__":
    execute_from_command_line(["manage.py", "migrate", "--verbosity", "0"])
