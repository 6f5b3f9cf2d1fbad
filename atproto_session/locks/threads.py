"""Locks between the threads of one process."""

from __future__ import annotations

import secrets
import threading
import time
from contextlib import AbstractContextManager, suppress
from queue import Empty, SimpleQueue
from types import TracebackType

from .._fork import reset_in_child
from ..errors import CancelledError, LockTimeoutError, printable
from . import LockKind

#: How often a waiting thread looks at ``cancel``, in seconds: a queue and an event cannot be waited for together.
_SLICE = 0.02
#: How often a waiting thread looks whether its turn has come although nobody said so, in seconds.
_LONG_SLICE = 0.5

#: Those that want one lock, in the order in which they came. The first one has it.
_Line = list[SimpleQueue[None]]


class ThreadLocks:
    """A lock for each name, kept as long as somebody holds it or waits for it.

    There is no :class:`threading.Lock` in it. The handler of a signal, a ``__del__`` or an exception raised from
    outside may come between any two steps, and would find such a lock taken, or leave it taken. Here each step is one
    operation on a dict or a list, and to leave is to take oneself out of a list, which may happen twice.

    :param kind: ``LockKind.HOLDER`` only for a store that no other process can reach.
    """

    def __init__(self, kind: LockKind = LockKind.PROCESS) -> None:
        self._kind = kind
        self.reset_after_fork()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._name = secrets.token_hex(16)  # a child's locks are not those of its parent

    @property
    def kind(self) -> LockKind:
        return self._kind

    def hold(
        self, name: str, *, timeout: float, cancel: threading.Event | None = None
    ) -> AbstractContextManager[ThreadHold]:
        return _Turn(self._lines, name, timeout, cancel, ThreadHold(self._name))


class ThreadHold:
    def __init__(self, lock: str) -> None:
        self.lock = lock
        self.held = False

    def extend(self, seconds: float) -> bool:
        return self.held


class _Turn:
    """A place in the line of one lock. It is written as a class, since a generator leaves an instant between taking the
    lock and the block that gives it back."""

    _line: _Line | None = None

    def __init__(
        self,
        lines: dict[str, _Line],
        name: str,
        timeout: float,
        cancel: threading.Event | None,
        hold: ThreadHold,
    ) -> None:
        self._lines = lines
        self._name = name
        self._timeout = timeout
        self._cancel = cancel
        self._hold = hold
        self._call: SimpleQueue[None] = SimpleQueue()

    def __enter__(self) -> ThreadHold:
        deadline = time.monotonic() + self._timeout
        try:
            self._check_cancel()
            while not self._is_first():
                self._wait(deadline)
                self._check_cancel()
            self._hold.held = True
        except BaseException:
            self._leave()
            raise
        return self._hold

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        # A signal's handler may have raised before the first line of __exit__.
        self._leave()

    def _join(self) -> _Line:
        self._line = line = self._lines.setdefault(self._name, [])
        line.append(self._call)
        return line

    def _is_first(self) -> bool:
        line = self._line or self._join()
        while line[0] is self._call:
            # The line may have been closed between the two steps of _join. Only its first one closes it.
            if self._lines.get(self._name) is line:
                return True
            self._leave()
            line = self._join()
        return False

    def _check_cancel(self) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError(f"waiting for the lock of {printable(self._name)} was cancelled")

    def _wait(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise LockTimeoutError(f"another thread keeps the lock of {printable(self._name)}; try again later")
        with suppress(Empty):
            self._call.get(timeout=min(left, _LONG_SLICE if self._cancel is None else _SLICE))

    def _leave(self) -> None:
        line = self._line
        if line is None or self._call not in line:
            return
        self._hold.held = False
        if len(line) == 1 and self._lines.get(self._name) is line:
            # Closed before it is left, so that it is the lock's holder who closes it. Who joins it just now finds that.
            self._lines.pop(self._name, None)
        with suppress(ValueError):
            line.remove(self._call)
        for call in line[:1]:
            call.put(None)
