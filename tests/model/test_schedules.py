"""The real code keeps to the protocol, in whatever order its processes move. Without its mechanisms it would not."""

from __future__ import annotations

import inspect
import logging
import sys
import textwrap

import pytest

from atproto_session import SessionGetter
from atproto_session.cached_getter import SharedGetter
from atproto_session.stores import memory

from .protocol import Violation
from .schedules import World, run

SEEDS = 1000
LOCK, LEASE = False, True


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "atproto_session")


@pytest.mark.duty(35)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lease", [LOCK, LEASE], ids=["lock", "lease"])
def test_no_schedule_ends_badly(lease: bool) -> None:
    for seed in range(SEEDS):
        run(seed, lease=lease)


Change = tuple[type, str, str, str]
#: What is taken out, under which kind of lock: of which method, which text, and what is left in its place.
MECHANISMS: dict[str, tuple[bool, list[Change]]] = {
    "the second read": (
        LOCK,
        [
            (SharedGetter, "_get", "if is_good(stored):\n                return", "if False:\n                return"),
            (SessionGetter, "get_session", "self._refresh(sub, found(sub, stored), ", "self._refresh(sub, seen, "),
        ],
    ),
    "the attempt": (
        LOCK,
        [
            (SessionGetter, "_refresh", "if not self._store.replace(key, attempted, session.token_set):", "if False:"),
            (SessionGetter, "_is_announced", "current = self._store.get(key)", "return True"),
        ],
    ),
    "the last look at the lock": (
        LEASE,
        [(SessionGetter, "_refresh", " and hold.extend(self._stored_within)", "")],
    ),
    "waiting for an answer": (LEASE, [(SessionGetter, "_outwait", "and wait > 0", "and False")]),
    "which lock it was": (LOCK, [(SessionGetter, "_is_gone", 'attempt.lock == getattr(hold, "lock", "")', "True")]),
    "storing by compare-and-set": (
        LOCK,
        [
            (
                SessionGetter,
                "_keep",
                "self._store.replace(key, successor, expected)",
                "not self._store.set(key, successor)",
            )
        ],
    ),
    "revoking what is stored nowhere": (
        LOCK,
        [(SessionGetter, "_keep", "self._revoke(successor)\n            return", "return")],
    ),
    "doubt after a 5xx": (LOCK, [(SessionGetter, "_spend", "if unspent else attempted.attempt", "if True else None")]),
    "doubt after a lost answer": (LOCK, [(SessionGetter, "_spend", "if error.sent:", "if False:")]),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_one_ends_badly_without(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease, changes = MECHANISMS[mechanism]
    for owner, method, old, new in changes:
        source = textwrap.dedent(inspect.getsource(getattr(owner, method)))
        assert source.count(old) == 1, f"{method} has changed"
        changed: dict[str, object] = {}
        exec(source.replace(old, new), vars(sys.modules[owner.__module__]), changed)
        monkeypatch.setattr(owner, method, changed[method])
    with pytest.raises(Violation, match=r"P\d|is lost to which nothing had happened|tokens that nobody has"):
        run_until_one_ends_badly(lease)


def test_a_lock_that_keeps_nobody_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "is_free", lambda world: True)
    with pytest.raises(Violation, match=r"P1|is lost to which nothing had happened|P4"):
        run_until_one_ends_badly(LOCK)


def test_a_compare_and_set_that_does_not_compare_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "holds", lambda stored, expected: True)
    with pytest.raises(Violation, match=r"P5|tokens that nobody has"):
        run_until_one_ends_badly(LOCK)


def run_until_one_ends_badly(lease: bool) -> None:
    for seed in range(2 * SEEDS):
        run(seed, lease=lease)
