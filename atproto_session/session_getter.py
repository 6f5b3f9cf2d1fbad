"""The sessions of a store: reading them, keeping them alive, logging in and out, and who is told about it.

How a refresh happens is in :mod:`.refresh`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, TypeVar

from . import _records as records
from ._checks import (
    check_flags,
    check_functions,
    check_kind,
    check_methods,
    check_seconds,
    check_texts,
    refuse_to_pickle,
    seconds,
)
from ._driver import Authority, World, drive
from ._flights import Flight, Flights
from ._records import log
from ._rests import check_rest
from ._steps import Protocol
from ._terms import Terms, Times, Wanted
from .errors import (
    CancelledError,
    LockTimeoutError,
    SessionError,
    StoreError,
    TokenRefreshError,
    TokenRevokedError,
    printable,
)
from .locks import LockKind, Locks
from .refresh import Refresh
from .session import Freshness, Session, SessionDeletedEvent, SessionUpdatedEvent, subject_of
from .stores import SessionStore, complete

T = TypeVar("T")

#: How many refreshes there may be at a time of accounts of one PDS, and of one authorization server. A server that does
#: not answer keeps no account of another one waiting.
_MOST_OF_PDS = 8
_MOST_OF_ISSUER = 16


class SessionGetter:
    """The sessions of a store, each kept alive.

    :param store: a session store; see :mod:`atproto_session.stores`.
    :param authority: who refreshes and revokes.
    :param locks: by default those of the store.
    :param freshness: when tokens count as stale.
    :param timeout: how long a caller waits by default, all told, in seconds.
    :param on_interrupted: what to do about a refresh that may have been sent by a worker that died, or whose answer
        was lost: ``"retry"`` it, since a token that was not spent still works and one that was is lost either way, or
        ``"fail"`` with :class:`.TokenRefreshError` and leave the record as it is.
    :param client_id: the client whose sessions these are; others of the store are refused and kept.
    :param times: what bounds a refresh in time.
    :raises ValueError: ``on_interrupted`` is neither.
    :raises TypeError: an argument is of another kind than it has to be; the message names it.
    """

    __reduce__ = refuse_to_pickle("a SessionGetter", "make one in each process, over the same store")
    #: How a refresh happens.
    _protocol: type[Refresh] = Refresh
    #: The part of its time for which a log-in or a log-out waits for the account's lock. Then it does without, in time.
    _lock_share = 0.5

    def __init__(
        self,
        store: SessionStore,
        authority: Authority,
        *,
        locks: Locks | None = None,
        freshness: Freshness | None = None,
        timeout: float = 30.0,
        on_interrupted: Literal["retry", "fail"] = "retry",
        client_id: str | None = None,
        times: Times | None = None,
    ) -> None:
        if on_interrupted not in ("retry", "fail"):
            raise ValueError('on_interrupted is "retry" or "fail"')
        check_methods("authority", authority, ("prepare", "revoke"), "what refreshes and revokes")
        if locks is not None:
            check_methods("locks", locks, ("hold",), "a set of locks, such as FileLocks(directory)")
        check_kind("freshness", freshness, Freshness, "a Freshness", optional=True)
        check_kind("times", times, Times, "a Times", optional=True)
        check_texts(client_id=client_id, optional=True)
        check_seconds(timeout=timeout)
        self.freshness = freshness or Freshness()
        self._timeout = timeout
        self._store = complete(store)
        locks = self._store.locks if locks is None else locks
        # Locks that do not say what they are might be anything, a lease for one.
        kind = getattr(locks, "kind", LockKind.LEASE)
        self._terms = Terms(client_id, kind, on_interrupted, times or Times(), self.freshness.is_expired)
        self._world = World(
            self._store, locks, authority, self.freshness.clock, timeout, self._terms.times.extend_every
        )
        self._flights: Flights[Session] = Flights(thread_ended=getattr(store, "thread_ended", None))

    # Reading

    def get_session(
        self,
        sub: str,
        refresh: Literal["auto"] | bool = "auto",
        *,
        rejected: str | None = None,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
    ) -> Session:
        """The session stored under ``sub``, with tokens that are good.

        :param sub: the account's DID, or ``did#session_id``.
        :param refresh: ``"auto"``: a fresh session at once; one about to expire is refreshed by the caller that gets
            the lock without waiting, while all others go on using it; for one that has expired everybody waits for the
            one refresh. ``True``: a session refreshed after this call began, by anyone. ``False``: what is stored,
            even expired; no lock is taken and no request made.
        :param rejected: an access token that the account's server refused. A session with another one is the answer,
            and costs nothing; without one, as ``True``.
        :param timeout: how many seconds to wait, all told. A refresh that was begun goes on afterwards.
        :param cancel: ends the waiting early when set, and the refresh, if nothing was sent and nobody else waits.
        :raises SessionNotFoundError: nothing is stored under ``sub``, or the session of another account.
        :raises TokenRefreshError: the account has to log in again: the session is over, and has been deleted. It is
            kept if another client got it, if its account belongs to another authorization server by now, if it has no
            refresh token but can be used, and, under ``on_interrupted="fail"``, if an answer was lost.
        :raises TokenRevokedError: it was signed out while it was being refreshed.
        :raises RefreshInterruptedError: the refresh was sent and no answer came. Try again.
        :raises LockTimeoutError: ``timeout`` is over.
        :raises CancelledError: ``cancel`` was set.
        :raises StoreError: the store cannot be used.
        :raises SessionError: whatever else kept the refresh from being sent; nothing is lost.
        :raises ValueError: ``refresh`` is none of the three.
        :raises TypeError: an argument is of another kind than it has to be; the message names it.
        """
        try:
            check_texts(sub=sub)
            if refresh != "auto" and not isinstance(refresh, bool):
                raise ValueError(f'refresh is "auto", True or False, not {printable(repr(refresh), 60)}')
            check_texts(rejected=rejected, optional=True)
            if cancel is not None:
                check_methods("cancel", cancel, ("is_set", "wait"), "a threading.Event")
            deadline = time.monotonic() + seconds(timeout, self._timeout)
            seen = self._read(sub)
            wanted = Wanted(seen, self.freshness, refresh, rejected)
            if (refresh is False and rejected is None) or wanted.is_met_by(seen):
                return seen
            is_usable = rejected is None and not self.freshness.is_expired(seen.token_set)
            if is_usable and seen.token_set.refresh_token is None:
                if refresh is True:
                    raise TokenRefreshError(
                        f"the session {sub} has no refresh token: it can be used, but not refreshed"
                    )
                return seen
            try:
                check_rest(seen.rest, self.freshness.clock(), self._terms.times)
            except SessionError:
                if is_usable and refresh is not True:
                    return seen
                raise
            if is_usable and refresh is not True:
                return self._refresh_ahead(sub, wanted, deadline, cancel)
            return self._fly(sub, wanted, deadline, cancel)
        except SessionError as error:
            error.about(sub)
            _, ending = self._world.endings.get(sub) or (0.0, None)
            if isinstance(error, TokenRevokedError) and ending is not None and not ending.is_log_out:
                raise ending.as_error(sub) from error  # its record was deleted meanwhile, and it is known why
            raise

    def _read(self, sub: str) -> Session:
        _, ending = self._world.endings.get(sub) or (0.0, None)
        try:
            session = records.found(sub, self._store.get(sub), ending)
        except StoreError:
            # The tokens of a refresh that cannot be stored are handed out meanwhile.
            flight = self._flights.get(sub)
            if flight is None or not flight.landed.is_set():
                raise
            session = flight.landed.result()
        if ending is not None and (session.began_at or 0.0) > ending.at:
            self._world.endings.delete(sub)  # another process has logged the account in since
        records.check_client(sub, session, self._terms.client_id)
        return session

    def _refresh_ahead(self, sub: str, wanted: Wanted, deadline: float, cancel: threading.Event | None) -> Session:
        """Refresh a session that is still good, if nobody else does. While its token lives, that is the answer whatever
        happens."""
        seen = wanted.seen
        left = self.freshness.seconds_left(seen.token_set)
        try:
            return self._fly(sub, wanted._replace(waits=False), min(deadline, time.monotonic() + (left or 0.0)), cancel)
        except SessionError as error:
            is_over = error.login_required and self._is_over(sub, seen)
            if is_over or (isinstance(error, CancelledError) and cancel is not None and cancel.is_set()):
                raise
            if not isinstance(error, LockTimeoutError):
                log.warning("%s was not refreshed ahead of time: %s", sub, error)
        if not self.freshness.is_expired(seen.token_set):
            return seen
        return self._fly(sub, wanted, deadline, cancel)  # its time has come meanwhile

    def _is_over(self, sub: str, seen: Session) -> bool:
        stored = self._store.get(sub)
        return stored is None or not stored.token_set.has_same_tokens(seen.token_set)

    def _fly(self, sub: str, wanted: Wanted, deadline: float, cancel: threading.Event | None) -> Session:
        """The result of the refresh that is under way, or of a new one. Those who wait share it, its failure too."""

        # A flight outlives callers who are in a hurry, and is of use to those who are not.
        tokens = wanted.seen.token_set
        groups = {tokens.iss: _MOST_OF_ISSUER, tokens.aud: _MOST_OF_PDS}
        world = replace(self._world, lock_within=max(self._timeout, deadline - time.monotonic()))

        def work(flight: Flight[Session]) -> Session:
            return drive(flight, self._protocol(sub, wanted, self._terms).run(), world)

        while True:
            flight, is_mine = self._flights.board(sub, work, deadline=deadline, groups=groups)
            if not (is_mine or wanted.waits):
                raise LockTimeoutError(f"{sub} is being refreshed by another thread")
            try:
                session = flight.wait(deadline, cancel)
                if is_mine or wanted.is_newer(session):
                    return session
            except SessionError as error:
                with suppress(SessionError):
                    if wanted.is_met_by(stored := self._read(sub)):
                        return stored  # another worker has brought it
                # One that does not wait for others has failed for a reason of its own.
                is_shared = not isinstance(error, LockTimeoutError | CancelledError)
                if is_mine or is_shared or time.monotonic() >= deadline or (cancel is not None and cancel.is_set()):
                    raise
            if wanted.is_met_by(stored := self._read(sub)):
                return stored

    # Logging in and out

    def get_stored(self, sub: str) -> Session | None:
        """What is stored under ``sub``, as it is.

        :raises StoreError: the record cannot be read.
        """
        check_texts(sub=sub)
        return self._store.get(sub)

    def set_stored(self, sub: str, session: Session, *, stored: Callable[[], None] | None = None) -> None:
        """Store the session of a new log-in, in the place of what is there. A refresh under way is waited for, for half
        of the getter's timeout. A grant of this client that is replaced is ended at its server.

        :param stored: called when it is stored, before the grant that it replaces is ended.
        :raises ValueError: the session is of another account.
        :raises StoreError: the session cannot be stored; it has been revoked.
        :raises LockTimeoutError: the getter's timeout is over. The session is stored as soon as the store allows it.
        """
        check_texts(sub=sub)
        check_kind("session", session, Session, "a Session")
        check_functions(stored=stored, optional=True)
        if session.token_set.sub != subject_of(sub):
            raise ValueError(f"a session of {printable(session.token_set.sub)} cannot be stored under {printable(sub)}")
        session = replace(session, client_id=self._terms.client_id, after_lost_answer=False)
        self._carry_out(sub, records.log_in(sub, session), None, orphan=session, handed_out=stored)

    def delete_stored(
        self, sub: str, cause: BaseException | None = None, *, revoke: bool = False, timeout: float | None = None
    ) -> None:
        """Delete what is stored under ``sub``. A refresh under way is waited for, for half of the time.

        :param cause: what the listeners are told; by default that the session was signed out.
        :param revoke: end the session at the authorization server as well, if it can be reached. Where that takes
            longer than ``timeout``, it goes on alone.
        :param timeout: how long to wait, all told, in seconds; by default the getter's.
        :raises StoreError: the store cannot be written.
        :raises LockTimeoutError: ``timeout`` is over and the store has not answered. The session is deleted as soon as
            it does.
        :raises TokenRefreshError: it is the session of another client, and is kept.
        """
        check_texts(sub=sub)
        check_kind("cause", cause, BaseException, "an error", optional=True)
        check_flags(revoke=revoke)
        why = cause or TokenRevokedError(f"the session {sub} was signed out").about(sub)
        self._carry_out(sub, records.log_out(sub, why, self._terms.client_id, revoke=revoke), timeout)

    def delete_rejected(self, sub: str, session: Session, cause: SessionError) -> None:
        """Delete ``session``, because its server refuses tokens that it has just issued, and end it there; not what has
        come since."""
        check_texts(sub=sub)
        check_kind("session", session, Session, "a Session")
        check_kind("cause", cause, SessionError, "a SessionError")
        self._carry_out(sub, records.end(sub, session, cause.about(sub)), None)

    def delete_unusable(self, sub: str, session: Session, cause: SessionError) -> bool:
        """Delete ``session``, which nobody can use any more; not what has come since. Returns whether it was there.

        :raises StoreError: the store cannot be written.
        """
        check_texts(sub=sub)
        check_kind("session", session, Session, "a Session")
        check_kind("cause", cause, SessionError, "a SessionError")
        return self._carry_out(sub, records.remove(sub, session, cause.about(sub)), None)

    def end_grant(self, session: Session) -> None:
        """End the grant of ``session``, which is not stored any more, at its server, if that can be reached."""
        check_kind("session", session, Session, "a Session")
        self._world.revoke(session)

    def _carry_out(
        self,
        sub: str,
        protocol: Protocol[T],
        timeout: float | None,
        *,
        orphan: Session | None = None,
        handed_out: Callable[[], None] | None = None,
    ) -> T:
        """
        :param orphan: a session that there is no way to come to again, if ``protocol`` cannot be begun.
        """
        timeout = seconds(timeout, self._timeout)
        deadline = time.monotonic() + timeout
        world = replace(self._world, lock_within=timeout * self._lock_share)
        try:
            flight: Flight[T] = self._flights.charter(
                sub, lambda flight: drive(flight, protocol, world, handed_out), committed=orphan is not None
            )
        except SessionError as error:
            if orphan is not None:
                self._world.revoke(orphan)
            error.about(sub)
            raise
        try:
            result = flight.wait(deadline)
        except SessionError as error:
            error.about(sub)
            raise
        flight.over.wait(deadline - time.monotonic())  # and no longer for what follows at the server
        return result

    def close(self) -> None:
        """Wait until nothing is being refreshed. Nothing is refreshed afterwards: what needs that raises
        :class:`.SessionError`."""
        self._flights.close()

    # Listeners

    def on_updated(self, listener: Callable[[SessionUpdatedEvent], None]) -> Callable[[], None]:
        """Have ``listener`` called whenever this getter has stored a session, after the locks are released. What it
        raises is logged. Returns a function that ends it.

        Of two events that follow each other closely, the later may be told first: what is stored counts."""
        return self._listen(SessionUpdatedEvent, listener)

    def on_deleted(self, listener: Callable[[SessionDeletedEvent], None]) -> Callable[[], None]:
        """As :meth:`on_updated`, for sessions that this getter has deleted."""
        return self._listen(SessionDeletedEvent, listener)

    def _listen(self, kind: type, listener: Callable[[Any], None]) -> Callable[[], None]:
        check_functions(listener=listener)
        listeners = self._world.listeners[kind]
        listeners.append(listener)

        def stop() -> None:
            with suppress(ValueError):
                listeners.remove(listener)

        return stop
