"""The protocol loses nothing and spends nothing twice; and its mechanisms are needed for that.

One is not, where there are locks: the last look at the record. It keeps a token from being spent for a session that was
just signed out, and workers without a common lock from spending it twice most of the time; see
``tests/test_session_getter.py``.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import pytest

from atproto_session import SessionGetter
from atproto_session._flights import Flight
from atproto_session.cached_getter import SharedGetter
from atproto_session.stores import FullStore

from .protocol import Protocol
from .search import search


@pytest.mark.duty(35)
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "protocol",
    [
        pytest.param(Protocol(), id="two workers"),
        pytest.param(Protocol(lease=True), id="two workers, lease"),
        pytest.param(Protocol(workers=3), id="three workers"),
        pytest.param(Protocol(workers=3, lease=True, owner=("log_out",)), id="three workers, lease, log-out"),
        pytest.param(Protocol(workers=3, lease=True, owner=("log_in",)), id="three workers, lease, log-in"),
        pytest.param(Protocol(workers=3, forgetful=True, owner=("log_out",)), id="three workers, broken lock, log-out"),
        pytest.param(Protocol(calls=2, owner=()), id="two calls each"),
        pytest.param(Protocol(calls=2, lease=True, owner=()), id="two calls each, lease"),
        pytest.param(Protocol(lease=True, forgetful=True), id="a lease that is forgotten"),
        pytest.param(Protocol(forgetful=True), id="a lock that is broken"),
        pytest.param(Protocol(forgetful=True, calls=2, owner=()), id="a lock that is broken, two calls each"),
    ],
)
def test_nothing_happens_that_must_not(protocol: Protocol) -> None:
    result = search(protocol)
    assert result.violation is None, str(result)
    assert result.states > 1000


P1 = "P1: a token is sent while an answer to it may still come"
HELD, LEASE, FORGETFUL = Protocol(), Protocol(lease=True), Protocol(lease=True, forgetful=True)
BROKEN = Protocol(forgetful=True)


@pytest.mark.parametrize(
    ("mechanism", "protocol", "violation"),
    [
        ("lock", HELD, P1),
        ("second read", HELD, "P4: the record does not tell that its token may have been spent"),
        ("second read", FORGETFUL, P1),
        ("attempt", HELD, "P2: a token is spent, and the store cannot take its successor"),
        ("last look at the lock", LEASE, P1),
        ("extending last", LEASE, P1),
        ("outwaiting", FORGETFUL, P1),
        ("lock name", BROKEN, P1),
        ("outwaiting", BROKEN, P1),
        ("compare-and-set", HELD, "P5: a newer session is overwritten or deleted"),
        ("same grant", HELD, "a session that is in the store is revoked"),
        ("revocation", HELD, "tokens that nobody has are good"),
    ],
)
def test_it_happens_without(mechanism: str, protocol: Protocol, violation: str) -> None:
    result = search(replace(protocol, without=frozenset({mechanism})))
    assert result.violation == violation, str(result)
    assert len(result.trace) < 20, str(result)


def test_a_log_out_is_undone_without_compare_and_set() -> None:
    result = search(Protocol(owner=("log_out",), without=frozenset({"compare-and-set"})))
    assert result.violation == "P5: a log-out is undone", str(result)


def test_a_trace_tells_who_did_what() -> None:
    result = search(Protocol(without=frozenset({"attempt"})))
    assert result.trace == (
        "worker 1 looks",
        "worker 1 gets the lock",
        "worker 1 looks again",
        "worker 1 does it",
    )


def test_every_step_names_the_code_that_takes_it() -> None:
    classes = {kind.__name__: kind for kind in (SessionGetter, SharedGetter, Flight, FullStore)}
    named = {
        match
        for _, step in inspect.getmembers(Protocol, inspect.isfunction)
        for match in re.findall(r"``(\w+)\.(\w+)", step.__doc__ or "")
    }
    assert len(named) > 10
    for owner, name in named:
        assert hasattr(classes[owner], name), f"{owner}.{name}"
