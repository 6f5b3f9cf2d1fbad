"""The protocol: every step that a worker, an owner or the world can take, and what must never happen.

A step is one access to something shared: the store, the lock, the server. What lies between two accesses is nobody
else's business and belongs to the step before. The docstring of a step names the function of the library that takes it.

Time is not counted. A lease may run out, and an answer get lost, at every moment that the code's own bounds allow:
:meth:`Protocol.lease_runs_out` and :meth:`Protocol.outwait` say which those are. One thing is assumed that no client
can enforce: that a worker does not stand still, between extending its lease and sending its request, for longer than
the lease was extended beyond the request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


class Violation(Exception):
    """What must never happen has happened; ``who`` did it."""

    who: int | None = None


class Record(NamedTuple):
    """What the store holds, or what was read from it. The refresh of ``token`` brings ``token + 1``; an attempt is
    known by its worker and the number of that worker's call."""

    grant: int
    token: int
    attempt: tuple[int, int] | None = None


class Grant(NamedTuple):
    """What the server knows of a log-in, and whether it has an excuse for its end: ``hurt``, when an answer or the
    worker waiting for it was lost; ``replaced``, by a log-in when it was at that token."""

    token: int = 0
    alive: bool = True
    hurt: bool = False
    replaced: int | None = None


class Actor(NamedTuple):
    """A worker, a log-out or a log-in: the step it takes next, and what it remembers.

    ``request`` is ``sent``, then ``issued`` or ``refused`` by the server, then ``received``.
    """

    at: str
    calls: int = 1
    seen: Record | None = None
    session: Record | None = None
    mine: tuple[int, int] | None = None
    request: str | None = None
    covered: bool = False


class State(NamedTuple):
    """:ivar late: requests whose senders are gone, which may be served yet.
    :ivar blurred: a worker that had lost its lease has written its attempt over another's.
    """

    record: Record | None
    grants: tuple[Grant, ...]
    actors: tuple[Actor, ...]
    holder: int | None = None
    late: frozenset[Record] = frozenset()
    writable: bool = True
    blurred: bool = False


Steps = Iterator[tuple[str, State]]
DONE = Actor("done", 0)


@dataclass(frozen=True)
class Protocol:
    """:param lease: the lock ends with its time, not with its holder.
    :param calls: how often each worker asks for a session refreshed after that moment.
    :param without: the mechanisms that are taken out, to see what they are there for.
    """

    workers: int = 2
    lease: bool = False
    calls: int = 1
    owner: tuple[str, ...] = ("log_out", "log_in")
    without: frozenset[str] = frozenset()

    def initial(self) -> Iterator[State]:
        actors = (Actor("look", self.calls),) * self.workers + tuple(Actor(at) for at in self.owner)
        for writable in (True, False):
            yield State(Record(0, 0), (Grant(),), actors, writable=writable)

    def steps(self, s: State) -> Iterator[tuple[int | None, str, State]]:
        """Everything that can happen next, and who does it: ``None`` is the world."""
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
            if s.holder == me or actor.session is not None:
                yield me, "dies", self.crash(s, me, actor)
        for request in s.late:
            rest = s._replace(late=s.late - {request})
            yield None, "a request whose sender is gone is dropped", rest
            yield None, "a request whose sender is gone is served", self.serve(rest, request)[0]
        if self.lease and s.holder is not None and (expired := self.lease_runs_out(s, s.actors[s.holder])) is not None:
            yield s.holder, "stands still until its lease has run out", expired

    # A worker

    def look(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter.get_session``: the first read, without a lock."""
        yield "looks", _put(s, me, DONE) if s.record is None else _put(s, me, a, at="lock", seen=s.record._replace(attempt=None))

    def lock(self, s: State, me: int, a: Actor) -> Steps:
        """``SharedGetter._get``: the account's lock."""
        if s.holder is None or "lock" in self.without:
            yield "gets the lock", _put(s._replace(holder=me), me, a, at="look_again")

    def look_again(self, s: State, me: int, a: Actor) -> Steps:
        """``SharedGetter._get``: the second read."""
        found = a.seen if "second read" in self.without else s.record
        yield "looks again", self._go_on(s, me, a, found, None if self.lease else found and found.attempt)

    def outwait(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._outwait``: under a lease, no answer to the attempt in the record may come any more. Every
        request has a hard bound, so one that has left is answered or lost by then."""
        attempt = _read(a).attempt
        if "outwaiting" in self.without or not any(b.mine == attempt and b.request == "sent" for b in s.actors):
            yield "waits until no answer can come", self._go_on(s, me, a, s.record, attempt)

    def _go_on(self, s: State, me: int, a: Actor, found: Record | None, outwaited: int | None) -> State:
        """What ``is_good`` in ``get_session`` says of what was found."""
        if found is None or a.seen is None or found[:2] != a.seen[:2]:
            return _end(s, me, a)
        if found.attempt not in (None, outwaited):
            return _put(s, me, a, at="outwait", session=found)
        return _put(s, me, a, at="send" if "attempt" in self.without else "claim", seen=None, session=found)

    def claim(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._refresh``: the attempt is written, by compare-and-set."""
        mine = (me, a.calls)
        claimed = self.replace(self._blur(s, me), _read(a)._replace(attempt=mine), _read(a))
        if claimed is None:
            yield "cannot write its attempt", _end(s, me, a)
        elif "last look" in self.without:
            yield "writes its attempt", _put(claimed, me, a, at="send", mine=mine)
        else:
            first = "extend" if "extending last" in self.without else "last_look"
            yield "writes its attempt", _put(claimed, me, a, at=first, mine=mine)

    def last_look(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._refresh``: the record still carries this attempt."""
        mine = s.record is not None and s.record.attempt == a.mine
        yield "looks a last time", _put(s, me, a, at="send") if mine else _end(s, me, a)

    def extend(self, s: State, me: int, a: Actor) -> Steps:
        """In no code: the lock is extended before the last look, not after it."""
        yield "extends its lock", _put(s, me, a, at="last_look") if s.holder == me else _end(s, me, a)

    def send(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._refresh``: the lock is still held, and a lease is extended to outlive the request, which
        leaves; unless the caller has left before that (``Flight.commit``)."""
        covered = not {"last look", "extending last", "attempt", "lock"} & self.without
        if covered and s.holder != me:
            yield "has lost its lock", _end(s, me, a)
            return
        if a.mine is not None:
            yield "gives up", _put(s, me, a, at="leave")
        if not s.writable:
            raise Violation("P2: a token is spent, and the store cannot take its successor")
        if any(b.session and b.session[:2] == _read(a)[:2] and b.request == "sent" for b in s.actors):
            raise Violation("P1: a token is sent while an answer to it may still come")
        yield "sends its request", _put(s, me, a, at="wait", request="sent", covered=covered)

    def wait(self, s: State, me: int, a: Actor) -> Steps:
        """``Authority.prepare(session)()``: the server answers, cannot look at it (429, no connection), or is not
        heard of again."""
        served, answer = self.serve(s, _read(a))
        yield f"is {answer}", _put(served, me, a, at="receive", mine=None, covered=False, request=answer)
        yield "is told to come later", _put(s, me, a, at="leave", covered=False, request=None)
        lost = _change(self._overdue(s, a), _read(a).grant, hurt=True)
        yield "has waited long enough", _end(lost, me, a)

    def receive(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._refresh``: what came back, if it did."""
        yield "loses the answer", _end(_change(s, _read(a).grant, hurt=True), me, a)
        yield from self.remove(s, me, a) if a.request == "refused" else self.keep(s, me, a)

    def keep(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._keep``: the new tokens take the place of those that were spent. The store may say that it
        failed when it has not."""
        new = Record(_read(a).grant, _read(a).token + 1)
        if (kept := self.replace(s, new, _read(a))) is not None:
            yield "stores the tokens", _end(kept, me, a)
            yield "stores the tokens and is told otherwise", _put(kept, me, a, at="keep", request="received")
        else:
            yield "cannot store the tokens", _put(s, me, a, at="keep_look", request="received")

    def keep_look(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._keep``: what is there in their place."""
        orphan = s.record is None or s.record.grant != _read(a).grant or "same grant" in self.without
        revoked = orphan and "revocation" not in self.without
        yield "looks what is there", _put(s, me, a, at="revoke", request=None) if revoked else _end(s, me, a)

    def revoke(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._revoke``: tokens that nobody will use."""
        if s.record is not None and s.record.grant == _read(a).grant:
            raise Violation("a session that is in the store is revoked")
        yield "revokes", _end(_change(s, _read(a).grant, alive=False), me, a)

    def remove(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._remove``, after ``invalid_grant``: the grant is still that which was refused."""
        ours = s.record is not None and s.record.grant == _read(a).grant
        yield "finds the session", _put(s, me, a, at="remove_write", request=None) if ours else _end(s, me, a)

    def remove_write(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._remove``: the session is deleted, by compare-and-set."""
        yield "deletes the session", _end(self.replace(s, None, _read(a)) or s, me, a)

    def leave(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._leave``: the record still carries this attempt."""
        mine = s.record is not None and s.record.attempt == a.mine
        yield "looks for its attempt", _put(s, me, a, at="leave_write") if mine else _end(s, me, a)

    def leave_write(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._leave``: the attempt is taken back, by compare-and-set."""
        yield "takes its attempt back", _end(self.replace(self._blur(s, me), _read(a), _read(a)) or s, me, a)

    def unlock(self, s: State, me: int, a: Actor) -> Steps:
        """The end of the ``with`` block."""
        yield "unlocks", _gone_on(s._replace(holder=None) if s.holder == me else s, me, a)

    # The owner

    def log_out(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter.delete_stored``: the account's lock; without it, if it cannot be had in time."""
        yield "logs out without the lock", _put(s, me, a, at="log_out_look")
        if s.holder is None:
            yield "logs out with the lock", _put(s._replace(holder=me), me, a, at="log_out_look")

    def log_out_look(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._delete``: the grant that is there, which may have been refreshed since the first look."""
        gone = s.record is None or (a.session is not None and a.session.grant != s.record.grant)
        yield "finds the session", _end(s, me, a) if gone else _put(s, me, a, at="log_out_write", session=s.record)

    def log_out_write(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter._delete``: the session is deleted, by compare-and-set."""
        if not s.writable:
            yield "cannot delete the session", _end(s, me, a)
        elif (deleted := self.replace(s, None, _read(a))) is not None:
            yield "deletes the session", _end(deleted, me, a, a.session)
        else:
            yield "finds it changed", _put(s, me, a, at="log_out_look")

    def log_in(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter.set_stored``, with a new grant: the account's lock, as for a log-out."""
        session = Record(len(s.grants), 0)
        s = s._replace(grants=(*s.grants, Grant()))
        yield "logs in without the lock", _put(s, me, a, at="log_in_write", session=session)
        if s.holder is None:
            yield "logs in with the lock", _put(s._replace(holder=me), me, a, at="log_in_write", session=session)

    def log_in_write(self, s: State, me: int, a: Actor) -> Steps:
        """``SessionGetter.set_stored``: the new session takes the place of whatever is there."""
        if not s.writable:
            yield "cannot store the session", _put(s, me, a, at="revoke")
            return
        if s.record is not None:
            s = _change(s, s.record.grant, replaced=s.record.token)
        yield "stores the session", _end(s._replace(record=a.session), me, a)

    # The world

    def crash(self, s: State, me: int, a: Actor) -> State:
        """The process dies. What it had sent may be served later; a lock that ends with its holder is free."""
        if a.request == "sent":
            s = self._overdue(s, a)
        if a.session is not None and (a.request is not None or a.at == "revoke" or me >= self.workers):
            s = _change(s, a.session.grant, hurt=True)
        if s.holder == me and not self.lease:
            s = s._replace(holder=None)
        return _put(s, me, DONE)

    def _overdue(self, s: State, a: Actor) -> State:
        request = _read(a)._replace(attempt=None)
        return s._replace(late=s.late | {request}) if s.grants[request.grant].alive else s

    def lease_runs_out(self, s: State, a: Actor) -> State | None:
        """At any time but while the request is under way that it was extended for. A holder that stands still for so
        long with an answer in its hands is no better than one that has lost it."""
        if (a.covered and a.request == "sent") or a.at == "unlock":
            return None
        return (_change(s, _read(a).grant, hurt=True) if a.request is not None else s)._replace(holder=None)

    def serve(self, s: State, request: Record) -> tuple[State, str]:
        """The token endpoint: a token works once, and the second use of one ends its grant."""
        grant = s.grants[request.grant]
        if not grant.alive:
            return s, "refused"
        if grant.token == request.token:
            return _change(s, request.grant, token=grant.token + 1), "issued"
        if not grant.hurt:
            raise Violation("a session is lost to which nothing had happened")
        return _change(s, request.grant, alive=False), "refused"

    def _blur(self, s: State, me: int) -> State:
        # The compare-and-set is on tokens alone, so this is for the lock to prevent; a lease may fail in that.
        return s._replace(blurred=True) if self.lease and s.holder != me else s

    def replace(self, s: State, new: Record | None, expected: Record) -> State | None:
        """``SessionStore.replace``: compares tokens. ``None`` if nothing was written."""
        old = s.record
        same = old is not None and old[:2] == expected[:2]
        if not s.writable or not (same or "compare-and-set" in self.without):
            return None
        if old is None and new is not None:
            raise Violation("P5: a log-out is undone")
        if old is not None and (old.grant != expected.grant or old.token > (new or expected).token):
            raise Violation("P5: a newer session is overwritten or deleted")
        same = old is not None and new is not None and old[:2] == new[:2]
        return s._replace(record=new, blurred=s.blurred and same)

    def check(self, s: State) -> None:
        """What must hold in every state: whoever reads a token that may have been sent is told so (P4)."""
        if s.record is None or s.record.attempt is not None or s.blurred:
            return
        grant, token = s.grants[s.record.grant], s.record[:2]
        spent = grant.alive and grant.token > s.record.token
        if spent or any(b.session and b.session[:2] == token and b.request == "sent" for b in s.actors):
            raise Violation("P4: the record does not tell that its token may have been spent")

    def check_end(self, s: State) -> None:
        """What must hold when nothing can happen any more."""
        if any(actor != DONE for actor in s.actors):
            raise Violation("P4: a lock stays taken")
        for number, grant in enumerate(s.grants):
            kept = s.record is not None and s.record.grant == number
            if grant.alive and not (kept or grant.hurt or grant.replaced == grant.token):
                raise Violation("tokens that nobody has are good")


def _read(a: Actor) -> Record:
    assert a.session is not None
    return a.session


def _end(s: State, me: int, a: Actor, deleted: Record | None = None) -> State:
    """Leave the ``with`` block, which nobody notices if the lock is not held, with nothing to remember but what a
    log-out has deleted."""
    a = Actor("unlock", a.calls, session=deleted)
    return _put(s, me, a) if s.holder == me else _gone_on(s, me, a)


def _gone_on(s: State, me: int, a: Actor) -> State:
    if a.session is not None:
        return _put(s, me, a, at="revoke")
    return _put(s, me, Actor("look", a.calls - 1) if a.calls > 1 else DONE)


def _put(s: State, me: int, a: Actor, **changes: Any) -> State:
    return s._replace(actors=(*s.actors[:me], a._replace(**changes), *s.actors[me + 1 :]))


def _change(s: State, grant: int, **changes: Any) -> State:
    changed = s.grants[grant]._replace(**changes)
    # Of a grant that has ended nothing else matters: fewer states to tell apart.
    changed = changed if changed.alive else Grant(alive=False)
    return s._replace(grants=(*s.grants[:grant], changed, *s.grants[grant + 1 :]))
