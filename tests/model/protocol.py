"""The protocol: every step that a worker, an owner or the world can take, and what must never happen.

A step is one access to something shared: the store, the lock, the server. What lies between two accesses is nobody
else's business and belongs to the step before. The docstring of a step names the function of the library that takes it.

Time is not counted: a lease may run out, and an answer get lost, at every moment that the code's own bounds allow.
:meth:`Protocol.lease_ends` and :meth:`Protocol.outwait` say which those are. One thing is assumed that no client can
enforce: that a worker does not stand still, between extending its lease and sending its request, for longer than the
lease was extended beyond the request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


class Violation(Exception):
    """What must never happen has happened; ``who`` did it."""

    who: int | None = None


class Record(NamedTuple):
    """What the store holds, or what was read from it: which log-in, and which of its tokens. A refresh brings
    ``token + 1``. An attempt is known by its worker and the number of that worker's call, and tells whether it was made
    under the lock that has taken the place of a broken one."""

    grant: int
    token: int
    attempt: tuple[int, int, bool] | None = None

    @property
    def tokens(self) -> tuple[int, int]:
        return self[:2]


NOTHING = Record(-1, 0)


class Grant(NamedTuple):
    """What the server knows of a log-in. Two things excuse that it ends, or is left alive with nobody to use it:
    an answer was lost, or the worker that waited for it or used it (``hurt``); a log-in has taken its place, when it
    was at the token ``replaced``."""

    token: int = 0
    alive: bool = True
    hurt: bool = False
    replaced: int | None = None


class Actor(NamedTuple):
    """A worker, a log-out or a log-in: its next step, how many calls are left to it, and what it remembers. Its
    ``request`` is ``"sent"``, then ``"issued"`` or ``"refused"``."""

    at: str
    calls: int = 1
    seen: Record = NOTHING
    session: Record = NOTHING
    request: str = ""


DONE = Actor("done", 0)


class State(NamedTuple):
    """:ivar late: the tokens in requests whose senders are gone, and which may still be served.
    :ivar blurred: a worker that had lost its lease has written over the attempt in the record.
    :ivar forgotten: the place where the leases live has forgotten one, or the lock was broken from outside.
    """

    record: Record
    grants: tuple[Grant, ...]
    actors: tuple[Actor, ...]
    holder: int | None = None
    late: frozenset[tuple[int, int]] = frozenset()
    writable: bool = True
    blurred: bool = False
    forgotten: bool = False


Steps = Iterator[tuple[str, State]]


@dataclass(frozen=True)
class Protocol:
    """:param lease: the lock ends with its time, not with its holder.
    :param forgetful: a lease ends early, whatever was promised: once, and no other does. Without ``lease``, the lock
        is broken from outside, once, while somebody holds it.
    :param calls: how often each worker asks for a session refreshed after that moment.
    :param owner: who else there is: ``"log_out"``, ``"log_in"``.
    :param without: the mechanisms that are taken out, to see what they are there for.
    """

    workers: int = 2
    lease: bool = False
    forgetful: bool = False
    calls: int = 1
    owner: tuple[str, ...] = ("log_out", "log_in")
    without: frozenset[str] = frozenset()

    def initial(self) -> Iterator[State]:
        actors = (Actor("look", self.calls),) * self.workers + tuple(Actor(at) for at in self.owner)
        for writable in (True, False):
            yield State(Record(0, 0), (Grant(),), actors, writable=writable)

    def steps(self, s: State) -> Iterator[tuple[int | None, str, State]]:
        """Everything that can happen next, and who does it; ``None`` is the world."""
        for me, actor in enumerate(s.actors):
            if actor == DONE:
                continue
            step: Callable[[State, int, Actor], Steps] = getattr(self, actor.at)
            try:
                for what, following in step(s, me, actor):
                    yield me, what, following
            except Violation as violation:
                violation.who = me
                raise
            if s.holder == me or actor.session != NOTHING:
                yield me, "dies", self.crash(s, me, actor)
        for request in s.late:
            rest = s._replace(late=s.late - {request})
            yield None, "a request whose sender is gone is dropped", rest
            yield None, "a request whose sender is gone is served", self.serve(rest, request)[0]
        can_end = self.lease or self.forgetful
        if can_end and s.holder is not None and (ended := self.lease_ends(s, s.actors[s.holder])) is not None:
            yield s.holder, "loses its lease", ended

    # A worker

    def look(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter.get_session``: the first read, without a lock."""
        seen = s.record._replace(attempt=None)
        yield "looks", _put(s, me, a, at="lock", seen=seen) if seen != NOTHING else _put(s, me, DONE)

    def lock(self, s: State, me: int, a: Actor) -> Steps:
        """``SharedGetter._get``: the account's lock."""
        if s.holder is None or "lock" in self.without:
            yield "gets the lock", _put(s._replace(holder=me), me, a, at="look_again")

    def look_again(self, s: State, me: int, a: Actor) -> Steps:
        """``SharedGetter._get``: the second read."""
        found = a.seen if "second read" in self.without else s.record
        yield "looks again", self._go_on(s, me, a, found, None)

    def outwait(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._outwait``: under a lease, no answer to the attempt in the record can come any more. Every
        request has a hard bound, so it is answered or lost by then; whoever has not stored an answer by then stands
        still."""
        number, call, _ = a.session.attempt or (me, 0, False)
        other = s.actors[number]
        if other.calls != call or other.request == "":
            yield "waits", self._go_on(s, me, a, s.record, a.session.attempt)
        elif other.request != "sent":
            yield "waits", self._go_on(_hurt(s, other), me, a, s.record, a.session.attempt)
        elif "outwaiting" in self.without:
            yield "does not wait", self._go_on(s, me, a, s.record, a.session.attempt)

    def _go_on(self, s: State, me: int, a: Actor, found: Record, outwaited: tuple[int, int, bool] | None) -> State:
        if found.tokens != a.seen.tokens:
            return _end(s, me, a)
        if found.attempt not in (None, outwaited) and not self.is_gone(s, me, found):
            return _put(s, me, a, at="outwait", session=found)
        at = "send" if "attempt" in self.without else "extend" if self.lease or self.forgetful else "claim"
        return _put(s, me, a, at=at, seen=NOTHING, session=found)

    def is_gone(self, s: State, me: int, found: Record) -> bool:
        """``SessionGetter._is_gone``: the attempt was made under the very lock that is held now."""
        same = found.attempt is not None and found.attempt[2] == self._has_new_lock(s, me)
        return not self.lease and (same or "lock name" in self.without)

    def _has_new_lock(self, s: State, me: int) -> bool:
        return not self.lease and s.forgotten and s.holder == me

    def extend(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._refresh``: the lock is still held, before the attempt is written."""
        yield "still has its lock", _put(s, me, a, at="claim") if s.holder == me else _end(s, me, a)

    def claim(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._refresh``: the attempt is written, by compare-and-set."""
        attempt = me, a.calls, self._has_new_lock(s, me)
        claimed = self.replace(self._blur(s, me), a.session._replace(attempt=attempt), a.session)
        if claimed is None:
            yield "cannot write its attempt", _end(s, me, a)
        else:
            first = "extend_early" if "extending last" in self.without else "last_look"
            yield "writes its attempt", _put(claimed, me, a, at=first)

    def last_look(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._refresh``: the record still carries this attempt."""
        yield "looks a last time", self._if_mine(s, me, a, "send")

    def extend_early(self, s: State, me: int, a: Actor) -> Steps:
        """Not what the code does: the lock is extended before the last look."""
        yield "extends its lock", _put(s, me, a, at="last_look") if s.holder == me else _end(s, me, a)

    def send(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._refresh``: the lock is still held, a lease extended to outlive the request, and the request
        leaves; unless the caller has left before it (``Flight.commit``)."""
        if self.covered and s.holder != me:
            yield "has lost its lock", _end(s, me, a)
            return
        yield "is left by its caller", _put(s, me, a, at="leave")
        if not s.writable:
            raise Violation("P2: a token is spent, and the store cannot take its successor")
        if any(b.session.tokens == a.session.tokens and b.request == "sent" for b in s.actors):
            raise Violation("P1: a token is sent while an answer to it may still come")
        yield "sends its request", _put(s, me, a, at="wait", request="sent")

    @property
    def covered(self) -> bool:
        """Whether the lease is extended as the last thing before the request."""
        return not {"last look at the lock", "extending last", "attempt", "lock"} & self.without

    def wait(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._spend``: the server answers, cannot look at the request (429, no connection), or is
        not heard of."""
        served, answer = self.serve(s, a.session.tokens)
        yield f"is {answer}", _put(served, me, a, at="receive", request=answer)
        yield "is told to come later", _put(s, me, a, at="leave", request="")
        yield "has waited long enough", _end(_hurt(self._overdue(s, a), a), me, a)

    def receive(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._spend``: what came back, if it did."""
        yield "loses the answer", _end(_hurt(s, a), me, a)
        yield from self.remove(s, me, a) if a.request == "refused" else self.keep(s, me, a)

    def keep(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._keep``: the new tokens take the place of those that were spent. The store may say that it
        failed when it has not."""
        kept = self.replace(s, Record(a.session.grant, a.session.token + 1), a.session)
        if kept is None:
            yield "cannot store the tokens", _put(s, me, a, at="keep_look")
        else:
            yield "stores the tokens", _end(kept, me, a)
            yield "stores the tokens and is told otherwise", _put(kept, me, a, at="keep")

    def keep_look(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._keep``: what is there in their place."""
        orphan = s.record.grant != a.session.grant or "same grant" in self.without
        revoked = orphan and "revocation" not in self.without
        yield "looks what is there", _put(s, me, a, at="revoke") if revoked else _end(s, me, a)

    def revoke(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._revoke``: tokens that nobody will use."""
        if s.record.grant == a.session.grant:
            raise Violation("a session that is in the store is revoked")
        yield "revokes", _end(_change(s, a.session.grant, alive=False), me, a)

    def remove(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._remove``, after ``invalid_grant``: it is still the same grant."""
        same = s.record.grant == a.session.grant
        yield "finds the session", _put(s, me, a, at="remove_write", request="") if same else _end(s, me, a)

    def remove_write(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._remove``: the session is deleted, by compare-and-set."""
        yield "deletes the session", _end(self.replace(s, NOTHING, a.session) or s, me, a)

    def leave(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._leave``: the record still carries this attempt."""
        yield "looks for its attempt", self._if_mine(s, me, a, "leave_write")

    def leave_write(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._leave``: the attempt is taken back, by compare-and-set."""
        yield "takes its attempt back", _end(self.replace(self._blur(s, me), a.session, a.session) or s, me, a)

    def unlock(self, s: State, me: int, a: Actor) -> Steps:
        """The end of the ``with`` block."""
        yield "unlocks", _go_home(s._replace(holder=None) if s.holder == me else s, me, a)

    def _if_mine(self, s: State, me: int, a: Actor, at: str) -> State:
        mine = s.record.attempt is not None and s.record.attempt[:2] == (me, a.calls)
        return _put(s, me, a, at=at) if mine else _end(s, me, a)

    def _blur(self, s: State, me: int) -> State:
        # Attempts are not compared, since the lock keeps others away; which a lease may fail to do.
        return s._replace(blurred=True) if (self.lease or self.forgetful) and s.holder != me else s

    # The owner

    def log_out(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter.delete_stored``: the account's lock; without it, if it cannot be had in time."""
        yield from self._undisturbed("logs out", s, me, a._replace(at="log_out_look"))

    def log_out_look(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._delete``: the grant that is there, which may have been refreshed since the first look."""
        gone = s.record == NOTHING or (a.session != NOTHING and a.session.grant != s.record.grant)
        yield "looks", _end(s, me, a, a.session) if gone else _put(s, me, a, at="log_out_write", session=s.record)

    def log_out_write(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._delete``: the session is deleted, by compare-and-set, and revoked after that."""
        if not s.writable:
            yield "cannot delete the session", _end(s, me, a)
        elif (deleted := self.replace(s, NOTHING, a.session)) is not None:
            yield "deletes the session", _end(deleted, me, a, a.session)
        else:
            yield "finds it changed", _put(s, me, a, at="log_out_look")

    def log_in(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter.set_stored``, with a new grant: the account's lock, as for a log-out."""
        new = Record(len(s.grants), 0)
        s = s._replace(grants=(*s.grants, Grant()))
        yield from self._undisturbed("logs in", s, me, a._replace(at="log_in_write", session=new))

    def log_in_write(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter.set_stored``: the new session takes the place of whatever is there."""
        if not s.writable:
            yield "cannot store the session", _put(s, me, a, at="revoke")
            return
        if s.record != NOTHING:
            s = _change(s, s.record.grant, replaced=s.record.token)
        yield "stores the session", _end(s._replace(record=a.session, blurred=False), me, a)

    def _undisturbed(self, what: str, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._undisturbed``."""
        yield f"{what} without the lock", _put(s, me, a)
        if s.holder is None:
            yield f"{what} with the lock", _put(s._replace(holder=me), me, a)

    # The world

    def crash(self, s: State, me: int, a: Actor) -> State:
        """The process dies. What it had sent may be served later; a lock that ends with its holder is free."""
        if a.request == "sent":
            s = self._overdue(s, a)
        if a.session != NOTHING and (a.request or a.at == "revoke" or me >= self.workers):
            s = _hurt(s, a)
        if s.holder == me and not self.lease:
            s = s._replace(holder=None)
        return _put(s, me, DONE)

    def _overdue(self, s: State, a: Actor) -> State:
        return s._replace(late=s.late | {a.session.tokens}) if s.grants[a.session.grant].alive else s

    def lease_ends(self, s: State, a: Actor) -> State | None:
        """At any time but while the request is under way that it was extended for. A holder that stands still for so
        long with an answer in its hands is no better than one that has lost it."""
        if self.forgetful and a != DONE:
            return None if s.forgotten else s._replace(holder=None, forgotten=True)
        if a.at == "unlock" or (self.covered and a.request == "sent"):
            return None
        return (_hurt(s, a) if a.request else s)._replace(holder=None)

    def serve(self, s: State, tokens: tuple[int, int]) -> tuple[State, str]:
        """The token endpoint: a refresh token works once, and the second use of one ends its grant."""
        number, token = tokens
        grant = s.grants[number]
        if not grant.alive:
            return s, "refused"
        if grant.token == token:
            return _change(s, number, token=token + 1), "issued"
        if not grant.hurt:
            raise Violation("a session is lost to which nothing had happened")
        return _change(s, number, alive=False), "refused"

    def replace(self, s: State, new: Record, expected: Record) -> State | None:
        """``FullStore.replace``: compares tokens, and deletes for ``NOTHING``. ``None`` if nothing was written."""
        old = s.record
        if not s.writable or (old.tokens != expected.tokens and "compare-and-set" not in self.without):
            return None
        if old == NOTHING != new:
            raise Violation("P5: a log-out is undone")
        if old != NOTHING and (old.grant != expected.grant or old.token > max(new.token, expected.token)):
            raise Violation("P5: a newer session is overwritten or deleted")
        return s._replace(record=new, blurred=s.blurred and new.tokens == old.tokens)

    # What must hold

    def check(self, s: State) -> None:
        """In every state: whoever reads a token that may have been spent is told so (P4)."""
        if s.record == NOTHING or s.record.attempt is not None or s.blurred:
            return
        grant = s.grants[s.record.grant]
        sent = any(b.session.tokens == s.record.tokens and b.request == "sent" for b in s.actors)
        if sent or s.record.tokens in s.late or (grant.alive and grant.token > s.record.token):
            raise Violation("P4: the record does not tell that its token may have been spent")

    def check_end(self, s: State) -> None:
        """When nothing can happen any more."""
        if any(actor != DONE for actor in s.actors):
            raise Violation("P4: a lock stays taken")
        for number, grant in enumerate(s.grants):
            if grant.alive and not (s.record.grant == number or grant.hurt or grant.replaced == grant.token):
                raise Violation("tokens that nobody has are good")


def _end(s: State, me: int, a: Actor, ended: Record = NOTHING) -> State:
    """Come to the end of the ``with`` block, with nothing to remember but what a log-out has yet to revoke."""
    a = Actor("unlock", a.calls, session=ended)
    return _put(s, me, a) if s.holder == me else _go_home(s, me, a)


def _go_home(s: State, me: int, a: Actor) -> State:
    if a.session != NOTHING:
        return _put(s, me, a, at="revoke")
    return _put(s, me, Actor("look", a.calls - 1) if a.calls > 1 else DONE)


def _put(s: State, me: int, a: Actor, **changes: Any) -> State:
    a = a._replace(**changes) if changes else a
    return s._replace(actors=(*s.actors[:me], a, *s.actors[me + 1 :]))


def _hurt(s: State, a: Actor) -> State:
    return _change(s, a.session.grant, hurt=True)


def _change(s: State, number: int, **changes: Any) -> State:
    grant = s.grants[number]._replace(**changes)
    grant = grant if grant.alive else Grant(alive=False)  # of one that has ended, nothing else matters
    return s._replace(grants=(*s.grants[:number], grant, *s.grants[number + 1 :]))
