"""Work in a thread of its own, at most one piece for each key at a time, that its caller may leave.

A refresh must not be cut short by what happens to the thread that asked for it: ``KeyboardInterrupt``, a time limit, an
exception raised from outside. So nothing of it runs there. The caller only waits, and may go at any moment; the flight
goes on. Only ``cancel`` and the end of the program stop it, and only before it has committed itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any, Generic, TypeVar, cast

from ._fork import copy_of, is_ending, land_at_end, reset_in_child
from ._threads import Promise, begin, spawn
from .errors import CancelledError, LockTimeoutError, SessionError, printable

T = TypeVar("T")
U = TypeVar("U")

#: How long a flight that is known may take to begin, in seconds. One that has not begun by then never will: its starter
#: was struck.
_START_WITHIN = 10.0
#: How often one that waits for a flight to land looks whether it has begun at all, in seconds.
_LOOK_AT_LANDING = 1.0
#: How often a caller looks whether there is room for another flight, in seconds.
_LOOK_FOR_ROOM = 0.02

_NO_GROUPS: Mapping[str, int] = {}

_log = logging.getLogger("atproto_session")
#: The flights that this thread does the work of, the inner ones last.
_here = threading.local()


class Fate(Enum):
    """What was decided about a flight. Decided once: the first to come decides."""

    COMMITTED = "it goes on to its end, whatever happens"
    ABANDONED = "it stops before anything is spent"


class Flight(Generic[T]):
    """One piece of work, seen by the thread that does it and by those that wait for it.

    :param groups: what it shares bounds with, such as a server, and how many flights each of them may have.
    :ivar landed: the result, brought when the work is over, or before, if the work hands it out early.
    :ivar abandoned: set when the work is to stop; the ``cancel`` of every wait in it.
    :ivar over: brought when nothing of it runs any more.
    :ivar has_fetched: the result is new, and was not found in the store.
    """

    def __init__(self, key: str, work: Callable[[Flight[T]], T], groups: Mapping[str, int] = _NO_GROUPS) -> None:
        self.key = key
        self.groups = groups
        self.landed: Promise[T] = Promise()
        self.abandoned: Promise[None] = Promise()
        self.cancel = cast(threading.Event, self.abandoned)  # for locks, which ask no more than is_set() and wait()
        self.over: Promise[None] = Promise()
        self.has_fetched = False
        self._ordered_at = time.monotonic()
        self._work = work
        self._fate: dict[str, Fate] = {}  # setdefault decides in one step
        self._why = "it was cancelled"
        self._has_begun = False
        self._starter = threading.get_ident()
        self._afterwards: list[Callable[[], None]] = []

    # For the thread that does the work

    def commit(self) -> None:
        """Pass the point of no return.

        :raises CancelledError: the flight was abandoned before.
        """
        if self._fate.setdefault("is", Fate.COMMITTED) is Fate.ABANDONED:
            self.check()

    def check(self) -> None:
        """
        :raises CancelledError: the flight was abandoned.
        """
        if self._fate.get("is") is Fate.ABANDONED:
            raise CancelledError(f"nothing was sent for {printable(self.key)}: {self._why}")

    def sleep(self, seconds: float) -> None:
        """
        :raises CancelledError: the flight was abandoned, before or meanwhile.
        """
        self.abandoned.wait(seconds)
        self.check()

    def hand_out(self, result: T) -> None:
        """Give ``result`` to all who wait and who will. The work goes on."""
        self.landed.set(result)

    def afterwards(self, action: Callable[[], None]) -> None:
        """Have ``action`` called when the work is over and its locks are released, before the callers go on."""
        self._afterwards.append(action)

    def run(self, unregister: Callable[[], None]) -> None:
        self._has_begun = True
        result, error = None, None
        with self._at_work():
            try:
                self.check()
                result = self._work(self)
            except BaseException as raised:  # noqa: BLE001 - it belongs to those who wait, and is raised there
                error = raised
            finally:
                try:
                    unregister()
                    for action in self._afterwards:
                        _call(self.key, action)
                finally:
                    self.landed.set(result, error)
                    self.over.set()

    def spawn(self, work: Callable[[], U]) -> Promise[U]:
        """Do ``work``, a part of this flight, in another thread.

        :raises RuntimeError: no thread can be started.
        """

        def run() -> U:
            with self._at_work():
                return work()

        return spawn(run, f"atproto_session {self.key}")

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        outside = _flights_here()
        _here.flights = (*outside, self)
        try:
            yield
        finally:
            _here.flights = outside

    # For the threads that wait

    def abandon(self, why: str = "it was cancelled") -> None:
        """Stop work that is not committed. No effect on work that is."""
        if self._fate.setdefault("is", Fate.ABANDONED) is Fate.ABANDONED:
            self._why = why
            self.abandoned.set()

    @property
    def never_began(self) -> bool:
        return not self._has_begun and time.monotonic() > self._ordered_at + _START_WITHIN

    @property
    def will_begin(self) -> bool:
        """Whether it has begun, or will without this thread: the handler of a signal may have interrupted its start."""
        return self._has_begun or not (self.never_began or self._starter == threading.get_ident())

    @property
    def is_here(self) -> bool:
        """Whether this very thread does the work."""
        return self in _flights_here()

    def wait(self, deadline: float, cancel: threading.Event | None = None) -> T:
        """The result, once it is there. Leaving changes nothing for the flight, but that ``cancel`` stops it if nobody
        else waits and nothing is spent yet.

        :param deadline: in terms of ``time.monotonic()``.
        :raises LockTimeoutError: the deadline has passed.
        :raises CancelledError: ``cancel`` was set.
        """
        try:
            is_there = self.landed.wait(deadline - time.monotonic(), cancel)
        except CancelledError:
            if not self.landed.is_awaited:
                self.abandon()
            raise CancelledError(f"waiting for {printable(self.key)} was cancelled") from None
        if not is_there:
            raise LockTimeoutError(
                f"{printable(self.key)} was not ready in time; what was begun for it goes on without you"
            )
        return self.landed.result()


class Flights(Generic[T]):
    """The flights of one getter that are in the air.

    :param most: how many there may be at a time.
    :param thread_ended: called at the end of each thread.
    """

    def __init__(self, *, most: int = 32, thread_ended: Callable[[], None] | None = None) -> None:
        self._most = most
        self._thread_ended = thread_ended
        self._closed = False
        self.reset_after_fork()
        reset_in_child(self)
        land_at_end(self)

    def reset_after_fork(self) -> None:
        self._joinable: dict[str, Flight[T]] = {}
        self._all: set[Flight[Any]] = set()

    def get(self, key: str) -> Flight[T] | None:
        """The flight for ``key`` that is under way."""
        return self._joinable.get(key)

    def board(
        self, key: str, work: Callable[[Flight[T]], T], *, deadline: float, groups: Mapping[str, int] = _NO_GROUPS
    ) -> tuple[Flight[T], bool]:
        """The flight for ``key`` that is under way, or a new one that does ``work``; and whether it is new.

        :param deadline: how long to wait for room for another flight, in terms of ``time.monotonic()``.
        :raises SessionError: nothing is begun any more, or too much is under way.
        """
        while True:
            under_way = self._joinable.get(key)
            if under_way is not None and under_way.is_here:
                raise SessionError(f"what is done for {printable(key)} asks for {printable(key)} itself")
            if under_way is not None and under_way.will_begin:
                return under_way, False
            if under_way is not None:
                self._joinable.pop(key, None)
            flight = Flight(key, work, groups)
            # Counted before anything is looked at, so that no more than the bound ever begin.
            self._all.add(flight)
            if self._has_room_for(flight):
                break
            self._all.discard(flight)
            if time.monotonic() >= deadline:
                raise SessionError(
                    f"nothing was begun for {printable(key)}: too much else is under way; try again later",
                    retryable=True,
                )
            time.sleep(_LOOK_FOR_ROOM)
        try:
            winner = self._joinable.setdefault(key, flight)
            if winner is flight:
                self._start(flight)
        except BaseException as error:
            # Those who have joined it meanwhile must not wait for what never comes.
            flight.abandon()
            self._forget(flight)
            flight.landed.set(error=error if isinstance(error, SessionError) else _cut_short(key))
            raise
        if winner is not flight:
            self._all.discard(flight)
        return winner, winner is flight

    def charter(self, key: str, work: Callable[[Flight[U]], U], *, committed: bool = False) -> Flight[U]:
        """A new flight that nobody joins.

        :param committed: from the first moment.
        :raises SessionError: no thread can be started.
        """
        flight = Flight(key, work)
        if committed:
            flight.commit()
        self._all.add(flight)
        try:
            self._start(flight, even_if_closed=True)
        except BaseException:
            flight.abandon()
            self._forget(flight)
            raise
        return flight

    def close(self) -> None:
        """Let nothing be begun any more, and wait for what is under way, but not for what nobody waits for and has
        spent nothing."""
        self._closed = True
        for flight in copy_of(self._all):
            if not flight.landed.is_awaited:
                flight.abandon("it is closed")
        self.land(float("inf"))

    def abandon(self, why: str) -> None:
        """Stop what is not committed."""
        for flight in copy_of(self._all):
            flight.abandon(why)

    def land(self, deadline: float) -> bool:
        """Wait for what is under way and was not abandoned. Returns whether anything was.

        :param deadline: in terms of ``time.monotonic()``.
        """
        flights = [each for each in copy_of(self._all) if not (each.is_here or each.abandoned.is_set())]
        for flight in flights:
            while not (flight.over.wait(min(deadline - time.monotonic(), _LOOK_AT_LANDING)) or flight.never_began):
                if time.monotonic() >= deadline:
                    return True
            self._all.discard(flight)
        return bool(flights)

    def _has_room_for(self, flight: Flight[Any]) -> bool:
        if _flights_here():
            return True  # it needs no thread of its own, and others would wait for what this thread does
        known = copy_of(self._all)
        return len(known) <= self._most and all(
            sum(group in each.groups for each in known) <= most for group, most in flight.groups.items()
        )

    def _forget(self, flight: Flight[Any]) -> None:
        self._all.discard(flight)
        if self._joinable.get(flight.key) is flight:
            self._joinable.pop(flight.key, None)

    def _start(self, flight: Flight[Any], *, even_if_closed: bool = False) -> None:
        self._check_open(flight.key, even_if_closed)
        if _flights_here():
            flight.run(lambda: self._forget(flight))  # in this thread: nothing from outside strikes it
            return

        def run() -> None:
            try:
                flight.run(lambda: self._forget(flight))
            finally:
                if self._thread_ended is not None:
                    _call(flight.key, self._thread_ended)

        # The end of the program waits for what is committed by itself (see _fork), and for no thread.
        try:
            begin(run, f"atproto_session {flight.key}")
        except RuntimeError as error:
            raise _not_started(flight.key) from error

    def _check_open(self, key: str, even_if_closed: bool) -> None:
        if self._closed and not even_if_closed:
            raise SessionError(f"nothing is fetched for {printable(key)} any more: it is closed")
        # Exit handlers of the application's own are waited for, other threads are not.
        if is_ending() and threading.current_thread() is not threading.main_thread():
            raise SessionError(f"nothing is done for {printable(key)} any more: the program is ending", retryable=True)


def _flights_here() -> tuple[Flight[Any], ...]:
    return getattr(_here, "flights", ())


def alongside(work: Callable[[], U], name: str) -> Callable[[], U]:
    """Begin ``work`` in another thread, as a part of what this one does. What is returned brings its result.

    :param work: ends by itself. Where no thread can be started, it is done when its result is wanted.
    """
    outside = _flights_here()

    def run() -> U:
        _here.flights = outside
        try:
            return work()
        finally:
            _here.flights = ()

    try:
        promise = spawn(run, name)
    except RuntimeError:
        return work

    def result() -> U:
        promise.wait()
        return promise.result()

    return result


def _cut_short(key: str) -> CancelledError:
    return CancelledError(f"the thread that began the work for {printable(key)} was interrupted; nothing was sent")


def _not_started(key: str) -> SessionError:
    return SessionError(
        f"no thread can be started to do the work for {printable(key)} in; nothing was sent", retryable=True
    )


def _call(key: str, action: Callable[[], None]) -> None:
    # What a listener raises changes nothing for anybody else; nor does what a handler of the log does.
    try:
        action()
    except BaseException:  # noqa: BLE001
        with suppress(BaseException):
            _log.exception("a listener failed for %s", key)
