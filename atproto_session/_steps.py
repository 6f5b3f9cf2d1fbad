"""What a protocol asks of the world, one access at a time.

The protocols (:mod:`.refresh`, :mod:`._records`) are generators. They do no I/O and have no thread, lock or clock. They
yield one of these steps, and are sent what came of it or have its error thrown into them. So the same code is driven by
:class:`.SessionGetter` over real stores and servers, and by an exhaustive search over every order of events.

After each step stands what it brings.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from .session import Attempt, Session, SessionDeletedEvent, SessionUpdatedEvent, TokenSet

T = TypeVar("T")

#: A refresh request that is ready to leave: called with the session whose token it spends, it is sent, and returns the
#: successor.
Request = Callable[[Session], Session]


#: Asked as the last thing before a request leaves, in the thread that sends it: for how many seconds from now it may
#: arrive. Not set for a request that may always.
may_arrive_for: ContextVar[Callable[[], float] | None] = ContextVar("atproto_session_may_arrive_for", default=None)


class Read(NamedTuple):
    """Read the record. Brings the :class:`.Session`, or ``None``."""


class Replace(NamedTuple):
    """Compare-and-set (:meth:`.FullStore.replace`). Brings whether it was done."""

    session: Session | None
    expected: Session | TokenSet | None


class Overwrite(NamedTuple):
    """Store ``session``, or delete the record, whatever is there, readable or not."""

    session: Session | None


class Lock(NamedTuple):
    """Take the account's lock. Brings its name (:attr:`.Hold.lock`).

    :ivar waits: whether to wait for another holder.
    """

    waits: bool = True


class Unlock(NamedTuple):
    """Release the account's lock."""


class Extend(NamedTuple):
    """Brings whether the lock is still held, and will be for so many ``seconds``."""

    seconds: float


class Now(NamedTuple):
    """Brings the time, in seconds since the epoch."""


class Sign(NamedTuple):
    """Brings a new :class:`.Attempt` of this worker, which begins now. Until the lock is released, all workers of its
    machine can see that this one is at work on it.

    :ivar window: in how many seconds it ends.
    :ivar lock: the lock that it is made under.
    """

    window: float
    lock: str


class LifeOf(NamedTuple):
    """Brings what is known about the worker that made ``attempt``, and whether it is still at work on it
    (:class:`.Life`)."""

    attempt: Attempt


class Wait(NamedTuple):
    """Let so many ``seconds`` pass."""

    seconds: float


class Prepare(NamedTuple):
    """Find the authorization server of ``session``, verify that it speaks for the account, and authenticate to it as
    the session began. Spends nothing. Brings a :data:`Request`."""

    session: Session


class Commit(NamedTuple):
    """Pass the point of no return. From here on nothing outside stops the protocol."""


class Send(NamedTuple):
    """Spend the refresh token of ``session``. Brings the successor, or ``None`` if no answer has come yet."""

    request: Request
    session: Session


class Await(NamedTuple):
    """Wait on for the answer to what was sent. Brings what :class:`Send` does."""


class HandOut(NamedTuple):
    """Give ``session`` to those who wait, before the protocol has ended."""

    session: Session | None


class Revoke(NamedTuple):
    """End the grant of ``session`` at its server (RFC 7009). Brings whether the server said so."""

    session: Session


class Tell(NamedTuple):
    """Tell the listeners, when the lock is released."""

    event: SessionUpdatedEvent | SessionDeletedEvent


#: One access to what workers share, or to time.
Step = (
    Read
    | Replace
    | Overwrite
    | Lock
    | Unlock
    | Extend
    | Now
    | Sign
    | LifeOf
    | Wait
    | Prepare
    | Commit
    | Send
    | Await
    | HandOut
    | Revoke
    | Tell
)

#: A protocol that ends with a ``T``.
Protocol = Generator[Step, Any, T]
