"""Does the steps of a protocol: over a store, locks, an authorization server and real time."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from . import _steps as steps
from ._flights import Flight
from ._recent import Recent
from ._records import Ending, log
from ._threads import Promise
from ._worker import at_work, life_of
from .errors import SessionError, StoreError, TransportError, printable
from .locks import Hold, Locks
from .session import Attempt, Session, SessionDeletedEvent, SessionUpdatedEvent, TokenSet
from .stores import FullStore

T = TypeVar("T")
Event = SessionUpdatedEvent | SessionDeletedEvent

#: For how long, in seconds, it is remembered why a session ended. (And of how many at most, see :class:`.Recent`.)
_REMEMBERED_FOR = 86400.0


class Authority(Protocol):
    """The authorization server of a session."""

    def prepare(self, session: Session) -> steps.Request:
        """Find the server and verify that it still speaks for the account, spending nothing. The function that is
        returned spends the refresh token of the session that it is given, and returns the successor."""
        ...

    def revoke(self, session: Session) -> None:
        """End the grant of ``session`` at its server (RFC 7009)."""
        ...


@dataclass(frozen=True)
class World:
    """What the steps are done with.

    :ivar clock: seconds since the epoch.
    :ivar lock_within: how long a lock is waited for, in seconds.
    :ivar answer_every: how long a request is waited for before it is said that no answer has come yet, in seconds.
    :ivar endings: why sessions have ended, and when, as far as this process has deleted them.
    """

    store: FullStore
    locks: Locks
    authority: Authority
    clock: Callable[[], float]
    lock_within: float
    answer_every: float
    listeners: dict[type[Any], list[Callable[[Any], None]]] = field(
        default_factory=lambda: {SessionUpdatedEvent: [], SessionDeletedEvent: []}
    )
    endings: Recent[Ending] = field(default_factory=lambda: Recent(_REMEMBERED_FOR))

    def remember(self, event: Event) -> None:
        """Keep in mind why a session ended, until another one takes its place."""
        if isinstance(event, SessionDeletedEvent):
            now = self.clock()
            self.endings.set(event.sub, (now, Ending.by(event.cause, now)))
        else:
            self.endings.delete(event.sub)

    def revoke(self, session: Session) -> bool:
        """Whether the grant of ``session`` was ended at its server."""
        try:
            self.authority.revoke(session)
        except Exception as error:  # noqa: BLE001 - there is nobody left to whom it would matter
            why = error if isinstance(error, SessionError) else type(error).__name__
            log.warning("tokens of %s could not be revoked: %s", printable(session.token_set.sub), why)
            return False
        return True


def drive(
    flight: Flight[T], protocol: steps.Protocol[T], world: World, handed_out: Callable[[], None] | None = None
) -> T:
    """Carry ``protocol`` out in ``flight``. Its lock is released at the end, whatever the end is.

    :param handed_out: called when the protocol has what it was for, and goes on alone.
    """
    driver = _Driver(flight, world, handed_out)
    try:
        step = next(protocol)
        while True:
            try:
                outcome = driver.do(step)
            except Exception as error:  # noqa: BLE001 - it is the protocol that knows what it means
                step = protocol.throw(error)
            else:
                step = protocol.send(outcome)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        driver.unlock()


class _Driver:
    def __init__(self, flight: Flight[Any], world: World, handed_out: Callable[[], None] | None = None) -> None:
        self._flight = flight
        self._handed_out = handed_out
        self._key = flight.key
        self._world = world
        self._held = ExitStack()  # the lock, and what shows that there is work under it
        self._hold: Hold | None = None
        self._answer: Promise[Session] = Promise()
        self._is_sent = False
        self._answer_by = float("inf")  # as the attempt in the record says

    def do(self, step: steps.Step) -> Any:  # noqa: PLR0911, PLR0912 - a case for each step
        world = self._world
        match step:
            case steps.Read():
                return world.store.get(self._key)
            case steps.Replace(session, expected):
                return self._replace(session, expected)
            case steps.Overwrite(session):
                return world.store.delete(self._key) if session is None else world.store.set(self._key, session)
            case steps.Lock(waits):
                return self._take_lock(world.lock_within if waits else 0.0)
            case steps.Unlock():
                return self.unlock()
            case steps.Extend(seconds):
                return self._extend(seconds)
            case steps.Now():
                return world.clock()
            case steps.Sign(window, lock):
                now, id = world.clock(), secrets.token_hex(16)
                return Attempt(id, self._held.enter_context(at_work(id)), now, now + window, lock=lock)
            case steps.LifeOf(attempt):
                return life_of(attempt.by, attempt.id)
            case steps.Wait(seconds):
                return time.sleep(seconds) if self._is_sent else self._flight.sleep(seconds)
            case steps.Prepare(session):
                return world.authority.prepare(session)
            case steps.Commit():
                return self._flight.commit()
            case steps.Send(request, session):
                return self._send(partial(request, session))
            case steps.Await():
                return self._await()
            case steps.HandOut(session):
                self._flight.hand_out(session)
                return self._handed_out() if self._handed_out is not None else None
            case steps.Revoke(session):
                return world.revoke(session)
            case steps.Tell(event):
                world.remember(event)
                for listener in list(world.listeners[type(event)]):
                    self._flight.afterwards(partial(listener, event))
                return None
            case _:
                raise TypeError(f"{step} is no step")

    def _take_lock(self, within: float) -> str:
        """Locks may be the user's own: what goes wrong with them is a StoreError."""
        self.unlock()
        try:
            lock = self._world.locks.hold(self._key, timeout=within, cancel=self._flight.cancel)
            self._hold = self._held.enter_context(lock)
        except SessionError:
            raise
        except Exception as error:
            raise StoreError(f"the lock of {printable(self._key)} cannot be used: {type(error).__name__}") from error
        return getattr(self._hold, "lock", "")

    def _extend(self, seconds: float) -> bool:
        try:
            return self._hold is not None and self._hold.extend(seconds)
        except SessionError:
            raise
        except Exception as error:
            raise StoreError(f"the lock of {printable(self._key)} cannot be used: {type(error).__name__}") from error

    def unlock(self) -> None:
        self._hold = None
        try:
            self._held.close()
        except Exception as error:  # noqa: BLE001 - no reason to lose what was done under it
            log.warning("the lock of %s was not released: %s", printable(self._key), type(error).__name__)

    def _replace(self, session: Session | None, expected: Session | TokenSet | None) -> bool:
        is_done = self._world.store.replace(self._key, session, expected)
        if is_done and session is not None and session.attempt is not None:
            self._answer_by = session.attempt.answer_by
        return is_done

    def _send(self, request: Callable[[], Session]) -> Session | None:
        self._is_sent = True

        def send() -> Session:
            # To look a name up and to connect takes time, and the process may stand still: what has not left when the
            # window of its attempt is over is not sent any more, since another worker may be sending by then.
            steps.may_arrive_for.set(lambda: self._answer_by - self._world.clock())
            return request()

        try:
            # In a thread of its own, so that this one can tell the others meanwhile that it lives.
            self._answer = self._flight.spawn(partial(Context().run, send))
        except RuntimeError as error:
            raise TransportError("no thread can be started for the request; nothing was sent") from error
        return self._await()

    def _await(self) -> Session | None:
        return self._answer.result() if self._answer.wait(self._world.answer_every) else None
