"""Overlaps, over servers: see :mod:`tests.topics.test_overlaps`."""

from __future__ import annotations

import pytest

from ..test_overlaps import (
    clean_up,
    scene,
    scenes,
    test_a_log_in_is_not_replaced,
    test_a_log_out_is_final,
    test_of_a_log_in_and_a_log_out_the_later_counts,
    test_two_sessions_of_one_account_leave_each_other_alone,
    test_two_that_need_another_token_spend_one,
    test_what_was_cleared_stays_away,
)

__all__ = [
    "clean_up",
    "scene",
    "scenes",
    "test_a_log_in_is_not_replaced",
    "test_a_log_out_is_final",
    "test_of_a_log_in_and_a_log_out_the_later_counts",
    "test_two_sessions_of_one_account_leave_each_other_alone",
    "test_two_that_need_another_token_spend_one",
    "test_what_was_cleared_stays_away",
]


@pytest.fixture(params=["redis", "postgresql", "mysql"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))
