"""Django in the process of the tests: the project of ``docs/examples``, and further databases for single tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "django_project"
#: The alias of a test's own database.
OWN = "own"
_ENGINES = {"postgresql": "django.db.backends.postgresql", "mysql": "django.db.backends.mysql"}


def set_up() -> None:
    """Make Django ready, once for each process."""
    if str(EXAMPLE) not in sys.path:
        sys.path.insert(0, str(EXAMPLE))
    import django
    import pymysql

    pymysql.install_as_MySQLdb()
    # Not for the programs that other tests start.
    before = os.environ.get("DJANGO_SETTINGS_MODULE")
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.contrib.django.settings"
    try:
        django.setup()
    finally:
        del os.environ["DJANGO_SETTINGS_MODULE"]
        if before is not None:
            os.environ["DJANGO_SETTINGS_MODULE"] = before


@contextmanager
def emptied() -> Iterator[None]:
    """At the end of the block nobody is in the project any more, and its client is closed."""
    from django.contrib.admin.models import LogEntry
    from django.contrib.auth import get_user_model
    from django.contrib.sessions.models import Session

    from atproto_session.contrib.django import conf
    from atproto_session.contrib.django.models import Account, PendingLogin, StoredSession

    yield
    conf.reset()
    user = get_user_model()
    permissions: Any = user._meta.get_field("user_permissions").remote_field
    for table in (LogEntry, StoredSession, PendingLogin, Account, permissions.through, user, Session):
        table.objects.all()._raw_delete("default")


def database_of(url: str, **more: Any) -> dict[str, Any]:
    """The entry of ``DATABASES`` for the URL of a server."""
    parts = urlsplit(url)
    options = {name: values[0] for name, values in parse_qs(parts.query).items()}
    return {
        "ENGINE": _ENGINES[parts.scheme],
        "NAME": parts.path.lstrip("/"),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname or "",
        "PORT": str(parts.port or ""),
        "OPTIONS": options,
        **more,
    }


def sqlite_in(folder: Path, **more: Any) -> dict[str, Any]:
    return {"ENGINE": "django.db.backends.sqlite3", "NAME": str(folder / "db.sqlite3"), **more}


def use(database: dict[str, Any], alias: str = OWN) -> None:
    """Let ``alias`` be that database in this process."""
    set_up()
    from django.db import connections

    given = {"default": connections.settings["default"], alias: database}
    if alias not in connections.settings or connections.settings[alias]["NAME"] != database["NAME"]:
        forget(alias)
    connections.settings[alias] = connections.configure_settings(given)[alias]


def forget(alias: str = OWN) -> None:
    from django.db import connections
    from django.db.backends.base.base import BaseDatabaseWrapper

    if alias in connections.settings:
        BaseDatabaseWrapper.close(connections[alias])  # also one in memory, which SQLite's own would keep
        del connections[alias]
        del connections.settings[alias]


def create_tables(alias: str = OWN) -> None:
    """Those of the store, without those of users that the accounts refer to."""
    from django.db import connections

    from atproto_session.contrib.django.models import PendingLogin, StoredSession

    with connections[alias].schema_editor() as editor:
        editor.create_model(StoredSession)
        editor.create_model(PendingLogin)


def open_django_store(database: dict[str, Any], **options: Any) -> Any:
    """The store in ``database``; in any process."""
    use(database)
    from atproto_session.contrib.django.store import DjangoStore

    return DjangoStore(OWN, **options)
