"""Steps over real stores, locks and threads. Most of them are tried in ``test_session_getter.py``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from atproto_session import MemoryStore, Session, StoreError, TransportError
from atproto_session import _steps as steps
from atproto_session._driver import World, _Driver, drive
from atproto_session._flights import Flight
from atproto_session._worker import Life
from atproto_session.locks import ThreadLocks
from atproto_session.session import Attempt

from .core import DID, FakeAuthority, Gate, make_session, wait_until


def world(**members: Any) -> World:
    options: dict[str, Any] = {
        "store": MemoryStore[Session](),
        "locks": ThreadLocks(),
        "authority": FakeAuthority(),
        "clock": lambda: 1.0,
        "lock_within": 0.0,
        "answer_every": 5.0,
    }
    return World(**(options | members))


def test_what_is_no_step() -> None:
    with pytest.raises(TypeError, match="no step"):
        _Driver(Flight(DID, lambda flight: None), world()).do(object())  # type: ignore[arg-type]


def test_without_its_lock_nothing_is_held() -> None:
    driver = _Driver(Flight(DID, lambda flight: None), world())
    assert not driver.do(steps.Extend(1.0))
    driver.do(steps.Lock())
    assert driver.do(steps.Extend(1.0))
    driver.do(steps.Unlock())
    assert not driver.do(steps.Extend(1.0))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells about other processes")
def test_until_its_lock_is_released_a_worker_is_at_work_on_its_attempt() -> None:
    driver = _Driver(Flight(DID, lambda flight: None), world())
    driver.do(steps.Lock())
    attempt = driver.do(steps.Sign(15.0, "lock"))
    assert driver.do(steps.LifeOf(attempt)) is Life.ALIVE
    assert driver.do(steps.LifeOf(replace(attempt, id="another"))) is Life.GONE
    driver.do(steps.Unlock())
    assert driver.do(steps.LifeOf(attempt)) is Life.GONE


def test_the_lock_is_released_whatever_the_end() -> None:
    locks = ThreadLocks()

    def protocol() -> steps.Protocol[None]:
        yield steps.Lock()
        raise StoreError("the end")

    with pytest.raises(StoreError, match="the end"):
        drive(Flight(DID, lambda flight: None), protocol(), world(locks=locks))
    with locks.hold(DID, timeout=0):
        pass


def test_no_thread_for_the_request_is_a_request_that_was_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Flight, "spawn", refuse)
    driver = _Driver(Flight(DID, lambda flight: None), world())
    with pytest.raises(TransportError) as caught:
        driver.do(steps.Send(lambda session: session, make_session()))
    assert not caught.value.sent


def test_an_answer_that_is_not_there_yet_can_be_awaited() -> None:
    gate, successor = Gate(), make_session(2)
    driver = _Driver(Flight(DID, lambda flight: None), world(answer_every=0.001))
    assert driver.do(steps.Send(lambda session: gate() or successor, make_session())) is None
    assert driver.do(steps.Await()) is None
    gate.open()
    wait_until(lambda: driver.do(steps.Await()) is successor)


def test_a_request_knows_until_when_it_may_arrive() -> None:
    """Until the end of the window of its attempt, as it is in the record by then."""
    told: list[float] = []

    def request(session: Session) -> Session:
        may_arrive_for = steps.may_arrive_for.get()
        assert may_arrive_for is not None
        told.append(may_arrive_for())
        return session

    now = 100.0
    driver = _Driver(Flight(DID, lambda flight: None), world(clock=lambda: now))
    for answer_by in (115.0, 120.0):
        attempt = Attempt("a", "host:1", now, answer_by)
        assert driver.do(steps.Replace(make_session(attempt=attempt), driver.do(steps.Read())))
        driver.do(steps.Send(request, make_session()))
        now += 1.0
    driver.do(steps.Replace(make_session(attempt=replace(attempt, answer_by=500.0)), make_session(7)))
    driver.do(steps.Send(request, make_session()))
    assert told == [15.0, 19.0, 18.0], "what was not written counts for nothing"
    assert steps.may_arrive_for.get() is None


def test_locks_that_say_what_is_wrong_are_believed() -> None:
    class Holds(ThreadLocks):
        @contextmanager
        def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[Any]:
            yield self

        def extend(self, seconds: float) -> bool:
            raise StoreError("the lock server is away")

    driver = _Driver(Flight(DID, lambda flight: None), world(locks=Holds()))
    driver.do(steps.Lock())
    with pytest.raises(StoreError, match="is away"):
        driver.do(steps.Extend(1.0))
