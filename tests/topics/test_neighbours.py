"""No account, server or caller delays, fills up or takes down another."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from atproto_session import LockTimeoutError, Session, SessionError, SessionGetter, SQLiteStore, TransportError
from atproto_session._terms import Times
from atproto_session.locks import FileLocks

from ..core import DID, OTHER_KEY, QUICK, FakeAuthority, Gate, Worker, expired_session, make_tokens, wait_until

DARK = 300
#: With a salt of zeros, these share the lock of ``DID``.
AIMED = [f"did:plc:{number:024}" for number in (1225298, 1749671, 3425788, 4204858)]


def session_of(did: str, pds: str, issuer: str = "https://issuer.example.com") -> Session:
    return expired_session(token_set=make_tokens(lifetime=-1.0, sub=did, aud=pds, iss=issuer), dpop_key=OTHER_KEY)


def renewed(session: Session) -> Session:
    return replace(session, token_set=make_tokens(2, sub=session.token_set.sub))


def did_of(number: int) -> str:
    return f"did:plc:{hashlib.sha256(str(number).encode()).hexdigest()[:24]}"


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("atproto_session")]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(tmp_path / "sessions.db")
    store.set(DID, expired_session())
    yield store
    store.close()


def impatient(getter: SessionGetter, enough: threading.Event, refused: list[SessionError]) -> list[Worker]:
    """Forty threads that try the accounts of the dark server in turn, all the time."""

    def try_on(number: int) -> None:
        while not enough.is_set():
            try:
                getter.get_session(did_of(number), timeout=0.05)
            except SessionError as error:
                refused.append(error)
            number = (number + 40) % DARK

    return [Worker(lambda number=number: try_on(number)) for number in range(40)]  # type: ignore[misc]


@pytest.mark.timeout(120)
def test_a_dark_server_keeps_no_account_of_another_waiting(store: SQLiteStore) -> None:
    """Three hundred accounts of it try all the time, with many more threads than may be of use."""
    authority, dark = FakeAuthority(), Gate()
    authority.on_prepare = lambda session: dark() if session.token_set.aud == "https://dark.example.com" else None
    getter = SessionGetter(store, authority, times=QUICK)
    for number in range(DARK):
        store.set(did_of(number), session_of(did_of(number), "https://dark.example.com"))
    refused: list[SessionError] = []
    enough = threading.Event()

    crowd = impatient(getter, enough, refused)
    dark.wait_until_reached()
    wait_until(lambda: len(refused) > 200)
    began = time.monotonic()
    assert getter.get_session(DID).token_set.access_token == "access-2"
    took = time.monotonic() - began
    assert len(ours()) <= 64
    assert all(error.retryable for error in refused)
    assert {type(error) for error in refused} <= {LockTimeoutError, SessionError}
    enough.set()
    dark.open()
    for each in crowd:
        each.outcome()
    getter.close()
    assert took < 30.0, "the timeout of a caller; in fact, milliseconds"


@pytest.mark.timeout(120)
def test_a_healthy_account_is_refreshed_while_a_dark_server_and_accounts_that_aim_at_its_lock_try(
    store: SQLiteStore, tmp_path: Path
) -> None:
    """Those that aim know everything but the secret of this directory: under the salt that they have in mind they share
    the lock of the healthy account. They hold their locks as long as they can: their servers do not answer."""
    locks = store.locks
    assert isinstance(locks, FileLocks)
    imagined = bytes(len(locks._salts.read().value))
    assert {locks._path_of(name, imagined) for name in AIMED} == {locks._path_of(DID, imagined)}
    authority, dark, mute = FakeAuthority(), Gate(), Gate()
    holding: list[str] = []

    def answer(session: Session) -> Session:
        if session.token_set.sub in AIMED:
            holding.append(session.token_set.sub)
            mute()
        return renewed(session)

    authority.on_prepare = lambda session: dark() if session.token_set.aud == "https://dark.example.com" else None
    authority.on_send = answer
    getter = SessionGetter(store, authority, times=QUICK)
    for number in range(DARK):
        store.set(did_of(number), session_of(did_of(number), "https://dark.example.com"))
    for number, did in enumerate(AIMED):
        server = f"https://mute-{number}.example.com"
        store.set(did, session_of(did, server, server))
    refused: list[SessionError] = []
    enough = threading.Event()
    crowd = impatient(getter, enough, refused)
    aiming = [Worker(lambda did=did: getter.get_session(did)) for did in AIMED]  # type: ignore[misc]
    dark.wait_until_reached()
    wait_until(lambda: len(holding) == len(AIMED) and len(refused) > 200)
    assert getter.get_session(DID).token_set.access_token == "access-2"
    assert not any(worker.result or worker.error for worker in aiming), "they hold their locks all the time"
    enough.set()
    dark.open()
    mute.open()
    for each in (*crowd, *aiming):
        each.outcome()
    getter.close()


def test_what_an_account_does_under_its_lock_is_no_more_than_the_request(store: SQLiteStore, tmp_path: Path) -> None:
    """Here all accounts share one lock, as if somebody knew the secret. Who looks for a dark server holds none."""
    authority, dark = FakeAuthority(), Gate()
    authority.on_prepare = lambda session: dark() if session.token_set.aud != "https://pds.example.com" else None
    authority.on_send = renewed
    getter = SessionGetter(store, authority, locks=FileLocks(tmp_path / "one", stripes=1), times=QUICK)
    for number, did in enumerate(AIMED):
        server = f"https://dark-{number}.example.com"
        store.set(did, session_of(did, server, server))
    aiming = [Worker(lambda did=did: getter.get_session(did)) for did in AIMED]  # type: ignore[misc]
    dark.wait_until_reached()
    wait_until(lambda: len(getter._flights._all) == len(AIMED))
    assert getter.get_session(DID).token_set.access_token == "access-2"
    assert not any(worker.result or worker.error for worker in aiming)
    dark.open()
    for each in aiming:
        each.outcome()
    getter.close()


def test_a_caller_in_a_hurry_gets_its_session_refreshed(store: SQLiteStore) -> None:
    """Each call is shorter than the preparation takes."""
    authority, slow = FakeAuthority(), Gate()
    authority.on_prepare = slow
    getter = SessionGetter(store, authority, times=QUICK)
    for _ in range(3):
        with pytest.raises(LockTimeoutError, match="goes on without you"):
            getter.get_session(DID, timeout=0.02)
    slow.open()
    wait_until(lambda: authority.sends == 1)
    assert getter.get_session(DID).token_set.access_token == "access-2"
    assert authority.sends == 1


def test_a_token_that_is_still_good_is_not_lost_to_its_refresh(store: SQLiteStore) -> None:
    """It is waited for no longer than the token lives, and the caller's time is not over then."""
    authority, slow = FakeAuthority(), Gate()
    authority.on_prepare = slow
    stale = expired_session(token_set=make_tokens(lifetime=9.0))
    store.set(DID, stale)
    getter = SessionGetter(store, authority, times=QUICK)
    assert getter.get_session(DID, timeout=0.05) == store.get(DID)
    slow.open()
    getter.close()
    authority.on_prepare = slow = Gate()
    store.set(DID, dying := replace(stale, token_set=make_tokens(lifetime=0.3)))
    getter = SessionGetter(store, authority, times=QUICK)
    waiting = Worker(lambda: getter.get_session(DID, timeout=30.0))
    slow.wait_until_reached()
    wait_until(lambda: getter.freshness.is_expired(dying.token_set))
    slow.open()
    session = waiting.outcome()
    assert isinstance(session, Session)
    assert session.token_set.access_token == "access-2"


def test_a_failure_is_shared_and_then_the_server_rests(store: SQLiteStore) -> None:
    authority, slow = FakeAuthority(), Gate()

    def fail(session: Session) -> None:
        slow()
        raise TransportError("no route to the server")

    authority.on_prepare = fail
    getter = SessionGetter(store, authority, times=Times(first_rest=60.0))
    callers = [Worker(lambda: getter.get_session(DID)) for _ in range(20)]
    slow.wait_until_reached()
    flight = getter._flights.get(DID)
    assert flight is not None
    wait_until(lambda: len(flight.landed._waiters) == 20)
    slow.open()
    for caller in callers:
        with pytest.raises(TransportError, match="no route"):
            caller.outcome()
    authority.on_prepare = lambda session: pytest.fail("the server rests")
    for other in (getter, SessionGetter(store, authority)):
        with pytest.raises(TransportError, match="no route") as caught:
            other.get_session(DID)
        assert 0 < (caught.value.retry_after or 0.0) <= 60.0
        assert (caught.value.did, caught.value.session_id) == (DID, None)
