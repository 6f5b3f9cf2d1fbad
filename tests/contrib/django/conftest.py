"""What the tests of Django share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atproto_session.testing.network import LocalNetwork

from ...core import RESTLESS
from . import project

project.set_up()

from django.test import Client  # noqa: E402 - Django has to be set up first

from atproto_session.contrib.django.test import local_network  # noqa: E402


def users() -> Any:
    """Where the users are; the stubs know less of it."""
    from django.contrib.auth import get_user_model

    return get_user_model()._default_manager


class Browser(Client):
    """One that is where a client for development is. A view that fails is a 500 to it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"SERVER_NAME": "127.0.0.1", "raise_request_exception": False, **options})


@pytest.fixture
def own_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A database with the store's tables, under the alias ``own``: of SQLite, or of the server that the parameter
    names."""
    kind = getattr(request, "param", "sqlite")
    if kind == "sqlite":
        database = project.sqlite_in(tmp_path, CONN_MAX_AGE=None)
    else:
        database = project.database_of(request.getfixturevalue(f"{kind}_url"), CONN_MAX_AGE=None)
        if kind == "postgresql":
            database["OPTIONS"]["application_name"] = uuid.uuid4().hex  # to tell its connections from those of others
    project.use(database)
    project.create_tables()
    yield database
    project.forget()


@pytest.fixture(scope="session")
def django_database() -> Iterator[None]:
    """The project's own tables."""
    from django.core.management import call_command
    from django.db import connections

    call_command("migrate", verbosity=0)
    yield
    connections.close_all()


@pytest.fixture
def site(network: LocalNetwork, django_database: None) -> Iterator[LocalNetwork]:
    """The project is there, with nobody in it, and its accounts are those of the network."""
    with project.emptied(), local_network(network, times=RESTLESS):
        yield network


@pytest.fixture
def browser() -> Client:
    return Browser()


@pytest.fixture
def another_browser() -> Client:
    return Browser()
