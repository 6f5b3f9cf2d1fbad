"""The real code, in orders that a seeded scheduler picks.

Every call of a store, a lock or an authorization server is a point at which its process stands still until the
scheduler lets it go on; one process moves at a time. So a seed is a schedule, and one that ends badly can be run again.
A process dies by never being let go on. Time stands still as well, and passes when the scheduler says so.

``python -m tests.model.schedules --seeds 20000`` runs more of them than the tests do.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from unittest.mock import patch

from atproto_session import ClientAuthMethod, MemoryStore, Session, SessionGetter, TokenSet, session_getter
from atproto_session.keys import generate_jwk

from ..core import DID
from .process import ANSWER_WITHIN, Process
from .protocol import Violation

_KEYS = [generate_jwk(), generate_jwk()]
#: What a lease lasts that nobody extends, in seconds.
_LEASE = 30.0


@dataclass
class Grant:
    """A log-in, as the server knows it; the excuses as in :class:`.protocol.Grant`."""

    token: int = 0
    alive: bool = True
    hurt: bool = False
    replaced: int | None = None


@dataclass
class World:
    """What the processes share, what must never happen to it, and the scheduler.

    :ivar late: requests whose senders are gone, and which may still be served.
    :ivar blurred: a process that had lost its lease has written over the attempt in the record.
    :ivar trace: what has happened, for people.
    """

    seed: int
    lease: bool
    now: float = 1_000_000.0
    holder: Process | None = None
    held_until: float = 0.0
    blurred: bool = False
    grants: list[Grant] = field(default_factory=list)
    late: list[Session] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    violation: Violation | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.writable = not self.chance(0.05)
        # The place where the leases live forgets one of them, once; all others there last as long as their holders.
        # Likewise, the lock is broken from outside, once.
        self._forgets = self._yet_to_forget = self.chance(0.25)
        self.which_lock = "the first"
        self.store: MemoryStore[Session] = MemoryStore()
        self.store.set(DID, self.new_grant())
        self._crashes = self.random.choice([0, 0, 1, 2])
        self.processes = [Process(self, f"worker {n + 1}", self._calls()) for n in range(self.random.choice([2, 2, 3]))]
        if self.chance(0.5):
            self.processes.append(Process(self, "log-out", [lambda getter: getter.delete_stored(DID, revoke=True)]))
        if self.chance(0.5):
            self.processes.append(Process(self, "log-in", [self._log_in]))
        self._stalled: dict[Process, int] = {}

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _calls(self) -> list[Callable[[SessionGetter], object]]:
        def anew(getter: SessionGetter) -> object:
            return getter.get_session(DID, True)

        def rejected(getter: SessionGetter) -> object:
            return getter.get_session(DID, rejected=getter.get_session(DID, False).token_set.access_token)

        return [self.random.choice([anew, rejected]) for _ in range(self.random.choice([1, 1, 2]))]

    def _log_in(self, getter: SessionGetter) -> None:
        getter._authority.process.tokens = session = self.new_grant()  # type: ignore[attr-defined]
        getter.set_stored(DID, session)

    # The server

    def new_grant(self) -> Session:
        self.grants.append(Grant())
        return self.issued(len(self.grants) - 1)

    def issued(self, number: int) -> Session:
        name = f"{number}-{self.grants[number].token}"
        tokens = TokenSet("https://issuer.test", DID, "https://pds.test", "atproto", f"ref-{name}", f"acc-{name}")
        return Session(_KEYS[number], ClientAuthMethod("none"), tokens)

    def grant_of(self, session: Session) -> Grant:
        return self.grants[_name_of(session)[0]]

    def serve(self, session: Session) -> Session | None:
        """The successor of ``session``, or ``None``: the token endpoint."""
        grant = self.grant_of(session)
        if not grant.alive:
            return None
        if grant.token != _name_of(session)[1]:
            self.must(grant.hurt, "a session is lost to which nothing had happened")
            grant.alive = False
            return None
        grant.token += 1
        return replace(session, token_set=self.issued(_name_of(session)[0]).token_set)

    # What must not happen

    def must(self, fact: bool, otherwise: str) -> None:
        if not fact:
            self.violation = self.violation or Violation(otherwise)
            raise self.violation

    def check_send(self, session: Session) -> None:
        self.must(self.writable, "P2: a token is spent, and the store cannot take its successor")
        sent = [process.request.token_set for process in self.processes if process.request is not None]
        self.must(
            not any(session.token_set.has_same_tokens(tokens) for tokens in sent),
            "P1: a token is sent while an answer to it may still come",
        )

    def check_write(self, process: Process, old: Session | None, new: Session | None) -> None:
        """``process`` has replaced ``old`` by ``new``."""
        if process.name == "log-in":
            if old is not None:
                self.grant_of(old).replaced = _name_of(old)[1]
        elif old is not None and new is None:
            ended = process.name == "log-out" or not self.grant_of(old).alive
            self.must(ended, "P5: a session that is good is deleted")
        elif new is not None:
            self.must(old is not None, "P5: a log-out is undone")
            self.must(old is None or _name_of(old) <= _name_of(new), "P5: a newer session is overwritten")
            self.must(old is None or old.is_same_grant(new), "P5: another log-in is overwritten")
        same = old is not None and new is not None and old.token_set.has_same_tokens(new.token_set)
        self.blurred = same and (self.blurred or self.holder is not process)

    def check_revocation(self, session: Session) -> None:
        stored = self.store.get(DID)
        self.must(
            stored is None or not stored.is_same_grant(session) or not self.writable,
            "a session that is in the store is revoked",
        )

    def check(self) -> None:
        """At every moment: whoever reads a token that may have been spent is told so."""
        record = self.store.get(DID)
        if record is None or record.attempt is not None or self.blurred:
            return
        grant = self.grant_of(record)
        requests = [*self.late, *(process.request for process in self.processes if process.request is not None)]
        self.must(
            not any(request.token_set.has_same_tokens(record.token_set) for request in requests)
            and not (grant.alive and grant.token > _name_of(record)[1]),
            "P4: the record does not tell that its token may have been spent",
        )

    def check_end(self) -> None:
        record = self.store.get(DID)
        for number, grant in enumerate(self.grants):
            stored = record is not None and _name_of(record)[0] == number
            excused = grant.hurt or grant.replaced == grant.token or not self.writable
            self.must(not grant.alive or stored or excused, "tokens that nobody has are good")

    # The scheduler

    def run(self) -> None:
        """:raises Violation: something has happened that must not."""
        try:
            self._until_rest()
            self.now += 1000.0
            self.processes.append(Process(self, "whoever comes next", self._calls()[:1]))
            self._until_rest()
            self.check_end()
        finally:
            for process in self.processes:
                process.end()

    def is_free(self) -> bool:
        return self.holder is None or (self.lease and self.now >= self.held_until)

    def take_lock(self, process: Process) -> None:
        if self.holder is not None and self.holder.tokens is not None:
            # Who stands still for so long with tokens in his hands has as good as lost them.
            self.grant_of(self.holder.tokens).hurt = True
        self.holder = process
        self.prolong(_LEASE)

    def prolong(self, seconds: float) -> None:
        self.held_until = math.inf if self._forgets else self.now + seconds

    def _until_rest(self) -> None:
        while living := [process for process in self.processes if process.at is not None and not process.dead]:
            self._step(living)
            if self.violation is not None:
                raise self.violation
            self.check()

    def _step(self, living: list[Process]) -> None:
        runnable = [process for process in living if process.ready()]
        waiting = [process for process in living if not process.ready()]
        awake = [process for process in runnable if self._stalled.get(process, 0) <= len(self.trace)]
        if self.late and self.chance(0.2):
            self._serve_late()
        elif self.chance(0.1):
            self._stall(self.random.choice(living))
        elif self._time_passes and self.chance(0.05):
            self._let_time_pass(self.random.choice([1.0, 15.0, 40.0]))
        elif self._yet_to_forget and self.holder is not None and self.chance(0.1):
            self._forget(self.holder)
        elif self._crashes and self.chance(0.05):
            self._crash(self.random.choice(living))
        elif waiting and self.chance(0.05) and (late := self.random.choice(waiting)).at == "gets the lock":
            self._go_on(late)
        elif awake or runnable:
            self._go_on(self.random.choice(awake or runnable))
        elif self._time_passes:
            self._let_time_pass(5.0)
        else:
            self.must(False, "P4: a lock stays taken")

    def _go_on(self, process: Process) -> None:
        self.trace.append(f"{process.name} {process.at}")
        process.go_on()

    def _stall(self, process: Process) -> None:
        """Let it stand still for some steps of the others; under a lease, often for longer than that lasts."""
        self._stalled[process] = len(self.trace) + self.random.choice([3, 6, 12, 25])
        if self._time_passes and self.chance(0.5):
            self._let_time_pass(40.0)

    def _serve_late(self) -> None:
        request = self.late.pop()
        if self.chance(0.5):
            self.trace.append("a request whose sender is gone is served")
            self.serve(request)

    def _let_time_pass(self, seconds: float) -> None:
        """No request takes longer than it may. Who may find his lease forgotten does not stand still besides, but sends
        his request as soon as he has announced it: what the attempt says about its end would not be true else."""
        ends = [process.sent_at + ANSWER_WITHIN for process in self.processes if process.request is not None]
        if self._forgets:
            for process in self.processes:
                if process.answer_by is not None:
                    sent = process.request is not None or process.tokens is not None
                    ends.append(process.answer_by - (1.0 if sent else ANSWER_WITHIN))
        self.now = max(self.now, min([self.now + seconds, *ends]))
        self.trace.append(f"{seconds} s pass")

    def _forget(self, holder: Process) -> None:
        self.trace.append(f"the {'lease' if self.lease else 'lock'} of {holder.name} is forgotten")
        self._yet_to_forget, self.holder, self.which_lock = False, None, "the second"

    @property
    def _time_passes(self) -> bool:
        """Whether anybody waits for it."""
        return self.lease or self._forgets

    def _crash(self, process: Process) -> None:
        self.trace.append(f"{process.name} dies")
        self._crashes -= 1
        process.dead = True
        for session in (process.request, process.tokens):
            if session is not None:
                self.grant_of(session).hurt = True
        if process.request is not None:
            self.late.append(process.request)
        process.request = process.answer_by = None
        if self.holder is process and (self._forgets or not self.lease):
            self.holder = None


def _name_of(session: Session) -> tuple[int, int]:
    """Which grant a session is of, and which refresh of it has brought it."""
    _, grant, token = (session.token_set.refresh_token or "").split("-")
    return int(grant), int(token)


def run(seed: int, *, lease: bool) -> None:
    """:raises Violation: with the seed and the schedule in its message."""
    world = World(seed, lease)
    try:
        with patch.object(session_getter, "_LOOK_AGAIN", 10.0):
            world.run()
    except Violation as violation:
        raise Violation("\n  ".join((f"seed {seed}, lease={lease}: {violation}", *world.trace))) from violation


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model.schedules", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many, of each kind of lock")
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args(argv)
    logging.getLogger("atproto_session").addHandler(logging.NullHandler())
    for lease in (False, True):
        began = time.monotonic()
        for seed in range(chosen.first, chosen.first + chosen.seeds):
            run(seed, lease=lease)
        print(f"lease={lease}: {chosen.seeds} schedules, all well, {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
