"""What workers share, every step that can be next, and what must never happen.

A step is one access to something shared: the store, the lock, the server, the end of a window. Time is not counted: a
window may end, a lease run out and an answer be lost at every moment but where the code sees to it that they do not.
A worker that has looked at the clock sends at once, and one that waits for an answer keeps its window ahead. Where
workers may stand still (``pauses``), the window ends all the same, and what comes of it is excused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from atproto_session import Freshness, Session, TokenSet
from atproto_session import _steps as steps
from atproto_session._terms import Terms
from atproto_session._worker import Life
from atproto_session.locks import LockKind
from atproto_session.refresh import Refresh
from atproto_session.stores.memory import holds

from .protocols import (
    EARLY,
    END,
    LATE,
    ODD,
    REPORTED,
    TIMES,
    TOKENS,
    Fault,
    Kind,
    Node,
    Record,
    Report,
    owner,
    request_to,
    worker,
)

Compare = Callable[[Session | None, Session | TokenSet | None], bool]


class Violation(Exception):
    """What must never happen has happened."""


class Request(NamedTuple):
    """A token that was sent.

    :ivar answer: empty while the server has not come to it, then what it answers.
    :ivar is_received: its sender has the answer, and has not stored it yet.
    :ivar awaited: how often its sender has found that it takes long.
    :ivar is_excused: its sender has stood still past its window.
    """

    grant: int
    token: int
    answer: str = ""
    is_received: bool = False
    awaited: int = 0
    is_excused: bool = False


class Actor(NamedTuple):
    """:ivar is_gone: its session was not in the store when it looked at anything the last time.
    :ivar had_lock: whether it had its lock when it wrote its attempt; ``None`` before that.
    """

    node: Node
    request: Request | None = None
    is_gone: bool = False
    had_lock: bool | None = None


class Grant(NamedTuple):
    """What the server knows of a log-in: which token is the good one. That it ends, or is left alive with nobody to use
    it, is excused if something has happened to it (``is_hurt``): an answer was lost, or the worker that had it."""

    token: int = 0
    is_alive: bool = True
    is_hurt: bool = False


class State(NamedTuple):
    """:ivar lock: the name of the lock: another one when it was broken from outside.
    :ivar late: the tokens in requests whose senders have given up, and which may still be served.
    :ivar ended: attempts whose window somebody has seen end, before their request has left.
    """

    record: Record | None
    grants: tuple[Grant, ...]
    actors: tuple[Actor, ...]
    losses: int
    mishaps: int
    stalls: int
    holder: int | None = None
    lock: str = "the first"
    late: frozenset[tuple[int, int]] = frozenset()
    ended: frozenset[str] = frozenset()
    is_writable: bool = True


#: Who does what, and what comes of it. ``None`` is the world.
Move = tuple[int | None, str, State]
_LOGIN_ERRORS = ("SessionNotFoundError", "TokenRevokedError", "TokenRefreshError")
_ERRORS = ("StoreError", "TransportError", "RefreshInterruptedError", "OAuthResponseError", "CancelledError")


@dataclass(frozen=True)
class World:
    """:ivar locks: ``"holder"``: they die with their holder; ``"broken"``: and one is broken from outside, once;
        ``"lease"``: they run out, so many times (``losses``); ``"none"``.
    :ivar is_one_machine: workers know of each other whether they are at work.
    :ivar pauses: workers may stand still past their window.
    :ivar owners: who else there is: ``"log_out"``, ``"log_in"``, ``"end"``.
    :ivar is_login_stale: a log-in brings a session that has to be refreshed.
    :ivar mishaps: how often the store fails for a moment, whether it has done what it was asked or not.
    :ivar compare: the comparison in compare-and-set.
    :ivar revokes: revoked grants end.
    """

    workers: int = 2
    locks: str = "holder"
    losses: int = 2
    is_one_machine: bool = False
    pauses: bool = False
    owners: tuple[str, ...] = ("log_out", "log_in")
    calls: int = 1
    is_login_stale: bool = False
    mishaps: int = 0
    stalls: int = 2
    refresh: type[Refresh] = field(default=Refresh, repr=False)
    compare: Compare = field(default=holds, repr=False)
    revokes: bool = True

    def __post_init__(self) -> None:
        local: dict[type[steps.Step], object] = {}
        if self.locks == "none":
            local |= {steps.Lock: "", steps.Unlock: None}
        if self.locks in ("none", "holder"):
            local[steps.Extend] = True
        if not self.is_one_machine:
            local[steps.LifeOf] = Life.UNKNOWN
        kinds = {"none": LockKind.PROCESS, "lease": LockKind.LEASE}
        terms = Terms(lock_kind=kinds.get(self.locks, LockKind.HOLDER), times=TIMES)
        freshness = _OnlyFirstIsStale() if self.is_login_stale else None
        actors = [
            *(
                Kind(f"worker {n + 1}", lambda: worker(self.refresh, terms, freshness, self.calls), local)
                for n in range(self.workers)
            ),
            *(Kind(f"the {name.replace('_', '-')}", partial(owner, name), local) for name in self.owners),
        ]
        object.__setattr__(self, "kinds", tuple(actors))

    kinds: tuple[Kind, ...] = field(default=(), init=False, repr=False)

    def initial(self) -> Iterator[State]:
        losses = {"lease": self.losses, "broken": 1}.get(self.locks, 0)
        actors = tuple(Actor(kind.start()) for kind in self.kinds)
        for is_writable in (True, False):
            grants = Grant(), Grant()
            yield State(Record.get(0, 0), grants, actors, losses, self.mishaps, self.stalls, is_writable=is_writable)

    def moves(self, s: State) -> Iterator[Move]:
        """Everything that can be next."""
        for me, a in enumerate(s.actors):
            # All workers are the same. The first that does something is the first.
            is_next = not 0 < me < self.workers or s.actors[me - 1].node.is_begun
            if a.node is END or not (a.node.is_begun or is_next):
                continue
            for what, following in self._steps(s, me, a):
                yield me, what, following
            if self._is_worth_killing(s, me, a):
                yield me, "dies", self._crash(s, me, a)
            if a.request is not None and not a.request.answer:
                served, answer = _serve(s, a.request.grant, a.request.token)
                yield (
                    None,
                    f"{self.kinds[me].name}'s request is served",
                    _put(served, me, a._replace(request=a.request._replace(answer=answer))),
                )
        for grant, token in s.late:
            served, _ = _serve(s._replace(late=s.late - {(grant, token)}), grant, token)
            yield None, "a request that was given up is served", served

    def _steps(self, s: State, me: int, a: Actor) -> Iterator[tuple[str, State]]:
        match a.node.step:
            case steps.Read():
                yield "reads the record", self._go(s, me, a, s.record)
                if s.mishaps and me < self.workers:
                    yield "cannot read the record", self._go(s._replace(mishaps=s.mishaps - 1), me, a, Fault.NOT_READ)
            case steps.Replace(session, expected):
                yield from self._replace(s, me, a, session, expected)
            case steps.Lock(waits):
                if s.holder is None:
                    yield "takes the lock", self._go(s._replace(holder=me), me, a, s.lock)
                elif s.losses:
                    lost = self._lose_lock(s)
                    yield (
                        "takes the lock, which its holder has lost",
                        self._go(lost._replace(holder=me), me, a, lost.lock),
                    )
                if s.holder is not None and (me >= self.workers or not waits):
                    yield "does not get the lock in time", self._go(s, me, a, Fault.LOCKED)
            case steps.Unlock():
                holder = None if s.holder == me else s.holder
                yield "releases the lock", self._go(s._replace(holder=holder), me, a, None)
            case steps.Extend():
                if s.holder == me:
                    yield "still has its lock", self._go(s, me, a, True)
                if s.holder != me or s.losses:
                    yield "has lost its lock", self._go(self._lose_lock(s) if s.holder == me else s, me, a, False)
            case steps.LifeOf(attempt):
                by = int(attempt.by)
                yield (
                    f"asks whether {self.kinds[by].name} is at work",
                    self._go(s, me, a, Life.ALIVE if s.actors[by].node.is_at_work(attempt) else Life.GONE),
                )
            case steps.Now():
                yield from self._look_at_clock(s, me, a)
            case steps.Commit():
                yield from self._commit(s, me, a)
            case steps.Prepare():
                pass
            case steps.Send() | steps.Await():
                yield from self._answer(s, me, a)
            case steps.Revoke(session):
                yield "revokes", self._go(self._revoke(s, Record.of(session)), me, a, True)
            case _:
                raise TypeError(f"{a.node.step} is no step")

    def _go(self, s: State, me: int, a: Actor, outcome: object, **changes: Any) -> State:
        """``me`` has done its step. What follows at once, follows."""
        kind, node = self.kinds[me], a.node
        node = kind.after(node, outcome)
        while node is not END:
            step = node.step
            if isinstance(step, steps.Sign):
                used = s.ended.union(*(b.node.attempts for b in s.actors), node.attempts)
                if s.record is not None and s.record.attempt is not None:
                    used |= {s.record.attempt.id}
                outcome = next(id for n in range(100) if (id := f"{me}.{n}") not in used)
            elif isinstance(step, steps.Unlock) and s.holder != me:
                outcome = None
            elif isinstance(step, Report):
                self._check_report(s, node.faults, step.error)
                outcome = REPORTED
                changes["request"] = None
            else:
                break
            node = kind.after(node, outcome)
        is_gone = node.is_announcing and (
            s.record is None or node.session is None or s.record.grant != node.session.grant
        )
        a = Actor(node, a.request, is_gone, a.had_lock if node.is_announcing else None)
        s = _put(s, me, a._replace(**changes) if changes else a)
        if s.ended:
            s = s._replace(
                ended=frozenset(
                    id
                    for id in s.ended
                    if id in s.actors[int(id[0])].node.attempts and s.actors[int(id[0])].request is None
                )
            )
        return s

    # The store

    def _replace(
        self, s: State, me: int, a: Actor, session: Session | None, expected: Session | TokenSet | None
    ) -> Iterator[tuple[str, State]]:
        new = None if session is None else Record.of(session)
        old: Any = s.record
        what = (
            "deletes the record"
            if new is None
            else "writes its attempt"
            if a.node.is_announcing and new.attempt
            else "writes the record"
        )
        yield "is told that the store takes no more writes", self._go(self._stop_writes(s), me, a, Fault.NOT_WRITTEN)
        if not s.is_writable:
            return
        if s.mishaps:
            yield (
                f"{what} in vain and is told so",
                self._go(s._replace(mishaps=s.mishaps - 1), me, a, Fault.NOT_WRITTEN),
            )
        if not self.compare(old and old.session, expected):
            yield f"{what} in vain: it has changed", self._go(s, me, a, False)
            return
        if old is None and expected is not None and new is not None:
            raise Violation("P5: a log-out is undone")
        if old is not None:
            tokens = expected.token_set if isinstance(expected, Session) else expected
            was: Any = tokens and Record.of(Session(old.session.dpop_key, None, tokens))
            if was is None or old.grant != was.grant or old.token > max(was.token, -1 if new is None else new.token):
                raise Violation("P5: a newer session is overwritten or deleted")
        changes: dict[str, Any] = {}
        if a.node.is_announcing and new is not None and new.attempt is not None:
            changes["had_lock"] = self.locks == "none" or s.holder == me
        if a.request is not None and (new is None or new.token > a.request.token):
            changes["request"] = None
        written = s._replace(record=new)
        yield what, self._go(written, me, a, True, **changes)
        if s.mishaps:
            if me >= self.workers:
                written = _all_hurt(written)
            yield (
                f"{what} and is told that it failed",
                self._go(written._replace(mishaps=s.mishaps - 1), me, a, Fault.NOT_WRITTEN),
            )

    def _stop_writes(self, s: State) -> State:
        """The tokens of a request that is under way are lost, or of one that was announced."""
        if s.is_writable and (
            any(a.request for a in s.actors) or (s.record is not None and s.record.attempt is not None)
        ):
            s = _all_hurt(s)
        return s._replace(is_writable=False)

    def _lose_lock(self, s: State) -> State:
        lock = "the second" if self.locks == "broken" else s.lock
        return s._replace(holder=None, lock=lock, losses=s.losses - 1)

    # The clock

    def _look_at_clock(self, s: State, me: int, a: Actor) -> Iterator[tuple[str, State]]:
        if a.node.asks_in("_check_window"):
            id = f"{me}."
            if not any(ended.startswith(id) for ended in s.ended):
                committing = a._replace(node=self.kinds[me].after(a.node, EARLY))
                for what, following in self._commit(s, me, committing):
                    yield f"sees that its window is open and {what}", following
                if s.stalls:
                    yield (
                        "has stood still and sees that its window is over",
                        self._go(s._replace(stalls=s.stalls - 1), me, a, LATE),
                    )
            else:
                yield "sees that its window is over", self._go(s, me, a, LATE)
            return
        yield "sees a window that is not over", self._go(s, me, a, EARLY)
        attempt: Any = a.node.session and a.node.session.attempt
        if attempt is None:
            raise Violation("a worker waits for no attempt")
        other = int(attempt.by)
        sender = s.actors[other]
        is_current = s.record is not None and s.record.attempt == attempt
        if sender.request is not None and is_current:
            if not (self.pauses and s.stalls) or self.is_one_machine:
                return  # its worker keeps the window ahead
            excused = sender._replace(request=sender.request._replace(is_excused=True))
            s = _hurt(_put(s, other, excused), sender.request.grant)
            s = s._replace(stalls=s.stalls - 1)
        elif sender.request is None and attempt.id in sender.node.attempts and attempt.id not in s.ended:
            if not s.stalls:
                return
            s = s._replace(ended=s.ended | {attempt.id}, stalls=s.stalls - 1)
        yield "sees a window that is over", self._go(s, me, s.actors[me], LATE)

    # The server

    def _commit(self, s: State, me: int, a: Actor) -> Iterator[tuple[str, State]]:
        if me >= self.workers:
            yield "begins", self._go(s, me, a, None)
            return
        yield "is cancelled", self._go(s, me, a, Fault.CANCELLED)
        sending = self.kinds[me].after(a.node, None)
        if not isinstance(sending.step, steps.Send):
            raise Violation("a worker commits itself and does not send")
        sent = Record.of(sending.step.session)
        if any(
            b.request is not None
            and b.request[:2] == (sent.grant, sent.token)
            and not (b.request.is_received or b.request.is_excused)
            for b in s.actors
        ):
            raise Violation("P1: a token is sent while an answer to it may still come")
        if not s.is_writable and a.had_lock is None:
            raise Violation("P2: a token is spent and the store cannot take its successor")
        if a.had_lock is False:
            raise Violation("a token is spent by a worker that had lost its lock before it announced that")
        if a.is_gone:
            raise Violation("a token is spent for a session that was signed out before its worker's last look")
        if sending.step.request is not request_to(sent.session.token_set.iss):
            raise Violation("a token is sent to the server of another session")
        yield "sends", _put(s, me, Actor(sending, Request(sent.grant, sent.token)))

    def _answer(self, s: State, me: int, a: Actor) -> Iterator[tuple[str, State]]:
        request = a.request
        if request is None:
            raise Violation("a worker waits for an answer that will not come")
        if not request.awaited:
            yield "waits on", self._go(s, me, a, None, request=request._replace(awaited=1))
        if request.answer == TOKENS:
            received = request._replace(is_received=True)
            yield "receives tokens", self._go(s, me, a, TOKENS, request=received)
            yield (
                "receives tokens that must not be used",
                self._go(_hurt(s, request.grant), me, a, ODD, request=received),
            )
        elif request.answer:
            yield "is refused", self._go(s, me, a, Fault.REFUSED, request=None)
        else:
            yield "cannot reach the server", self._go(s, me, a, Fault.NEVER_SENT, request=None)
            yield "is told to come later", self._go(s, me, a, Fault.BUSY, request=None)
        lost = self._give_up(s, request)
        yield "loses the answer", self._go(lost, me, a, Fault.LOST, request=None)
        yield "gets the error of a gateway", self._go(lost, me, a, Fault.GATEWAY, request=None)

    def _give_up(self, s: State, request: Request) -> State:
        if not request.answer:
            s = s._replace(late=s.late | {(request.grant, request.token)})
        return _hurt(s, request.grant)

    def _revoke(self, s: State, what: Record) -> State:
        grant = s.grants[what.grant]
        if s.record is not None and s.record.grant == what.grant and not grant.is_hurt:
            raise Violation("a session that is in the store is revoked")
        return _change(s, what.grant, is_alive=False) if self.revokes else s

    # The world

    def _is_worth_killing(self, s: State, me: int, a: Actor) -> bool:
        """One that has nothing and does nothing any more is as good as dead."""
        has_attempt = s.record is not None and s.record.attempt is not None and s.record.attempt.by == str(me)
        return s.holder == me or has_attempt or a.request is not None or (me >= self.workers and a.node.is_begun)

    def _crash(self, s: State, me: int, a: Actor) -> State:
        if me >= self.workers:
            s = _all_hurt(s)
        elif a.request is not None:
            s = self._give_up(s, a.request)
        elif isinstance(a.node.step, steps.Revoke):
            s = _hurt(s, Record.of(a.node.step.session).grant)
        holder = None if s.holder == me else s.holder
        return _put(s._replace(holder=holder), me, Actor(END))

    # What must hold

    def _check_report(self, s: State, faults: tuple[Fault, ...], error: str | None) -> None:
        is_touched = any(g.is_hurt for g in s.grants) or any(a.node.is_begun for a in s.actors[self.workers :])
        kind = (error or "").partition(":")[0]
        if kind in _LOGIN_ERRORS:
            is_right = is_touched
        else:  # the rest are of its own worker's making
            is_right = error is None or "took too long to record" in error or (bool(faults) and kind in _ERRORS)
        if not is_right:
            raise Violation(f"a worker ends with {error!r} and nothing had happened to its session")

    def check(self, s: State) -> None:
        """In every state: who reads a token that may have been spent is told so."""
        record = s.record
        if record is None or record.attempt is not None:
            return
        grant, tokens = s.grants[record.grant], (record.grant, record.token)
        is_sent = tokens in s.late or any(a.request is not None and a.request[:2] == tokens for a in s.actors)
        if is_sent or (grant.is_alive and grant.token > record.token):
            raise Violation("P4: the record does not tell that its token may have been spent")

    def check_end(self, s: State) -> None:
        """When nobody has anything left to do, or can do it."""
        if any(a.node is not END for a in s.actors) or s.holder is not None:
            raise Violation("P4: a lock stays taken")
        for number, grant in enumerate(s.grants):
            is_lost = grant.is_alive and not grant.is_hurt and (s.record is None or s.record.grant != number)
            if is_lost and (number == 0 or "log_in" in self.owners):
                raise Violation("tokens that nobody has are good")
        if s.record is not None and not (s.grants[s.record.grant].is_alive or s.grants[s.record.grant].is_hurt):
            raise Violation("a session is lost to which nothing had happened")


class _OnlyFirstIsStale(Freshness):
    """Of every log-in the first tokens are to be refreshed."""

    def is_stale(self, token_set: TokenSet) -> bool:
        return token_set.access_token.endswith(".0")

    is_expired = is_stale


def _serve(s: State, number: int, token: int) -> tuple[State, str]:
    """The server's token endpoint: a refresh token works once, and the second use of one ends its grant."""
    grant = s.grants[number]
    if not grant.is_alive:
        return s, "refused"
    if grant.token == token:
        return _change(s, number, token=token + 1), TOKENS
    if not grant.is_hurt:
        raise Violation("a session is lost to which nothing had happened")
    return _change(s, number, is_alive=False), "refused"


def _put(s: State, me: int, a: Actor) -> State:
    return s._replace(actors=(*s.actors[:me], a, *s.actors[me + 1 :]))


def _change(s: State, number: int, **changes: Any) -> State:
    grant = s.grants[number]._replace(**changes)
    grant = grant if grant.is_alive else Grant(is_alive=False, is_hurt=grant.is_hurt)  # nothing else matters of it
    return s._replace(grants=(*s.grants[:number], grant, *s.grants[number + 1 :]))


def _hurt(s: State, number: int) -> State:
    return _change(s, number, is_hurt=True)


def _all_hurt(s: State) -> State:
    return s._replace(grants=tuple(grant._replace(is_hurt=True) for grant in s.grants))
