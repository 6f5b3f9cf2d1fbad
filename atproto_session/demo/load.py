"""The load of the demo: worker processes that share one account, and what they report."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import cast

from .figures import Failure, Figures
from .worker import START, STOP, Job, work

#: Seconds between two looks at the clock.
_TICK = 0.25
#: Seconds that a worker process has to start and to end.
_PATIENCE = 60.0


class Crew:
    """Worker processes at one job. Use it in a ``with`` block; at its end they have stopped.

    :ivar figures: all that they have reported.
    """

    def __init__(self, job: Job, processes: int) -> None:
        self.figures = Figures()
        self._job = job
        self._count = processes
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []
        self._open: set[Connection] = set()
        self._silent: set[Connection] = set()
        self._began = 0.0

    def __enter__(self) -> Crew:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def run(self, seconds: float, tick: Callable[[float], bool]) -> None:
        """Let them work for so long.

        :param tick: called a few times a second with the seconds that have passed; ``False`` ends it early.
        """
        self._began = time.monotonic()
        self._tell_all(START)
        while (passed := time.monotonic() - self._began) < seconds and self._open and tick(passed):
            self._listen(min(_TICK, seconds - passed))

    def _start(self) -> None:
        # Spawned, not forked: a fork of a process with threads, the network's for one, is a gamble.
        context = multiprocessing.get_context("spawn")
        with _interrupts_ignored():  # Ctrl-C goes to them too, and it is for this process to stop them
            for _ in range(self._count):
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(self._job, theirs), daemon=True)
                process.start()
                theirs.close()  # so that the end of the process is the end of what can be read
                self._processes.append(process)
                self._connections.append(ours)
                self._open.add(ours)
        self._silent = set(self._open)
        deadline = time.monotonic() + _PATIENCE
        while self._silent and time.monotonic() < deadline:
            self._listen(_TICK)

    def _stop(self) -> None:
        self._tell_all(STOP)
        deadline = time.monotonic() + _PATIENCE
        while self._open and time.monotonic() < deadline:
            self._listen(_TICK)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
            if process.exitcode != 0:
                self._note(f"a worker process ended with exit code {process.exitcode}")
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._open = [], [], set()

    def _tell_all(self, message: str) -> None:
        for connection in self._open:
            with suppress(OSError):  # it has died; that is seen when its end is read
                connection.send(message)

    def _listen(self, timeout: float) -> None:
        """Take in what is reported within ``timeout`` seconds, or the first of it."""
        for connection in cast(list[Connection], wait(list(self._open), timeout)):
            try:
                self.figures.add(connection.recv())
            except (EOFError, OSError):
                self._open.discard(connection)
            self._silent.discard(connection)

    def _note(self, message: str) -> None:
        self.figures.failures.append(Failure(time.monotonic() - self._began, message))


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
