"""The real code keeps to the protocol, in whatever order its processes move."""

from __future__ import annotations

import logging

import pytest

from atproto_session import SessionGetter
from atproto_session.stores import memory

from .protocol import Violation
from .schedules import World, run

SEEDS = 1000


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "atproto_session")


@pytest.mark.duty(35)
@pytest.mark.parametrize("lease", [False, True], ids=["lock", "lease"])
def test_no_schedule_ends_badly(lease: bool) -> None:
    for seed in range(SEEDS):
        run(seed, lease=lease)


def test_a_lock_that_keeps_nobody_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "is_free", lambda world: True)
    with pytest.raises(Violation, match=r"P1|is lost to which nothing had happened|P4"):
        run_all()


def test_a_compare_and_set_that_does_not_compare_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "holds", lambda stored, expected: True)
    with pytest.raises(Violation, match=r"P5|tokens that nobody has"):
        run_all()


def test_a_broken_lock_that_passes_for_the_one_before_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SessionGetter, "_is_gone", lambda getter, attempt, hold: True)
    with pytest.raises(Violation, match=r"P1|is lost to which nothing had happened"):
        run_all()


def run_all() -> None:
    for seed in range(SEEDS):
        run(seed, lease=False)
