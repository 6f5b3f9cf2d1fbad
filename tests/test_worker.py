"""Which worker this is, and whether another is still there."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import uuid
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from atproto_session import _worker
from atproto_session._worker import Life, at_work, life_of, this_worker

from .core import wait_until
from .processes import forked, in_child

#: What the processes that run these tests side by side share no name of.
THIS, THAT = uuid.uuid4().hex, uuid.uuid4().hex

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells about other processes")


def test_this_worker_is_alive() -> None:
    assert life_of(this_worker()) is Life.ALIVE


def worker_of(process: subprocess.Popen[bytes]) -> str:
    machine = this_worker().rsplit("/", 2)[0]
    return f"{machine}/{process.pid}/{_worker._start_of(process.pid)}"


def test_a_process_that_was_killed_is_gone_and_one_that_was_stopped_is_not() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        worker = worker_of(process)
        assert life_of(worker) is Life.ALIVE
        process.send_signal(19)  # SIGSTOP
        assert life_of(worker) is Life.ALIVE
        process.kill()
        wait_until(lambda: life_of(worker) is Life.GONE)  # though nobody has waited for it yet
    assert life_of(worker) is Life.GONE


def test_it_shows_what_it_is_at_work_on() -> None:
    with at_work(THIS) as worker:
        assert worker == this_worker()
        assert life_of(worker, THIS) is Life.ALIVE
        assert life_of(worker, THAT) is Life.GONE
    assert life_of(worker, THIS) is Life.GONE
    assert life_of(worker) is Life.ALIVE
    with at_work(THIS) as worker:  # and so on
        assert life_of(worker, THIS) is Life.ALIVE


def test_another_process_sees_it_until_its_end() -> None:
    def work(connection: Connection) -> None:
        with at_work(THIS) as worker:
            connection.send(worker)
            connection.recv()

    with forked(work) as child:
        worker = child.hear()
        assert life_of(worker, THIS) is Life.ALIVE
        assert life_of(worker, THAT) is Life.GONE
        os.kill(child.pid, signal.SIGSTOP)
        assert life_of(worker, THIS) is Life.ALIVE
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: life_of(worker, THIS) is Life.GONE)


def test_a_child_that_was_forked_is_not_at_the_work_of_its_parent() -> None:
    def work(connection: Connection) -> None:
        connection.send("begun")
        connection.recv()

    with at_work(THIS) as worker, forked(work) as child:
        assert child.hear() == "begun"
        assert in_child(lambda: life_of(worker, THIS)) is Life.ALIVE
        _worker._signs.pop().close()  # as if the parent had done its work
        assert life_of(worker, THIS) is Life.GONE, "though its child is there"


def test_of_one_that_can_show_nothing_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("too many open files")

    def work() -> str:
        with at_work(THIS) as worker:
            return worker

    with at_work(THIS) as worker, at_work(THIS) as another:
        assert life_of(another, THAT) is Life.ALIVE, "its name was taken"
        monkeypatch.setattr(_worker, "_new_socket", refuse)
        assert life_of(worker, THAT) is Life.ALIVE, "in doubt"
        monkeypatch.undo()
        assert life_of(worker, THAT) is Life.GONE
    monkeypatch.setattr(_worker, "_new_socket", refuse)
    worker, gone = work(), in_child(work)
    monkeypatch.undo()
    assert life_of(worker, THIS) is Life.ALIVE
    assert life_of(gone, THIS) is Life.GONE


def test_a_thread_that_has_gone_to_another_network_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it shows there cannot be seen from here."""
    this_worker()
    machine = _worker._machine()
    with monkeypatch.context() as gone, ExitStack() as work:
        gone.setattr(_worker, "_machine", lambda: f"{machine}1")
        worker = work.enter_context(at_work(THIS))
        gone.undo()
        gone.setattr(_worker, "_is_at_work", lambda on: False)
        assert life_of(worker, THIS) is Life.ALIVE


def test_another_process_with_the_same_number_is_another() -> None:
    assert life_of(f"{this_worker()}0") is Life.GONE


@pytest.mark.parametrize("worker", ["", "host:1", "host/boot/12/34", "/////", "host//12/34"])
def test_of_other_machines_nothing_is_known(worker: str) -> None:
    assert life_of(worker) is Life.UNKNOWN


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **options: object) -> str:
        raise PermissionError

    this_worker.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_text", refuse)
            assert this_worker().endswith("/")
            assert life_of(this_worker()) is Life.UNKNOWN
            with at_work(THIS) as worker:
                assert life_of(worker, THIS) is Life.UNKNOWN
    finally:
        this_worker.cache_clear()


def test_a_child_is_another_worker() -> None:
    assert in_child(this_worker) != this_worker()


def test_where_nothing_forks_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "register_at_fork")
    assert "at_work" in runpy.run_path(_worker.__file__)
