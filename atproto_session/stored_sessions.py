"""The sessions of a store but for their refresh: logging in and out, and who is told about it.

Whatever is deleted or replaced here is what was looked at, and nothing newer: every change but a log-in is a
compare-and-set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from ._flights import Flight, land_at_exit
from .cached_getter import SharedGetter
from .errors import (
    LockTimeoutError,
    SessionError,
    SessionNotFoundError,
    StoreError,
    TokenRevokedError,
    printable,
)
from .locks import Locks
from .session import Freshness, Session, SessionDeletedEvent, SessionUpdatedEvent, subject_of
from .stores import SessionStore, complete

_log = logging.getLogger("atproto_session")


class Revoker(Protocol):
    """The authorization server of a session, as far as its end is concerned."""

    def revoke(self, session: Session) -> None:
        """End the grant of ``session`` at its server (RFC 7009)."""
        ...


class StoredSessions(SharedGetter[Session]):
    """The sessions of a store.

    :param store: a session store; see :mod:`atproto_session.stores`.
    :param revoker: ends sessions at their server.
    :param locks: by default those of the store.
    :param freshness: when tokens count as stale, and the clock.
    :param timeout: how long a caller waits by default, all told, in seconds.
    """

    def __init__(
        self,
        store: SessionStore,
        revoker: Revoker,
        *,
        locks: Locks | None,
        freshness: Freshness | None,
        timeout: float,
    ) -> None:
        self._store = complete(store)
        super().__init__(self._store, locks=locks, timeout=timeout)
        land_at_exit(self._flights)
        self._revoker = revoker
        self.freshness = freshness or Freshness()
        self._clock = self.freshness.clock
        self._updated: list[Callable[[SessionUpdatedEvent], None]] = []
        self._deleted: list[Callable[[SessionDeletedEvent], None]] = []

    def get_stored(self, sub: str) -> Session | None:
        """What is stored under ``sub``, as it is.

        :raises StoreError: the record cannot be read.
        """
        return self._store.get(sub)

    # Logging in and out

    def set_stored(self, sub: str, session: Session) -> None:
        """Store the session of a new log-in, in the place of whatever is there. A refresh under way is waited for.

        :raises ValueError: the session is of another account.
        :raises StoreError: the session cannot be stored; it has been revoked.
        """
        if session.token_set.sub != subject_of(sub):
            raise ValueError(f"a session of {printable(session.token_set.sub)} cannot be stored under {printable(sub)}")
        session = replace(session, attempt=None, refreshed_at=self._clock(), after_lost_answer=False)

        def work(flight: Flight[None]) -> None:
            with self._undisturbed(sub, flight):
                try:
                    self._store.set(sub, session)
                except Exception:
                    self._revoke(session)
                    raise
                self._tell_updated(sub, session, flight)

        try:
            flight = self._flights.charter(sub, work, committed=True)  # there is no way to come to this session again
        except SessionError:
            self._revoke(session)
            raise
        self._wait_for(flight)

    def delete_stored(self, sub: str, cause: BaseException | None = None, *, revoke: bool = False) -> None:
        """Delete what is stored under ``sub``. A refresh under way is waited for.

        :param cause: what the listeners are told; by default that the session was signed out.
        :param revoke: end the session at the authorization server as well, if it can be reached.
        :raises StoreError: the store cannot be written.
        """
        why = cause or TokenRevokedError(f"the session {sub} was signed out")

        def work(flight: Flight[None]) -> None:
            with self._undisturbed(sub, flight):
                flight.commit()
                last, deleted = self._delete(sub)
                if deleted:
                    self._tell_deleted(sub, why, flight)
            if revoke and last is not None:
                self._revoke(last)

        self._wait_for(self._flights.charter(sub, work))

    def delete_rejected(self, sub: str, session: Session, cause: SessionError) -> None:
        """Delete ``session`` because its server refuses tokens that it has just issued; not what has come since."""

        def work(flight: Flight[None]) -> None:
            with self._undisturbed(sub, flight):
                flight.commit()
                self._remove(sub, session, cause, flight)

        self._wait_for(self._flights.charter(sub, work))

    def _delete(self, key: str) -> tuple[Session | None, bool]:
        """Delete the grant that is stored under ``key``, however often it is refreshed meanwhile. Returns the last that
        was seen of it, and whether it was deleted here."""
        try:
            last = current = self._store.get(key)
        except StoreError:  # its owner wants it gone, readable or not
            self._store.delete(key)
            return None, True
        while current is not None and last is not None and current.is_same_grant(last):
            last = current
            if self._store.replace(key, None, current.token_set):
                return last, True
            current = self._store.get(key)
        return last, False

    def _undisturbed(self, key: str, flight: Flight[None]) -> ExitStack:
        """The account's lock, if it can be had: whoever finds the record changed without it takes that for final."""
        stack = ExitStack()
        try:
            stack.enter_context(self._hold(key, self._timeout, flight))
        except (LockTimeoutError, StoreError) as error:
            _log.warning("%s changes without its lock: %s", key, error)
        return stack

    def _wait_for(self, flight: Flight[None]) -> None:
        self._wait(flight, float("inf"), None, own=True)
        flight.result()

    # Listeners

    def on_updated(self, listener: Callable[[SessionUpdatedEvent], None]) -> Callable[[], None]:
        """Have ``listener`` called whenever this getter has stored a session, after the locks are released. What it
        raises is logged. Returns a function that ends it.

        Of two events that follow each other closely, the later may be told first: what is stored counts."""
        self._updated.append(listener)
        return lambda: _drop(self._updated, listener)

    def on_deleted(self, listener: Callable[[SessionDeletedEvent], None]) -> Callable[[], None]:
        """Have ``listener`` called whenever this getter has deleted a session, likewise."""
        self._deleted.append(listener)
        return lambda: _drop(self._deleted, listener)

    def _tell_updated(self, key: str, session: Session, flight: Flight[Any]) -> None:
        event = SessionUpdatedEvent(key, session.dpop_key, session.auth_method, session.token_set)
        for listener in list(self._updated):
            flight.afterwards(partial(listener, event))

    def _tell_deleted(self, key: str, cause: BaseException, flight: Flight[Any]) -> None:
        event = SessionDeletedEvent(key, cause)
        for listener in list(self._deleted):
            flight.afterwards(partial(listener, event))

    # What a change leaves alone

    def _remove(self, key: str, session: Session, cause: SessionError, flight: Flight[Any]) -> bool:
        """Delete ``session``, unless something newer is stored; whether that was done."""
        current = self._store.get(key)
        if current is None or not current.is_same_grant(session):
            return False
        if not self._store.replace(key, None, session.token_set):
            return False
        self._tell_deleted(key, cause, flight)
        return True

    def _revoke(self, session: Session) -> None:
        try:
            self._revoker.revoke(session)
        except Exception as error:  # noqa: BLE001 - there is nobody left to whom it would matter
            why = error if isinstance(error, SessionError) else type(error).__name__
            _log.warning("tokens of %s could not be revoked: %s", session.token_set.sub, why)

    def _newer(self, key: str, session: Session) -> Session:
        """What took the place of ``session`` in the store."""
        current = self._store.get(key)
        if current is None:
            raise TokenRevokedError(f"the session {key} was signed out while it was being refreshed")
        if current.is_same_grant(session) and current.token_set.has_same_tokens(session.token_set):
            raise LockTimeoutError(
                f"the lock of {key} was lost to somebody else: another worker may be refreshing it now; try again"
            )
        return current


def found(key: str, session: Session | None) -> Session:
    if session is None:
        raise SessionNotFoundError(f"no session is stored for {printable(key)}; log in first")
    return session


def _drop(listeners: list[Any], listener: object) -> None:
    if listener in listeners:
        listeners.remove(listener)
