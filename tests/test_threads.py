"""Starting threads in a thread of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest

from atproto_session import _launcher
from atproto_session._threads import carry_out, start_thread

from .core import SOON, wait_until


def test_a_thread_is_started_by_another() -> None:
    ran = threading.Event()
    start_thread(threading.Thread(target=ran.set))
    assert ran.wait(SOON)


def test_what_keeps_a_thread_from_starting_is_the_callers() -> None:
    thread = threading.Thread(target=lambda: None)
    start_thread(thread)
    thread.join(SOON)
    with pytest.raises(RuntimeError, match="once"):
        start_thread(thread)


def test_orders_are_carried_out_as_long_as_it_is_needed() -> None:
    # Here, where it can be measured that all of it runs: the real one is a thread that Python's tools do not see.
    orders: SimpleQueue[Any] = SimpleQueue()
    ran, answers = threading.Event(), SimpleQueue[BaseException | None]()
    thread = threading.Thread(target=ran.set)
    needed = iter((True, False))
    for order in ((thread, answers), (thread, answers)):
        orders.put(order)
    carry_out(orders, lambda: next(needed))
    assert ran.wait(SOON)
    assert answers.get() is None
    assert isinstance(answers.get(), RuntimeError)


def test_a_launcher_that_died_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = _launcher._Launcher()
    monkeypatch.setattr(_launcher, "_PATIENCE", 0.01)
    lost._latest = "one that died"
    ran = threading.Event()
    lost.start(threading.Thread(target=ran.set))
    assert ran.wait(SOON)


def test_a_launcher_that_was_replaced_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[Callable[[], bool]] = []
    monkeypatch.setattr(_launcher, "_PATIENCE", 0.001)
    monkeypatch.setattr(_launcher, "carry_out", lambda orders, is_needed: needed.append(is_needed))
    late = _launcher._Launcher()
    with pytest.raises(RuntimeError, match="in time"):
        late.start(threading.Thread())
    wait_until(lambda: len(needed) == _launcher._TRIES)
    late._latest = None
    assert all(is_needed() for is_needed in needed), "no other is there"
    late._latest = "another"
    assert not any(is_needed() for is_needed in needed)


def test_a_launcher_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launcher, "_PATIENCE", 0.001)
    monkeypatch.setattr(_launcher, "carry_out", lambda orders, is_needed: None)
    with pytest.raises(RuntimeError, match="in time"):
        _launcher._Launcher().start(threading.Thread())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_has_a_launcher_of_its_own() -> None:
    start_thread(threading.Thread(target=lambda: None))
    child = os.fork()
    if child == 0:
        ran = threading.Event()
        start_thread(threading.Thread(target=ran.set))
        os._exit(0 if ran.wait(SOON) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
