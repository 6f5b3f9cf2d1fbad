"""How a refresh happens, from top to bottom.

A refresh token works once, and :class:`Refresh` is the only way to where one is spent. The record keeps workers apart:
before a token is spent, an *attempt* is written into it by compare-and-set, and of all workers that have read one
record, one succeeds. The account's lock lets the others wait cheaply. The steps are those of :mod:`._steps`.
"""

from __future__ import annotations

from dataclasses import replace

from . import _steps as steps
from ._records import check_client, check_key, found, holds_spent_token, log, newer, remove, updated
from ._rests import OAUTH_ERRORS, check_rest, rest_after
from ._steps import Protocol, Request
from ._terms import Terms, Wanted
from ._worker import Life
from .errors import (
    CancelledError,
    LockTimeoutError,
    OAuthResponseError,
    RefreshInterruptedError,
    SessionError,
    StoreError,
    TokenRefreshError,
    TransportError,
)
from .locks import LockKind
from .session import Attempt, Session, fault_in

_ROUNDS = 10  # how often a refresh begins anew because another worker came first


class Refresh:
    """One refresh of the session under ``key``: the ``session`` as it was found, the ``record`` as it is by now."""

    def __init__(self, key: str, wanted: Wanted, terms: Terms) -> None:
        self.key = key
        self.wanted = wanted
        self.terms = terms
        self.times = terms.times
        self.session = self.record = wanted.seen
        self.lock = ""

    def run(self) -> Protocol[Session]:
        """Brings a session that the caller wants. Up to the commit anything may stop it, and nothing is lost."""
        request: Request | None = None
        for _ in range(_ROUNDS):
            prepared = self.session
            if request is None:  # what may be slow comes before the lock
                yield from self._check()
                request = yield from self._prepare()
            self.lock = yield steps.Lock(self.wanted.waits)
            yield from self._look_again()
            yield from self._outwait()
            if self.wanted.is_met_by(self.session):
                return self.session  # another worker was faster
            yield from self._check()
            if not self.session.has_same_server(prepared):
                request = None  # a new log-in
            elif (yield from self._announce()):
                return (yield from self._spend(request))
            yield steps.Unlock()
        raise LockTimeoutError(f"other workers refresh {self.key} all the time; try again later")

    def _check(self) -> Protocol[None]:
        """Stop here if the record cannot be refreshed at all, or not yet."""
        check_client(self.key, self.session, self.terms.client_id)
        if self.session.token_set.refresh_token is None:
            why = TokenRefreshError(f"the session {self.key} was issued without a refresh token; log in again")
            yield from remove(self.key, self.session, why)
            raise why
        check_key(self.key, self.session)
        check_rest(self.session.rest, (yield steps.Now()), self.times)

    def _prepare(self) -> Protocol[Request]:
        try:
            return (yield steps.Prepare(self.session))  # type: ignore[no-any-return]
        except SessionError as error:
            if error.retryable and not isinstance(error, CancelledError | StoreError | LockTimeoutError):
                yield from self._leave(self.session.attempt, error)
            raise

    def _look_again(self) -> Protocol[None]:
        """The record may be another one by now."""
        self.session = self.record = found(self.key, newer(self.key, (yield steps.Read())))

    def _outwait(self) -> Protocol[None]:
        """Wait until the answer to the attempt in the record is there, or can no longer come."""
        waited = 0.0
        while (attempt := self.session.attempt) is not None and not (yield from self._is_over(attempt)):
            is_alive = (yield steps.LifeOf(attempt)) is Life.ALIVE
            end = max(attempt.answer_by, attempt.started_at + self.times.longest) if is_alive else attempt.answer_by
            # The clock may have been set back: no attempt is waited for without end.
            wait = min(end - (yield steps.Now()), self.times.longest - waited, self.times.look_again)
            if wait <= 0:
                break
            if not self.wanted.waits:
                raise LockTimeoutError(f"another worker refreshes {self.key}")
            yield steps.Extend(self.times.window)
            yield steps.Wait(wait)
            waited += wait
            yield from self._look_again()
        if self.session.attempt and not self.wanted.is_met_by(self.session) and self.terms.on_interrupted == "fail":
            why = f"the answer to a refresh of {self.key} may be lost, and is not asked for again; log in again"
            raise TokenRefreshError(why, answer_lost=True)

    def _is_over(self, attempt: Attempt) -> Protocol[bool]:
        """Whether no answer to ``attempt`` will come for certain. Its worker has said so, or it held the very lock that
        is held here now, and that is one that ends only with its holder, or is not at work on it any more."""
        if attempt.is_over or (self.terms.lock_kind is LockKind.HOLDER and attempt.lock == self.lock):
            return True
        return (yield steps.LifeOf(attempt)) is Life.GONE

    def _announce(self) -> Protocol[bool]:
        """Write the attempt, look a last time at everything that must be true when the request leaves, and commit.

        The attempt proves that the store takes this very record, and it tells all who come after a crash that the token
        may have been spent. Brings ``False`` if another worker came first; then nothing is sent."""
        if not (yield from self._has_lock()):
            return False
        attempt, earlier = (yield steps.Sign(self.times.window, self.lock)), self.session.attempt
        if earlier is not None:
            attempt = replace(attempt, answers_lost=earlier.answers_lost + 1)
        attempted = replace(self.session, attempt=attempt)
        try:
            is_mine = yield from self._write(attempted)
            is_mine = is_mine and (yield from self._has_lock()) and (yield from self._is_in_store(attempted))
            if is_mine:
                yield from self._check_window(attempted)
                yield steps.Commit()
        except Exception:
            self.record = attempted  # it may have been written all the same
            yield from self._leave(self.session.attempt)
            raise
        if not is_mine:
            yield from self._leave(self.session.attempt)
        return is_mine

    def _has_lock(self) -> Protocol[bool]:
        return (yield steps.Extend(self.times.window))  # type: ignore[no-any-return]

    def _write(self, record: Session) -> Protocol[bool]:
        """Put ``record`` in the place of what is known to be in the store, attempt included."""
        if is_written := (yield steps.Replace(record, self.record)):
            self.record = record
        return is_written  # type: ignore[no-any-return]

    def _is_in_store(self, attempted: Session) -> Protocol[bool]:
        """Whether the attempt is where all see it: nobody has logged out or in since."""
        current = yield steps.Read()
        if current is None or not current.token_set.has_same_tokens(attempted.token_set):
            return False
        if current.attempt == self.session.attempt:
            raise StoreError(f"the session store did not keep what was recorded for {self.key} before its refresh")
        return current.attempt == attempted.attempt  # type: ignore[no-any-return]

    def _check_window(self, attempted: Session) -> Protocol[None]:
        """The last look is at the clock. After its window a worker that stood still may not be the only one to send."""
        now = yield steps.Now()
        if attempted.attempt is None or now + self.times.spare > attempted.attempt.answer_by:
            raise StoreError(f"the session store took too long to record the refresh of {self.key}", retryable=True)

    # From here on the token counts as spent

    def _spend(self, request: Request) -> Protocol[Session]:
        """Send the request, and wait as long as an answer may come."""
        try:
            successor = yield steps.Send(request, self.session)
            while successor is None:
                yield from self._go_on()
                successor = yield steps.Await()
        except OAuthResponseError as error:
            return (yield from self._refused(error))
        except TransportError as error:
            if error.sent:
                raise (yield from self._interrupted(error)) from error
            yield from self._leave(self.session.attempt, error)
            raise
        except SessionError:
            yield from self._leave(self._given_up())
            raise
        except Exception as error:
            raise (yield from self._interrupted(error)) from error
        if (fault := fault_in(successor.token_set, self.session.token_set.sub)) is not None:
            return (yield from self._discard(successor, fault))
        now, lost = (yield steps.Now()), self.session.attempt is not None
        successor = replace(successor, attempt=None, rest=None, refreshed_at=now, after_lost_answer=lost)
        return (yield from self._keep(successor))

    def _go_on(self) -> Protocol[None]:
        """This takes long. Let the others know that this worker lives."""
        try:
            yield steps.Extend(self.times.window)
            now = yield steps.Now()
            attempt = self.record.attempt and replace(self.record.attempt, answer_by=now + self.times.window)
            yield from self._write(replace(self.record, attempt=attempt))
        except Exception as error:  # noqa: BLE001 - whatever it is, the answer is waited for
            log.warning("others do not see that %s is still being refreshed: %s", self.key, type(error).__name__)

    def _keep(self, successor: Session) -> Protocol[Session]:
        """Store ``successor`` in the place of what was spent for it, no matter what has changed beside that."""
        spent, failures, tried_for, pause = self.session.token_set, list[Exception](), 0.0, 0.05
        while True:
            try:
                current = successor if (yield steps.Replace(successor, spent)) else (yield steps.Read())
                if holds_spent_token(current, spent, successor):
                    spent = current.token_set
                    raise StoreError("the record has changed in the meantime")  # noqa: TRY301 - and is tried again
            except Exception as error:  # noqa: BLE001 - whatever it is, the tokens are there and paid for
                failures = [*failures[-9:], error]
                if tried_for >= self.times.store_for:
                    break
                if len(failures) > 1:  # that the first write failed may mean no more than that it was done
                    yield steps.HandOut(successor)
                yield steps.Wait(pause)
                tried_for, pause = tried_for + pause, min(pause * 3, 5.0)
                yield from self._go_on()
                continue
            if current is None or not current.is_same_grant(successor):  # logged out, or in anew, meanwhile
                yield steps.Revoke(successor)
                return newer(self.key, current)
            if not current.token_set.has_same_tokens(successor.token_set):
                return current  # another worker has refreshed it since
            yield steps.Tell(updated(self.key, successor))  # stored now, or by a try that seemed to fail
            return successor
        end = "was ended at its server" if (yield steps.Revoke(successor)) else "could not be ended at its server"
        lost = StoreError(f"the refreshed session {self.key} could not be stored, and {end}; log in again")
        try:
            yield from remove(self.key, self.session, lost)
        except Exception as error:  # noqa: BLE001 - as above
            failures.append(error)
        log.error("%s", lost)  # those who waited have the tokens already
        raise lost from ExceptionGroup("what the store said", failures)

    def _refused(self, error: OAuthResponseError) -> Protocol[Session]:
        if error.error == "invalid_grant" and error.status < 500:
            return (yield from self._end(error))
        # A gateway that answers 5xx may have cut off the answer of the server behind it.
        is_answer = error.error is not None and (error.status < 500 or error.error == "temporarily_unavailable")
        if is_answer or error.status == 429:
            yield from self._leave(self.session.attempt, error)
        else:
            error.retryable = True
            yield from self._leave(self._given_up(), error)
        if error.status == 400 and error.error not in OAUTH_ERRORS and self.terms.is_expired(self.session.token_set):
            # Some servers say so of a refresh token that is dead. The session is kept all the same.
            raise TokenRefreshError(f"the session {self.key} cannot be refreshed ({error}); log in again") from error
        raise error

    def _end(self, error: OAuthResponseError) -> Protocol[Session]:
        """The refresh token is of no use (``invalid_grant``), unless something newer is stored by now."""
        if self.terms.lock_kind is LockKind.PROCESS:
            yield steps.Wait(self.times.patience)
        is_lost = self.session.attempt is not None or self.session.after_lost_answer
        why = "the answer to an earlier refresh had been lost" if is_lost else "the server refused its refresh token"
        why = f"the session {self.key} is over: {why} ({error}); log in again"
        over = TokenRefreshError(why, answer_lost=is_lost, error=error.error, error_description=error.error_description)
        if not (yield from remove(self.key, self.session, over)):
            return newer(self.key, (yield steps.Read()))
        raise over from error

    def _interrupted(self, error: Exception) -> Protocol[SessionError]:
        """The answer is lost, or cannot be read. Nobody knows whether the token was spent."""
        why = error if isinstance(error, SessionError) else type(error).__name__
        lost = RefreshInterruptedError(f"the refresh of {self.key} was sent and its answer lost ({why}); try again")
        yield from self._leave(self._given_up(), lost)
        return lost

    def _discard(self, successor: Session, fault: str) -> Protocol[Session]:
        """The server issued tokens that must not be used."""
        over = TokenRefreshError(f"the session {self.key} is over: the server issued {fault}; log in again")
        current: Session | None = None
        try:
            if not (yield from remove(self.key, self.session, over)):
                current = yield steps.Read()
        except SessionError as error:
            log.warning("the session %s could not be deleted: %s", self.key, error)
        if current is None or not current.is_same_grant(self.session):
            yield steps.Revoke(successor)
        if current is None:
            raise over
        return current

    def _leave(self, attempt: Attempt | None, error: SessionError | None = None) -> Protocol[None]:
        """Leave the record with ``attempt``, and with a rest for the server after ``error``."""
        left = replace(self.record, attempt=attempt)
        if error is not None:
            left = replace(left, rest=rest_after(error, left.rest, (yield steps.Now()), self.times))
        try:
            if left != self.record:
                yield from self._write(left)
        except SessionError as failure:
            # The record says more than is true: that an answer may be lost. The next refresh finds out.
            log.warning("the attempt to refresh %s could not be taken back: %s", self.key, failure)

    def _given_up(self) -> Attempt | None:
        return self.record.attempt and replace(self.record.attempt, is_over=True)
