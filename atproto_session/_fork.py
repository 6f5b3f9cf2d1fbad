"""What happens when the process forks, and when it ends.

A forked child inherits the parent's locks as they stood, without the threads that would release them, and its
connections, which the parent goes on using. What holds such state registers here. It is told in the child, before any
other code of it runs, to start clean, and where that is not enough, in the parent beforehand, to come to rest.

A program may end while a refresh is under way. What is not committed then is abandoned, the moment the main thread has
ended; what is committed is waited for.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

T = TypeVar("T")

#: How often a thread that waits for a fork looks again, and a fork that waits for a thread, in seconds.
_POLL = 0.001


class ForkAware(Protocol):
    def reset_after_fork(self) -> None:
        """In the child: forget, without closing or releasing, what belongs to the parent."""
        ...


class ForkPaused(ForkAware, Protocol):
    def pause_for_fork(self) -> None:
        """In the parent, before: finish what is under way, and let nothing new begin."""
        ...

    def resume_after_fork(self) -> None:
        """In the parent, afterwards: go on. Called even where ``pause_for_fork`` failed."""
        ...


_aware: weakref.WeakSet[ForkAware] = weakref.WeakSet()
_paused: weakref.WeakSet[ForkPaused] = weakref.WeakSet()
_forking = threading.RLock()
_waiting: list[ForkPaused] = []


def reset_in_child(state: ForkAware) -> None:
    """Have ``state.reset_after_fork()`` called in every child that this process forks, as long as ``state`` lives."""
    _aware.add(state)


def pause_at_fork(state: ForkPaused) -> None:
    """As :func:`reset_in_child`, and have ``state`` rest in the parent while the fork happens."""
    _aware.add(state)
    _paused.add(state)


def _pause_all() -> None:
    # One fork at a time: two threads that fork at once would else wait for what the other has paused.
    _forking.acquire()
    _waiting[:] = copy_of(_paused)
    for state in _waiting:
        state.pause_for_fork()


def _resume_all() -> None:
    try:
        for state in _waiting:
            state.resume_after_fork()
    finally:
        _waiting.clear()
        _forking.release()


def _reset_all() -> None:
    global _forking  # noqa: PLW0603 - the child's own, whoever held the parent's
    _forking = threading.RLock()
    _waiting.clear()
    for state in copy_of(_aware):
        state.reset_after_fork()


class _Turn:
    """Something under way that a fork waits for."""


class Turns:
    """What must not be under way in any thread when the process forks.

    Without a lock: an exception may be raised in a thread at any instant, by a signal for one, and a lock that was left
    taken would stop every other. Sets do what is asked of them here in one step.

    :param patience: how many seconds a fork waits for what is under way. Then it happens all the same.
    """

    def __init__(self, *, patience: float) -> None:
        self._patience = patience
        # Weak: one that was lost to an exception is under way no more.
        self._under_way: weakref.WeakSet[object] = weakref.WeakSet()
        self._pausing = False
        pause_at_fork(self)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """No fork happens in this block, and it waits for one that does."""
        turn = _Turn()
        try:
            self._under_way.add(turn)  # before the look at _pausing: a fork that begins now sees one or the other
            while self._pausing:
                self._under_way.discard(turn)
                time.sleep(_POLL)
                self._under_way.add(turn)
            yield
        finally:
            self._under_way.discard(turn)

    def pause_for_fork(self) -> None:
        self._pausing = True
        deadline = time.monotonic() + self._patience
        while self._under_way and time.monotonic() < deadline:
            time.sleep(_POLL)

    def resume_after_fork(self) -> None:
        self._pausing = False

    def reset_after_fork(self) -> None:
        self._pausing = False
        self._under_way = weakref.WeakSet()


def copy_of(items: Collection[T]) -> list[T]:
    """The items of a set that other threads may be adding to."""
    while True:
        with suppress(RuntimeError):  # one has just done so
            return list(items)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_pause_all, after_in_parent=_resume_all, after_in_child=_reset_all)


# The end of the program

#: How long the end of the program waits for what was sent, in seconds: for an answer, and for a store that takes its
#: time. The times of a refresh are shorter (see refresh.Times).
_LAND_WITHIN = 330.0


class Airborne(Protocol):
    def abandon(self, why: str) -> None:
        """Stop what can still be stopped."""
        ...

    def land(self, deadline: float) -> bool:
        """Wait for the rest. Whether there was any."""
        ...


class Pool(Protocol):
    def close_idle(self) -> None: ...


_airborne: weakref.WeakSet[Airborne] = weakref.WeakSet()
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_ending = False


def land_at_end(airborne: Airborne) -> None:
    """Have the interpreter wait at its end for what is committed there, and abandon the rest."""
    _airborne.add(airborne)


def close_at_end(pool: Pool) -> None:
    """Have what is idle in ``pool`` closed at the end of the interpreter, when everything has landed."""
    _pools.add(pool)


def is_ending() -> bool:
    """Whether nothing is begun any more but by exit handlers."""
    return _ending


def _end() -> bool:
    """Abandon what is not committed, and wait for the rest. Whether there was any."""
    for airborne in copy_of(_airborne):
        airborne.abandon("the program is ending")
    deadline = time.monotonic() + _LAND_WITHIN
    return any(airborne.land(deadline) for airborne in copy_of(_airborne))


# Twice: a signal that is pending when the interpreter comes to it is raised before its first line.
@atexit.register
@atexit.register
def _end_at_exit() -> None:
    """A signal may have cut the waiting short before, and exit handlers of the application may have begun a flight
    since. Here no signal does so any more: it has ended all that it can."""
    global _ending  # noqa: PLW0603 - there is one end
    _ending = True
    deadline = time.monotonic() + _LAND_WITHIN
    while True:
        try:
            if not _end() or time.monotonic() >= deadline:
                break
        except BaseException:  # noqa: BLE001, S112 - a signal
            continue
    for pool in copy_of(_pools):
        pool.close_idle()


def end_now() -> None:
    """What happens at the end of the interpreter, in a process that ends without it (``os._exit``)."""
    _end_at_exit()


# The moment the main thread has ended, before the interpreter waits for threads. Where CPython does not offer that (it
# is made for concurrent.futures), what is not committed ends a little later.
if hasattr(threading, "_register_atexit"):
    threading._register_atexit(_end)
