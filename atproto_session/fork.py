"""State that must not cross ``fork()``.

A forked child inherits the parent's locks as they stood, without the threads that would release them, and its
connections, which the parent goes on using. Whatever holds such state registers here and is told, in the child and
before any other code of it runs, to start clean.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class ForkAware(Protocol):
    def reset_after_fork(self) -> None:
        """Forget, without closing or releasing, what belongs to the parent."""


_aware: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def reset_in_child(state: ForkAware) -> None:
    """Have ``state.reset_after_fork()`` called in every child that this process forks, as long as ``state`` lives."""
    _aware.add(state)


def _reset_all() -> None:
    for state in list(_aware):
        state.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
