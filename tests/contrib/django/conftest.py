"""What the tests of Django share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import project

project.set_up()


@pytest.fixture
def own_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A database with the store's tables, under the alias ``own``: of SQLite, or of the server that the parameter
    names."""
    kind = getattr(request, "param", "sqlite")
    if kind == "sqlite":
        database = project.sqlite_in(tmp_path, CONN_MAX_AGE=None)
    else:
        database = project.database_of(request.getfixturevalue(f"{kind}_url"), CONN_MAX_AGE=None)
    project.use(database)
    project.create_tables()
    yield database
    project.forget()
