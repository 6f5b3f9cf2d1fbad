"""What changes a record beside a refresh: a log-in, a log-out, a session that its server refuses.

Protocols as in :mod:`.refresh`. Every change is a compare-and-set: what is deleted or replaced is what was looked at,
and nothing newer.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple

from . import _steps as steps
from ._steps import Protocol
from .errors import (
    AuthMethodUnsatisfiableError,
    LockTimeoutError,
    SessionError,
    SessionNotFoundError,
    StoreError,
    TokenRefreshError,
    TokenRevokedError,
    printable,
)
from .keys import load_private_key
from .session import Session, SessionDeletedEvent, SessionUpdatedEvent, TokenSet, subject_of

log = logging.getLogger("atproto_session")


class Ending(NamedTuple):
    """What is remembered of a session that this process has deleted.

    :ivar at: when, seconds since the epoch.
    :ivar is_log_out: its owner, or the application, has ended it.
    :ivar error: the OAuth error code of the server that ended it, if one did.
    :ivar error_description: the server's own words.
    """

    at: float
    why: str
    is_log_out: bool
    error: str | None
    error_description: str | None

    @classmethod
    def by(cls, cause: BaseException, at: float) -> Ending:
        # What others raise may say anything.
        why = str(cause) if isinstance(cause, SessionError) else type(cause).__name__
        error, words = (getattr(cause, name, None) for name in ("error", "error_description"))
        return cls(
            at,
            printable(why, 600),
            not isinstance(cause, SessionError) or isinstance(cause, TokenRevokedError),
            printable(error) if isinstance(error, str) else None,
            printable(words, 300) if isinstance(words, str) else None,
        )

    def as_error(self, key: str) -> SessionNotFoundError:
        since = datetime.fromtimestamp(self.at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        advice = "" if self.why.endswith("log in again") else "; log in again"
        error = SessionNotFoundError(f"no session is stored for {printable(key)} since {since}: {self.why}{advice}")
        error.ended_at, error.error, error.error_description = self.at, self.error, self.error_description
        return error.about(key)


def found(key: str, session: Session | None, ending: Ending | None = None) -> Session:
    """``session``, which was read under ``key``.

    :param ending: of the last session that was there, if that is known.
    :raises SessionNotFoundError: there is none, or it is not one of this account.
    """
    if session is None and ending is not None:
        raise ending.as_error(key)
    if session is None:
        raise SessionNotFoundError(f"no session is stored for {printable(key)}; log in first")
    if session.token_set.sub != subject_of(key):
        raise SessionNotFoundError(f"what is stored for {printable(key)} is a session of another account; log in again")
    return session


def check_client(key: str, session: Session, client_id: str | None) -> None:
    """
    :raises TokenRefreshError: another client got the session. To refresh or revoke it would end it. It is kept.
    """
    if None not in (session.client_id, client_id) and session.client_id != client_id:
        raise TokenRefreshError(
            f"the session {printable(key)} was given to the client {printable(session.client_id or '', 300)}, and this "
            f"is {printable(client_id or '', 300)}: use it with that client, or log in again with this one"
        )


def newer(key: str, current: Session | None) -> Session:
    """What took the place of the session that was being refreshed.

    :raises TokenRevokedError: nothing did.
    """
    if current is None:
        raise TokenRevokedError(f"the session {printable(key)} was signed out while it was being refreshed")
    return current


def holds_spent_token(current: Session | None, spent: TokenSet, successor: Session) -> bool:
    """Whether the record still has the refresh token that was spent, beside something that has changed."""
    if current is None or not current.is_same_grant(successor):
        return False
    tokens = current.token_set
    return tokens.refresh_token == spent.refresh_token and not tokens.has_same_tokens(successor.token_set)


def check_key(key: str, session: Session) -> None:
    """
    :raises AuthMethodUnsatisfiableError: the DPoP key cannot be used. Another worker, of a later release, may know what
        to do with it: the session is kept.
    """
    try:
        load_private_key(session.dpop_key)
    except ValueError as error:
        raise AuthMethodUnsatisfiableError(f"the DPoP key of the session {key} cannot be used: {error}") from error


def log_in(key: str, session: Session) -> Protocol[None]:
    """Store the session of a new log-in in the place of what is there. The grant that it replaces is ended.

    :raises StoreError: it cannot be stored; it has been revoked.
    """
    yield from _lock(key)
    began_at = yield steps.Now()
    session = replace(session, attempt=None, rest=None, began_at=began_at, refreshed_at=began_at)
    try:
        replaced = yield from _put(session)
    except Exception:
        yield steps.Revoke(session)
        raise
    yield steps.Tell(updated(key, session))
    yield steps.Unlock()
    yield steps.HandOut(None)
    is_ours = replaced is not None and replaced.client_id in (None, session.client_id)
    if replaced is not None and is_ours and not replaced.is_same_grant(session):
        yield steps.Revoke(replaced)


def _put(session: Session) -> Protocol[Session | None]:
    """Store ``session`` and bring what was there."""
    while True:
        try:
            current = yield steps.Read()
        except StoreError:  # what cannot be read is replaced as well
            yield steps.Overwrite(session)
            return None
        if (yield steps.Replace(session, current and current.token_set)):
            return current  # type: ignore[no-any-return]


def log_out(key: str, cause: BaseException, client_id: str | None, *, revoke: bool) -> Protocol[None]:
    """Delete what is stored, however often it is refreshed meanwhile, and end its grant if that is wanted.

    :raises TokenRefreshError: it is another client's; it is kept.
    """
    yield from _lock(key)
    yield steps.Commit()
    last, is_deleted = yield from _delete(key, client_id)
    if is_deleted:
        yield steps.Tell(SessionDeletedEvent(key, cause))
    yield steps.Unlock()
    yield steps.HandOut(None)  # a server that is slow keeps nobody waiting
    if revoke and last is not None:
        yield steps.Revoke(last)


def _delete(key: str, client_id: str | None) -> Protocol[tuple[Session | None, bool]]:
    """Brings the last that was seen of the grant, and whether it was deleted here."""
    last: Session | None = None
    while True:
        try:
            current = yield steps.Read()
        except StoreError:  # its owner wants it gone, readable or not
            yield steps.Overwrite(None)
            return last, True
        if current is None or (last is not None and not current.is_same_grant(last)):
            return last, False
        check_client(key, current, client_id)
        last = current
        if (yield steps.Replace(None, current.token_set)):
            return last, True


def end(key: str, session: Session, cause: SessionError) -> Protocol[None]:
    """Delete ``session``, whose server refuses the tokens that it has just issued, and end its grant there. What has
    come since stays."""
    yield from _lock(key)
    yield steps.Commit()
    is_deleted = yield from remove(key, session, cause)
    yield steps.Unlock()
    yield steps.HandOut(None)
    if is_deleted:
        yield steps.Revoke(session)


def remove(key: str, session: Session, cause: SessionError) -> Protocol[bool]:
    """Delete ``session``, unless something newer is stored. Brings whether that was done."""
    current = yield steps.Read()
    if current is None or not current.is_same_grant(session):
        return False
    if not (yield steps.Replace(None, session.token_set)):
        return False
    yield steps.Tell(SessionDeletedEvent(key, cause))
    return True


def updated(key: str, session: Session) -> SessionUpdatedEvent:
    return SessionUpdatedEvent(key, session.dpop_key, session.auth_method, session.token_set)


def _lock(key: str) -> Protocol[None]:
    """The account's lock, if it can be had. A refresh that finds the record changed without it takes that for final."""
    try:
        yield steps.Lock()
    except (LockTimeoutError, StoreError) as error:
        log.warning("%s changes without its lock: %s", key, error)
