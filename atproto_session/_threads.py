"""Threads of our own, and the results that others wait for.

An exception may strike the thread of a caller at any instant: a signal, a time limit, a watchdog. So no work that
matters is done there, and nothing here has a lock that such an exception could leave taken.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from ._fork import reset_in_child
from .errors import CancelledError, SessionError

T = TypeVar("T")

#: How often a thread that waits looks at ``cancel``, in seconds.
_SLICE = 0.02
#: How often one without ``cancel`` runs at all, so that an exception raised in it by another thread gets through.
_LONG_SLICE = 0.5
#: How long to wait for the launcher before another one is made, in seconds, and how often.
_PATIENCE = 0.5
_TRIES = 10


#: How many threads are kept for more work, and what they are called meanwhile.
_MOST_IDLE = 64
_IDLE = "atproto_session idle"

_Job = tuple[Callable[[], None], str]


class Promise(Generic[T]):
    """A result that one thread brings and any number wait for. The first result counts; later ones change nothing.

    Neither ``Thread.join``, ``Event`` nor ``Future`` does here. Up to CPython 3.12, ``KeyboardInterrupt`` in a ``join``
    makes the interpreter exit without waiting for that thread. An exception raised inside ``Event.wait`` or
    ``Future.result`` may leave an inner lock taken, where the working thread would then stop for ever. A queue has
    neither weakness.

    It also serves as an event: ``set()``, ``is_set()`` and ``wait(timeout)`` are those of :class:`threading.Event`.
    """

    def __init__(self) -> None:
        self._outcome: tuple[T | None, BaseException | None] | None = None
        self._waiters: list[SimpleQueue[None]] = []

    def set(self, result: T | None = None, error: BaseException | None = None) -> None:
        """Bring the result, or the error that there is instead."""
        if self._outcome is None:
            self._outcome = result, error
        for waiter in list(self._waiters):
            waiter.put(None)

    def is_set(self) -> bool:
        return self._outcome is not None

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits for it at this moment."""
        return bool(self._waiters)

    def wait(self, timeout: float | None = None, cancel: threading.Event | None = None) -> bool:
        """Wait for the result, ``timeout`` seconds at most. Returns whether it is there.

        :raises CancelledError: ``cancel`` was set.
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        slice_ = _LONG_SLICE if cancel is None else _SLICE
        arrived: SimpleQueue[None] = SimpleQueue()
        self._waiters.append(arrived)
        try:
            while self._outcome is None:
                if cancel is not None and cancel.is_set():
                    raise CancelledError("the waiting was cancelled")
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                try:
                    arrived.get(timeout=min(left, slice_))
                except Empty:
                    continue
        finally:
            self._waiters.remove(arrived)
        return True

    def get(self, timeout: float) -> T:
        """The result, once it is there.

        :raises TimeoutError: it took longer than ``timeout`` seconds.
        """
        if not self.wait(timeout):
            raise TimeoutError("timed out")
        return self.result()

    def result(self) -> T:
        """The result, which is there, or its error, raised."""
        if self._outcome is None:
            raise RuntimeError("there is no result yet")
        result, error = self._outcome
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # without an error there is a result


def spawn(work: Callable[[], T], name: str) -> Promise[T]:
    """Do ``work`` in a thread of its own, which does not keep the interpreter from exiting.

    :raises RuntimeError: no thread can be started.
    """
    promise: Promise[T] = Promise()

    def run() -> None:
        try:
            promise.set(work())
        except BaseException as error:  # noqa: BLE001 - it belongs to those who wait for the result
            promise.set(error=error)

    begin(run, name)
    return promise


def begin(work: Callable[[], None], name: str) -> None:
    """Do ``work``, which raises nothing, in a thread that does not keep the interpreter from exiting.

    :raises RuntimeError: no thread can be started.
    """
    _crew.begin(work, name)


class _Crew:
    """Threads that have done their work, and wait for more.

    Not to save the start of a thread: a thread that has signed something leaves OpenSSL when it ends, and a process
    that is forked in just that moment has a child in which no signature ever ends (measured with OpenSSL 3: 5 of 72
    children that were forked right after a log-in). Threads that wait are in nobody's way.
    """

    def __init__(self) -> None:
        self.reset_after_fork()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        self._idle: list[SimpleQueue[_Job]] = []

    def begin(self, work: Callable[[], None], name: str) -> None:
        check_not_patched_late()
        try:
            self._idle.pop().put((work, name))
        except IndexError:
            jobs: SimpleQueue[_Job] = SimpleQueue()
            jobs.put((work, name))
            start_thread(threading.Thread(target=self._work, args=(jobs, self._idle), name=name, daemon=True))

    def _work(self, jobs: SimpleQueue[_Job], idle: list[SimpleQueue[_Job]]) -> None:
        thread = threading.current_thread()
        while True:
            work, thread.name = jobs.get()
            work()
            del work  # and all that it holds
            thread.name = _IDLE
            if len(idle) >= _MOST_IDLE:
                return
            idle.append(jobs)


_crew = _Crew()


def start_thread(thread: threading.Thread) -> None:
    """``thread.start()``, whatever is raised in the calling thread meanwhile.

    :raises RuntimeError: no thread can be started.
    """
    if sys.version_info >= (3, 12):
        thread.start()
    else:
        _launcher.start(thread)


def check_not_patched_late() -> None:
    """
    :raises SessionError: gevent has replaced the queues and threads that this module has imported already, or the
        threads alone. What waits here would stop the whole program.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading") and not monkey.is_module_patched("queue"):
        raise SessionError(
            "gevent has patched threads, but not queues: call gevent.monkey.patch_all() as it is, without queue=False"
        )
    if queue.SimpleQueue is not SimpleQueue:
        raise SessionError(
            "gevent has patched the standard library after atproto_session was imported: call "
            "gevent.monkey.patch_all() before anything else is imported"
        )


class _Order:
    """A thread to start. Taken back, it is not started any more."""

    def __init__(self, thread: threading.Thread) -> None:
        self.thread = thread
        self.started: Promise[None] = Promise()
        self._claims = [None]

    def claim(self) -> bool:
        """For the one who starts the thread and the one who takes the order back: the first gets it."""
        try:
            self._claims.pop()
        except IndexError:
            return False
        return True


class _Launcher:
    """Starts threads where nothing from outside can strike them. For CPython 3.11 alone.

    There, a thread that is being started counts as the one that starts it, until it runs. An exception raised from
    outside in a caller (``PyThreadState_SetAsyncExc``, as watchdogs do) would kill the new thread at birth, and
    ``Thread.start()``, which waits for it to run, would never return (measured; 3.12.1 and 3.13.0 do not do so). So
    threads are started by one that has no other work, and that nobody has a reason to interrupt.
    """

    def __init__(self) -> None:
        self.reset_after_fork()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        self._orders: SimpleQueue[_Order] = SimpleQueue()
        self._latest: object = None

    def start(self, thread: threading.Thread) -> None:
        import _thread

        order = _Order(thread)
        try:
            self._orders.put(order)
            for _ in range(_TRIES):
                if self._latest is None:
                    # Without the wait that Thread.start() has. Should this one be struck at birth, another is made
                    # below; should there be two, the older one leaves after its next order.
                    latest = object()
                    _thread.start_new_thread(carry_out, (self._orders, partial(self._is_needed, latest)))
                    self._latest = latest
                if order.started.wait(_PATIENCE):
                    return order.started.result()
                self._latest = None
            raise RuntimeError("the thread was not started in time")
        finally:
            order.claim()  # what its caller has given up is not started later

    def _is_needed(self, launcher: object) -> bool:
        return self._latest in (None, launcher)


def carry_out(orders: SimpleQueue[_Order], is_needed: Callable[[], bool]) -> None:
    """Start the threads that are ordered, as long as another order may come."""
    while True:
        order = orders.get()
        if order.claim():
            try:
                order.thread.start()
            except BaseException as error:  # noqa: BLE001 - it is the caller's, who raises it
                order.started.set(error=error)
            else:
                order.started.set()
        if not is_needed():
            return


_launcher = _Launcher()
