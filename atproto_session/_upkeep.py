"""Looking after a store: who is in it, keeping idle sessions alive, deleting what nobody can use."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from ._records import found, log
from .errors import CancelledError, IdentityError, SessionError, StoreError, TokenRefreshError, printable
from .session import Session, TokenSet
from .session_getter import SessionGetter
from .stores import FullStore

#: A refresh token of a public client dies after two weeks without use. Who calls once a week is in time with this.
IDLE = 5 * 24 * 3600.0
PACE = 0.5
#: So many failures of one server in a row are no longer a matter of single accounts.
_FAILURES = 3
_LONGEST_REST = 60.0

#: A record, or why it cannot be read.
_Record = Session | SessionError


@dataclass(frozen=True)
class Account:
    """What may be shown of a session that is stored. It holds no token and no key.

    :ivar did: the account.
    :ivar session_id: which of its sessions, where it has several, or ``None``.
    :ivar iss: the issuer of its authorization server.
    :ivar aud: the origin of its PDS.
    :ivar scope: what was granted, separated by spaces.
    :ivar client_id: the client that got the session, and the only one that can refresh it; ``None`` where that was not
        recorded.
    :ivar began_at: when the account logged in; ``None`` where that is not known.
    :ivar refreshed_at: when its tokens were stored; ``None`` where that is not known.
    :ivar expires_at: when its access token expires; ``None`` where the server did not say.
    :ivar error: why the record cannot be read; then nothing else is known of it but the account. Otherwise ``None``.
    """

    did: str
    session_id: str | None = None
    iss: str = ""
    aud: str = ""
    scope: str = ""
    client_id: str | None = None
    began_at: datetime | None = None
    refreshed_at: datetime | None = None
    expires_at: datetime | None = None
    error: SessionError | None = None


@dataclass(frozen=True)
class KeepAliveResult:
    """What became of one session.

    :ivar outcome: ``"refreshed"``: it has new tokens, from here or from another worker. ``"ended"``: the account has to
        log in again. ``"failed"``: it stays as it is, and the next call tries again.
    :ivar error: why it ended or failed, or ``None``.
    :ivar left: how many sessions are still to come in this call.
    """

    did: str
    session_id: str | None
    outcome: Literal["refreshed", "ended", "failed"]
    error: SessionError | None = None
    left: int = 0


@dataclass(frozen=True)
class CleanResult:
    """What was deleted.

    :ivar sessions: the sessions, as they were.
    :ivar logins: how many log-ins that had been begun and were past their hour.
    """

    sessions: tuple[Account, ...]
    logins: int


class Upkeep:
    """
    :param client_id: the client whose sessions are looked after. Others are left alone.
    :param timeout: how long one refresh is waited for, in seconds.
    """

    def __init__(self, sessions: SessionGetter, store: FullStore, client_id: str, *, timeout: float) -> None:
        self._sessions = sessions
        self._store = store
        self._client_id = client_id
        self._timeout = timeout

    def accounts(self) -> Iterator[Account]:
        return (_account(key, record) for key, record in self._walk())

    def _walk(self) -> Iterator[tuple[str, _Record]]:
        keys = iter(self._store)  # now: a store that cannot be walked says so when it is asked
        return ((key, record) for key in keys if (record := self._read(key)) is not None)

    def _read(self, key: str) -> _Record | None:
        try:
            session = self._store.get(key)
            return None if session is None else found(key, session)
        except SessionError as error:
            return error.about(key)

    def _is_mine(self, session: Session) -> bool:
        return session.client_id in (None, self._client_id)

    # Keeping alive

    def keep_alive(
        self,
        *,
        idle: float,
        pace: float,
        timeout: float | None,
        cancel: threading.Event | None,
        on_result: Callable[[KeepAliveResult], object] | None,
    ) -> list[KeepAliveResult]:
        _check_seconds(idle=idle, pace=pace, **({} if timeout is None else {"timeout": timeout}))
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        results: list[KeepAliveResult] = []

        def is_over() -> bool:
            return time.monotonic() >= deadline or (cancel is not None and cancel.is_set())

        def tell(key: str, error: SessionError | None, left: int) -> None:
            did, _, session_id = key.partition("#")
            outcome: Literal["refreshed", "ended", "failed"] = "refreshed"
            if error is not None:
                outcome = "ended" if error.login_required else "failed"
            results.append(KeepAliveResult(did, session_id or None, outcome, error, left))
            if on_result is not None:
                on_result(results[-1])

        due, unreadable, failure = self._due(idle, is_over)
        for number, (key, why) in enumerate(unreadable, start=1):
            tell(key, why, len(unreadable) - number + len(due))
        servers = _Servers()
        is_asked = False
        for number, (last, key) in enumerate(due, start=1):
            if is_asked:
                _pause(min(pace, deadline - time.monotonic()), cancel)
            if is_over():
                break
            is_asked, error = self._refresh(key, last, servers, deadline, cancel)
            if isinstance(error, CancelledError) and cancel is not None and cancel.is_set():
                break
            tell(key, error, len(due) - number)
        if failure is not None:
            raise failure
        return results

    def _due(
        self, idle: float, is_over: Callable[[], bool]
    ) -> tuple[list[tuple[float, str]], list[tuple[str, SessionError]], StoreError | None]:
        """The sessions that are due, each with the time of its last refresh, the oldest first; those that cannot be
        read; and what else the store had to say at the end.

        All of them are looked for first: nothing of the store stays open for hours while accounts are refreshed."""
        now = self._sessions.freshness.clock()
        due: list[tuple[float, str]] = []
        unreadable: list[tuple[str, SessionError]] = []
        try:
            for key, record in self._walk():
                if isinstance(record, SessionError):
                    unreadable.append((key, record))
                # A time that lies ahead comes from a clock that was wrong.
                elif self._can_be_refreshed(record) and abs(now - _last_of(record)) >= idle:
                    due.append((_last_of(record), key))
                if is_over():
                    break
        except StoreError as error:
            return sorted(due), unreadable, error
        return sorted(due), unreadable, None

    def _can_be_refreshed(self, session: Session) -> bool:
        return self._is_mine(session) and session.token_set.refresh_token is not None

    def _refresh(
        self, key: str, last: float, servers: _Servers, deadline: float, cancel: threading.Event | None
    ) -> tuple[bool, SessionError | None]:
        """Refresh the session, unless another worker has done so. Returns whether its server may have been asked, and
        why the session was not refreshed, if so."""
        server = ""
        try:
            session = self._sessions.get_stored(key)
            if session is not None:
                server = session.token_set.aud
                if _last_of(session) != last:
                    return False, None
                if (rest := servers.rest_of(server, key)) is not None:
                    return False, rest
            self._sessions.get_session(
                key,
                True,
                # What another worker brings between the look above and the next one is as good.
                rejected=None if session is None else session.token_set.access_token,
                timeout=min(self._timeout, deadline - time.monotonic()),
                cancel=cancel,
            )
        except SessionError as error:
            servers.note(server, error)
            return True, error
        servers.note(server, None)
        return True, None

    # Cleaning

    def clean(self) -> CleanResult:
        deleted = []
        for key, record in self._walk():
            if isinstance(record, SessionError):
                log.warning("%s stays in the store: %s", printable(key), record)
            elif self._is_mine(record) and self._is_unusable(record.token_set):
                why = f"the session {printable(key)} has expired and has no refresh token; log in again"
                try:
                    is_deleted = self._sessions.delete_unusable(key, record, TokenRefreshError(why))
                except StoreError as error:
                    log.warning("%s stays in the store: %s", printable(key), error)
                else:
                    deleted += [_account(key, record)] if is_deleted else []
        purge: Callable[[], int] | None = getattr(self._store.logins, "purge", None)
        return CleanResult(tuple(deleted), 0 if purge is None else purge())

    def _is_unusable(self, tokens: TokenSet) -> bool:
        return tokens.refresh_token is None and self._sessions.freshness.is_expired(tokens)


class _Servers:
    """Servers that fail again and again are left alone for a while, so that the accounts of others are not kept
    waiting."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[str, int] = {}
        self._rests_until: dict[str, float] = {}

    def rest_of(self, server: str, key: str) -> SessionError | None:
        """Why nothing is sent for ``key``, if ``server`` is left alone at the moment."""
        left = self._rests_until.get(server, 0.0) - self._clock()
        if left <= 0:
            return None
        return SessionError(
            f"nothing was sent for {printable(key)}: {printable(server)} has failed {self._failures[server]} times in "
            "a row",
            retryable=True,
            retry_after=left,
        ).about(key)

    def note(self, server: str, error: SessionError | None) -> None:
        if error is None:
            self._failures.pop(server, None)
        # Neither the directory nor the store is the server's fault.
        elif error.retryable and not isinstance(error, IdentityError | StoreError | CancelledError):
            failures = self._failures[server] = self._failures.get(server, 0) + 1
            if failures >= _FAILURES:
                rest = max(error.retry_after or 0.0, min(2.0 ** (failures - _FAILURES), _LONGEST_REST))
                self._rests_until[server] = self._clock() + rest


def _account(key: str, record: _Record) -> Account:
    did, _, session_id = key.partition("#")
    if isinstance(record, SessionError):
        return Account(did, session_id or None, error=record)
    tokens = record.token_set
    return Account(
        did=did,
        session_id=session_id or None,
        iss=tokens.iss,
        aud=tokens.aud,
        scope=tokens.scope,
        client_id=record.client_id,
        began_at=_moment(record.began_at),
        refreshed_at=_moment(record.refreshed_at),
        expires_at=tokens.expires_at,
    )


def _moment(seconds: float | None) -> datetime | None:
    if seconds is not None:
        with suppress(ValueError, OverflowError, OSError):  # no calendar has it
            return datetime.fromtimestamp(seconds, UTC)
    return None


def _last_of(session: Session) -> float:
    """When the session was last refreshed or begun, seconds since the epoch; 0 if nobody knows."""
    last = session.began_at if session.refreshed_at is None else session.refreshed_at
    return last or 0.0


def _pause(seconds: float, cancel: threading.Event | None) -> None:
    if cancel is not None:
        cancel.wait(max(seconds, 0.0))
    else:
        time.sleep(max(seconds, 0.0))


def _check_seconds(**arguments: object) -> None:
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is a finite number of seconds, 0 or more")
