"""Workers on several machines that share one server. ``make machines`` makes many more rounds of this."""

from __future__ import annotations

import os

import pytest

from ..machines import FEW, check_possible, go_through, go_without_locks
from ..servers import Missing


@pytest.fixture(autouse=True)
def possible(redis_server: str, postgresql_server: str, mysql_server: str) -> None:
    try:
        check_possible()
    except Missing as missing:
        if os.environ.get("CI"):  # where nobody would notice
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["redis", "postgresql", "mysql"])
def test_what_is_promised_on_many_machines(engine: str) -> None:
    # To wait for the end of a window takes 15 s: once for each kind of store.
    numbers = FEW | {"pauses": 0} if engine == "mysql" else FEW
    assert len(list(go_through(engine, numbers))) == (8 if engine == "redis" else 7)


@pytest.mark.parametrize("engine", ["redis", "postgresql"])
def test_compare_and_set_is_enough(engine: str) -> None:
    list(go_without_locks(engine, FEW))
