"""Work in a thread of its own, at most one piece for each key, that its caller may leave.

A refresh must not be cut short by what happens to the thread that asked for it: ``KeyboardInterrupt``, a time limit, an
exception raised from outside. So nothing of it runs there. The caller only waits, and may go at any moment; a flight
that has not committed itself then stops, one that has goes on to its end.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from ._fork import copy_of, reset_in_child
from ._launcher import start_thread
from .errors import CancelledError, LockTimeoutError, SessionError

T = TypeVar("T")
U = TypeVar("U")

#: How often a waiting caller looks at ``cancel``, in seconds.
_SLICE = 0.02
#: How often a waiting caller without ``cancel`` runs at all, so that an exception raised in it by another thread, as
#: watchdogs do, gets through.
_LONG_SLICE = 0.5
#: How long the end of the program waits for what was sent: for an answer, and for a store that takes its time.
_LAND_WITHIN = 120.0
#: How long whoever closes waits for a thread that is yet to begin, in seconds.
_START_WITHIN = 10.0

_log = logging.getLogger("atproto_session")


class Flight(Generic[T]):
    """One piece of work, seen by the thread that does it and by those that wait for it.

    :ivar abandoned: set when its caller has left before the work was committed; the ``cancel`` of every wait in it.
    :ivar fetched: the result is new, not found in the store.
    :ivar committed: past the point of no return.
    :ivar is_over: the work is, and nobody has to be told of it any more but those who wait.
    """

    def __init__(self, key: str, work: Callable[[Flight[T]], T]) -> None:
        self.key = key
        self.abandoned = threading.Event()
        self.fetched = False
        self._work = work
        self._mutex = threading.Lock()
        self.committed = False
        self.is_over = False
        self._why = "the caller has left"
        self._thread: int | None = None
        self._result: T | None = None
        self._error: BaseException | None = None
        self._done = False
        self._afterwards: list[Callable[[], None]] = []
        self._waiters: list[SimpleQueue[None]] = []

    # For the thread that does the work

    def commit(self) -> None:
        """Pass the point of no return.

        :raises CancelledError: the caller has left already.
        """
        with self._mutex:
            self.check()
            self.committed = True

    def check(self) -> None:
        """
        :raises CancelledError: the caller has left already.
        """
        if self.abandoned.is_set():
            raise CancelledError(f"nothing was sent for {self.key}: {self._why}")

    def afterwards(self, action: Callable[[], None]) -> None:
        """Have ``action`` called when the work is over and its locks are released, before the callers go on."""
        self._afterwards.append(action)

    def run(self, unregister: Callable[[], None]) -> None:
        self._thread = threading.get_ident()
        try:
            self._result = self._work(self)
        except BaseException as error:  # noqa: BLE001 - it is the caller's, who raises it
            self._error = error
        finally:
            try:
                unregister()
                for action in self._afterwards:
                    self._call(action)
            finally:
                self._done = True
                for waiter in list(self._waiters):
                    waiter.put(None)

    def _call(self, listener: Callable[[], None]) -> None:
        # What a listener raises changes nothing for anybody else; nor does what a handler of the log does.
        try:
            listener()
        except BaseException:  # noqa: BLE001
            with suppress(BaseException):
                _log.exception("a listener failed for %s", self.key)

    # For the threads that wait

    def abandon(self, why: str = "the caller has left") -> None:
        """Leave. Stops work that is not committed; no effect on work that is."""
        with self._mutex:
            if not self.committed:
                self._why = why
                self.abandoned.set()

    def land(self, deadline: float) -> None:
        """Wait until no work is done any more: none is where none was begun and all have left, or here.

        :raises LockTimeoutError: the deadline has passed.
        """
        if self._thread is None and not self.abandoned.is_set():
            with suppress(LockTimeoutError):
                self.wait(min(deadline, time.monotonic() + _START_WITHIN), None)
        if self._thread not in (None, threading.get_ident()):
            self.wait(deadline, None)

    def wait(self, deadline: float, cancel: threading.Event | None) -> None:
        """Wait for the end of the work.

        Neither ``Thread.join`` nor an ``Event`` does here: up to CPython 3.12, ``KeyboardInterrupt`` in a ``join``
        makes the interpreter exit without waiting for that thread, and an exception raised inside ``Event.wait`` may
        leave its inner lock taken, where the working thread would then stop for ever. A queue has neither weakness.

        :param deadline: in terms of ``time.monotonic()``.
        :raises LockTimeoutError: the deadline has passed.
        :raises CancelledError: ``cancel`` was set.
        """
        slice_ = _LONG_SLICE if cancel is None else _SLICE
        landed: SimpleQueue[None] = SimpleQueue()
        self._waiters.append(landed)
        while not self._done:
            if cancel is not None and cancel.is_set():
                raise CancelledError(f"waiting for {self.key} was cancelled")
            left = deadline - time.monotonic()
            if left <= 0:
                raise LockTimeoutError(f"{self.key} was not ready in time; a request that was sent goes on without you")
            try:
                landed.get(timeout=min(left, slice_))
            except Empty:
                continue

    def result(self) -> T:
        """What the work returned, once it is done, or the error that it raised."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # the work has returned, so this is a T

    @property
    def succeeded(self) -> bool:
        return self._done and self._error is None


class Flights(Generic[T]):
    """The flights of one getter that are in the air."""

    def __init__(self) -> None:
        self._closed = False
        self.reset_after_fork()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        self._mutex = threading.RLock()  # the handler of a signal may fetch in the middle of board()
        self._joinable: dict[str, Flight[T]] = {}
        self._all: set[Flight[Any]] = set()

    def under_way(self, key: str) -> bool:
        return key in self._joinable

    def board(self, key: str, work: Callable[[Flight[T]], T]) -> tuple[Flight[T], bool]:
        """The flight for ``key`` that is under way, or a new one that does ``work``; and whether it is new.

        :raises SessionError: nothing is begun any more.
        """
        with self._mutex:
            flight = self._joinable.get(key)
            if flight is not None:
                return flight, False
            flight = self._joinable[key] = self._start(Flight(key, work), even_if_closed=False)
            if flight.is_over:  # it was quicker than this
                self._joinable.pop(key, None)
            return flight, True

    def charter(self, key: str, work: Callable[[Flight[U]], U], *, committed: bool = False) -> Flight[U]:
        """A new flight that nobody joins.

        :param committed: from the first moment.
        :raises SessionError: nothing is begun any more.
        """
        flight = Flight(key, work)
        flight.committed = committed
        with self._mutex:
            return self._start(flight, even_if_closed=True)

    def close(self) -> None:
        """Let nothing be fetched any more, and wait for what is in the air. Without the mutex: this may be a signal's
        handler, and whoever has the mutex be what it interrupts."""
        self._closed = True
        for flight in self.in_the_air():
            flight.land(float("inf"))

    def in_the_air(self) -> list[Flight[Any]]:
        return copy_of(self._all)

    def _start(self, flight: Flight[U], *, even_if_closed: bool) -> Flight[U]:
        def unregister() -> None:
            # Without the mutex, which close() does not take either. Whoever lists it just now looks at is_over after.
            flight.is_over = True
            self._all.discard(flight)
            if self._joinable.get(flight.key) is flight:
                self._joinable.pop(flight.key, None)

        # Known before anything else, so that whoever closes waits for it, or is noticed here.
        self._all.add(flight)
        try:
            self._check_open(flight.key, even_if_closed)
        except SessionError:
            self._all.discard(flight)
            raise
        # Not a daemon, not even if the caller is one: the interpreter waits for it on exit. Started before it can be
        # joined, so that an exception in between leaves no flight that others would join and that never ends.
        name = f"atproto_session {flight.key}"
        thread = threading.Thread(target=flight.run, args=(unregister,), name=name, daemon=False)
        try:
            start_thread(thread)
        except RuntimeError as error:
            self._all.discard(flight)
            flight.abandon()
            raise SessionError(
                "no thread can be started to do the work in; nothing was sent", retryable=True
            ) from error
        except BaseException:
            flight.abandon()  # it may have been started all the same
            raise
        return flight

    def _check_open(self, key: str, even_if_closed: bool) -> None:
        if self._closed and not even_if_closed:
            raise SessionError(f"nothing is fetched for {key} any more: it is closed")
        # Exit handlers of the application's own are waited for, other threads are not.
        if _ending and threading.current_thread() is not threading.main_thread():
            raise SessionError(f"nothing is done for {key} any more: the program is ending", retryable=True)


# The end of the program


class Pool(Protocol):
    def close_idle(self) -> None: ...


_landing: weakref.WeakSet[Flights[Any]] = weakref.WeakSet()
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_ending = False


def land_at_exit(flights: Flights[Any]) -> None:
    """Have the interpreter wait at its end for those of ``flights`` that are committed."""
    _landing.add(flights)


def close_at_exit(pool: Pool) -> None:
    """Have what is idle in ``pool`` closed at the end of the interpreter, when all flights have landed."""
    _pools.add(pool)


# Twice: a signal that is pending when the interpreter comes to it is raised before its first line.
@atexit.register
@atexit.register
def _land_all() -> None:
    """The interpreter waits for threads before this: once, and only until another signal comes. A daemon thread goes on
    until after it, and may have begun a flight since."""
    global _ending  # noqa: PLW0603 - there is one end
    _ending = True
    deadline = time.monotonic() + _LAND_WITHIN
    while flights := [flight for each in copy_of(_landing) for flight in each.in_the_air()]:
        try:
            for flight in flights:
                flight.abandon("the program is ending")
            for flight in flights:
                flight.land(deadline)
        except BaseException:  # noqa: BLE001 - a signal, which has ended all that it can
            if time.monotonic() < deadline:
                continue
        break
    for pool in copy_of(_pools):
        pool.close_idle()
