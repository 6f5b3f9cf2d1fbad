"""Work that its caller may leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from atproto_session import CancelledError, LockTimeoutError, SessionError, _fork
from atproto_session._flights import Flight, Flights
from atproto_session._threads import _crew, begin

from .core import SOON, Gate, Worker, wait_until


def board(flights: Flights[str], key: str, result: str = "") -> Flight[str]:
    return flights.board(key, lambda flight: result, deadline=time.monotonic() + SOON)[0]


def landed(flight: Flight[str]) -> str:
    return flight.wait(time.monotonic() + SOON)


def test_a_flight_that_was_abandoned_does_not_commit() -> None:
    flight: Flight[None] = Flight("a", lambda flight: flight.commit())
    flight.abandon("no more")
    flight.run(lambda: None)
    with pytest.raises(CancelledError, match="no more"):
        flight.wait(0.0)


def test_a_flight_that_is_abandoned_while_it_sleeps_wakes_up() -> None:
    flight: Flight[None] = Flight("a", lambda flight: flight.sleep(SOON))
    worker = Worker(lambda: flight.run(lambda: None))
    wait_until(lambda: flight.abandoned.is_awaited)
    flight.abandon()
    worker.outcome()
    with pytest.raises(CancelledError):
        flight.wait(0.0)


def test_a_committed_flight_cannot_be_abandoned() -> None:
    flight: Flight[int] = Flight("a", lambda flight: 1)
    flight.commit()
    flight.abandon()
    assert not flight.abandoned.is_set()


def test_a_flight_goes_on_without_a_caller_whose_time_is_over() -> None:
    gate, flights = Gate(), Flights[str]()
    flight, _ = flights.board("a", lambda flight: gate() or "done", deadline=0.0)
    with pytest.raises(LockTimeoutError, match="goes on without you"):
        flight.wait(time.monotonic())
    gate.open()
    assert landed(flight) == "done"


def test_one_who_cancels_does_not_stop_what_another_waits_for() -> None:
    gate, flights, cancel = Gate(), Flights[str](), threading.Event()
    flight, _ = flights.board("a", lambda flight: gate() or "done", deadline=0.0)
    other = Worker(lambda: landed(flight))
    leaving = Worker(lambda: flight.wait(time.monotonic() + SOON, cancel))
    wait_until(lambda: len(flight.landed._waiters) == 2)
    cancel.set()
    with pytest.raises(CancelledError):
        leaving.outcome()
    assert not flight.abandoned.is_set()
    gate.open()
    assert other.outcome() == "done"


def test_a_result_may_be_handed_out_before_the_work_is_over() -> None:
    gate, flights = Gate(), Flights[str]()

    def work(flight: Flight[str]) -> str:
        flight.hand_out("early")
        gate()
        return "late"

    flight, _ = flights.board("a", work, deadline=0.0)
    assert landed(flight) == "early"
    assert not flight.over.is_set()
    gate.open()
    assert flight.over.wait(SOON)
    assert landed(flight) == "early"


def test_what_a_listener_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    called: list[int] = []

    def work(flight: Flight[int]) -> int:
        flight.afterwards(lambda: (_ for _ in ()).throw(SystemExit))
        flight.afterwards(lambda: called.append(1))
        return 1

    flights: Flights[int] = Flights()
    assert flights.charter("a", work).wait(float("inf")) == 1
    assert called == [1]
    assert "a listener failed for a" in caplog.text


def test_a_listener_may_use_the_getter() -> None:
    flights: Flights[str] = Flights()
    inner: list[str] = []

    def work(flight: Flight[str]) -> str:
        flight.afterwards(lambda: inner.append(landed(board(flights, "a", "inner"))))
        return "outer"

    flight, _ = flights.board("a", work, deadline=0.0)
    landed(flight)
    assert inner == ["inner"]


def test_the_end_of_each_thread_is_told() -> None:
    ended: list[int] = []
    flights: Flights[str] = Flights(thread_ended=lambda: ended.append(threading.get_ident()))
    landed(board(flights, "a"))
    wait_until(lambda: ended)
    assert ended[0] != threading.get_ident()


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(_crew, "_idle", [])
    flights: Flights[str] = Flights()
    with pytest.raises(SessionError, match="no thread") as caught:
        board(flights, "a")
    assert caught.value.retryable
    assert not flights.get("a")
    assert not flights._all


def test_the_handler_of_a_signal_may_fetch_while_a_flight_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    flights: Flights[str] = Flights()
    signals = [lambda: board(flights, "a", "inner")]
    inner: list[Flight[str]] = []

    def interrupted(work: Callable[[], None], name: str) -> None:
        if signals:
            inner.append(signals.pop()())
        begin(work, name)

    monkeypatch.setattr("atproto_session._flights.begin", interrupted)
    outer = Worker(lambda: board(flights, "a", "outer")).outcome()
    assert isinstance(outer, Flight)
    assert (landed(outer), landed(inner[0])) == ("outer", "inner")
    assert not flights.get("a")
    wait_until(lambda: not flights._all)


def test_an_interrupt_while_a_flight_starts_abandons_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupt(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupt)
    monkeypatch.setattr(_crew, "_idle", [])
    flights: Flights[bool] = Flights()
    outcome: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        flights.board("a", lambda flight: outcome.append(flight.abandoned.wait(SOON)) or True, deadline=0.0)  # type: ignore[func-returns-value]
    wait_until(lambda: not flights.get("a"))
    assert outcome in ([], [True])


def test_of_two_that_begin_at_once_one_joins_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, flights, first = Gate(), Flights[str](), list[Flight[str]]()
    has_room = flights._has_room_for

    def another_begins(flight: Flight[str]) -> bool:
        if not first:
            first.append(flight)  # so that this happens once
            first[0] = flights.board("a", lambda _: gate() or "first", deadline=time.monotonic() + SOON)[0]
        return has_room(flight)

    monkeypatch.setattr(flights, "_has_room_for", another_begins)
    flight, is_new = flights.board("a", lambda _: "second", deadline=time.monotonic() + SOON)
    assert (flight, is_new) == (first[0], False)
    gate.open()
    assert landed(flight) == "first"
    wait_until(lambda: not flights._all)


def test_one_that_never_begins_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    flights: Flights[str] = Flights()
    lost: Flight[str] = Flight("a", lambda flight: "never")
    flights._joinable["a"] = lost
    Worker(lambda: setattr(lost, "_starter", threading.get_ident())).outcome()
    assert board(flights, "a") is lost
    monkeypatch.setattr("atproto_session._flights._START_WITHIN", 0.0)
    assert landed(board(flights, "a", "anew")) == "anew"


def test_no_more_than_so_many_are_in_the_air() -> None:
    gate, flights = Gate(), Flights[str](most=3)

    def begin(key: str, group: str, deadline: float = 0.0) -> Flight[str]:
        return flights.board(key, lambda flight: gate() or key, deadline=deadline, groups={group: 2})[0]

    begun = [begin("a", "dark"), begin("b", "dark")]
    with pytest.raises(SessionError, match="too much else is under way") as caught:
        begin("c", "dark")
    assert caught.value.retryable
    begun.append(begin("d", "well"))
    with pytest.raises(SessionError, match="too much else"):
        begin("e", "other")
    waiting = Worker(lambda: begin("f", "dark", time.monotonic() + SOON))
    wait_until(lambda: len(flights._all) >= 3)
    gate.open()
    assert landed(waiting.outcome()) == "f"  # type: ignore[arg-type]
    assert [landed(flight) for flight in begun] == ["a", "b", "d"]


def test_what_a_flight_needs_is_done_in_its_own_thread() -> None:
    flights, others = Flights[str](most=1), Flights[str](most=0)
    inner: list[int] = []

    def work(flight: Flight[str]) -> str:
        needed, _ = others.board("b", lambda flight: inner.append(threading.get_ident()) or "b", deadline=0.0)  # type: ignore[func-returns-value]
        return str((inner == [threading.get_ident()], landed(needed)))

    flight, _ = flights.board("a", work, deadline=0.0)
    assert landed(flight) == "(True, 'b')"


# The end


@pytest.fixture
def the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes to its end in this test alone."""
    monkeypatch.setattr(_fork, "_airborne", set())
    monkeypatch.setattr(_fork, "_pools", set())
    monkeypatch.setattr(_fork, "_ending", False)


@pytest.mark.usefixtures("the_end")
def test_at_the_end_a_signal_does_not_end_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    # Here, where it can be measured that all of it runs; in programs that really end, see tests/topics.
    flights, gate = Flights[str](), Gate()
    land, struck = flights.land, iter((True, False, False, False))

    def land_struck(deadline: float) -> bool:
        if next(struck):
            raise KeyboardInterrupt
        gate.open()
        return land(deadline)

    def work(flight: Flight[str]) -> str:
        flight.commit()
        gate()
        return "done"

    flight, _ = flights.board("a", work, deadline=0.0)
    gate.wait_until_reached()
    monkeypatch.setattr(flights, "land", land_struck)
    _fork._end_at_exit()
    assert flight.over.is_set()
    assert landed(flight) == "done"


@pytest.mark.usefixtures("the_end")
def test_at_the_end_what_is_not_committed_is_abandoned_and_not_waited_for() -> None:
    flights, gate = Flights[str](), Gate()
    flight, _ = flights.board("a", lambda flight: gate() or "never mind", deadline=0.0)
    gate.wait_until_reached()
    _fork._end()
    assert flight.abandoned.is_set()
    assert not flight.over.is_set()
    gate.open()
    assert flight.over.wait(SOON)


@pytest.mark.usefixtures("the_end")
def test_the_end_does_not_wait_for_what_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    flights, gate, closed = Flights[str](), Gate(), threading.Event()

    class Pool:
        def close_idle(self) -> None:
            closed.set()

    def work(flight: Flight[str]) -> str:
        flight.commit()
        gate()
        return "done"

    pool = Pool()
    _fork.close_at_end(pool)
    monkeypatch.setattr(_fork, "_LAND_WITHIN", 0.0)
    flight, _ = flights.board("a", work, deadline=0.0)
    gate.wait_until_reached()
    _fork._end_at_exit()
    assert closed.is_set()
    assert _fork.is_ending()
    with pytest.raises(SessionError, match="the program is ending") as caught:
        Worker(lambda: board(flights, "b")).outcome()
    assert caught.value.retryable
    assert landed(board(flights, "b", "for an exit handler, in the main thread")).startswith("for")
    gate.open()
    landed(flight)


def test_closing_waits_for_what_is_awaited_and_abandons_the_rest() -> None:
    flights, gate = Flights[str](), Gate()
    left, _ = flights.board("a", lambda flight: gate() or "a", deadline=0.0)
    kept, _ = flights.board("b", lambda flight: gate() or "b", deadline=0.0)
    waiting = Worker(lambda: landed(kept))
    wait_until(lambda: kept.landed.is_awaited)
    closing = Worker(flights.close)
    wait_until(left.abandoned.is_set)
    gate.open()
    closing.outcome()
    assert waiting.outcome() == "b"
    with pytest.raises(SessionError, match="it is closed"):
        board(flights, "c")
    assert landed(flights.charter("c", lambda flight: "log-ins and log-outs go on")).startswith("log-ins")


def test_one_that_never_began_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atproto_session._flights._START_WITHIN", 0.0)
    flights: Flights[str] = Flights()
    flights._all.add(Flight("a", lambda flight: "never"))
    assert flights.land(float("inf"))


def test_one_that_lands_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atproto_session._flights._LOOK_AT_LANDING", 0.001)
    flights, gate = Flights[str](), Gate()
    flight, _ = flights.board("a", lambda flight: gate() or "a", deadline=0.0)
    waits, wait = threading.Event(), flight.over.wait

    def noted(timeout: float) -> bool:
        if wait(timeout):
            return True
        waits.set()
        return False

    monkeypatch.setattr(flight.over, "wait", noted)
    landing = Worker(lambda: flights.land(float("inf")))
    assert waits.wait(SOON)
    gate.open()
    assert landing.outcome() is True
