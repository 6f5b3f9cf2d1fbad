"""Processes that are killed, over servers: see :mod:`tests.topics.test_death`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from atproto_session.testing.network import LocalNetwork

from ..test_death import (
    DeathScene,
    another_row,
    row,
    test_killed_at_every_step_of_a_log_out,
    test_killed_at_every_step_of_a_refresh,
    test_killed_at_every_step_of_storing_a_log_in,
    test_killed_while_the_answer_is_awaited,
    test_the_others_go_on_when_one_is_killed,
)

__all__ = [
    "another_row",
    "row",
    "test_killed_at_every_step_of_a_log_out",
    "test_killed_at_every_step_of_a_refresh",
    "test_killed_at_every_step_of_storing_a_log_in",
    "test_killed_while_the_answer_is_awaited",
    "test_the_others_go_on_when_one_is_killed",
]


@pytest.fixture(params=["redis", "postgresql", "mysql"])
def scene(request: pytest.FixtureRequest, network: LocalNetwork) -> Iterator[DeathScene]:
    with closing(DeathScene(network, request.getfixturevalue(f"{request.param}_url"))) as scene:
        yield scene
        scene.check_uses()
