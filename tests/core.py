"""What the tests of the core share: sessions made by hand, and an authorization server without a network."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from atproto_session import CachedGetter, ClientAuthMethod, Session, SessionGetter, TokenSet, server
from atproto_session._flights import Flight
from atproto_session._terms import Times
from atproto_session.keys import generate_jwk
from atproto_session.locks import LockKind

DID = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
KEY = generate_jwk()
OTHER_KEY = generate_jwk()
#: For what has to happen and does, in seconds: generous, since it only passes when a test fails.
SOON = 30.0
#: Times of a refresh: with no rest after a failure; and for tests that come to the end of waiting.
RESTLESS = Times(first_rest=0.0, longest_rest=0.0)
QUICK = Times(window=15.0, store_for=0.2, look_again=0.01, patience=0.01, first_rest=0.0, longest_rest=0.0)


def make_tokens(number: int = 1, *, lifetime: float | None = 3600.0, **members: object) -> TokenSet:
    """The token set that the refresh ``number`` brought."""
    tokens = TokenSet(
        iss="https://issuer.example.com",
        sub=DID,
        aud="https://pds.example.com",
        scope="atproto transition:generic",
        refresh_token=f"refresh-{number}",
        access_token=f"access-{number}",
        expires_at=None if lifetime is None else datetime.now(UTC) + timedelta(seconds=lifetime),
    )
    return replace(tokens, **members)  # type: ignore[arg-type]


def make_session(number: int = 1, *, lifetime: float | None = 3600.0, **members: object) -> Session:
    session = Session(KEY, ClientAuthMethod("none"), make_tokens(number, lifetime=lifetime))
    return replace(session, **members)  # type: ignore[arg-type]


def expired_session(number: int = 1, **members: object) -> Session:
    return make_session(number, lifetime=-60.0, **members)


@dataclass
class FakeAuthority:
    """Issues ``refresh-2`` for ``refresh-1`` and so on, and counts what it is sent.

    :ivar on_prepare: called before a refresh is prepared; may raise.
    :ivar on_send: called with the session when its refresh token is sent, before it is answered; may raise, or return
        the answer.
    """

    on_prepare: Callable[[Session], object] | None = None
    on_send: Callable[[Session], Session | None] | None = None
    spent: Counter[str] = field(default_factory=Counter)
    revoked: list[str] = field(default_factory=list)
    revocation_error: Exception | None = None

    def prepare(self, session: Session) -> Callable[[Session], Session]:
        if self.on_prepare is not None:
            self.on_prepare(session)
        return self._send

    def _send(self, session: Session) -> Session:
        token = session.token_set.refresh_token or ""
        self.spent[token] += 1
        answer = None if self.on_send is None else self.on_send(session)
        return answer or successor_of(session)

    def revoke(self, session: Session) -> None:
        self.revoked.append(session.token_set.refresh_token or session.token_set.access_token)
        if self.revocation_error is not None:
            raise self.revocation_error

    @property
    def sends(self) -> int:
        return self.spent.total()


def successor_of(session: Session) -> Session:
    number = int((session.token_set.refresh_token or "-0").rpartition("-")[2]) + 1
    return replace(session, token_set=make_tokens(number))


@contextmanager
def an_answer_within(seconds: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the block, a server has so long to answer a refresh."""
    with monkeypatch.context() as patch:
        # Of clients that are there already, too.
        always = property(lambda _: seconds, lambda _, value: None)
        patch.setattr(server.AccountAuthority, "answer_within", always, raising=False)
        yield


class PlainStore:
    """The least that a store can be."""

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}

    def get(self, key: str) -> Session | None:
        return self.sessions.get(key)

    def set(self, key: str, session: Session) -> None:
        self.sessions[key] = session

    def delete(self, key: str) -> None:
        self.sessions.pop(key, None)


class NoLocks:
    """Locks that keep nobody away from anything."""

    kind = LockKind.LEASE

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[NoLocks]:
        yield self

    lock = ""

    def extend(self, seconds: float) -> bool:
        return True


class Gate:
    """Stops whoever comes to it until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, *ignored: object) -> Any:
        self.reached.set()
        assert self._open.wait(SOON)
        return None

    def open(self) -> None:
        self._open.set()

    def wait_until_reached(self) -> None:
        assert self.reached.wait(SOON)


class Worker(threading.Thread):
    """A thread whose result or error is kept."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.result: object = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error

    def outcome(self) -> object:
        self.join(SOON)
        assert not self.is_alive(), "still at work"
        if self.error is not None:
            raise self.error
        return self.result


def wait_until(condition: Callable[[], object]) -> None:
    """For what gives no event."""
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def flight_of(getter: SessionGetter | CachedGetter[Any], key: str = DID) -> Flight[Any]:
    """The flight for ``key``, once it is registered."""
    wait_until(lambda: getter._flights.get(key))
    flight = getter._flights.get(key)
    assert flight is not None
    return flight
