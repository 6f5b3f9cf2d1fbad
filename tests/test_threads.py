"""Threads of our own, and the results that others wait for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from atproto_session import CancelledError, SessionError, _threads
from atproto_session._threads import Promise, carry_out, spawn, start_thread

from .core import SOON, Worker, wait_until


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
    ran = threading.Event()
    thread = threading.Thread(target=ran.set)
    needed = iter((True, True, False))
    first, again, taken_back = (_threads._Order(thread) for _ in range(3))
    assert taken_back.claim()
    for order in (first, taken_back, again):
        orders.put(order)
    carry_out(orders, lambda: next(needed))
    assert ran.wait(SOON)
    first.started.result()
    assert not taken_back.started.is_set()
    with pytest.raises(RuntimeError, match="once"):
        again.started.result()


def test_a_launcher_that_died_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = _threads._Launcher()
    monkeypatch.setattr(_threads, "_PATIENCE", 0.01)
    lost._latest = "one that died"
    ran = threading.Event()
    lost.start(threading.Thread(target=ran.set))
    assert ran.wait(SOON)


def test_a_launcher_that_was_replaced_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[Callable[[], bool]] = []
    monkeypatch.setattr(_threads, "_PATIENCE", 0.001)
    monkeypatch.setattr(_threads, "carry_out", lambda orders, is_needed: needed.append(is_needed))
    late = _threads._Launcher()
    with pytest.raises(RuntimeError, match="in time"):
        late.start(threading.Thread())
    wait_until(lambda: len(needed) == _threads._TRIES)
    late._latest = None
    assert all(is_needed() for is_needed in needed), "no other is there"
    late._latest = "another"
    assert not any(is_needed() for is_needed in needed)


def test_a_launcher_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "_PATIENCE", 0.001)
    monkeypatch.setattr(_threads, "carry_out", lambda orders, is_needed: None)
    with pytest.raises(RuntimeError, match="in time"):
        _threads._Launcher().start(threading.Thread())


def test_what_was_not_started_in_time_is_not_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "_PATIENCE", 0.001)
    launcher, ran = _threads._Launcher(), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(_threads, "carry_out", lambda orders, is_needed: None)
        with pytest.raises(RuntimeError, match="in time"):
            launcher.start(threading.Thread(target=ran.set))
    monkeypatch.setattr(_threads, "_PATIENCE", SOON)
    launcher._latest = None
    after = threading.Event()
    launcher.start(threading.Thread(target=after.set))
    assert after.wait(SOON)
    assert not ran.is_set()


def test_a_promise() -> None:
    promise: Promise[int] = Promise()
    with pytest.raises(RuntimeError, match="no result"):
        promise.result()
    assert not promise.wait(0.0)
    waiting = Worker(promise.wait)
    wait_until(lambda: promise.is_awaited)
    promise.set(1)
    promise.set(2)
    assert waiting.outcome() is True
    assert promise.result() == 1, "the first counts"
    assert not promise.is_awaited


def test_waiting_for_a_promise_can_be_cancelled() -> None:
    promise: Promise[None] = Promise()
    cancel = threading.Event()
    waiting = Worker(lambda: promise.wait(SOON, cancel))
    wait_until(lambda: promise.is_awaited)
    cancel.set()
    with pytest.raises(CancelledError):
        waiting.outcome()


def test_what_spawned_work_returns_and_raises() -> None:
    good, bad = spawn(lambda: 1, "good"), spawn(lambda: 1 // 0, "bad")
    assert good.wait(SOON)
    assert good.result() == 1
    assert bad.wait(SOON)
    with pytest.raises(ZeroDivisionError):
        bad.result()


def test_threads_that_have_done_their_work_wait_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = _threads._Crew()
    seen: list[tuple[int, str]] = []

    def note() -> None:
        thread = threading.current_thread()
        seen.append((threading.get_ident(), thread.name))

    crew.begin(note, "one")
    wait_until(lambda: crew._idle)
    crew.begin(note, "two")
    wait_until(lambda: crew._idle)
    assert len({number for number, _ in seen}) == 1
    assert [name for _, name in seen] == ["one", "two"]
    monkeypatch.setattr(_threads, "_MOST_IDLE", 0)
    crew.begin(note, "three")
    wait_until(lambda: len(seen) == 3 and not any(each.ident == seen[2][0] for each in threading.enumerate()))
    assert crew._idle == []


def test_gevent_that_patches_too_late_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Patched:
        """Stands for gevent's."""

    monkeypatch.setattr("queue.SimpleQueue", Patched)
    with pytest.raises(SessionError, match="before anything else is imported"):
        spawn(lambda: None, "late")


@pytest.mark.parametrize(("patched", "is_wrong"), [("", False), ("threading", True), ("threading queue", False)])
def test_gevent_that_patches_threads_alone_is_found_out(
    patched: str, is_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkey = SimpleNamespace(is_module_patched=lambda name: name in patched.split())
    monkeypatch.setitem(sys.modules, "gevent.monkey", monkey)
    if is_wrong:
        with pytest.raises(SessionError, match="without queue=False"):
            spawn(lambda: None, "partly")
    else:
        assert spawn(lambda: "done", "wholly").get(SOON) == "done"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_has_a_launcher_of_its_own() -> None:
    start_thread(threading.Thread(target=lambda: None))
    child = os.fork()
    if child == 0:
        ran = threading.Event()
        start_thread(threading.Thread(target=ran.set))
        os._exit(0 if ran.wait(SOON) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_from_python_3_12_on_a_thread_starts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12))
    monkeypatch.setattr(_threads._launcher, "start", None)
    ran = threading.Event()
    start_thread(threading.Thread(target=ran.set))
    assert ran.wait(SOON)
