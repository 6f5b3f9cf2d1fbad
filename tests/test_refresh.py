"""The refresh as a value: driven by hand, without a thread, a lock or a clock. What it does over real stores is in
``test_session_getter.py``, and every order of events in ``tests/model``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from atproto_session import (
    LockTimeoutError,
    OAuthResponseError,
    RefreshInterruptedError,
    Session,
    StoreError,
    TokenRefreshError,
    TransportError,
)
from atproto_session import _steps as s
from atproto_session._terms import Terms, Wanted
from atproto_session._worker import Life
from atproto_session.locks import LockKind
from atproto_session.refresh import Refresh
from atproto_session.session import Attempt, Freshness

from .core import DID, QUICK, expired_session, make_session, successor_of

NOW = 1_800_000_000.0


class World:
    """What a refresh asks, answered from one record and a script.

    :ivar asked: the steps, in order.
    :ivar answers: what a step of some kind brings, one after the other, in the place of what it usually does.
    """

    def __init__(self, record: Session | None, **answers: Iterator[object]) -> None:
        self.record = record
        self.now = NOW
        self.asked: list[s.Step] = []
        self.answers = answers

    def do(self, step: s.Step) -> Any:
        self.asked.append(step)
        if (scripted := next(self.answers.get(type(step).__name__, iter(())), None)) is not None:
            answer = scripted(self) if callable(scripted) else scripted
            if isinstance(answer, Exception):
                raise answer
            return answer
        return self._usual(step)

    def _usual(self, step: s.Step) -> Any:
        match step:
            case s.Read():
                return self.record
            case s.Replace(session, expected):
                tokens = expected.token_set if isinstance(expected, Session) else expected
                if self.record is None or tokens is None or not self.record.token_set.has_same_tokens(tokens):
                    return False
                if isinstance(expected, Session) and expected.attempt != self.record.attempt:
                    return False
                self.record = session
                return True
            case s.Lock():
                return "lock"
            case s.Extend():
                return True
            case s.Now():
                return self.now
            case s.Sign(window, lock):
                return Attempt("mine", "here", self.now, self.now + window, lock=lock)
            case s.LifeOf():
                return Life.UNKNOWN
            case s.Wait(seconds):
                self.now += seconds
                return None
            case s.Prepare():
                return lambda session: session
            case s.Send(_, session):
                return successor_of(session)
            case s.Revoke():
                return True
            case _:
                return None

    def names(self, *without: str) -> list[str]:
        names = [type(step).__name__ for step in self.asked]
        return [name for name in names if name not in ("Now", "Sign", *without)]


def play(world: World, seen: Session, *, waits: bool = True, **terms: Any) -> Session:
    wanted = Wanted(seen, Freshness(clock=lambda: NOW), refresh=True, waits=waits)
    protocol = Refresh(DID, wanted, Terms(**{"lock_kind": LockKind.HOLDER, "times": QUICK, **terms})).run()
    try:
        step = next(protocol)
        while True:
            try:
                outcome = world.do(step)
            except Exception as error:
                step = protocol.throw(error)
            else:
                step = protocol.send(outcome)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def attempt_of_another(**members: Any) -> Attempt:
    return replace(Attempt("other", "there", NOW - 1.0, NOW + 10.0, lock="another"), **members)


def test_the_order_in_which_it_happens() -> None:
    world = World(expired_session())
    assert play(world, expired_session()).token_set.access_token == "access-2"
    assert world.names() == [
        *("Prepare", "Lock", "Read"),  # what is slow, and then the second look
        *("Extend", "Replace", "Extend", "Read", "Commit", "Send"),  # the attempt, and the last look
        *("Replace", "Tell"),
    ]
    assert world.record is not None
    assert (world.record.attempt, world.record.refreshed_at) == (None, NOW)


def test_of_two_that_read_one_record_one_announces_itself() -> None:
    """Without any lock. The other waits for what the first brings, and sends nothing."""
    session = expired_session()

    def another_comes_first(world: World) -> bool:
        world.record = replace(session, attempt=attempt_of_another())
        return False

    stored = make_session(2)

    def another_stores(world: World) -> None:
        world.record = stored

    world = World(session, Replace=iter([another_comes_first]), Wait=iter([another_stores]))
    assert play(world, session) is stored
    assert "Send" not in world.names()


def test_an_answer_that_takes_long_is_waited_for_and_the_others_see_it() -> None:
    session = expired_session()
    ends: list[float] = []

    def nothing_yet(world: World) -> None:
        world.now += 5.0

    def note(world: World) -> bool:
        assert world.record is not None
        assert world.record.attempt is not None
        ends.append(world.record.attempt.answer_by - world.now)
        return True

    world = World(session, Extend=iter([None, None, note, note]))
    send, awaits = iter([True]), iter([True, False])
    usual = world._usual

    def slow(step: s.Step) -> Any:
        if isinstance(step, s.Send | s.Await) and next(send if isinstance(step, s.Send) else awaits):
            nothing_yet(world)
            return None
        return successor_of(session) if isinstance(step, s.Await) else usual(step)

    world._usual = slow  # type: ignore[method-assign]
    assert play(world, session).token_set.access_token == "access-2"
    assert ends == [10.0, 10.0], "each time it was moved on before"


def test_a_worker_that_cannot_say_that_it_lives_waits_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    session = expired_session()
    world = World(session, Extend=iter([True, True, StoreError("away")]))
    usual, slow = world._usual, iter([True])
    world._usual = lambda step: (  # type: ignore[method-assign]
        None
        if isinstance(step, s.Send) and next(slow)
        else successor_of(session)
        if isinstance(step, s.Await)
        else usual(step)
    )
    assert play(world, session).token_set.access_token == "access-2"
    assert "do not see that" in caplog.text


@pytest.mark.parametrize(
    ("attempt", "life", "waits"),
    [
        (attempt_of_another(lock="lock"), Life.UNKNOWN, False),
        (attempt_of_another(is_over=True), Life.UNKNOWN, False),
        (attempt_of_another(), Life.GONE, False),
        (attempt_of_another(answer_by=NOW - 0.5), Life.UNKNOWN, False),
        (attempt_of_another(), Life.UNKNOWN, True),
        (attempt_of_another(answer_by=NOW - 0.5), Life.ALIVE, True),
    ],
    ids=["its very lock", "it gave up", "its process is gone", "its time is over", "it may live", "it lives"],
)
def test_an_attempt_of_another_is_waited_for_unless_no_answer_can_come(
    attempt: Attempt, life: Life, waits: bool
) -> None:
    session = expired_session(attempt=attempt)
    world = World(session, LifeOf=iter([life] * 100_000))
    play(world, session)
    assert ("Wait" in world.names()) == waits
    assert world.names().count("Send") == 1
    assert world.record is not None
    assert world.record.after_lost_answer


def test_a_worker_that_is_alive_is_not_waited_for_without_end() -> None:
    session = expired_session(attempt=attempt_of_another())
    world = World(session, LifeOf=iter([Life.ALIVE] * 100_000))
    play(world, session)
    waited = sum(step.seconds for step in world.asked if isinstance(step, s.Wait))
    assert QUICK.longest - 2.0 <= waited <= QUICK.longest


def test_one_that_does_not_wait_leaves_another_alone() -> None:
    session = expired_session(attempt=attempt_of_another())
    world = World(session)
    with pytest.raises(LockTimeoutError):
        play(world, session, waits=False)
    assert "Send" not in world.names()


def test_a_worker_that_stood_still_past_its_window_sends_nothing() -> None:
    session = expired_session()

    def stand_still(world: World) -> Session | None:
        world.now += QUICK.window
        return world.record

    world = World(session, Read=iter([lambda world: world.record, stand_still]))
    with pytest.raises(StoreError, match="too long"):
        play(world, session)
    assert "Send" not in world.names()
    assert world.record == session


def test_another_log_in_is_prepared_for_anew() -> None:
    session = expired_session()
    other = replace(session, token_set=replace(session.token_set, iss="https://other.example.com"))
    wanted = Wanted(session, Freshness(clock=lambda: NOW), rejected=session.token_set.access_token)
    world = World(other)
    protocol = Refresh(DID, wanted, Terms(lock_kind=LockKind.HOLDER, times=QUICK)).run()
    step: s.Step | None = next(protocol)
    while step is not None:
        try:
            step = protocol.send(world.do(step))
        except StopIteration:
            step = None
    assert [step.session for step in world.asked if isinstance(step, s.Prepare)] == [session, other]


def test_a_gateway_that_speaks_oauth_leaves_no_doubt() -> None:
    session = expired_session()
    error = OAuthResponseError("503", status=503, error="temporarily_unavailable")
    world = World(session, Send=iter([error]))
    with pytest.raises(OAuthResponseError):
        play(world, session)
    assert world.record is not None
    assert world.record.attempt is None


def test_what_gave_up_says_so() -> None:
    session = expired_session()
    world = World(session, Send=iter([TransportError("reset", sent=True)]))
    with pytest.raises(RefreshInterruptedError, match="reset"):
        play(world, session)
    assert world.record is not None
    assert world.record.attempt is not None
    assert world.record.attempt.is_over


@pytest.mark.parametrize("has_expired", [True, False])
def test_an_error_that_is_not_oauths_once_the_token_has_expired(has_expired: bool) -> None:
    """Some servers say so of a refresh token that is dead."""
    session = expired_session()
    world = World(session, Send=iter([OAuthResponseError("400", status=400, error="InvalidRequest")]))
    with pytest.raises(TokenRefreshError if has_expired else OAuthResponseError, match="400"):
        play(world, session, is_expired=lambda tokens: has_expired)
    assert world.record == session, "it is kept"


def test_an_error_of_the_authority_s_own_leaves_a_doubt() -> None:
    session = expired_session()
    world = World(session, Send=iter([TokenRefreshError("of a program's own")]))
    with pytest.raises(TokenRefreshError, match="own"):
        play(world, session)
    assert world.record is not None
    assert world.record.attempt is not None
