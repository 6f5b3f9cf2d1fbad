"""What the demo counts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Failure:
    """A request that came to nothing.

    :ivar at: when, in seconds since the load began.
    :ivar message: what the application would see.
    """

    at: float
    message: str


@dataclass
class Figures:
    """What happened to requests. Times are in seconds.

    :ivar latencies: of each request that was served, from ``client.restore`` to its answer.
    :ivar waits: of each request that asked for the session before a refresh had ended and got the refreshed one, how
        long it waited for that.
    :ivar failures: in any order.
    """

    latencies: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        self.latencies += other.latencies
        self.waits += other.waits
        self.failures += other.failures

    @property
    def served(self) -> int:
        return len(self.latencies)

    @property
    def first_failure(self) -> Failure | None:
        return min(self.failures, key=lambda failure: failure.at, default=None)


class Collector:
    """Figures that many threads add to and one takes away."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._figures = Figures()

    def add(self, figures: Figures) -> None:
        with self._mutex:
            self._figures.add(figures)

    def take(self) -> Figures:
        """What has been added since the last time."""
        with self._mutex:
            taken, self._figures = self._figures, Figures()
        return taken


@dataclass(frozen=True)
class Tokens:
    """What the authorization server saw of refresh tokens.

    :ivar spends: refresh requests that passed its checks of proof and client.
    :ivar rotations: those that brought new tokens.
    :ivar spent_twice: refresh tokens that came more than once.
    """

    spends: int
    rotations: int
    spent_twice: int


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of ``values`` do not exceed; 0 if there are none."""
    if not values:
        return 0.0
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
