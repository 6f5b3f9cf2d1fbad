"""A process that moves when the scheduler lets it, and what it sees of the world. See :mod:`.schedules`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from atproto_session import Freshness, Session, SessionGetter, TokenSet
from atproto_session._flights import Flight, Flights
from atproto_session.errors import LockTimeoutError, OAuthResponseError, SessionError, StoreError, TransportError
from atproto_session.locks import LockKind

from ..core import SOON
from .protocol import Violation

if TYPE_CHECKING:
    from .schedules import World

#: The bound on a request, in seconds.
ANSWER_WITHIN = 20.0


class Killed(BaseException):
    """Unwinds the threads of a process that has died, where no step follows any more."""


class Process:
    """One process with a getter of its own, which does ``actions`` one after the other.

    :ivar at: what it does next; ``None`` when it has ended.
    :ivar ready: whether it can.
    :ivar request: the session whose token it has sent and is waiting for an answer to, since ``sent_at``.
    :ivar answer_by: what its attempt says about that, as long as it has the lock.
    :ivar tokens: what is lost if it dies now: tokens that it has to store or to revoke.
    """

    def __init__(self, world: World, name: str, actions: Sequence[Callable[[SessionGetter], object]]) -> None:
        self.world = world
        self.name = name
        self.at: str | None = "begins"
        self.ready: Callable[[], bool] = _always
        self.dead = False
        self.request: Session | None = None
        self.sent_at = 0.0
        self.answer_by: float | None = None
        self.tokens: Session | None = None
        self._actions = actions
        self._unwinding = False
        # Both are locks because nothing is faster: each is released by the one side when the other may go on.
        self._go, self._arrived = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._arrived.acquire()
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def point(self, at: str, ready: Callable[[], bool] | None = None) -> None:
        """Stand still before doing what ``at`` says, until the scheduler says so."""
        if not self._unwinding:
            self.at, self.ready = at, ready or _always
            self._arrived.release()
            self._go.acquire()
        if self._unwinding:
            raise Killed

    def go_on(self) -> None:
        """For the scheduler: let it come to its next point."""
        self._go.release()
        if not self._arrived.acquire(timeout=SOON):
            raise Violation(f"{self.name} hangs after it {self.at}")

    def end(self) -> None:
        """Get rid of its threads, wherever they stand."""
        if self.at is not None:
            self._unwinding = True
            self._go.release()
        self._thread.join(SOON)

    def _run(self) -> None:
        self._go.acquire()
        clock = Freshness(clock=lambda: self.world.now)
        getter = SessionGetter(Store(self), Authority(self), freshness=clock)
        getter._flights = PatientFlights(self)
        for action in self._actions:
            if self._unwinding:
                return
            try:
                action(getter)
            except SessionError:
                pass
            except Killed:
                return
            except BaseException as error:
                self.world.violation = self.world.violation or Violation(f"{self.name} raises {error!r}")
            self.tokens = None
        self.at = None
        self._arrived.release()


def _always() -> bool:
    return True


class PatientFlights(Flights[Session]):
    """Real flights, whose waiting is for the scheduler's time to pass."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def board(self, key: str, work: Callable[[Flight[Session]], Session]) -> tuple[Flight[Session], bool]:
        def patient(flight: Flight[Session]) -> Session:
            flight.abandoned = _Patience(self._process)
            return work(flight)

        return super().board(key, patient)


class _Patience(threading.Event):
    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def wait(self, timeout: float | None = None) -> bool:
        until = self._process.world.now + (timeout or 0.0)
        self._process.point("has waited", lambda: self._process.world.now >= until)
        return self.is_set()


class Store:
    """The shared store, as one process sees it."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.locks = Locks(process)
        self.logins = object()

    def get(self, key: str) -> Session | None:
        self.process.point("reads")
        return self.process.world.store.get(key)

    def set(self, key: str, session: Session) -> None:
        self.process.point("stores a log-in")
        world = self.process.world
        if not world.writable:
            raise StoreError("read-only")
        old = world.store.get(key)
        world.store.set(key, session)
        world.check_write(self.process, old, session)
        self.process.tokens = None

    def replace(self, key: str, session: Session | None, expected: TokenSet | None) -> bool:
        if session is not None and session.attempt is not None:
            self.process.answer_by = session.attempt.answer_by
        self.process.point(_said_of(session))
        world = self.process.world
        if not world.writable:
            raise StoreError("read-only")
        old = world.store.get(key)
        if not world.store.replace(key, session, expected):
            return False
        world.check_write(self.process, old, session)
        if session is None:
            self.process.tokens = old
        elif self.process.tokens is not None:
            self.process.tokens = None
            if world.chance(0.1):
                raise StoreError("it is stored, and the connection has gone before that was said")
        return True

    def delete(self, key: str) -> None:
        self.process.point("deletes what is there")
        old = self.process.world.store.get(key)
        self.process.world.store.delete(key)
        self.process.world.check_write(self.process, old, None)

    def clear(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError


def _said_of(session: Session | None) -> str:
    if session is None:
        return "deletes"
    return "stores tokens, or takes its attempt back" if session.attempt is None else "writes its attempt"


class Locks:
    """The one account's lock, as one process sees it."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.kind = LockKind.LEASE if process.world.lease else LockKind.HOLDER
        self.lock = ""

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[Locks]:
        world = self.process.world
        self.process.point("gets the lock", world.is_free)
        if not world.is_free():
            raise LockTimeoutError("the scheduler says that it took too long")
        world.take_lock(self.process)
        self.lock = world.which_lock
        try:
            yield self
        finally:
            self.process.point("unlocks")
            self.process.answer_by = None
            if world.holder is self.process:
                world.holder = None

    def extend(self, seconds: float) -> bool:
        self.process.point("extends its lock")
        world = self.process.world
        held = world.holder is self.process and not (self.process.world.lease and world.now >= world.held_until)
        if held:
            world.prolong(seconds)
        return held


class Authority:
    """The authorization server, as one process sees it."""

    answer_within = ANSWER_WITHIN

    def __init__(self, process: Process) -> None:
        self.process = process

    def prepare(self, session: Session) -> Callable[[], Session]:
        return lambda: self._send(session)

    def _send(self, session: Session) -> Session:
        # No point comes before: a process does not stand still between extending its lease and sending.
        process, world = self.process, self.process.world
        world.check_send(session)
        process.request, process.sent_at = session, world.now
        process.point("is served")
        process.request = None
        luck = world.random.random()
        if luck < 0.1:
            raise world.random.choice([TransportError("refused"), OAuthResponseError("later", status=429)])
        lost = world.random.choice([TransportError("cut", sent=True), OAuthResponseError("gateway", status=502)])
        if luck < 0.2:
            world.grant_of(session).hurt = True
            world.late.append(session)
            raise lost
        process.tokens = answer = world.serve(session)
        process.point("gets its answer")
        if world.chance(0.1):
            world.grant_of(session).hurt, process.tokens = True, None
            raise lost
        if answer is None:
            raise OAuthResponseError("no", status=400, error="invalid_grant")
        return answer

    def revoke(self, session: Session) -> None:
        self.process.tokens = session
        self.process.point("revokes")
        self.process.world.check_revocation(session)
        self.process.world.grant_of(session).alive = False
        self.process.tokens = None
