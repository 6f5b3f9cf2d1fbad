"""How a session is kept alive: every way a refresh can end, with a fake authorization server and real stores."""

from __future__ import annotations

import logging
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from atproto_session import (
    AuthMethodUnsatisfiableError,
    CancelledError,
    Freshness,
    LockTimeoutError,
    MemoryStore,
    OAuthResponseError,
    RefreshInterruptedError,
    Session,
    SessionDeletedEvent,
    SessionError,
    SessionGetter,
    SessionNotFoundError,
    SessionUpdatedEvent,
    StoreError,
    TokenInvalidError,
    TokenRefreshError,
    TokenRevokedError,
    TokenSet,
    TransportError,
    _flights,
    _worker,
)
from atproto_session._flights import Flight
from atproto_session._threads import begin
from atproto_session.locks import LockKind, ThreadLocks
from atproto_session.session import Attempt, Rest
from atproto_session.stores import complete

from . import core
from .core import (
    DID,
    OTHER_KEY,
    QUICK,
    SOON,
    FakeAuthority,
    Gate,
    PlainStore,
    Worker,
    expired_session,
    flight_of,
    make_session,
    make_tokens,
    successor_of,
    wait_until,
)

INVALID_GRANT = OAuthResponseError("400", status=400, error="invalid_grant")


class Rig:
    """A getter over a memory store that holds one session."""

    def __init__(self, session: Session | None = None, store: Any = None, **options: Any) -> None:
        self.store = store if store is not None else MemoryStore[Session]()
        if session is not None:
            self.store.set(DID, session)
        self.authority = FakeAuthority()
        self.getter = SessionGetter(self.store, self.authority, **{"times": QUICK, **options})
        self.events: list[SessionUpdatedEvent | SessionDeletedEvent] = []
        self.getter.on_updated(self.events.append)
        self.getter.on_deleted(self.events.append)

    @property
    def stored(self) -> Session | None:
        return self.store.get(DID)

    def get(self, *args: Any, **options: Any) -> Session:
        return self.getter.get_session(DID, *args, **options)

    def answer_with(self, error: Exception) -> None:
        def on_send(session: Session) -> None:
            raise error

        self.authority.on_send = on_send

    def refuse_preparation(self, error: Exception) -> None:
        def on_prepare(session: Session) -> None:
            raise error

        self.authority.on_prepare = on_prepare


class NoLocks:
    kind = LockKind.HOLDER

    def hold(self, name: str, **options: object) -> Any:
        raise AssertionError("a lock was taken")


class LeaseHold:
    def __init__(self, locks: LeaseLocks) -> None:
        self._locks = locks

    def extend(self, seconds: float) -> bool:
        self._locks.extended.append(seconds)
        return self._locks.held


class LeaseLocks(ThreadLocks):
    """Locks that say they can expire, and expire when told to."""

    kind = LockKind.LEASE

    def __init__(self) -> None:
        super().__init__()
        self.held = True
        self.extended: list[float] = []

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[Any]:
        with super().hold(name, timeout=timeout, cancel=cancel):
            yield LeaseHold(self)


class FailingStore(MemoryStore[Session]):
    """A store that fails on command.

    :ivar failures: how many calls of a method still fail.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, int] = {}

    def _maybe_fail(self, method: str) -> None:
        if self.failures.get(method, 0) > 0:
            self.failures[method] -= 1
            raise StoreError(f"{method} fails")

    def get(self, key: str) -> Session | None:
        self._maybe_fail("get")
        return super().get(key)

    def set(self, key: str, value: Session) -> None:
        self._maybe_fail("set")
        super().set(key, value)

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        self._maybe_fail("replace")
        return super().replace(key, session, expected)


# Reading


def test_a_fresh_session_takes_no_lock_and_no_request() -> None:
    session = make_session()
    rig = Rig(session, locks=NoLocks())
    assert rig.get() == session
    assert rig.get(False) == session
    assert rig.get(rejected="access-0") == session
    assert rig.authority.sends == 0


def test_an_expired_session_as_it_is_takes_none_either() -> None:
    session = expired_session()
    assert Rig(session, locks=NoLocks()).get(False) == session


@pytest.mark.duty(36)
def test_tokens_without_expiry_are_never_stale() -> None:
    rig = Rig(make_session(lifetime=None), locks=NoLocks())
    assert rig.get().token_set.access_token == "access-1"


@pytest.mark.parametrize("refresh", ["auto", True, False])
def test_nobody_is_logged_in(refresh: Any) -> None:
    with pytest.raises(SessionNotFoundError, match=DID) as caught:
        Rig().get(refresh)
    assert caught.value.login_required


def test_a_session_that_vanishes_before_the_lock_is_had() -> None:
    locks = ThreadLocks(LockKind.HOLDER)
    rig = Rig(expired_session(), locks=locks)
    with locks.hold(DID, timeout=0):
        worker = Worker(rig.get)
        wait_until(lambda: rig.getter._flights.get(DID))
        rig.store.delete(DID)
    with pytest.raises(TokenRevokedError):
        worker.outcome()


def test_a_store_that_cannot_be_read_is_an_error() -> None:
    store = FailingStore()
    rig = Rig(expired_session(), store)
    store.failures["get"] = 1
    with pytest.raises(StoreError):
        rig.get()
    assert rig.stored is not None
    assert rig.getter.get_stored(DID) == rig.stored


def test_on_interrupted_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="on_interrupted"):
        Rig(on_interrupted="ignore")


# Refreshing


def test_an_expired_session_is_refreshed_and_stored() -> None:
    rig = Rig(expired_session())
    session = rig.get()
    assert session.token_set.access_token == "access-2"
    assert rig.stored == session
    assert session.attempt is None
    assert session.refreshed_at is not None
    assert rig.authority.spent == {"refresh-1": 1}
    assert [type(event) for event in rig.events] == [SessionUpdatedEvent]
    assert rig.events[0].sub == DID


def test_true_refreshes_what_is_fresh() -> None:
    rig = Rig(make_session())
    assert rig.get(True).token_set.access_token == "access-2"
    assert rig.get(True).token_set.access_token == "access-3"


def test_a_rejected_token_is_replaced_once() -> None:
    rig = Rig(make_session())
    assert rig.get(rejected="access-1").token_set.access_token == "access-2"
    assert rig.get(rejected="access-1").token_set.access_token == "access-2"
    assert rig.authority.sends == 1


def test_a_newer_session_that_has_expired_is_no_answer_to_a_rejected_token() -> None:
    rig = Rig(expired_session(5))
    assert rig.get(rejected="access-1").token_set.access_token == "access-6"


def test_the_attempt_stands_in_the_record_while_the_request_is_out() -> None:
    rig = Rig(expired_session())
    seen: list[Session | None] = []
    rig.authority.on_send = lambda session: seen.append(rig.stored)
    rig.get()
    assert seen[0] is not None
    attempt = seen[0].attempt
    assert attempt is not None
    assert attempt.answer_by - attempt.started_at == pytest.approx(QUICK.window)
    assert attempt.answers_lost == 0


@pytest.mark.duty(35)
def test_a_herd_refreshes_once() -> None:
    rig = Rig(expired_session())
    gate = rig.authority.on_prepare = Gate()
    workers = [Worker(rig.get) for _ in range(32)]
    gate.wait_until_reached()
    flight = flight_of(rig.getter)
    wait_until(lambda: len(flight.landed._waiters) == 32)
    gate.open()
    assert {worker.outcome().token_set.access_token for worker in workers} == {"access-2"}  # type: ignore[attr-defined]
    assert rig.authority.sends == 1


def test_two_getters_over_one_store_refresh_once() -> None:
    rig = Rig(expired_session())
    other = SessionGetter(rig.store, rig.authority)
    gate = rig.authority.on_prepare = Gate()
    first = Worker(rig.get)
    gate.wait_until_reached()
    second = Worker(lambda: other.get_session(DID))
    wait_until(lambda: other._flights.get(DID))
    gate.open()
    assert first.outcome() == second.outcome()
    assert rig.authority.sends == 1


def test_what_was_just_refreshed_is_good_even_if_it_lives_short() -> None:
    rig = Rig(expired_session())
    other = SessionGetter(rig.store, rig.authority)
    gate = rig.authority.on_prepare = Gate()
    rig.authority.on_send = lambda session: replace(successor_of(session), token_set=make_tokens(2, lifetime=5))
    first = Worker(rig.get)
    gate.wait_until_reached()
    second = Worker(lambda: other.get_session(DID))
    wait_until(lambda: other._flights.get(DID))
    gate.open()
    assert first.outcome() == second.outcome()
    assert rig.authority.sends == 1


def test_no_refresh_token_in_the_answer_keeps_what_the_server_says() -> None:
    rig = Rig(expired_session())
    tokens = make_tokens(2, refresh_token="refresh-1")
    rig.authority.on_send = lambda session: replace(session, token_set=tokens)
    assert rig.get().token_set == tokens
    assert rig.stored is not None
    assert rig.stored.token_set == tokens


# Ahead of time


def stale() -> Session:
    return make_session(lifetime=5.0)


def test_a_stale_session_is_refreshed_ahead_of_time() -> None:
    assert Rig(stale()).get().token_set.access_token == "access-2"


def test_staleness_has_a_random_part() -> None:
    session = make_session(lifetime=25.0)
    assert Rig(session, freshness=Freshness(random=lambda: 0.4)).get() == session
    assert Rig(session, freshness=Freshness(random=lambda: 0.6)).get() != session


def test_the_others_go_on_with_a_stale_session() -> None:
    rig = Rig(stale())
    gate = rig.authority.on_send = Gate()
    first = Worker(rig.get)
    gate.wait_until_reached()
    assert rig.get().token_set.access_token == "access-1"
    other = SessionGetter(rig.store, rig.authority)
    assert other.get_session(DID).token_set.access_token == "access-1"
    gate.open()
    assert first.outcome().token_set.access_token == "access-2"  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [TransportError("no"), OAuthResponseError("no", status=500)])
def test_a_stale_session_outlasts_a_refresh_that_failed(error: SessionError) -> None:
    rig = Rig(stale())
    rig.answer_with(error)
    assert rig.get().token_set.access_token == "access-1"


def test_a_stale_session_that_is_over_is_over() -> None:
    rig = Rig(stale())
    rig.answer_with(INVALID_GRANT)
    with pytest.raises(TokenRefreshError):
        rig.get()


def test_a_stale_session_that_expires_meanwhile_is_an_error() -> None:
    now = [0.0]
    rig = Rig(make_session(lifetime=None), freshness=Freshness(clock=lambda: now[0]))
    expires_at = make_tokens().expires_at
    assert expires_at is not None
    now[0] = expires_at.timestamp() - 5
    rig.store.set(DID, make_session())

    def on_prepare(session: Session) -> None:
        now[0] += 10
        raise TransportError("no")

    rig.authority.on_prepare = on_prepare
    rig.store.set(DID, replace(make_session(), token_set=make_tokens(expires_at=expires_at)))
    with pytest.raises(TransportError):
        rig.get()


def test_cancel_counts_for_a_stale_session_as_well() -> None:
    rig, cancel = Rig(stale()), threading.Event()

    def on_prepare(session: Session) -> None:
        cancel.set()
        wait_until(flight_of(rig.getter).abandoned.is_set)

    rig.authority.on_prepare = on_prepare
    with pytest.raises(CancelledError):
        rig.get(cancel=cancel)
    rig.getter.close()
    assert rig.authority.sends == 0


def test_a_stale_session_that_cannot_be_refreshed_is_used_to_its_end() -> None:
    rig = Rig(replace(stale(), token_set=make_tokens(lifetime=5.0, refresh_token=None)), locks=NoLocks())
    assert rig.get().token_set.access_token == "access-1"


# What came back


def test_a_newer_record_is_the_answer_to_a_late_invalid_grant() -> None:
    rig = Rig(expired_session())
    newer = make_session(7)

    def on_send(session: Session) -> None:
        rig.store.set(DID, newer)
        raise INVALID_GRANT

    rig.authority.on_send = on_send
    assert rig.get() == newer
    assert rig.stored == newer
    assert rig.events == []


@pytest.mark.duty(37)
def test_invalid_grant_ends_the_session() -> None:
    rig = Rig(expired_session())
    rig.answer_with(INVALID_GRANT)
    with pytest.raises(TokenRefreshError) as caught:
        rig.get()
    assert caught.value.login_required
    assert not caught.value.answer_lost
    assert rig.stored is None
    assert [type(event) for event in rig.events] == [SessionDeletedEvent]
    assert isinstance(rig.events[0], SessionDeletedEvent)
    assert rig.events[0].cause is caught.value


def test_invalid_grant_after_a_lost_answer_says_so() -> None:
    rig = Rig(expired_session())
    rig.answer_with(TransportError("reset", sent=True))
    with pytest.raises(RefreshInterruptedError):
        rig.get()
    rig.answer_with(INVALID_GRANT)
    with pytest.raises(TokenRefreshError) as caught:
        rig.get()
    assert caught.value.answer_lost


def test_invalid_grant_for_a_session_that_was_signed_out_meanwhile() -> None:
    rig = Rig(expired_session())

    def on_send(session: Session) -> None:
        rig.store.delete(DID)
        raise INVALID_GRANT

    rig.authority.on_send = on_send
    with pytest.raises(TokenRevokedError):
        rig.get()
    assert rig.events == []


def test_patience_under_locks_of_this_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(expired_session(), locks=ThreadLocks())
    newer = make_session(7)
    monkeypatch.setattr("time.sleep", lambda seconds: rig.store.set(DID, newer))
    rig.answer_with(INVALID_GRANT)
    assert rig.get() == newer


@pytest.mark.parametrize(
    "error",
    [
        OAuthResponseError("no", status=400, error="invalid_client"),
        OAuthResponseError("no", status=429),
        TransportError("refused", sent=False),
    ],
)
def test_an_error_that_spent_nothing_leaves_no_trace(error: SessionError) -> None:
    session = expired_session()
    rig = Rig(session)
    rig.answer_with(error)
    with pytest.raises(type(error)):
        rig.get()
    assert rig.stored == session


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OAuthResponseError("no", status=503), OAuthResponseError),
        (OAuthResponseError("no", status=500, error="server_error"), OAuthResponseError),
        (OAuthResponseError("no", status=403), OAuthResponseError),
        (TransportError("reset", sent=True), RefreshInterruptedError),
        (RuntimeError("a bug"), RefreshInterruptedError),
        (AuthMethodUnsatisfiableError("no key"), AuthMethodUnsatisfiableError),
    ],
)
def test_an_answer_that_may_be_lost_leaves_the_attempt(error: Exception, raised: type[Exception]) -> None:
    rig = Rig(expired_session())
    rig.answer_with(error)
    with pytest.raises(raised):
        rig.get()
    assert rig.stored is not None
    assert rig.stored.attempt is not None
    assert rig.stored.attempt.answers_lost == 0
    with pytest.raises(raised):
        rig.get()
    assert rig.stored.attempt is not None
    assert rig.stored.attempt.answers_lost == 1
    rig.authority.on_send = None
    assert rig.get().token_set.access_token == "access-2"
    assert rig.stored.attempt is None


def test_a_doubt_survives_an_error_that_spent_nothing() -> None:
    rig = Rig(expired_session())
    rig.answer_with(TransportError("reset", sent=True))
    with pytest.raises(RefreshInterruptedError):
        rig.get()
    doubtful = rig.stored
    rig.answer_with(TransportError("refused", sent=False))
    with pytest.raises(TransportError):
        rig.get()
    assert rig.stored == doubtful


def test_retry_after_is_honoured_by_every_worker() -> None:
    now = [1_700_000_000.0]
    rig = Rig(expired_session(), freshness=Freshness(clock=lambda: now[0] + 10_000_000_000))
    rig.answer_with(OAuthResponseError("slow down", status=429, retry_after=20.0))
    with pytest.raises(OAuthResponseError):
        rig.get()
    other = SessionGetter(
        rig.store, rig.authority, freshness=Freshness(clock=lambda: now[0] + 10_000_000_000), times=QUICK
    )
    now[0] += 15
    with pytest.raises(OAuthResponseError, match="slow down") as caught:
        other.get_session(DID)
    assert caught.value.retryable
    assert caught.value.retry_after == pytest.approx(5.0)
    assert rig.authority.sends == 1
    now[0] += 6
    rig.authority.on_send = None
    assert other.get_session(DID).token_set.access_token == "access-2"
    assert rig.stored is not None
    assert rig.stored.rest is None


def test_retry_after_does_not_keep_a_stale_session_waiting() -> None:
    session = replace(stale(), rest=Rest(time.time() + 60.0, 1, "TransportError", "cannot reach it"))
    assert Rig(session, locks=NoLocks()).get() == session


def test_a_rest_of_more_than_an_hour_is_a_clock_that_was_set_back() -> None:
    rig = Rig(expired_session(rest=Rest(10_000_000_000.0, 1, "TransportError", "cannot reach it")))
    assert rig.get().token_set.access_token == "access-2"


@pytest.mark.parametrize(
    "members", [{"sub": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"}, {"scope": "transition:generic"}, {"token_type": "Bearer"}]
)
def test_tokens_that_must_not_be_used(members: dict[str, Any]) -> None:
    rig = Rig(expired_session())
    rig.authority.on_send = lambda session: replace(session, token_set=make_tokens(2, **members))
    with pytest.raises(TokenRefreshError, match="the server issued"):
        rig.get()
    assert rig.stored is None
    assert rig.authority.revoked == ["refresh-2"]
    assert isinstance(rig.events[0], SessionDeletedEvent)


def test_tokens_that_must_not_be_used_do_not_hurt_a_newer_session() -> None:
    rig = Rig(expired_session())
    newer = make_session(7)

    def on_send(session: Session) -> Session:
        rig.store.set(DID, newer)
        return replace(session, token_set=make_tokens(2, token_type="Bearer"))

    rig.authority.on_send = on_send
    assert rig.get() == newer
    assert rig.authority.revoked == [], "any token of a grant ends the whole grant"
    rig.store.set(DID, expired_session())
    newer = replace(newer, dpop_key=OTHER_KEY)
    assert rig.get() == newer
    assert rig.stored == newer
    assert rig.authority.revoked == ["refresh-2"]


def test_tokens_that_must_not_be_used_are_revoked_even_if_the_store_fails() -> None:
    store = FailingStore()
    rig = Rig(expired_session(), store)

    def on_send(session: Session) -> Session:
        store.failures["get"] = 1
        return replace(session, token_set=make_tokens(2, token_type="Bearer"))

    rig.authority.on_send = on_send
    with pytest.raises(TokenRefreshError):
        rig.get()
    assert rig.authority.revoked == ["refresh-2"]


# The record


@pytest.mark.parametrize(
    ("session", "why"),
    [
        (expired_session(token_set=make_tokens(lifetime=-1, refresh_token=None)), "without a refresh token"),
    ],
)
def test_a_record_that_proves_itself_useless(session: Session, why: str) -> None:
    rig = Rig(session)
    with pytest.raises(TokenRefreshError, match=why):
        rig.get()
    assert rig.stored is None
    assert rig.authority.sends == 0


def test_a_key_of_an_unknown_kind_keeps_the_session() -> None:
    session = expired_session(dpop_key={"kty": "EC", "crv": "P-384", "x": "AA", "y": "AA", "d": "AA"})
    rig = Rig(session)
    with pytest.raises(AuthMethodUnsatisfiableError, match="crv"):
        rig.get()
    assert rig.stored == session
    assert rig.authority.sends == 0


def test_another_authority_does_not_end_the_session() -> None:
    rig = Rig(session := expired_session())
    rig.refuse_preparation(TokenRefreshError("moved"))
    with pytest.raises(TokenRefreshError, match="moved"):
        rig.get()
    assert rig.stored == session


def test_nothing_is_written_when_the_server_cannot_be_found() -> None:
    session = expired_session()
    rig = Rig(session)
    rig.refuse_preparation(TransportError("no network"))
    with pytest.raises(TransportError):
        rig.get()
    assert rig.stored == session


# Attempts of others


def test_an_attempt_of_a_dead_worker_is_tried_again() -> None:
    rig = Rig()
    with rig.store.locks.hold(DID, timeout=0) as hold:
        attempt = Attempt("other", "host:1", 0.0, 9e12, lock=hold.lock)
    rig.store.set(DID, expired_session(attempt=attempt))
    assert rig.get().token_set.access_token == "access-2"


class CountingStore(MemoryStore[Session]):
    reads = 0

    def get(self, key: str) -> Session | None:
        self.reads += 1
        return super().get(key)


def test_under_another_lock_than_that_of_an_attempt_an_answer_is_waited_for() -> None:
    store = CountingStore()
    rig = Rig(expired_session(attempt=replace(attempt_in_flight(), lock="another")), store)
    worker = Worker(lambda: rig.get(timeout=SOON))
    wait_until(lambda: store.reads > 2)  # without a lock, under it, and while it waits
    newer = make_session(2)
    store.set(DID, newer)
    assert worker.outcome() == newer
    assert rig.authority.sends == 0


def test_an_attempt_of_a_dead_worker_is_given_up_where_wanted() -> None:
    attempt = Attempt("other", "host:1", 0.0, 0.0)
    session = expired_session(attempt=attempt)
    rig = Rig(session, on_interrupted="fail")
    with pytest.raises(TokenRefreshError, match="lost") as caught:
        rig.get()
    assert caught.value.answer_lost
    assert rig.stored == session, "kept: its owner may think again"
    assert rig.authority.sends == 0


def attempt_in_flight(seconds: float = SOON) -> Attempt:
    return Attempt("other", "host:1", time.time(), time.time() + seconds)


def test_under_a_lease_an_answer_is_waited_for() -> None:
    locks = LeaseLocks()
    rig = Rig(expired_session(attempt=attempt_in_flight(0.05)), locks=locks)
    assert rig.get().token_set.access_token == "access-2"
    assert set(locks.extended) == {QUICK.window}
    assert rig.stored is not None


def test_under_a_lease_an_answer_that_comes_is_taken() -> None:
    locks = LeaseLocks()
    rig = Rig(expired_session(attempt=attempt_in_flight(0.2)), locks=locks)
    worker = Worker(rig.get)
    wait_until(lambda: locks.extended)
    newer = make_session(2)
    rig.store.set(DID, newer)
    assert worker.outcome() == newer
    assert rig.authority.sends == 0


def test_under_a_lease_a_later_attempt_is_waited_for_in_turn() -> None:
    locks = LeaseLocks()
    rig = Rig(expired_session(attempt=attempt_in_flight(0.1)), locks=locks)
    worker = Worker(rig.get)
    wait_until(lambda: locks.extended)
    rig.store.set(DID, expired_session(attempt=replace(attempt_in_flight(0.1), id="third")))
    assert worker.outcome().token_set.access_token == "access-2"  # type: ignore[attr-defined]


def test_a_caller_who_leaves_while_an_answer_is_waited_for() -> None:
    session = expired_session(attempt=attempt_in_flight())
    rig, cancel = Rig(session, locks=LeaseLocks()), threading.Event()
    worker = Worker(lambda: rig.get(cancel=cancel))
    wait_until(lambda: rig.getter._world.locks.extended)  # type: ignore[attr-defined]
    cancel.set()
    with pytest.raises(CancelledError):
        worker.outcome()
    rig.getter.close()
    assert rig.stored == session
    assert rig.authority.sends == 0


def test_locks_that_do_not_say_what_they_are_count_as_leases() -> None:
    class Locks:
        def __init__(self) -> None:
            self.hold = ThreadLocks().hold

    rig = Rig(expired_session(), locks=Locks())
    assert rig.getter._terms.lock_kind is LockKind.LEASE


# Before the point of no return


def test_a_store_that_takes_no_attempt_spends_nothing() -> None:
    store = FailingStore()
    rig = Rig(expired_session(), store)
    store.failures["replace"] = 1
    with pytest.raises(StoreError):
        rig.get()
    assert rig.authority.sends == 0


def test_a_record_that_changes_before_the_attempt() -> None:
    rig = Rig(expired_session())
    newer = make_session(7)
    rig.authority.on_prepare = lambda session: rig.store.set(DID, newer)
    assert rig.get() == newer
    rig.store.set(DID, expired_session())
    rig.authority.on_prepare = lambda session: rig.store.delete(DID)
    with pytest.raises(TokenRevokedError):
        rig.get()
    assert rig.authority.sends == 0


class MeddledStore(MemoryStore[Session]):
    """Something happens right after an attempt was written."""

    meddle: Any = None

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        done = super().replace(key, session, expected)
        if session is not None and session.attempt is not None and self.meddle is not None:
            meddle, self.meddle = self.meddle, None
            meddle(session)
        return done


def test_the_last_look_sees_another_worker() -> None:
    store = MeddledStore()
    rig = Rig(expired_session(), store)
    taken_over = expired_session(attempt=attempt_in_flight())
    store.meddle = lambda session: store.set(DID, taken_over)
    with pytest.raises(LockTimeoutError):
        rig.get(timeout=0.1)
    assert rig.stored == taken_over, "the other's attempt stands, and is waited for"
    store.set(DID, newer := make_session(7))
    assert rig.get() == newer
    assert rig.authority.sends == 0


def test_the_last_look_sees_a_newer_session_and_a_log_out() -> None:
    store = MeddledStore()
    rig = Rig(expired_session(), store)
    newer = make_session(7)
    store.meddle = lambda session: store.set(DID, newer)
    assert rig.get() == newer
    store.set(DID, expired_session())
    store.meddle = lambda session: store.delete(DID)
    with pytest.raises(TokenRevokedError):
        rig.get()
    assert rig.authority.sends == 0


def test_an_attempt_of_another_worker_is_not_taken_back() -> None:
    # Whoever lost its lease in flight finds the attempt of its successor beside the same tokens.
    rig = Rig(expired_session(), locks=LeaseLocks())
    others = expired_session(attempt=attempt_in_flight())

    def on_send(session: Session) -> None:
        rig.store.set(DID, others)
        raise OAuthResponseError("later", status=429, retry_after=5.0)

    rig.authority.on_send = on_send
    with pytest.raises(OAuthResponseError, match="later"):
        rig.get()
    assert rig.stored == others


class StoreThatGoes(MemoryStore[Session]):
    """:ivar is_away: nothing can be read or written.
    :ivar goes_when_announced: it is when an attempt has been written.
    """

    is_away = False
    goes_when_announced = False

    def get(self, key: str) -> Session | None:
        self._check()
        return super().get(key)

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        self._check()
        is_done = super().replace(key, session, expected)
        self.is_away = self.goes_when_announced and session is not None and session.attempt is not None
        return is_done

    def _check(self) -> None:
        if self.is_away:
            raise StoreError("the server of the sessions is away", retryable=True)


only_linux_tells = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells about other processes")


@only_linux_tells
def test_an_attempt_that_could_not_be_taken_back_keeps_nobody_of_this_machine_waiting() -> None:
    store = StoreThatGoes()
    rig = Rig(expired_session(), store, locks=core.NoLocks())
    store.goes_when_announced = True
    with pytest.raises(StoreError, match="away"):
        rig.get()
    store.is_away = store.goes_when_announced = False
    assert rig.stored is not None
    assert rig.stored.attempt is not None
    assert rig.get(timeout=5.0).token_set.access_token == "access-2"
    assert rig.authority.sends == 1


@only_linux_tells
@pytest.mark.parametrize("is_sent", [False, True])
def test_nor_does_one_whose_request_failed_while_the_store_was_away(is_sent: bool) -> None:
    store = StoreThatGoes()
    rig = Rig(expired_session(), store, locks=core.NoLocks())

    def on_send(session: Session) -> None:
        store.is_away = True
        raise TransportError("no route", sent=is_sent)

    rig.authority.on_send = on_send
    with pytest.raises(RefreshInterruptedError if is_sent else TransportError):
        rig.get()
    store.is_away, rig.authority.on_send = False, None
    assert rig.get(timeout=5.0).token_set.access_token == "access-2"


@only_linux_tells
def test_a_worker_that_is_at_work_is_waited_for_though_its_window_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    store, gate, looks = MemoryStore[Session](), Gate(), list[str]()
    is_at_work = _worker._is_at_work

    def look(on: str) -> bool:
        looks.append(on)
        return is_at_work(on)

    monkeypatch.setattr(_worker, "_is_at_work", look)
    one = Rig(expired_session(), store, locks=core.NoLocks())
    one.authority.on_send = gate
    first = Worker(one.get)
    gate.wait_until_reached()
    later = Freshness(clock=lambda: time.time() + QUICK.window + 60.0)
    other = Rig(None, store, locks=core.NoLocks(), freshness=later)
    second, seen = Worker(other.get), len(looks)
    wait_until(lambda: len(looks) > seen + 2)
    gate.open()
    assert first.outcome() == second.outcome() == store.get(DID)
    assert (one.authority.sends, other.authority.sends) == (1, 0)


def test_a_lease_that_was_lost_spends_nothing() -> None:
    locks, store = LeaseLocks(), MeddledStore()
    session = expired_session()
    rig = Rig(session, store, locks=locks)
    locks.held = False
    with pytest.raises(LockTimeoutError, match="all the time"):
        rig.get()
    assert rig.stored == session, "nothing is written without the lock"
    locks.held = True
    store.meddle = lambda session: setattr(locks, "held", False)
    with pytest.raises(LockTimeoutError, match="all the time"):
        rig.get()
    assert rig.authority.sends == 0
    assert rig.stored == session, "the attempt is taken back"
    locks.held = True
    assert rig.get().token_set.access_token == "access-2"


def test_a_caller_who_leaves_before_spending_takes_the_attempt_back() -> None:
    store = MeddledStore()
    session = expired_session()
    rig, cancel, gate = Rig(session, store), threading.Event(), Gate()
    store.meddle = gate
    worker = Worker(lambda: rig.get(cancel=cancel))
    gate.wait_until_reached()
    cancel.set()
    with pytest.raises(CancelledError):
        worker.outcome()
    gate.open()
    wait_until(lambda: rig.stored == session)
    assert rig.authority.sends == 0


def test_an_attempt_that_cannot_be_taken_back_stands(caplog: pytest.LogCaptureFixture) -> None:
    store = FailingStore()
    rig = Rig(expired_session(), store)

    def on_send(session: Session) -> None:
        store.failures["replace"] = 1
        raise TransportError("refused", sent=False)

    rig.authority.on_send = on_send
    with pytest.raises(TransportError):
        rig.get()
    assert "could not be taken back" in caplog.text
    assert rig.stored is not None
    assert rig.stored.attempt is not None


# After it


def test_a_caller_who_leaves_after_spending_loses_nothing() -> None:
    rig, cancel, gate = Rig(expired_session()), threading.Event(), Gate()
    rig.authority.on_send = gate
    worker = Worker(lambda: rig.get(cancel=cancel))
    gate.wait_until_reached()
    cancel.set()
    with pytest.raises(CancelledError):
        worker.outcome()
    with pytest.raises(LockTimeoutError):
        rig.get(timeout=0.01)
    gate.open()
    rig.getter.close()
    assert rig.stored is not None
    assert rig.stored.token_set.access_token == "access-2"
    assert rig.authority.sends == 1


def test_a_log_out_is_not_undone() -> None:
    rig = Rig(expired_session())
    rig.authority.on_send = lambda session: rig.store.delete(DID)
    with pytest.raises(TokenRevokedError):
        rig.get()
    assert rig.stored is None
    assert rig.authority.revoked == ["refresh-2"]
    assert rig.events == []


def test_a_new_log_in_is_not_overwritten() -> None:
    rig = Rig(expired_session())
    newer = make_session(9, dpop_key=OTHER_KEY)
    rig.authority.on_send = lambda session: rig.store.set(DID, newer)
    rig.authority.revocation_error = TransportError("away")
    assert rig.get() == newer
    assert rig.stored == newer
    assert rig.authority.revoked == ["refresh-2"], "an orphan"


def test_a_newer_token_of_the_same_grant_is_not_overwritten() -> None:
    rig = Rig(expired_session())
    newer = make_session(7)
    rig.authority.on_send = lambda session: rig.store.set(DID, newer)
    assert rig.get() == newer
    assert rig.authority.revoked == [], "no orphan: it would end the newer one too"


def test_the_successor_of_the_spent_token_is_stored_whatever_else_has_changed() -> None:
    rig = Rig(expired_session())
    edited = replace(expired_session(), token_set=make_tokens(1, access_token="other"))
    rig.authority.on_send = lambda session: rig.store.set(DID, edited)
    assert rig.get().token_set.access_token == "access-2"
    assert rig.stored is not None
    assert rig.stored.token_set.access_token == "access-2"


def test_a_store_that_fails_for_a_moment_is_tried_again() -> None:
    store = FailingStore()
    rig = Rig(expired_session(), store)
    rig.authority.on_send = lambda session: store.failures.update(replace=2)
    assert rig.get().token_set.access_token == "access-2"
    rig.getter.close()
    assert rig.stored is not None
    assert rig.stored.token_set.access_token == "access-2"


def test_a_store_that_stored_and_said_otherwise() -> None:
    class Liar(FailingStore):
        def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
            done = MemoryStore.replace(self, key, session, expected)
            self._maybe_fail("replace")
            return done

    store = Liar()
    rig = Rig(expired_session(), store)
    rig.authority.on_send = lambda session: store.failures.update(replace=1)
    assert rig.get().token_set.access_token == "access-2"
    rig.getter.close()
    assert [type(event) for event in rig.events] == [SessionUpdatedEvent]


@pytest.mark.parametrize("replaces", [1, 2])
def test_what_cannot_be_stored_is_revoked(replaces: int, caplog: pytest.LogCaptureFixture) -> None:
    store = FailingStore()
    rig = Rig(expired_session(), store, times=replace(QUICK, store_for=0.0))
    rig.authority.on_send = lambda session: store.failures.update(replace=replaces)
    with pytest.raises(StoreError, match="could not be stored, and was ended at its server") as caught:
        rig.get()
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == replaces
    assert rig.authority.revoked == ["refresh-2"]
    assert (rig.stored is None) == (replaces == 1), "deleted, if the store lets it"
    assert str(caught.value) in caplog.text


def test_what_is_said_of_a_revocation_is_true() -> None:
    store = FailingStore()
    rig = Rig(expired_session(), store, times=replace(QUICK, store_for=0.0))
    rig.authority.revocation_error = TransportError("away")
    rig.authority.on_send = lambda session: store.failures.update(replace=1)
    with pytest.raises(StoreError, match="could not be ended at its server"):
        rig.get()


def test_those_who_wait_get_the_new_tokens_while_the_store_fails() -> None:
    store = FailingStore()
    rig = Rig(expired_session(), store, times=replace(QUICK, store_for=60.0))
    rig.authority.on_send = lambda session: store.failures.update(replace=10_000)
    assert rig.get().token_set.access_token == "access-2"
    assert rig.stored is not None
    assert rig.stored.token_set.access_token == "access-1"
    assert rig.get().token_set.access_token == "access-2", "the next caller gets them too"
    store.failures["get"] = 1
    assert rig.get().token_set.access_token == "access-2", "even if the store cannot be read"
    store.failures.clear()
    wait_until(lambda: rig.stored and rig.stored.token_set.access_token == "access-2")
    rig.getter.close()
    assert rig.authority.revoked == []
    assert rig.authority.sends == 1


def test_a_record_that_never_holds_still() -> None:
    store = FailingStore()
    rig = Rig(expired_session(), store, times=replace(QUICK, store_for=0.0))
    count = iter(range(100))

    def disturb(key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        store.set(DID, expired_session(token_set=make_tokens(1, lifetime=-60.0, access_token=f"other-{next(count)}")))
        return False

    def on_send(session: Session) -> None:
        store.replace = disturb  # type: ignore[method-assign]

    rig.authority.on_send = on_send
    with pytest.raises(StoreError):
        rig.get()
    assert rig.authority.revoked == ["refresh-2"]


# Logging in and out


def test_a_log_in_is_stored_and_told() -> None:
    rig = Rig(expired_session(5, attempt=Attempt("a", "b", 0, 0)))
    rig.getter.set_stored(DID, make_session(attempt=Attempt("a", "b", 0, 0)))
    assert rig.stored is not None
    assert rig.stored.token_set.access_token == "access-1"
    assert rig.stored.attempt is None
    assert isinstance(rig.events[0], SessionUpdatedEvent)
    rig.getter.set_stored(f"{DID}#two", make_session())
    assert rig.store.get(f"{DID}#two") is not None


def test_a_session_of_another_account_is_not_stored() -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        Rig().getter.set_stored("did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", make_session())


def test_a_log_in_that_cannot_be_stored_is_revoked() -> None:
    store = FailingStore()
    rig = Rig(None, store)
    store.failures["replace"] = 1
    with pytest.raises(StoreError) as caught:
        rig.getter.set_stored(DID, make_session())
    assert caught.value.did == DID
    assert rig.authority.revoked == ["refresh-1"]
    assert rig.events == []


def test_a_log_out_deletes_tells_and_revokes() -> None:
    rig = Rig(make_session())
    rig.getter.delete_stored(DID, revoke=True)
    assert rig.stored is None
    assert rig.authority.revoked == ["refresh-1"]
    assert isinstance(rig.events[0], SessionDeletedEvent)
    assert isinstance(rig.events[0].cause, TokenRevokedError)
    rig.getter.delete_stored(DID)
    assert len(rig.events) == 1, "there was nothing left to delete"


def test_a_deletion_with_a_cause() -> None:
    rig, cause = Rig(make_session()), RuntimeError("closed")
    rig.getter.delete_stored(DID, cause)
    assert isinstance(rig.events[0], SessionDeletedEvent)
    assert rig.events[0].cause is cause
    assert rig.authority.revoked == []


def test_a_log_out_waits_for_a_refresh_and_ends_what_it_left() -> None:
    rig, gate = Rig(expired_session()), Gate()
    rig.authority.on_send = gate
    refresh = Worker(rig.get)
    gate.wait_until_reached()
    log_out = Worker(lambda: rig.getter.delete_stored(DID, revoke=True))
    wait_until(lambda: len(rig.getter._flights._all) == 2)
    gate.open()
    refresh.outcome()
    log_out.outcome()
    assert rig.stored is None
    assert rig.authority.revoked == ["refresh-2"]


def test_a_log_out_that_cannot_wait_acts_at_once() -> None:
    rig, gate = Rig(expired_session()), Gate()
    rig.getter._lock_share = 0.0
    rig.authority.on_send = gate
    refresh = Worker(lambda: rig.get(timeout=SOON))
    gate.wait_until_reached()
    rig.getter.delete_stored(DID, revoke=True)
    assert rig.stored is None
    gate.open()
    with pytest.raises(TokenRevokedError):
        refresh.outcome()
    assert rig.stored is None
    assert rig.authority.revoked == ["refresh-1", "refresh-2"]


def test_a_log_out_ends_the_grant_however_often_it_is_refreshed_meanwhile() -> None:
    store = FailingStore()
    rig = Rig(make_session(), store)
    replace_ = MemoryStore.replace

    def refreshed_first(key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        del store.replace
        store.set(DID, make_session(2))
        return replace_(store, key, session, expected)

    store.replace = refreshed_first  # type: ignore[method-assign]
    rig.getter.delete_stored(DID)
    assert rig.stored is None


def test_a_log_out_leaves_a_log_in_that_came_after_it() -> None:
    store = FailingStore()
    rig = Rig(make_session(), store)
    newer = make_session(dpop_key=OTHER_KEY, token_set=make_tokens(9))

    def logged_in_first(key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        store.set(DID, newer)
        return MemoryStore.replace(store, key, session, expected)

    store.replace = logged_in_first  # type: ignore[method-assign]
    rig.getter.delete_stored(DID)
    assert rig.stored == newer
    assert rig.events == []


def test_an_unreadable_session_can_be_logged_out_of() -> None:
    store = FailingStore()
    rig = Rig(make_session(), store)
    store.failures["get"] = 1
    rig.getter.delete_stored(DID, revoke=True)
    assert rig.stored is None


def test_a_rejected_session_is_deleted_unless_it_was_replaced() -> None:
    rig = Rig(make_session(2))
    cause = TokenRevokedError("refused")
    rig.getter.delete_rejected(DID, make_session(1), cause)
    assert rig.stored is not None
    rig.getter.delete_rejected(DID, make_session(2, dpop_key=OTHER_KEY), cause)
    assert rig.stored is not None
    rig.getter.delete_rejected(DID, make_session(2), cause)
    assert rig.stored is None
    rig.getter.delete_rejected(DID, make_session(2), cause)
    assert len(rig.events) == 1


def test_a_log_out_waits_for_no_server_beyond_its_time() -> None:
    rig, gate = Rig(make_session()), Gate()
    revoke = rig.authority.revoke
    rig.authority.revoke = lambda session: (gate(), revoke(session))[1]  # type: ignore[method-assign]
    rig.getter.delete_stored(DID, revoke=True, timeout=0.05)
    assert rig.stored is None
    assert rig.authority.revoked == []
    assert rig.events == [], "nothing but the end of the flight tells"
    gate.open()
    rig.getter.close()
    assert rig.authority.revoked == ["refresh-1"], "it goes on alone"
    assert len(rig.events) == 1


def test_a_log_out_within_its_time_has_told_the_server() -> None:
    rig = Rig(make_session())
    rig.getter.delete_stored(DID, revoke=True, timeout=SOON)
    assert rig.authority.revoked == ["refresh-1"]
    assert len(rig.events) == 1


def test_a_log_out_waits_for_no_store_beyond_its_time() -> None:
    store, gate = FailingStore(), Gate()
    rig = Rig(make_session(), store)
    store.replace = lambda *arguments: (gate(), MemoryStore.replace(store, *arguments))[1]  # type: ignore[method-assign]
    with pytest.raises(LockTimeoutError, match="goes on without you") as caught:
        rig.getter.delete_stored(DID, revoke=True, timeout=0.05)
    assert caught.value.retryable
    assert (caught.value.did, caught.value.session_id) == (DID, None)
    gate.open()
    rig.getter.close()
    assert rig.stored is None
    assert rig.authority.revoked == ["refresh-1"]


def test_a_log_out_does_without_the_lock_after_half_its_time() -> None:
    rig = Rig(make_session())
    locks, times = rig.store.locks, list[float]()
    hold = locks.hold

    def spied(name: str, *, timeout: float, cancel: Any = None) -> Any:
        times.append(timeout)
        return hold(name, timeout=timeout, cancel=cancel)

    locks.hold = spied  # type: ignore[method-assign]
    with hold(DID, timeout=0.0):
        rig.getter.delete_stored(DID, revoke=True, timeout=0.2)
    assert rig.stored is None
    assert times == [0.1]


@pytest.mark.parametrize(("timeout", "problem"), [("5", TypeError), (True, TypeError), (float("nan"), ValueError)])
def test_a_timeout_is_a_number_of_seconds(timeout: Any, problem: type[Exception]) -> None:
    rig = Rig(make_session())
    for call in (rig.getter.delete_stored, rig.getter.get_session):
        with pytest.raises(problem, match="timeout is a number of seconds"):
            call(DID, timeout=timeout)
    assert rig.stored is not None


# Why there is no session


def test_why_a_session_ended_is_told_to_all_who_ask_later() -> None:
    rig = Rig(expired_session())
    refusal = OAuthResponseError(
        "400: invalid_grant (Token was not issued to this client)",
        status=400,
        error="invalid_grant",
        error_description="Token was not issued to this client",
    )
    rig.answer_with(refusal)
    with pytest.raises(TokenRefreshError):
        rig.get()
    for refresh in (False, "auto", True):
        with pytest.raises(SessionNotFoundError, match=r"since \d{4}-\d\d-\d\d .* UTC: .*not issued to") as caught:
            rig.get(refresh)
        error = pickle.loads(pickle.dumps(caught.value))
        assert (error.error, error.error_description) == ("invalid_grant", "Token was not issued to this client")
        assert (error.did, error.session_id) == (DID, None)
        assert abs(error.ended_at - time.time()) < 60
        assert error.login_required
    with pytest.raises(SessionNotFoundError, match="log in first") as caught:
        rig.getter.get_session(f"{DID}#other")
    assert (caught.value.error, caught.value.ended_at) == (None, None)


def test_a_sign_out_is_remembered_until_the_next_log_in() -> None:
    rig = Rig(make_session())
    rig.getter.delete_stored(DID)
    with pytest.raises(SessionNotFoundError, match=r"was signed out; log in again$"):
        rig.get()
    rig.getter.set_stored(DID, make_session())
    rig.store.delete(DID)
    with pytest.raises(SessionNotFoundError, match="log in first"):
        rig.get()


def test_a_log_in_by_another_process_is_the_end_of_what_is_remembered() -> None:
    rig = Rig(make_session())
    rig.getter.delete_stored(DID)
    rig.store.set(DID, make_session(2, began_at=1.0))
    assert rig.get()
    rig.store.delete(DID)
    with pytest.raises(SessionNotFoundError, match="signed out"):
        rig.get()
    rig.store.set(DID, make_session(2, began_at=time.time() + 1.0))
    assert rig.get()
    rig.store.delete(DID)
    with pytest.raises(SessionNotFoundError, match="log in first"):
        rig.get()


def test_what_others_say_of_the_end_is_not_repeated() -> None:
    rig = Rig(make_session())
    rig.getter.delete_stored(DID, RuntimeError("the password is hunter2"))
    with pytest.raises(SessionNotFoundError, match=r"UTC: RuntimeError; log in again$"):
        rig.get()


def test_those_whose_refresh_finds_no_record_are_told_why_as_well() -> None:
    rig, gate = Rig(expired_session()), Gate()
    rig.authority.on_prepare = gate
    waiting = [Worker(rig.get) for _ in range(2)]
    gate.wait_until_reached()
    rig.getter.delete_rejected(DID, expired_session(), TokenInvalidError("the server refuses new tokens"))
    gate.open()
    for each in waiting:
        with pytest.raises(SessionNotFoundError, match="refuses new tokens"):
            each.outcome()


# Listeners


def test_a_listener_that_raises_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(expired_session())

    def listener(event: SessionUpdatedEvent) -> None:
        raise RuntimeError("listener")

    stop = rig.getter.on_updated(listener)
    assert rig.get() == rig.stored
    assert "a listener failed" in caplog.text
    caplog.clear()
    stop()
    stop()
    rig.get(True)
    assert caplog.text == ""


def test_listeners_are_told_after_the_lock_is_released() -> None:
    locks = ThreadLocks(LockKind.HOLDER)
    rig = Rig(expired_session(), locks=locks)
    free: list[bool] = []

    def listener(event: SessionUpdatedEvent) -> None:
        with locks.hold(DID, timeout=0):
            free.append(not rig.getter._flights.get(DID))

    rig.getter.on_updated(listener)
    rig.get()
    assert free == [True]


def test_an_attempt_is_not_taken_back_from_another() -> None:
    rig = Rig(expired_session())
    newer = make_session(7)

    def on_send(session: Session) -> None:
        rig.store.set(DID, newer)
        raise TransportError("refused", sent=False)

    rig.authority.on_send = on_send
    assert rig.get() == newer
    assert rig.stored == newer


def test_a_token_whose_time_comes_while_another_worker_refreshes_it_is_waited_for() -> None:
    now = [time.time()]

    class SlowLocks(ThreadLocks):
        """Another process has the lock, and to find that out takes as long as the token lives."""

        tries = 0

        @contextmanager
        def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[Any]:
            self.tries += 1
            if self.tries == 1:
                now[0] += 60.0
                raise LockTimeoutError("another process has it")
            with super().hold(name, timeout=timeout, cancel=cancel) as lock:
                yield lock

    freshness = Freshness(clock=lambda: now[0])
    rig = Rig(make_session(lifetime=5.0), locks=SlowLocks(), freshness=freshness)
    assert rig.get().token_set.access_token == "access-2"
    assert rig.authority.sends == 1


# Stores and locks of the application's own


class OwnFullStore:
    """One with everything that a store may have, and with errors of its own."""

    def __init__(self, session: Session) -> None:
        self._sessions = FailingStore()
        self._sessions.set(DID, session)
        self.failures = self._sessions.failures
        self.locks, self.logins = self._sessions.locks, self._sessions.logins

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._sessions, method)(*arguments)
        except StoreError as error:
            raise ConnectionError("the server has gone") from error

    def get(self, key: str) -> Session | None:
        return self._call("get", key)  # type: ignore[no-any-return]

    def set(self, key: str, session: Session) -> None:
        self._call("set", key, session)

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        return self._call("replace", key, session, expected)  # type: ignore[no-any-return]

    def delete(self, key: str) -> None:
        self._call("delete", key)

    def clear(self) -> None:
        self._call("clear")

    def __iter__(self) -> Iterator[str]:
        return iter(self._sessions)

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize("store", [PlainStore, dict])
def test_two_getters_over_one_plain_store_refresh_once(store: Callable[[], Any]) -> None:
    shared, gate = store(), Gate()
    first, second = Rig(None, shared), Rig(None, shared)
    first.getter.set_stored(DID, expired_session())
    first.authority.on_send = gate
    refresh = Worker(first.get)
    gate.wait_until_reached()
    other = Worker(second.get)
    flight_of(second.getter)
    gate.open()
    assert refresh.outcome() == other.outcome()
    assert (first.authority.sends, second.authority.sends) == (1, 0)


def test_whatever_a_store_of_ones_own_raises_the_answer_is_kept() -> None:
    store = OwnFullStore(expired_session())
    rig = Rig(None, store)
    rig.authority.on_send = lambda session: store.failures.update(replace=2)
    assert rig.get().token_set.access_token == "access-2"
    wait_until(lambda: not rig.getter._flights.get(DID))
    assert rig.getter.get_stored(DID) == rig.get()
    store.failures["replace"] = 1
    with pytest.raises(StoreError, match="OwnFullStore cannot be written: ConnectionError"):
        rig.getter.set_stored(DID, make_session(7))
    assert rig.authority.revoked == ["refresh-7"]


def test_a_store_that_loses_the_attempt_spends_nothing() -> None:
    class Forgetful(PlainStore):
        def set(self, key: str, session: Session) -> None:
            super().set(key, Session(session.dpop_key, session.auth_method, session.token_set))

    rig = Rig(None, Forgetful())
    rig.getter.set_stored(DID, expired_session())
    with pytest.raises(StoreError, match="did not keep what was recorded"):
        rig.get()
    assert rig.authority.sends == 0


def test_a_store_that_takes_too_long_for_the_attempt_spends_nothing() -> None:
    # Under locks that do not keep other processes out, what the attempt says about its end is all they have.
    clock, store = [1e9], MeddledStore()
    session = make_session(lifetime=None)
    rig = Rig(session, store, freshness=Freshness(clock=lambda: clock[0]), locks=ThreadLocks())
    store.meddle = lambda session: clock.append(clock.pop() + QUICK.window)
    with pytest.raises(StoreError, match="too long") as caught:
        rig.get(True)
    assert caught.value.retryable
    assert rig.stored == session, "the attempt is taken back"
    assert rig.get(True).token_set.access_token == "access-2"


def fail_once(store: Any) -> None:
    def get(key: str) -> Session | None:
        del store.get
        raise StoreError("once")

    store.get = get


def test_a_store_that_fails_at_the_last_look_keeps_no_attempt() -> None:
    store = MeddledStore()
    session = expired_session()
    rig = Rig(session, store, on_interrupted="fail")
    store.meddle = lambda session: fail_once(store)
    with pytest.raises(StoreError, match="once"):
        rig.get()
    assert rig.stored == session, "the attempt is taken back"
    assert rig.get().token_set.access_token == "access-2", "nothing was sent, so no answer was lost"


class GoneLocks(LeaseLocks):
    """Locks whose server goes just after an attempt was written."""

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[Any]:
        with super().hold(name, timeout=timeout, cancel=cancel) as lock:
            yield GoneHold(lock, self)


class GoneHold:
    def __init__(self, lock: LeaseHold, locks: GoneLocks) -> None:
        self._lock = lock
        self._locks = locks

    def extend(self, seconds: float) -> bool:
        if not self._locks.held:
            raise ConnectionError("the server has gone")
        return self._lock.extend(seconds)


def test_a_lock_that_cannot_be_asked_any_more_stops_the_refresh_and_the_attempt_is_taken_back() -> None:
    locks, store = GoneLocks(), MeddledStore()
    session = expired_session()
    rig = Rig(session, store, locks=locks)
    store.meddle = lambda session: setattr(locks, "held", False)
    with pytest.raises(StoreError, match=r"the lock of .* cannot be used: ConnectionError"):
        rig.get()
    assert rig.authority.sends == 0
    assert rig.stored == session


def test_a_lease_is_prolonged_as_long_as_the_store_takes_no_tokens() -> None:
    locks, store = LeaseLocks(), FailingStore()
    rig = Rig(expired_session(), store, locks=locks)
    rig.authority.on_send = lambda session: store.failures.update(replace=3)
    assert rig.get().token_set.access_token == "access-2"
    rig.getter.close()
    assert len(locks.extended) > 3, "twice before the request, and after each try"
    assert set(locks.extended) == {QUICK.window}


class RemoteLocks:
    """Locks on a server that has gone."""

    kind = LockKind.LEASE

    def hold(self, name: str, **options: object) -> Any:
        raise ConnectionError("the server has gone")


def test_without_its_locks_a_log_in_is_stored_and_a_log_out_final(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(expired_session(), locks=RemoteLocks())
    rig.getter.set_stored(DID, make_session(7))
    assert rig.getter.get_stored(DID) is not None
    rig.getter.delete_stored(DID)
    assert rig.getter.get_stored(DID) is None
    assert caplog.text.count("changes without its lock") == 2
    assert "ConnectionError" in caplog.text


class StickyLocks(ThreadLocks):
    """Locks whose server goes while one is held."""

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[Any]:
        with super().hold(name, timeout=timeout, cancel=cancel) as lock:
            yield lock
        raise ConnectionError("the server has gone")


def test_a_lock_that_cannot_be_released_takes_nothing_back(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(expired_session(), locks=StickyLocks())
    assert rig.get().token_set.access_token == "access-2"
    rig.getter.set_stored(DID, make_session(7))
    rig.getter.delete_stored(DID, revoke=True)
    assert rig.authority.revoked == ["refresh-7"]
    assert [type(event) for event in rig.events] == [SessionUpdatedEvent, SessionUpdatedEvent, SessionDeletedEvent]
    assert caplog.text.count("was not released: ConnectionError") == 3


def test_a_log_in_that_is_called_away_while_it_waits_is_stored() -> None:
    rig = Rig(expired_session())
    with rig.store.locks.hold(DID, timeout=0):
        log_in = Worker(lambda: rig.getter.set_stored(DID, make_session(7)))
        wait_until(lambda: rig.getter._flights._all)
        (flight,) = rig.getter._flights._all
        flight.abandon()  # as when something is raised in its caller
    log_in.outcome()
    assert rig.stored is not None
    assert rig.stored.token_set.access_token == "access-7"


def test_locks_that_count_themselves_are_used_while_there_are_none() -> None:
    class CountedLocks(ThreadLocks):
        def __len__(self) -> int:
            return 0

    locks = CountedLocks()
    assert Rig(locks=locks).getter._world.locks is locks


def test_a_log_out_from_an_unreadable_record_is_told() -> None:
    store = FailingStore()
    rig = Rig(make_session(), store)
    store.failures["get"] = 1
    rig.getter.delete_stored(DID)
    assert rig.stored is None
    assert [type(event) for event in rig.events] == [SessionDeletedEvent]


# Without a refresh token


def test_a_session_without_a_refresh_token_is_kept_as_long_as_it_can_be_used() -> None:
    session = make_session()
    session = replace(session, token_set=replace(session.token_set, refresh_token=None))
    rig = Rig(session)
    assert rig.get() == session
    with pytest.raises(TokenRefreshError, match="can be used, but not refreshed"):
        rig.get(True)
    assert rig.stored == session
    with pytest.raises(TokenRefreshError, match="without a refresh token"):
        rig.get(rejected="access-1")
    assert rig.stored is None, "its server has refused it"


# Tokens that were asked for by others


def test_the_token_that_a_caller_has_had_refused_is_no_answer_to_it() -> None:
    rig, gate = Rig(expired_session()), Gate()
    hold = rig.getter._world.locks.hold

    @contextmanager
    def slow_to_release(name: str, **options: Any) -> Iterator[Any]:
        with hold(name, **options) as lock:
            yield lock
            gate()  # the new tokens are stored, and the flight is still there to be joined

    rig.getter._world.locks.hold = slow_to_release  # type: ignore[method-assign]
    first = Worker(rig.get)
    gate.wait_until_reached()
    rejected = Worker(lambda: rig.get(rejected="access-2"))
    anew = Worker(lambda: rig.get(True))
    flight = flight_of(rig.getter)
    wait_until(lambda: len(flight.landed._waiters) == 3)
    gate.open()
    assert first.outcome().token_set.access_token == "access-2"  # type: ignore[attr-defined]
    answers = {rejected.outcome().token_set.access_token, anew.outcome().token_set.access_token}  # type: ignore[attr-defined]
    assert answers == {"access-3"}, "one refresh for both"
    assert rig.authority.sends == 2


@pytest.mark.parametrize("token", ["access-2\n", "access-2\udc80", "accéss-2"])
def test_tokens_that_no_header_can_carry_are_given_back(token: str) -> None:
    rig = Rig(expired_session())
    rig.authority.on_send = lambda session: replace(session, token_set=make_tokens(2, access_token=token))
    with pytest.raises(TokenRefreshError, match="no header can carry") as caught:
        rig.get()
    assert token not in str(caught.value)
    assert rig.stored is None
    assert rig.authority.revoked == ["refresh-2"]


# The end


def test_nothing_is_refreshed_after_the_end() -> None:
    rig, gate = Rig(expired_session()), Gate()
    rig.authority.on_send = gate
    refresh = Worker(rig.get)
    gate.wait_until_reached()
    rig.store.set(f"{DID}#other", expired_session())
    closing = Worker(rig.getter.close)
    wait_until(lambda: rig.getter._flights._closed)
    with pytest.raises(SessionError, match="it is closed"):
        rig.getter.get_session(f"{DID}#other")
    gate.open()
    closing.outcome()
    assert refresh.outcome() == rig.stored
    with pytest.raises(SessionError, match="it is closed"):
        rig.get(True)
    assert rig.get() == rig.stored, "what is fresh needs nothing to be begun"
    assert rig.authority.sends == 1
    rig.getter.set_stored(DID, make_session(7))
    rig.getter.delete_stored(DID, revoke=True)
    assert rig.stored is None
    assert rig.authority.revoked == ["refresh-7"]


def test_a_signals_handler_may_close_what_is_just_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(expired_session())

    def interrupted(work: Callable[[], None], name: str) -> None:
        rig.getter.close()  # as a handler would, of a signal that comes at this moment
        begin(work, name)

    monkeypatch.setattr(_flights, "_START_WITHIN", 0.01)
    monkeypatch.setattr(_flights, "begin", interrupted)
    with pytest.raises(CancelledError, match="it is closed"):
        rig.get()
    assert rig.authority.sends == 0


def test_whoever_closes_from_within_does_not_wait_for_himself() -> None:
    rig = Rig(expired_session())
    rig.authority.on_send = lambda session: rig.getter.close()
    assert rig.get().token_set.access_token == "access-2"


def test_work_that_is_over_at_once_is_joined_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin_and_wait(work: Callable[[], None], name: str) -> None:
        over = threading.Event()
        begin(lambda: work() or over.set(), name)  # type: ignore[func-returns-value]
        assert over.wait(SOON)

    rig = Rig(expired_session())
    monkeypatch.setattr(_flights, "begin", begin_and_wait)
    assert rig.get().token_set.access_token == "access-2"
    assert not rig.getter._flights.get(DID)
    assert rig.get(True).token_set.access_token == "access-3"


def test_a_log_in_for_which_no_thread_can_be_started_is_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(work: Callable[[], None], name: str) -> None:
        raise RuntimeError("can't start new thread")

    rig = Rig()
    monkeypatch.setattr(_flights, "begin", refuse)
    with pytest.raises(SessionError, match="no thread"):
        rig.getter.set_stored(DID, make_session())
    assert rig.authority.revoked == ["refresh-1"]
    rig.getter.close()


def test_a_log_that_fails_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(record: logging.LogRecord) -> bool:
        raise OSError("the disk of the log is full")

    logger = logging.getLogger("atproto_session")
    monkeypatch.setattr(logger, "filters", [fail])
    rig = Rig(expired_session())
    rig.getter.on_updated(lambda event: fail(None))  # type: ignore[arg-type]
    assert rig.get().token_set.access_token == "access-2"


class Joined(Flight[Session]):
    """One that another caller began, and that this one finds under way: once."""

    def __init__(self, rig: Rig, end: Callable[[], Session]) -> None:
        super().__init__(DID, lambda flight: end())
        self._flights = rig.getter._flights
        self._has_begun = True
        self._end = end
        self._flights._joinable[DID] = self

    def wait(self, deadline: float, cancel: threading.Event | None = None) -> Session:
        self._flights._joinable.pop(DID)
        return self._end()


def test_one_that_waited_for_nobody_has_failed_for_itself_alone() -> None:
    rig = Rig(expired_session())

    def held() -> Session:
        raise LockTimeoutError("another worker refreshes it")

    Joined(rig, held)
    assert rig.get().token_set.access_token == "access-2"
    assert rig.authority.sends == 1


def test_what_another_brought_is_looked_at() -> None:
    session = expired_session()
    rig = Rig(session)

    def found() -> Session:
        rig.store.set(DID, make_session(7))
        return session

    Joined(rig, found)
    assert rig.get().token_set.access_token == "access-7"
    assert rig.authority.sends == 0


def test_a_log_out_for_which_no_thread_can_be_started_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(work: Callable[[], None], name: str) -> None:
        raise RuntimeError("can't start new thread")

    session = make_session()
    rig = Rig(session)
    monkeypatch.setattr(_flights, "begin", refuse)
    with pytest.raises(SessionError, match="no thread"):
        rig.getter.delete_stored(DID, revoke=True)
    assert (rig.stored, rig.authority.revoked) == (session, [])


def test_a_store_with_compare_and_set_of_its_own_is_written_as_it_is() -> None:
    store = complete(OwnFullStore(expired_session()))
    store.set(DID, make_session(2))
    stored = store.get(DID)
    assert stored is not None
    assert stored.token_set.access_token == "access-2"
    store.delete(DID)
    assert store.get(DID) is None
