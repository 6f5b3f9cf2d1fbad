"""How a refresh happens.

A refresh token works once. :meth:`SessionGetter._refresh` is the only way to where one is spent: under the account's
lock, in a thread that nothing interrupts, after the store has been proven writable for this very record, and never
while an answer to an earlier try may still come.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

from ._flights import Flight
from .errors import (
    AuthMethodUnsatisfiableError,
    LockTimeoutError,
    OAuthResponseError,
    RefreshInterruptedError,
    SessionError,
    StoreError,
    TokenRefreshError,
    TransportError,
)
from .keys import load_private_key
from .locks import Hold, LockKind, Locks
from .session import Attempt, Freshness, Session, fault_in, subject_of
from .stored_sessions import Revoker, StoredSessions, found
from .stores import SessionStore

#: How long, after ``invalid_grant``, another process may need to store what it refreshed, in seconds. Matters only
#: under locks that do not exclude it.
_PATIENCE = 1.0
#: The longest ``Retry-After`` that is believed, in seconds.
_LONGEST_REST = 3600.0
#: What a lease has to outlast beside the request itself, in seconds: storing the result.
_STORE_WITHIN = 15.0
#: How often whoever waits for another's answer looks whether it is stored, in seconds.
_LOOK_AGAIN = 0.5
#: Pauses between tries to store tokens that were paid for, in seconds.
_STORE_PAUSES = (0.05, 0.2, 0.75, 2.0)

_log = logging.getLogger("atproto_session")


class Authority(Revoker, Protocol):
    """The authorization server of a session, as far as its refresh is concerned."""

    @property
    def answer_within(self) -> float:
        """The bound on everything that ``send`` does, in seconds."""
        ...

    def prepare(self, session: Session) -> Callable[[], Session]:
        """Find the server and verify that it still speaks for the account, spending nothing. The function that is
        returned sends the refresh request and returns the successor of ``session``, as the server gave it."""
        ...


class SessionGetter(StoredSessions):
    """The sessions of a store, each kept alive.

    :param store: a session store; see :mod:`atproto_session.stores`.
    :param authority: who refreshes and revokes.
    :param locks: by default those of the store.
    :param freshness: when tokens count as stale.
    :param timeout: how long a caller waits by default, all told, in seconds.
    :param on_interrupted: what to do about a refresh that may have been sent by a worker that died, or whose answer
        was lost: ``"retry"`` it, since a token that was not spent still works and one that was is lost either way, or
        ``"fail"`` with :class:`.TokenRefreshError` and leave the record as it is.
    :raises ValueError: ``on_interrupted`` is neither.
    """

    def __init__(
        self,
        store: SessionStore,
        authority: Authority,
        *,
        locks: Locks | None = None,
        freshness: Freshness | None = None,
        timeout: float = 30.0,
        on_interrupted: Literal["retry", "fail"] = "retry",
    ) -> None:
        if on_interrupted not in ("retry", "fail"):
            raise ValueError('on_interrupted is "retry" or "fail"')
        super().__init__(store, authority, locks=locks, freshness=freshness, timeout=timeout)
        self._authority = authority
        # Locks that do not say what they are might be anything, a lease for one.
        self._lock_kind = getattr(self._locks, "kind", LockKind.LEASE)
        self._on_interrupted = on_interrupted

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
        :param refresh: ``"auto"``: a fresh session at once; one about to expire is refreshed by whoever gets the lock
            without waiting, while all others go on using it; for one that has expired everybody waits for the one
            refresh. ``True``: a session refreshed after this call began, by anyone. ``False``: what is stored, even
            expired; no lock is taken and no request made.
        :param rejected: an access token that the account's server refused. A session with another one is the answer,
            and costs nothing; else as ``True``.
        :param timeout: how many seconds to wait, all told. A refresh that has been sent goes on afterwards.
        :param cancel: ends the waiting early when set, likewise.
        :raises SessionNotFoundError: nothing is stored under ``sub``.
        :raises TokenRefreshError: the account has to log in again: the session is over, and has been deleted. It is
            kept if its account belongs to another authorization server by now, if it has no refresh token but can be
            used, and, under ``on_interrupted="fail"``, if an answer was lost.
        :raises TokenRevokedError: it was signed out while it was being refreshed.
        :raises RefreshInterruptedError: the refresh was sent and no answer came. Try again.
        :raises LockTimeoutError: ``timeout`` is over.
        :raises CancelledError: ``cancel`` was set.
        :raises StoreError: the store cannot be used.
        :raises SessionError: whatever else kept the refresh from being sent; nothing is lost.
        """
        seen = found(sub, self._store.get(sub))
        if refresh is False and rejected is None:
            return seen

        def is_newer(session: Session) -> bool:
            if rejected is not None:
                return session.token_set.access_token != rejected
            return not session.token_set.has_same_tokens(seen.token_set)

        def is_good(session: Session | None) -> bool:
            session = found(sub, session)
            if refresh is True and rejected is None:
                return is_newer(session)
            if rejected is None and not self.freshness.is_stale(session.token_set):
                return True
            # What another worker has just renewed is used, even if it is to live so short that it counts as stale.
            return is_newer(session) and not self.freshness.is_expired(session.token_set)

        if is_good(seen):
            return seen

        def fetch(stored: Session | None, hold: Hold, flight: Flight[Session]) -> Session:
            return self._refresh(sub, found(sub, stored), is_good, hold, flight)

        get = partial(self._get, sub, is_good, fetch, suits=is_newer, timeout=timeout, cancel=cancel)
        usable = rejected is None and not self.freshness.is_expired(seen.token_set)
        if refresh is True and usable and seen.token_set.refresh_token is None:
            raise TokenRefreshError(
                f"the session {sub} was issued without a refresh token: it can be used, but not refreshed"
            )
        if refresh is True or not usable:
            return get()
        if self._rest_of(seen) > 0 or seen.token_set.refresh_token is None:
            return seen
        return self._refresh_ahead(sub, seen, get, self._timeout if timeout is None else timeout, cancel)

    def _refresh_ahead(
        self, sub: str, seen: Session, get: Callable[..., Session], timeout: float, cancel: threading.Event | None
    ) -> Session:
        """Refresh ``seen``, which is still good, if nobody else does."""
        began = time.monotonic()
        try:
            return get(at_once=True)
        except SessionError as error:
            expired, held = self.freshness.is_expired(seen.token_set), isinstance(error, LockTimeoutError)
            if error.login_required or (expired and not held) or (cancel and cancel.is_set()):
                raise
            if not held:
                _log.warning("%s was not refreshed ahead of time: %s", sub, error)
        if not expired:
            return seen
        # Another worker is at it, and the time of the token has come meanwhile.
        return get(timeout=max(0.0, timeout - (time.monotonic() - began)))

    # How a refresh happens

    def _refresh(
        self,
        key: str,
        session: Session,
        is_good: Callable[[Session | None], bool],
        hold: Hold,
        flight: Flight[Session],
    ) -> Session:
        """Refresh ``session``, which was just read under the lock ``hold``. Up to the last line, nothing is spent."""
        if session.attempt is not None:  # left by a worker that died, or whose answer was lost
            session = self._outwait(key, session, hold, flight)
            if is_good(session):
                return session
        self._check(key, session, flight)
        send = self._authority.prepare(session)

        # The attempt proves that the store takes this very record, and tells whoever comes after a crash that the
        # token may have been spent. It must not hide that of whoever got a lock that was lost meanwhile.
        if not hold.extend(self._stored_within):
            return self._newer(key, session)
        attempt = self._new_attempt(session, hold)
        attempted = session.with_attempt(attempt)
        if not self._store.replace(key, attempted, session.token_set):
            return self._newer(key, session)
        # The lock is looked at last of all, so that nothing that takes time lies between this and the request. If it
        # was lost, the attempt stays: it may stand in the place of the one of whoever holds it now.
        try:
            go = self._is_announced(key, session, attempt) and hold.extend(self._stored_within)
            if go:
                flight.commit()
        except Exception:
            self._withdraw(key, session, attempted, hold)
            raise
        if not go:
            return self._newer(key, session)
        return self._spend(session, attempted, send, hold, flight)

    def _spend(
        self, session: Session, attempted: Session, send: Callable[[], Session], hold: Hold, flight: Flight[Session]
    ) -> Session:
        """Send the refresh request, and make the best of what comes back. Nothing gives up waiting for that here."""
        key = flight.key
        try:
            successor = send()
        except OAuthResponseError as error:
            if error.error == "invalid_grant" and error.status < 500:
                return self._refused(key, session, error, flight)
            unspent = error.status == 429 or (error.error is not None and error.status < 500)
            self._leave(key, attempted, session.attempt if unspent else attempted.attempt, rest=error.retry_after)
            if not unspent:  # it may not even have been the authorization server that answered
                error.retryable = True
            raise
        except TransportError as error:
            if error.sent:
                raise RefreshInterruptedError(
                    f"the refresh of {key} was sent and its answer lost; try again"
                ) from error
            self._leave(key, attempted, session.attempt)
            raise
        except SessionError:
            raise
        except Exception as error:
            raise RefreshInterruptedError(f"the answer to the refresh of {key} could not be read; try again") from error
        if (fault := fault_in(successor.token_set, session.token_set.sub)) is not None:
            return self._discard(key, session, successor, fault, flight)
        successor = replace(
            successor,
            attempt=None,
            refresh_not_before=None,
            refreshed_at=self._clock(),
            after_lost_answer=session.attempt is not None,
        )
        return self._keep(key, session, successor, hold, flight)

    def _outwait(self, key: str, session: Session, hold: Hold, flight: Flight[Session]) -> Session:
        """The session in the store once no answer to the attempt in it can come any more."""
        longest = self._stored_within
        outwaited: Attempt | None = None
        while (attempt := session.attempt) not in (None, outwaited) and not self._is_gone(attempt, hold):
            wait = max(0.0, min(attempt.answer_by - self._clock(), longest))
            hold.extend(wait + longest)
            while session.attempt == attempt and wait > 0:
                flight.abandoned.wait(min(wait, _LOOK_AGAIN))
                flight.check()
                wait -= _LOOK_AGAIN
                session = found(key, self._store.get(key))
            outwaited = attempt
        if session.attempt is not None and self._on_interrupted == "fail":
            raise TokenRefreshError(
                f"the answer to an earlier refresh of {key} may be lost, and is not asked for again; log in again",
                answer_lost=True,
            )
        return session

    def _is_gone(self, attempt: Attempt, hold: Hold) -> bool:
        """Whether the worker that made ``attempt`` is gone for certain: it held the very lock that is held here now,
        and that is one that ends only with its holder. Else it may be alive, and its request under way."""
        return self._lock_kind is LockKind.HOLDER and attempt.lock == getattr(hold, "lock", "")

    def _check(self, key: str, session: Session, flight: Flight[Session]) -> None:
        tokens, why = session.token_set, ""
        if tokens.sub != subject_of(key):
            why = f"the session stored under {key} is of another account; log in again"
        elif tokens.refresh_token is None:
            why = f"the session {key} was issued without a refresh token; log in again"
        if why:
            self._remove(key, session, error := TokenRefreshError(why), flight)
            raise error
        try:
            load_private_key(session.dpop_key)
        except ValueError as error:
            # Another worker, of a later release, may know what to do with it.
            raise AuthMethodUnsatisfiableError(f"the DPoP key of the session {key} cannot be used: {error}") from error
        if (rest := self._rest_of(session)) > 0:
            raise OAuthResponseError(
                f"the authorization server of {key} asked not to be called for another {rest:.0f} s",
                status=429,
                retry_after=rest,
            )

    def _is_announced(self, key: str, session: Session, attempt: Attempt) -> bool:
        """Whether ``attempt`` is in the store, where everybody sees it, and tells the truth about its end."""
        current = self._store.get(key)
        if current is None or not current.token_set.has_same_tokens(session.token_set):
            return False
        if current.attempt == session.attempt:
            raise StoreError(f"the session store did not keep what was recorded for {key} before its refresh")
        if self._clock() + self._authority.answer_within > attempt.answer_by:
            raise StoreError(f"the session store took too long to record the refresh of {key}", retryable=True)
        return current.attempt == attempt

    def _withdraw(self, key: str, session: Session, attempted: Session, hold: Hold) -> None:
        """Take the attempt back, since nothing was sent. If the lock may have been lost, it may stand in the place of
        the one of whoever holds it now; then another takes its place, with the time that that one may need."""
        held = False
        with suppress(Exception):
            held = hold.extend(self._stored_within)
        self._leave(key, attempted, session.attempt if held else self._new_attempt(session, hold))

    @property
    def _stored_within(self) -> float:
        """When the answer to a request that is sent now is stored, or lost, at the latest: in so many seconds."""
        return self._authority.answer_within + _STORE_WITHIN

    def _new_attempt(self, session: Session, hold: Hold) -> Attempt:
        now = self._clock()
        return Attempt(
            id=uuid.uuid4().hex,
            by=f"{socket.gethostname()}:{os.getpid()}",
            started_at=now,
            answer_by=now + self._stored_within,
            answers_lost=0 if session.attempt is None else session.attempt.answers_lost + 1,
            lock=getattr(hold, "lock", ""),
        )

    # How it ends

    def _keep(self, key: str, spent: Session, successor: Session, hold: Hold, flight: Flight[Session]) -> Session:
        """Store ``successor`` in the place of what was spent for it, and of nothing else."""
        errors: list[Exception] = []
        expected = spent.token_set
        for pause in (*_STORE_PAUSES, 0.0):
            try:
                stored = self._store.replace(key, successor, expected)
                current = successor if stored else self._store.get(key)
            except Exception as error:  # noqa: BLE001 - whatever it is, the tokens are there and paid for
                errors.append(error)
                time.sleep(pause)
                with suppress(Exception):  # a lease may live elsewhere, and be well
                    hold.extend(self._stored_within)
                continue
            if current is None or not current.is_same_grant(successor):  # signed out, or logged in anew, meanwhile
                self._revoke(successor)
                return self._newer(key, spent)
            if current.token_set.has_same_tokens(successor.token_set):  # stored now, or by a try that seemed to fail
                self._tell_updated(key, successor, flight)
                return successor
            if current.token_set.refresh_token != spent.token_set.refresh_token:
                return current
            expected = current.token_set
        failure = StoreError(
            f"the refreshed session {key} could not be stored; it was ended at the server, log in again"
        )
        self._revoke(successor)
        try:
            self._remove(key, spent, failure, flight)
        except Exception as error:  # noqa: BLE001 - likewise
            errors.append(error)
        raise failure from ExceptionGroup("what the store said", errors or [failure])

    def _refused(self, key: str, session: Session, error: OAuthResponseError, flight: Flight[Session]) -> Session:
        """The refresh token is of no use (``invalid_grant``), unless that is news of yesterday."""
        if self._lock_kind is LockKind.PROCESS:
            time.sleep(_PATIENCE)
        lost = session.attempt is not None or session.after_lost_answer
        why = "the answer to an earlier refresh had been lost" if lost else "the server refused its refresh token"
        cause = TokenRefreshError(f"the session {key} is over: {why}; log in again", answer_lost=lost)
        if not self._remove(key, session, cause, flight):
            return self._newer(key, session)
        raise cause from error

    def _discard(self, key: str, session: Session, successor: Session, fault: str, flight: Flight[Session]) -> Session:
        """The server issued tokens that must not be used."""
        cause = TokenRefreshError(f"the session {key} is over: the server issued {fault}; log in again")
        newer = None
        try:
            if not self._remove(key, session, cause, flight):
                newer = self._store.get(key)
        except SessionError as error:
            _log.warning("the session %s could not be deleted: %s", key, error)
        if newer is None or not newer.is_same_grant(session):
            self._revoke(successor)
        if newer is None:
            raise cause
        return newer

    def _leave(self, key: str, attempted: Session, attempt: Attempt | None, *, rest: float | None = None) -> None:
        """Put ``attempt`` in the place of the attempt in ``attempted``, if that is still what is stored."""
        if attempt == attempted.attempt and rest is None:
            return
        until = None if rest is None else self._clock() + min(rest, _LONGEST_REST)
        try:
            current = self._store.get(key)
            if current is not None and current.attempt == attempted.attempt:
                left = attempted.with_attempt(attempt, refresh_not_before=until)
                self._store.replace(key, left, attempted.token_set)
        except SessionError as error:
            # The record says more than is true: that an answer may be lost. The next refresh finds out.
            _log.warning("the attempt to refresh %s could not be taken back: %s", key, error)

    def _rest_of(self, session: Session) -> float:
        """For how many seconds more the server has asked not to be called. Nobody asks for longer than an hour: what
        seems so is a clock that was set back."""
        rest = 0.0 if session.refresh_not_before is None else session.refresh_not_before - self._clock()
        return rest if 0.0 < rest <= _LONGEST_REST else 0.0
