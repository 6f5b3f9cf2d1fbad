"""Breadth first, through every state that can be reached."""

from __future__ import annotations

from dataclasses import dataclass

from .protocol import Actor, Protocol, Record, State, Violation


@dataclass(frozen=True)
class Result:
    """:ivar states: how many were seen, those apart in nothing but which worker is which being one.
    :ivar violation: what must never happen and can, else ``None``.
    :ivar trace: the shortest way there.
    """

    states: int
    violation: str | None = None
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.violation is None:
            return f"{self.states} states, all well"
        return "\n  ".join((f"{self.violation}:", *self.trace))


#: The state before, who did what there, and how the workers were renumbered since.
Step = tuple[State, int | None, str, tuple[int, ...]]


def search(protocol: Protocol, *, most: int | None = None) -> Result:
    """:param most: give up after so many states."""
    came_from: dict[State, Step | None] = dict.fromkeys(protocol.initial())
    layer = list(came_from)
    while layer and (most is None or len(came_from) < most):
        reached = []
        for state in layer:
            try:
                end = True
                for who, what, following in protocol.steps(state):
                    end = False
                    order, canonical = _canonical(following, protocol.workers)
                    if canonical not in came_from:
                        came_from[canonical] = state, who, what, order
                        reached.append(canonical)
                protocol.check_end(state) if end else protocol.check(state)
            except Violation as violation:
                return Result(len(came_from), str(violation), _trace(protocol, came_from, state, violation))
        layer = reached
    return Result(len(came_from))


def _canonical(s: State, workers: int) -> tuple[tuple[int, ...], State]:
    """The same state with the workers in an order of their own: which is which makes no difference."""
    order = sorted(range(workers), key=lambda me: s.actors[me][:2])
    if all(order[me] == me for me in order):
        return (), s
    place = {old: new for new, old in enumerate(order)}

    def renumbered(a: Actor) -> Actor:
        return a._replace(seen=of(a.seen), session=of(a.session), mine=a.mine and (place[a.mine[0]], a.mine[1]))

    def of(record: Record | None) -> Record | None:
        if record is None or record.attempt is None:
            return record
        return record._replace(attempt=(place[record.attempt[0]], record.attempt[1]))

    actors = (*(renumbered(s.actors[old]) for old in order), *s.actors[workers:])
    return tuple(order), s._replace(record=of(s.record), actors=actors, holder=place.get(s.holder, s.holder))


def _trace(
    protocol: Protocol, came_from: dict[State, Step | None], state: State, violation: Violation
) -> tuple[str, ...]:
    steps = []
    while (step := came_from[state]) is not None:
        state, who, what, order = step
        steps.append((who, what, order))
    names = [f"worker {number + 1}" for number in range(protocol.workers)] + list(protocol.owner)
    trace = []
    for who, what, order in reversed(steps):
        trace.append(what if who is None else f"{names[who]} {what}")
        names = [names[old] for old in order] + names[len(order):]
    return (*trace, f"{violation.who is not None and names[violation.who] or 'state'}: {violation}")
