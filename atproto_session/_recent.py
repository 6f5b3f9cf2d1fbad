"""What was looked up a short while ago."""

from __future__ import annotations

from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """A cache of values that carry the time at which they were fetched, bounded in number and age. Every change is a
    single operation on a dict, so there is no lock.

    :param keep_for: seconds after which a value goes.
    :param most: how many values there may be; the oldest go first.
    """

    def __init__(self, keep_for: float, most: int = 1000) -> None:
        self._keep_for = keep_for
        self._most = most
        self._entries: dict[str, tuple[float, V]] = {}

    def get(self, key: str) -> tuple[float, V] | None:
        return self._entries.get(key)

    def set(self, key: str, value: tuple[float, V]) -> None:
        self._entries.pop(key, None)  # what is set last is the last in a dict's order
        self._entries[key] = value
        for other, (fetched_at, _) in list(self._entries.items()):
            if fetched_at > value[0] - self._keep_for and len(self._entries) <= self._most:
                break
            self._entries.pop(other, None)

    def delete(self, key: str) -> None:
        self._entries.pop(key, None)
