"""What the caller of a refresh wants."""

from __future__ import annotations

import pytest

from atproto_session._terms import Times, Wanted
from atproto_session.session import Freshness

from .core import expired_session, make_session


@pytest.mark.parametrize(
    ("options", "same", "newer", "newer_but_stale", "newer_but_expired"),
    [
        ({}, False, True, True, False),
        ({"refresh": True}, False, True, True, True),
        ({"rejected": "access-1"}, False, True, True, False),
        ({"refresh": True, "rejected": "access-1"}, False, True, True, False),
    ],
)
def test_what_is_an_answer(
    options: dict[str, str], same: bool, newer: bool, newer_but_stale: bool, newer_but_expired: bool
) -> None:
    seen = expired_session()
    wanted = Wanted(seen, Freshness(), **options)  # type: ignore[arg-type]
    candidates = (seen, make_session(2), make_session(2, lifetime=5.0), expired_session(2))
    assert [wanted.is_met_by(each) for each in candidates] == [same, newer, newer_but_stale, newer_but_expired]


def test_a_fresh_session_is_an_answer_whoever_knows_it() -> None:
    seen = make_session()
    assert Wanted(seen, Freshness()).is_met_by(seen)
    assert not Wanted(seen, Freshness(), refresh=True).is_met_by(seen)


def test_the_times_fit_together() -> None:
    times = Times()
    assert times.spare + times.extend_every < times.window, "an attempt is moved on long before its end"
    assert times.window < 30.0, "a caller with the usual timeout outlives the wait for a worker that died"
    assert times.store_for < times.longest
