"""What a refresh has to keep to: what its caller wants, what the client chose, and the times that bound it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ._checks import check_seconds
from .locks import LockKind
from .session import Freshness, Session, TokenSet


@dataclass(frozen=True)
class Times:
    """What bounds a refresh in time, in seconds. The defaults are for servers on the Internet.

    :ivar window: how far ahead an attempt says that its answer may come. Others wait so long for a worker that died.
    :ivar spare: how much of the window has to be left when the request leaves.
    :ivar extend_every: how often a worker that waits for its answer moves the window on.
    :ivar longest: how long a worker is waited for that is known to be at work on its attempt still.
    :ivar store_for: how long it is tried to store new tokens.
    :ivar look_again: how often a worker that waits for another's answer looks whether it is stored.
    :ivar patience: how long another process may need to store what it has refreshed, where no lock tells.
    :ivar first_rest: how long a server is left alone after a failure; twice as long after each further one.
    :ivar longest_rest: the longest such rest, and the longest that a server's error (5xx) may ask for.
    :ivar longest_rest_asked: the longest that a server may ask for with 429 (``Retry-After``).
    :raises TypeError: one of them is no number.
    :raises ValueError: one of them is less than 0.
    """

    window: float = 15.0
    spare: float = 5.0
    extend_every: float = 5.0
    longest: float = 300.0
    store_for: float = 180.0
    look_again: float = 0.5
    patience: float = 1.0
    first_rest: float = 1.0
    longest_rest: float = 60.0
    longest_rest_asked: float = 3600.0

    def __post_init__(self) -> None:
        check_seconds(**vars(self))


class Terms(NamedTuple):
    """What holds for every refresh of a client.

    :ivar client_id: the client; ``None`` if every session is taken for its own.
    :ivar lock_kind: what it means to find a lock free.
    :ivar on_interrupted: whether a token that may have been spent is tried again.
    :ivar is_expired: whether an access token's time has come.
    """

    client_id: str | None = None
    lock_kind: LockKind = LockKind.LEASE
    on_interrupted: Literal["retry", "fail"] = "retry"
    times: Times = Times()
    is_expired: Callable[[TokenSet], bool] = Freshness().is_expired


class Wanted(NamedTuple):
    """What the caller of :meth:`.SessionGetter.get_session` wants.

    :ivar seen: the session that was stored when the call began.
    :ivar refresh: ``True`` for one that was refreshed since.
    :ivar rejected: an access token that a server refused: any other will do.
    :ivar waits: whether to wait for another worker that refreshes.
    """

    seen: Session
    freshness: Freshness
    refresh: Literal["auto"] | bool = "auto"
    rejected: str | None = None
    waits: bool = True

    def is_newer(self, session: Session) -> bool:
        """Whether ``session`` has other tokens than those that the caller knows."""
        if self.rejected is not None:
            return session.token_set.access_token != self.rejected
        return not session.token_set.has_same_tokens(self.seen.token_set)

    def is_met_by(self, session: Session) -> bool:
        """Whether ``session`` is the answer."""
        if self.refresh is True and self.rejected is None:
            return self.is_newer(session)
        if self.rejected is None and not self.freshness.is_stale(session.token_set):
            return True
        # What another worker has just renewed is used, even if it is to live so short that it counts as stale.
        return self.is_newer(session) and not self.freshness.is_expired(session.token_set)
