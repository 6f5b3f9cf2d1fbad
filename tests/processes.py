"""Other processes that a test has: programs that it starts, and children that it forks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from .core import SOON

#: The repository.
ROOT = Path(__file__).parent.parent

#: The environment of a program whose coverage is not measured.
UNMEASURED = {
    name: value
    for name, value in os.environ.items()
    if name not in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
}


class Program:
    """A module of the tests that runs as a program, and that its parent talks with line by line.

    :param module: its name, such as ``programs.late_exit``.
    :param is_measured: whether its coverage is measured, which makes its end slower.
    :param stderr: as :class:`subprocess.Popen` takes it; by default that of the tests.
    :param prefix: a command that runs it somewhere else.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        is_measured: bool = True,
        stderr: int | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", f"tests.{module}", *arguments],
            env=None if is_measured else UNMEASURED,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        assert self.process.returncode == 0 or error[0] is not None

    def say(self, message: object = "go on") -> None:
        """Say one line: a string as it is, anything else as JSON."""
        assert self.process.stdin is not None
        line = message if isinstance(message, str) else json.dumps(message)
        print(line, file=self.process.stdin, flush=True)

    def hear_line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"{self.process.args!r} ended"
        return line.rstrip("\n")

    def hear(self) -> Any:
        """What the next line says in JSON."""
        return json.loads(self.hear_line())

    def close(self) -> None:
        """Say that no more comes, and wait until it has ended."""
        self.process.communicate(timeout=SOON)


def stop(pid: int) -> None:
    """Stop a child, and wait until it stands still: until then it goes on, for as long as it takes to tell it."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)


class Child:
    """``work`` in a forked child, which it can talk with through a connection."""

    def __init__(self, work: Callable[[Connection], object]) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._ended = False
        self.pid = _fork_in_turn()
        if self.pid == 0:
            try:
                answer: tuple[bool, object] = True, work(theirs)
            except BaseException:
                answer = False, traceback.format_exc()
            theirs.send(answer)
            os._exit(0)
        theirs.close()

    def say(self, message: object) -> None:
        self._connection.send(message)

    def hear(self) -> Any:
        assert self._connection.poll(SOON), "the child stands still"
        return self._connection.recv()

    def result(self) -> Any:
        """What ``work`` returned; the child has ended."""
        succeeded, answer = self.hear()
        self._reap()
        assert succeeded, f"in the child: {answer}"
        return answer

    def end(self) -> None:
        """Kill it, if it lives."""
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def _reap(self) -> None:
        os.waitpid(self.pid, 0)
        self._connection.close()
        self._ended = True


def _fork_in_turn() -> int:
    """From Python 3.12 on, filelock refuses a fork while another thread of the process is forking."""
    while True:
        with suppress(RuntimeError):
            return os.fork()


@contextmanager
def forked(work: Callable[[Connection], object]) -> Iterator[Child]:
    child = Child(work)
    try:
        yield child
    finally:
        child.end()


def in_child(work: Callable[[], object]) -> Any:
    """What ``work`` returns in a forked child."""
    with forked(lambda _: work()) as child:
        return child.result()
