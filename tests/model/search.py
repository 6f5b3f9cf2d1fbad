"""Breadth first, through every state that can be reached."""

from __future__ import annotations

from dataclasses import dataclass

from .protocol import Protocol, Record, State, Violation

#: The state before, who did what in it, and how the workers were put in order afterwards.
Step = tuple[State, int | None, str, tuple[int, ...]]


@dataclass(frozen=True)
class Result:
    """:ivar states: how many there are, or were seen. States that differ in the order of the workers alone are one.
    :ivar violation: what must never happen and can, else ``None``.
    :ivar trace: the shortest way there.
    """

    states: int
    violation: str | None = None
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        verdict = self.violation or "nothing that must not happen"
        return "\n  ".join((f"{self.states} states: {verdict}", *self.trace))


def search(protocol: Protocol, *, most: int | None = None) -> Result:
    """:param most: do not begin another layer after so many states."""
    came_from: dict[State, Step | None] = dict.fromkeys(protocol.initial())
    layer = list(came_from)
    while layer and (most is None or len(came_from) < most):
        reached = []
        for state in layer:
            try:
                protocol.check(state)
                at_end = True
                for who, what, following in protocol.steps(state):
                    at_end = False
                    order, new = _in_order(following, protocol.workers)
                    if new not in came_from:
                        came_from[new] = state, who, what, order
                        reached.append(new)
                if at_end:
                    protocol.check_end(state)
            except Violation as violation:
                return Result(len(came_from), str(violation), _trace(protocol, came_from, state, violation.who))
        layer = reached
    return Result(len(came_from))


def _in_order(s: State, workers: int) -> tuple[tuple[int, ...], State]:
    """The same state with the workers sorted by where they are: which of them is which makes no difference."""
    keys = [actor[:2] for actor in s.actors[:workers]]
    if all(keys[n] <= keys[n + 1] for n in range(workers - 1)):
        return (), s
    order = sorted(range(workers), key=keys.__getitem__)
    place = {old: new for new, old in enumerate(order)}

    def renumbered(record: Record) -> Record:
        if record.attempt is None:
            return record
        return record._replace(attempt=(place[record.attempt[0]], *record.attempt[1:]))

    sorted_ = (s.actors[old]._replace(session=renumbered(s.actors[old].session)) for old in order)
    holder = s.holder if s.holder is None else place.get(s.holder, s.holder)
    return tuple(order), s._replace(record=renumbered(s.record), actors=(*sorted_, *s.actors[workers:]), holder=holder)


def _trace(
    protocol: Protocol, came_from: dict[State, Step | None], state: State, culprit: int | None
) -> tuple[str, ...]:
    steps = []
    while (step := came_from[state]) is not None:
        state, who, what, order = step
        steps.append((who, what, order))
    names = [*(f"worker {number + 1}" for number in range(protocol.workers)), *protocol.owner]
    trace = []
    for who, what, order in reversed(steps):
        trace.append(what if who is None else f"{names[who]} {what}")
        names = [names[old] for old in order] + names[len(order) :]
    return (*trace,) if culprit is None else (*trace, f"{names[culprit]} does it")
