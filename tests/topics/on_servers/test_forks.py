"""Processes that fork, over servers: see :mod:`tests.topics.test_forks`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from atproto_session.testing.network import LocalNetwork

from ..test_forks import (
    ForkScene,
    pytestmark,
    test_a_child_closes_its_client_without_waiting_for_its_parent,
    test_a_child_takes_what_the_refresh_of_its_parent_brings,
    test_parent_and_children_write_at_the_same_time,
    test_the_child_of_a_parent_that_was_killed_gets_the_lock,
    test_what_a_child_does_is_nothing_to_the_refresh_of_its_parent,
    test_workers_that_were_forked_after_the_client_was_made,
)

__all__ = [
    "pytestmark",
    "test_a_child_closes_its_client_without_waiting_for_its_parent",
    "test_a_child_takes_what_the_refresh_of_its_parent_brings",
    "test_parent_and_children_write_at_the_same_time",
    "test_the_child_of_a_parent_that_was_killed_gets_the_lock",
    "test_what_a_child_does_is_nothing_to_the_refresh_of_its_parent",
    "test_workers_that_were_forked_after_the_client_was_made",
]


@pytest.fixture(params=["redis", "postgresql", "mysql"])
def scene(request: pytest.FixtureRequest, network: LocalNetwork) -> Iterator[ForkScene]:
    with closing(ForkScene(network, request.getfixturevalue(f"{request.param}_url"))) as scene:
        yield scene
    assert {token for token, uses in network.refresh_token_uses.items() if uses > 1} == scene.lost
