"""Refreshes that lack one of the mechanisms that keep tokens from being lost."""

from __future__ import annotations

from atproto_session import Session, TokenSet
from atproto_session import _steps as steps
from atproto_session._worker import Life
from atproto_session.locks import LockKind
from atproto_session.refresh import Refresh
from atproto_session.session import Attempt


class WithoutSecondRead(Refresh):
    def _look_again(self) -> steps.Protocol[None]:
        yield from ()


class WithoutAttempt(Refresh):
    def _announce(self) -> steps.Protocol[bool]:
        yield steps.Commit()
        return True


class WithoutLookAtRecord(Refresh):
    def _is_in_store(self, attempted: Session) -> steps.Protocol[bool]:
        yield from ()
        return True


class WithoutLookAtLock(Refresh):
    def _has_lock(self) -> steps.Protocol[bool]:
        yield from ()
        return True


class WithoutNameOfLock(Refresh):
    def _is_over(self, attempt: Attempt) -> steps.Protocol[bool]:
        if attempt.is_over or self.terms.lock_kind is LockKind.HOLDER:
            return True
        return (yield steps.LifeOf(attempt)) is Life.GONE


class WithoutOutwaiting(Refresh):
    def _outwait(self) -> steps.Protocol[None]:
        yield from ()


class WithoutLookAtClock(Refresh):
    def _check_window(self, attempted: Session) -> steps.Protocol[None]:
        yield from ()


class WithoutDoubt(Refresh):
    """An answer that was lost leaves no trace."""

    def _given_up(self) -> Attempt | None:
        return None


def compare_nothing(stored: Session | None, expected: Session | TokenSet | None) -> bool:
    """Compare-and-set without the comparison."""
    return True


def compare_tokens(stored: Session | None, expected: Session | TokenSet | None) -> bool:
    """Compare-and-set that does not look at the attempt."""
    if stored is None or expected is None:
        return stored is None and expected is None
    tokens = expected if isinstance(expected, TokenSet) else expected.token_set
    return stored.token_set.has_same_tokens(tokens)
