"""What a protocol asks of the world, one access at a time.

The protocols (:mod:`.refresh`, :mod:`._records`) are generators. They do no I/O and have no thread, lock or clock. They
yield one of these steps, and are sent what came of it or have its error thrown into them. So the same code is driven by
:class:`.SessionGetter` over real stores and servers, and by an exhaustive search over every order of events.

After each step stands what it brings.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .session import Attempt, Session, SessionDeletedEvent, SessionUpdatedEvent, TokenSet

T = TypeVar("T")

#: A refresh request that is ready to leave: called with the session whose token it spends, it is sent, and returns the
#: successor.
Request = Callable[[Session], Session]


@dataclass(frozen=True)
class Step:
    """One access to what workers share, or to time."""


#: Asked as the last thing before a request leaves, in the thread that sends it: for how many seconds from now it may
#: arrive. Not set for a request that may always.
may_arrive_for: ContextVar[Callable[[], float] | None] = ContextVar("atproto_session_may_arrive_for", default=None)

#: A protocol that ends with a ``T``.
Protocol = Generator[Step, Any, T]


class Read(Step):
    """Read the record. Brings the :class:`.Session`, or ``None``."""


@dataclass(frozen=True)
class Replace(Step):
    """Compare-and-set (:meth:`.FullStore.replace`). Brings whether it was done."""

    session: Session | None
    expected: Session | TokenSet | None


@dataclass(frozen=True)
class Overwrite(Step):
    """Store ``session``, or delete the record, whatever is there, readable or not."""

    session: Session | None


@dataclass(frozen=True)
class Lock(Step):
    """Take the account's lock. Brings its name (:attr:`.Hold.lock`).

    :ivar waits: whether to wait for another holder.
    """

    waits: bool = True


class Unlock(Step):
    """Release the account's lock."""


@dataclass(frozen=True)
class Extend(Step):
    """Brings whether the lock is still held, and will be for so many ``seconds``."""

    seconds: float


class Now(Step):
    """Brings the time, in seconds since the epoch."""


@dataclass(frozen=True)
class Sign(Step):
    """Brings a new :class:`.Attempt` of this worker, which begins now. Until the lock is released, all workers of its
    machine can see that this one is at work on it.

    :ivar window: in how many seconds it ends.
    :ivar lock: the lock that it is made under.
    """

    window: float
    lock: str


@dataclass(frozen=True)
class LifeOf(Step):
    """Brings what is known about the worker that made ``attempt``, and whether it is still at work on it
    (:class:`.Life`)."""

    attempt: Attempt


@dataclass(frozen=True)
class Wait(Step):
    """Let so many ``seconds`` pass."""

    seconds: float


@dataclass(frozen=True)
class Prepare(Step):
    """Find the authorization server of ``session``, verify that it speaks for the account, and authenticate to it as
    the session began. Spends nothing. Brings a :data:`Request`."""

    session: Session


class Commit(Step):
    """Pass the point of no return. From here on nothing outside stops the protocol."""


@dataclass(frozen=True)
class Send(Step):
    """Spend the refresh token of ``session``. Brings the successor, or ``None`` if no answer has come yet."""

    request: Request = field(repr=False)
    session: Session


class Await(Step):
    """Wait on for the answer to what was sent. Brings what :class:`Send` does."""


@dataclass(frozen=True)
class HandOut(Step):
    """Give ``session`` to those who wait, before the protocol has ended."""

    session: Session | None


@dataclass(frozen=True)
class Revoke(Step):
    """End the grant of ``session`` at its server (RFC 7009). Brings whether the server said so."""

    session: Session


@dataclass(frozen=True)
class Tell(Step):
    """Tell the listeners, when the lock is released."""

    event: SessionUpdatedEvent | SessionDeletedEvent
