"""Which worker this is, and whether another is still there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from atproto_session import _worker
from atproto_session._worker import Life, life_of, this_worker

from .core import wait_until
from .processes import in_child

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
    finally:
        this_worker.cache_clear()


def test_a_child_is_another_worker() -> None:
    assert in_child(this_worker) != this_worker()
