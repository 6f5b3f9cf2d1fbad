"""No order of steps loses anything or spends a token twice; and every mechanism is needed for that."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from atproto_session import Session, refresh

from . import mechanisms
from .protocols import END
from .search import search
from .world import World

HOLDER, LEASE = World(stalls=1), World(locks="lease")
BROKEN, NO_LOCKS = World(locks="broken"), World(locks="none")
LOG_OUT, LOG_IN, END_IT, NOBODY = ("log_out",), ("log_in",), ("end",), ()


@pytest.fixture(autouse=True)
def _quickly(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Without log lines and without measuring coverage, which would take a third longer."""
    caplog.set_level(logging.CRITICAL, "atproto_session")
    tracing = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracing)


@pytest.mark.duty(35)
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("world", "at_least"),
    [
        pytest.param(replace(HOLDER, owners=LOG_OUT), 46_301, id="a log-out"),
        pytest.param(replace(HOLDER, owners=LOG_IN), 46_301, id="a log-in"),
        pytest.param(replace(HOLDER, owners=END_IT), 46_301, id="a session whose tokens are refused"),
        pytest.param(replace(LEASE, owners=NOBODY), 1_000, id="leases"),
        pytest.param(replace(BROKEN, owners=NOBODY), 1_000, id="a broken lock"),
        pytest.param(replace(BROKEN, owners=NOBODY, is_one_machine=True), 1_000, id="a broken lock, one machine"),
        pytest.param(replace(NO_LOCKS, owners=NOBODY, pauses=True), 72_550, id="no locks, workers that stand still"),
        pytest.param(replace(NO_LOCKS, owners=NOBODY, is_one_machine=True), 1_000, id="no locks, one machine"),
        pytest.param(replace(NO_LOCKS, owners=LOG_OUT, stalls=0), 72_550, id="no locks, a log-out"),
        pytest.param(replace(NO_LOCKS, owners=NOBODY, mishaps=1), 1_000, id="no locks, a store that fails"),
        pytest.param(
            replace(NO_LOCKS, owners=NOBODY, mishaps=1, is_one_machine=True), 1_000, id="the same on one machine"
        ),
        pytest.param(replace(HOLDER, owners=NOBODY, mishaps=1), 1_000, id="a store that fails"),
        pytest.param(
            replace(HOLDER, owners=NOBODY, compare=mechanisms.compare_tokens), 1_000, id="a store that compares tokens"
        ),
    ],
)
def test_nothing_happens_that_must_not(world: World, at_least: int) -> None:
    result = search(world)
    assert result.violation is None, str(result)
    assert result.states > at_least


P1 = "P1: a token is sent while an answer to it may still come"
P2 = "P2: a token is spent and the store cannot take its successor"
P4 = "P4: the record does not tell that its token may have been spent"


@pytest.mark.parametrize(
    ("without", "world", "violation"),
    [
        # Where the store compares attempts as well, it costs no more than work that is done twice.
        (mechanisms.WithoutSecondRead, replace(HOLDER, compare=mechanisms.compare_tokens), P4),
        (mechanisms.WithoutAttempt, HOLDER, P2),
        (
            mechanisms.WithoutLookAtRecord,
            replace(LEASE, owners=LOG_OUT),
            "a token is spent for a session that was signed",
        ),
        (mechanisms.WithoutLookAtLock, LEASE, "a token is spent by a worker that had lost its lock"),
        (mechanisms.WithoutNameOfLock, BROKEN, P1),
        (mechanisms.WithoutOutwaiting, BROKEN, P1),
        (mechanisms.WithoutOutwaiting, LEASE, P1),
        (mechanisms.WithoutOutwaiting, NO_LOCKS, P1),
        (mechanisms.WithoutLookAtClock, LEASE, P1),
        (mechanisms.WithoutLookAtClock, NO_LOCKS, P1),
        (mechanisms.WithoutDoubt, HOLDER, P4),
    ],
)
def test_it_happens_without(without: type[refresh.Refresh], world: World, violation: str) -> None:
    _is_found(
        replace(world, refresh=without, owners=world.owners if violation.endswith("signed") else NOBODY), violation
    )


@pytest.mark.parametrize(
    ("world", "violation"),
    [
        (replace(NO_LOCKS, owners=NOBODY, compare=mechanisms.compare_tokens), P1),
        (replace(LEASE, owners=NOBODY, compare=mechanisms.compare_tokens), P4),
        (replace(HOLDER, owners=LOG_OUT, compare=mechanisms.compare_nothing), "P5: a log-out is undone"),
        (replace(HOLDER, owners=LOG_IN, compare=mechanisms.compare_nothing), "P5: a newer session"),
        (replace(HOLDER, owners=LOG_OUT, revokes=False), "tokens that nobody has are good"),
    ],
)
def test_it_happens_without_what_the_store_and_the_server_do(world: World, violation: str) -> None:
    _is_found(world, violation)


@pytest.mark.parametrize(
    ("answer", "violation"),
    [(False, "a session that is in the store is revoked"), (True, "tokens that nobody has are good")],
)
def test_it_happens_where_grants_are_not_told_apart(
    answer: bool, violation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "is_same_grant", lambda self, other: answer)
    _is_found(replace(HOLDER, owners=LOG_IN), violation)


def test_it_happens_where_a_request_is_sent_for_another_record(monkeypatch: pytest.MonkeyPatch) -> None:
    world = replace(HOLDER, owners=LOG_IN, is_login_stale=True)
    monkeypatch.setattr(Session, "has_same_server", lambda self, other: True)
    _is_found(world, "a token is sent to the server of another session")


def _is_found(world: World, violation: str) -> None:
    result = search(world)
    assert (result.violation or "").startswith(violation), str(result)
    assert len(result.trace) < 20, str(result)


def test_a_trace_tells_who_did_what() -> None:
    result = search(replace(NO_LOCKS, owners=NOBODY, refresh=mechanisms.WithoutOutwaiting))
    assert result.trace == (
        "worker 1 reads the record",
        "worker 1 reads the record",
        "worker 1 writes its attempt",
        "worker 1 reads the record",
        "worker 1 sees that its window is open and sends",
        "worker 2 reads the record",
        "worker 2 reads the record",
        "worker 2 writes its attempt",
        "worker 2 reads the record",
    )


def test_a_worker_makes_as_many_calls_as_it_is_told() -> None:
    once, twice = (search(World(1, owners=NOBODY, calls=calls, stalls=0), most=20_000).states for calls in (1, 2))
    assert 100 < once < twice < 20_000


def test_nodes_that_are_taken_for_one_go_on_alike() -> None:
    world = replace(NO_LOCKS, owners=NOBODY, stalls=1)
    search(world)
    for kind in world.kinds:
        merged = [
            ((*node.history, outcome), following)
            for node in list(kind.nodes())
            for outcome, following in node.next.items()
            if following is not END and following.history != (*node.history, outcome)
        ]
        assert len(merged) > 100
        for history, node in random.Random(1).sample(merged, 100):
            for outcome, following in node.next.items():
                assert kind.after_all((*history, outcome)) is following
