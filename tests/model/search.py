"""Breadth first, through every state that can be reached."""

from __future__ import annotations

from dataclasses import dataclass

from .world import State, Violation, World


@dataclass(frozen=True)
class Result:
    """:ivar states: how many there are, or were seen.
    :ivar steps: how many were taken.
    :ivar violation: what must never happen and can, or ``None``.
    :ivar trace: the shortest way there.
    """

    states: int
    steps: int
    violation: str | None = None
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        verdict = self.violation or "nothing that must not happen"
        return "\n  ".join((f"{self.states} states, {self.steps} steps: {verdict}", *self.trace))


def search(world: World, *, most: int | None = None) -> Result:
    """:param most: begin no other layer after so many states."""
    came_from: dict[State, tuple[State, int | None, str] | None] = dict.fromkeys(world.initial())
    layer, taken = list(came_from), 0
    while layer and (most is None or len(came_from) < most):
        reached = []
        for state in layer:
            try:
                world.check(state)
                can_go_on = False
                for who, what, following in world.moves(state):
                    taken += 1
                    can_go_on = can_go_on or (who is not None and what != "dies")
                    if following not in came_from:
                        came_from[following] = state, who, what
                        reached.append(following)
                if not can_go_on:
                    world.check_end(state)
            except Violation as violation:
                return Result(len(came_from), taken, str(violation), _trace(world, came_from, state))
        layer = reached
    return Result(len(came_from), taken)


def _trace(world: World, came_from: dict[State, tuple[State, int | None, str] | None], state: State) -> tuple[str, ...]:
    trace = []
    while (step := came_from[state]) is not None:
        state, who, what = step
        trace.append(what if who is None else f"{world.kinds[who].name} {what}")
    return (*reversed(trace),)
