"""Steps over real stores, locks and threads. Most of them are tried in ``test_session_getter.py``."""

from __future__ import annotations

from typing import Any

import pytest

from atproto_session import MemoryStore, Session, StoreError, TransportError
from atproto_session import _steps as steps
from atproto_session._driver import World, _Driver, drive
from atproto_session._flights import Flight
from atproto_session.locks import ThreadLocks

from .core import DID, FakeAuthority, make_session


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
        _Driver(Flight(DID, lambda flight: None), world()).do(steps.Step())


def test_without_its_lock_nothing_is_held() -> None:
    driver = _Driver(Flight(DID, lambda flight: None), world())
    assert not driver.do(steps.Extend(1.0))
    driver.do(steps.Lock())
    assert driver.do(steps.Extend(1.0))
    driver.do(steps.Unlock())
    assert not driver.do(steps.Extend(1.0))


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
