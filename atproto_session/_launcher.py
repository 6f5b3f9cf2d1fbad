"""Starting threads where nothing from outside can strike them.

In CPython 3.11 a thread that is being started counts as the one that starts it, until it runs: an exception raised from
outside in a caller (``PyThreadState_SetAsyncExc``, as watchdogs do) would kill the new thread at birth, and
``Thread.start()``, which waits for it to run, would never return (measured). So threads are started by one that has no
other work, and that nobody has a reason to interrupt.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue

from ._fork import reset_in_child

#: How long to wait for the launcher before another one is made, in seconds, and how often.
_PATIENCE = 0.5
_TRIES = 10

_Order = tuple[threading.Thread, SimpleQueue[BaseException | None]]


class _Launcher:
    def __init__(self) -> None:
        self.reset_after_fork()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        self._orders: SimpleQueue[_Order] = SimpleQueue()
        self._latest: object = None

    def start(self, thread: threading.Thread) -> None:
        done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._orders.put((thread, done))
        for _ in range(_TRIES):
            if self._latest is None:
                # Without the wait that Thread.start() has. Should this one be struck at birth, another is made below;
                # should there be two, the older leaves after its next order.
                latest = object()
                _thread.start_new_thread(carry_out, (self._orders, partial(self._is_needed, latest)))
                self._latest = latest
            try:
                error = done.get(timeout=_PATIENCE)
            except Empty:
                self._latest = None
                continue
            if error is not None:
                raise error
            return
        raise RuntimeError("the thread was not started in time")

    def _is_needed(self, launcher: object) -> bool:
        return self._latest in (None, launcher)


def carry_out(orders: SimpleQueue[_Order], is_needed: Callable[[], bool]) -> None:
    """Start the threads that are ordered, as long as another order may come."""
    while True:
        thread, done = orders.get()
        try:
            thread.start()
        except BaseException as error:  # noqa: BLE001 - it is the caller's, who raises it
            done.put(error)
        else:
            done.put(None)
        if not is_needed():
            return


_launcher = _Launcher()


def start_thread(thread: threading.Thread) -> None:
    """``thread.start()``, whatever is raised in the calling thread meanwhile.

    :raises RuntimeError: no thread can be started.
    """
    _launcher.start(thread)
