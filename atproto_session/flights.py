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
from typing import Any, Generic, TypeVar

from .errors import CancelledError, LockTimeoutError, SessionError
from .fork import reset_in_child
from .launcher import start_thread

T = TypeVar("T")
U = TypeVar("U")

#: How often a waiting caller looks at ``cancel``, in seconds.
_SLICE = 0.02
#: How often a waiting caller without ``cancel`` runs at all, so that an exception raised in it by another thread, as
#: watchdogs do, gets through.
_LONG_SLICE = 0.5

_log = logging.getLogger("atproto_session")


class Flight(Generic[T]):
    """One piece of work, seen by the thread that does it and by those that wait for it.

    :ivar abandoned: set when its caller has left before the work was committed; the ``cancel`` of every wait in it.
    :ivar fetched: the result is new, not found in the store.
    """

    def __init__(self, key: str, work: Callable[[Flight[T]], T]) -> None:
        self.key = key
        self.abandoned = threading.Event()
        self.fetched = False
        self._work = work
        self._mutex = threading.Lock()
        self._committed = False
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
            self._committed = True

    def check(self) -> None:
        """
        :raises CancelledError: the caller has left already.
        """
        if self.abandoned.is_set():
            raise CancelledError(f"the caller that asked for {self.key} has left")

    def afterwards(self, action: Callable[[], None]) -> None:
        """Have ``action`` called when the work is over and its locks are released, before the callers go on."""
        self._afterwards.append(action)

    def run(self, unregister: Callable[[], None]) -> None:
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

    def abandon(self) -> None:
        """Leave. Stops work that is not committed; no effect on work that is."""
        with self._mutex:
            if not self._committed:
                self.abandoned.set()

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
        self._closed: str | None = None
        self.reset_after_fork()
        reset_in_child(self)
        _all_flights.add(self)

    def reset_after_fork(self) -> None:
        self._mutex = threading.Lock()
        self._joinable: dict[str, Flight[T]] = {}
        self._all: set[Flight[Any]] = set()

    def under_way(self, key: str) -> bool:
        return key in self._joinable

    def board(self, key: str, work: Callable[[Flight[T]], T]) -> tuple[Flight[T], bool]:
        """The flight for ``key`` that is under way, or a new one that does ``work``; and whether it is new."""
        with self._mutex:
            flight = self._joinable.get(key)
            if flight is not None:
                return flight, False
            flight = self._joinable[key] = self._start(Flight(key, work))
            return flight, True

    def charter(self, key: str, work: Callable[[Flight[U]], U]) -> Flight[U]:
        """A new flight that nobody joins."""
        with self._mutex:
            return self._start(Flight(key, work))

    def close(self, why: str = "it is closed") -> list[Flight[Any]]:
        """Let no flight begin any more, and say which are still in the air."""
        with self._mutex:
            self._closed = self._closed or why
            return list(self._all)

    def _start(self, flight: Flight[U]) -> Flight[U]:
        if self._closed is not None:
            raise SessionError(f"nothing is done for {flight.key} any more: {self._closed}")

        def unregister() -> None:
            with self._mutex:
                self._all.discard(flight)
                if self._joinable.get(flight.key) is flight:
                    del self._joinable[flight.key]

        # Not a daemon, not even if the caller is one: the interpreter waits for it on exit. Started before it is
        # registered, so that an exception in between leaves no flight that others would join and that never ends.
        name = f"atproto_session {flight.key}"
        thread = threading.Thread(target=flight.run, args=(unregister,), name=name, daemon=False)
        try:
            start_thread(thread)
        except RuntimeError as error:
            flight.abandon()
            raise SessionError(
                "no thread can be started to do the work in; nothing was sent", retryable=True
            ) from error
        except BaseException:
            flight.abandon()
            raise
        self._all.add(flight)
        return flight


_all_flights: weakref.WeakSet[Flights[Any]] = weakref.WeakSet()


# Twice: a signal that is pending when the interpreter comes to it is raised before its first line.
@atexit.register
@atexit.register
def _land_all() -> None:
    """At the end of the interpreter, which waits for threads before this: once, and only until another signal comes. A
    daemon thread goes on until after this, and may have begun a flight since."""
    while True:
        try:
            flights = [flight for each in list(_all_flights) for flight in each.close("the program is ending")]
            for flight in flights:
                flight.abandon()
            for flight in flights:
                flight.wait(float("inf"), None)
        except BaseException:  # noqa: BLE001, S112 - a signal, which has ended all that it can
            continue
        return
