"""What happens when a process forks: the child starts clean, and takes nothing from its parent."""

from __future__ import annotations

import os
import runpy
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from atproto_session import _adapter, _fork
from atproto_session._adapter import HardenedAdapter, Network
from atproto_session.errors import LockTimeoutError, StoreError
from atproto_session.locks import FileLocks, Locks, ThreadLocks
from atproto_session.session import Session
from atproto_session.stores import FullStore, JSONStore, MemoryStore, SQLiteStore, _connections, open_store, sqlite
from atproto_session.testing.contracts import DID, make_session

from .core import SOON, wait_until
from .processes import Child, in_child

# From Python 3.12 on, to fork while other threads run is warned of. That it can be survived is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@contextmanager
def another_thread(work: Callable[[threading.Event, threading.Event], object]) -> Iterator[threading.Event]:
    """``work(ready, go_on)`` in a thread, which is ready in the block; the event lets it go on before its end."""
    ready, go_on = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(work, ready, go_on)
        try:
            assert ready.wait(SOON)
            yield go_on
        finally:
            go_on.set()
        running.result(SOON)


def holding(locks: Locks) -> Callable[[threading.Event, threading.Event], None]:
    def hold(ready: threading.Event, go_on: threading.Event) -> None:
        with locks.hold(DID, timeout=SOON):
            ready.set()
            assert go_on.wait(SOON)

    return hold


def is_free(locks: Locks, name: str = DID) -> bool:
    try:
        with locks.hold(name, timeout=0):
            return True
    except LockTimeoutError:
        return False


# Locks


def test_a_lock_that_a_thread_of_the_parent_holds_is_free_in_the_child() -> None:
    locks = ThreadLocks()
    with another_thread(holding(locks)):
        assert in_child(lambda: is_free(locks))
        assert not is_free(locks)


def test_a_file_lock_that_a_thread_of_the_parent_holds_is_taken_for_the_child(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path)
    with another_thread(holding(locks)) as release:
        assert in_child(lambda: is_free(locks)) is False
        assert not is_free(FileLocks(tmp_path))
        release.set()
        wait_until(lambda: is_free(locks))
    assert in_child(lambda: is_free(locks))


def test_a_child_forked_in_the_block_does_not_hold_the_lock_and_its_end_does_not_release_it(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path)
    block = locks.hold(DID, timeout=0)
    hold = block.__enter__()

    def leave_the_block() -> tuple[bool, bool]:
        extended = hold.extend(30.0)
        block.__exit__(None, None, None)
        return extended, is_free(FileLocks(tmp_path))

    assert in_child(leave_the_block) == (False, False)
    assert hold.extend(30.0)
    assert not is_free(FileLocks(tmp_path))
    block.__exit__(None, None, None)
    assert is_free(FileLocks(tmp_path))


def test_a_child_that_ends_as_programs_do_leaves_the_lock_with_its_parent(tmp_path: Path) -> None:
    """Garbage collection and the exit handlers of the child included."""
    script = """
import gc, os, sys
from atproto_session.locks import FileLocks
from atproto_session.errors import LockTimeoutError
with FileLocks(sys.argv[1]).hold("did", timeout=0) as hold:
    if (pid := os.fork()) == 0:
        gc.collect()
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert hold.extend(30.0)
    try:
        with FileLocks(sys.argv[1]).hold("did", timeout=0):
            print("free")
    except LockTimeoutError:
        print("held")
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout == "held\n"


def test_a_lock_that_the_parent_releases_is_free_while_the_child_lives(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path)
    reader, writer = os.pipe()
    with locks.hold(DID, timeout=0):
        child = Child(lambda _: os.close(writer) or os.read(reader, 1))  # type: ignore[func-returns-value]
        assert not is_free(FileLocks(tmp_path))
    assert is_free(FileLocks(tmp_path))
    os.close(writer)
    assert child.result() == b""
    os.close(reader)


def test_a_lock_is_free_when_the_parent_is_killed_and_its_child_lives_on(tmp_path: Path) -> None:
    script = """
import os, sys
from atproto_session.locks import FileLocks
with FileLocks(sys.argv[1]).hold("did", timeout=0):
    if os.fork() == 0:
        print("child", os.getpid(), flush=True)
    sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    try:
        child = int(parent.stdout.readline().split()[1])
        assert not is_free(FileLocks(tmp_path), "did")
        parent.send_signal(signal.SIGKILL)
        assert parent.wait(SOON) == -signal.SIGKILL
        with FileLocks(tmp_path).hold("did", timeout=SOON):
            os.kill(child, 0)  # it is there still
    finally:
        parent.kill()
        parent.stdin.close()
        parent.stdout.read()  # until the child has ended, too
        parent.stdout.close()
        parent.wait()


# Stores


def test_a_child_has_the_memory_of_a_store_for_itself() -> None:
    store = MemoryStore[Session](max_entries=10)
    store.set(DID, make_session())
    store.logins.put("state", {"verifier": "v"}, 4e9)

    def use() -> tuple[Session | None, dict[str, Any] | None]:
        store.set("other", make_session())
        return store.get(DID), store.logins.take("state")

    assert in_child(use) == (make_session(), {"verifier": "v"})
    assert store.logins.take("state") == {"verifier": "v"}
    assert store.get("other") is None


@pytest.mark.parametrize("kind", ["json", "sqlite"])
def test_parent_and_child_share_a_store(kind: str, tmp_path: Path) -> None:
    with closing(open_store(f"{kind}:///{tmp_path}/place")) as store:
        store.set(DID, make_session("1"))

        def use() -> tuple[Session | None, bool]:
            return store.get(DID), store.replace(DID, make_session("2"), make_session("1").token_set)

        assert in_child(use) == (make_session("1"), True)
        assert store.get(DID) == make_session("2")
        assert store.replace(DID, make_session("3"), make_session("2").token_set)
        assert in_child(lambda: in_child(lambda: store.get(DID))) == make_session("3")


def test_what_a_child_writes_survives_the_end_of_its_parents_database(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    store: FullStore = SQLiteStore(path)
    store.set(DID, make_session("1"))
    reader, writer = os.pipe()

    def write_later(_: object) -> Session | None:
        os.close(writer)
        seen = store.get(DID)
        os.read(reader, 1)
        store.set(DID, make_session("2"))
        return seen

    child = Child(write_later)
    assert store.get(DID) == make_session("1")
    store.close()
    with closing(SQLiteStore(path)) as another:
        assert another.get(DID) == make_session("1")
    os.close(writer)
    assert child.result() == make_session("1")
    os.close(reader)
    with closing(SQLiteStore(path)) as later:
        assert later.get(DID) == make_session("2")


def test_a_fork_waits_for_the_statements_under_way(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        pool = store._database._connections

        def write(ready: threading.Event, go_on: threading.Event) -> None:
            def work(connection: sqlite3.Connection) -> None:
                connection.execute("INSERT INTO logins VALUES ('state', '', 0)")
                ready.set()
                assert go_on.wait(SOON)

            store._database.write(work)

        def use() -> bool:
            store.set(DID, make_session())
            return store.get(DID) == make_session()

        with ThreadPoolExecutor(1) as forking, another_thread(write) as go_on:
            forked = forking.submit(in_child, use)
            wait_until(lambda: pool._turns._pausing)
            assert not forked.done()
            go_on.set()
            assert forked.result(SOON) is True
        assert store.get(DID) == make_session()


def test_a_child_forked_in_the_middle_of_a_statement_refuses_the_database(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        store.set(DID, make_session())
        pool = store._database._connections
        pool._turns._patience = 0.01

        def use() -> str:
            with pytest.raises(StoreError, match="forked while its parent was using the SQLite database") as caught:
                store.get(DID)
            with pytest.raises(StoreError, match="forked while its parent was using the SQLite database"):
                SQLiteStore(tmp_path / "sessions.db")  # no more than the one that was inherited
            return str(caught.value)

        with pool.lent():
            in_child(use)
        assert store.get(DID) == make_session()


def test_a_child_that_leaves_the_block_it_was_forked_in_does_not_close_the_connection(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        pool = store._database._connections
        pool._turns._patience = 0.01
        block = pool.lent()
        connection = block.__enter__()

        def leave() -> int:
            block.__exit__(None, None, None)
            assert pool._idle == []
            return connection.total_changes  # of a closed one it is an error

        assert in_child(leave) == 0
        block.__exit__(None, None, None)
        assert pool._idle == [connection]


def test_a_fork_does_not_wait_for_a_database_that_another_program_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits between its tries, with nothing in its hands, and the child may use the database."""
    path = tmp_path / "sessions.db"
    waiting = threading.Event()

    class Time:
        monotonic, time = time.monotonic, time.time

        @staticmethod
        def sleep(seconds: float) -> None:
            waiting.set()
            time.sleep(seconds)

    with closing(SQLiteStore(path)) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        store.set(DID, make_session("1"))
        monkeypatch.setattr(sqlite, "time", Time)
        other.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as threads:
            writer = threads.submit(store.set, DID, make_session("2"))
            assert waiting.wait(SOON)
            assert in_child(lambda: store.get(DID)) == make_session("1")
            assert not writer.done()
            other.execute("ROLLBACK")
            writer.result(SOON)
        assert store.get(DID) == make_session("2")


def test_connections_that_no_fork_has_announced_are_kept_and_never_used(tmp_path: Path) -> None:
    """As after a fork from C code that tells Python only afterwards."""
    store = SQLiteStore(tmp_path / "sessions.db")
    store.set(DID, make_session())
    pool = store._database._connections
    (connection,) = pool._idle
    pool.reset_after_fork()
    try:
        assert _connections._inherited == [connection]
        with pytest.raises(StoreError, match="forked"):
            store.get(DID)
        store.close()
        assert connection.execute("SELECT count(*) FROM sessions").fetchone() == (1,)
    finally:
        _connections._inherited.remove(connection)
        _connections._inherited_paths.remove(store._database.path)
        connection.close()


def test_a_fork_waits_for_a_database_that_is_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, pausing = sqlite._create, threading.Event()
    pause = _connections.Connections.pause_for_fork

    def noticed(pool: _connections.Connections) -> None:
        pausing.set()
        pause(pool)

    def open_slowly(ready: threading.Event, go_on: threading.Event) -> SQLiteStore:
        def slow(path: Path) -> None:
            ready.set()
            assert go_on.wait(SOON)
            create(path)

        monkeypatch.setattr(sqlite, "_create", slow)
        return SQLiteStore(tmp_path / "sessions.db")

    def let_go_on(go_on: threading.Event) -> None:
        assert pausing.wait(SOON)
        assert not (tmp_path / "sessions.db").exists()
        go_on.set()

    def use() -> bool:
        with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
            store.set(DID, make_session())
            return store.get(DID) == make_session()

    monkeypatch.setattr(_connections.Connections, "pause_for_fork", noticed)
    with another_thread(open_slowly) as go_on:
        threading.Thread(target=let_go_on, args=(go_on,)).start()
        assert in_child(use)
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        assert store.get(DID) == make_session()


def test_nobody_gets_a_connection_while_a_fork_happens(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store, ThreadPoolExecutor(1) as threads:
        store.set(DID, make_session())
        pool = store._database._connections
        pool.pause_for_fork()
        assert not (tmp_path / "sessions.db-wal").exists()
        reader = threads.submit(store.get, DID)
        with pytest.raises(TimeoutError):
            reader.result(0.1)
        pool.resume_after_fork()
        assert reader.result(SOON) == make_session()


def test_a_store_works_in_a_pool_of_forked_workers_while_the_parent_goes_on(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        stop = threading.Event()

        def read() -> bool:
            good = True
            while not stop.is_set():
                good = good and store.get(DID) is not None
            return good

        store.set(DID, make_session())
        with ThreadPoolExecutor(2) as threads:
            readers = [threads.submit(read) for _ in range(2)]
            try:
                children = [Child(lambda _, n=n: store.set(f"{DID}#{n}", make_session(str(n)))) for n in range(8)]  # type: ignore[misc]
                for child in children:
                    child.result()
            finally:
                stop.set()
            assert all(reader.result(SOON) for reader in readers)
        assert sorted(store) == [DID, *(f"{DID}#{n}" for n in range(8))]


# Looking names up


class Names:
    """Those of a network where a look-up takes as long as the test likes."""

    def __init__(self) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()
        self._network = Network(getaddrinfo=self._getaddrinfo)

    def _getaddrinfo(self, *_: object) -> list[tuple[Any, ...]]:
        self.asked.set()
        assert self.answer.wait(SOON)
        return []

    def look_up(self, timeout: float | None = None) -> str:
        """:param timeout: a look-up that is bounded happens in a thread of its own."""
        with requests.Session() as session:
            session.mount("http://", HardenedAdapter(network=self._network))
            with pytest.raises(requests.ConnectionError) as caught:
                session.get("http://pds.example.com/", timeout=timeout)
        return str(caught.value)


@pytest.fixture
def names() -> Iterator[Names]:
    names = Names()
    try:
        yield names
    finally:
        names.answer.set()


@pytest.mark.parametrize("timeout", [None, SOON])
def test_a_fork_waits_for_a_look_up(timeout: float | None, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_adapter._look_ups, "_patience", SOON)
    with ThreadPoolExecutor(2) as threads:
        looking = threads.submit(names.look_up, timeout)
        assert names.asked.wait(SOON)
        forked = threads.submit(in_child, lambda: names.look_up(timeout))
        wait_until(lambda: _adapter._look_ups._pausing)
        with pytest.raises(TimeoutError):
            forked.result(0.1)
        names.answer.set()
        assert "no address" in forked.result(SOON)
        assert "no address" in looking.result(SOON)


def test_no_look_up_begins_while_a_fork_happens(names: Names) -> None:
    names.answer.set()
    with ThreadPoolExecutor(1) as threads:
        _adapter._look_ups.pause_for_fork()
        try:
            looking = threads.submit(names.look_up)
            assert not names.asked.wait(0.1)
        finally:
            _adapter._look_ups.resume_after_fork()
        assert "no address" in looking.result(SOON)


def test_a_fork_waits_for_a_look_up_only_so_long(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a DNS server that does not answer, it would be too long."""
    monkeypatch.setattr(_adapter._look_ups, "_patience", 0.01)

    def look_up() -> str:
        names.answer = threading.Event()  # the parent's is of no use here
        names.answer.set()
        return names.look_up()

    with ThreadPoolExecutor(1) as threads:
        looking = threads.submit(names.look_up)
        assert names.asked.wait(SOON)
        assert "no address" in in_child(look_up)
        assert not looking.done()
        names.answer.set()
        assert "no address" in looking.result(SOON)


# The register


class Recorder:
    def __init__(self, events: list[str], name: str) -> None:
        self._events = events
        self._name = name

    def pause_for_fork(self) -> None:
        self._events.append(f"pause {self._name}")

    def resume_after_fork(self) -> None:
        self._events.append(f"resume {self._name}")

    def reset_after_fork(self) -> None:
        self._events.append(f"reset {self._name}")


def test_who_is_told_of_a_fork() -> None:
    events: list[str] = []
    paused, aware, dropped = (Recorder(events, name) for name in ("paused", "aware", "dropped"))
    _fork.pause_at_fork(paused)
    _fork.reset_in_child(aware)
    _fork.reset_in_child(dropped)
    del dropped
    assert sorted(in_child(lambda: events)) == ["pause paused", "reset aware", "reset paused"]
    assert events == ["pause paused", "resume paused"]


def test_forks_of_two_threads_come_one_after_the_other() -> None:
    events: list[str] = []
    recorder = Recorder(events, "it")
    _fork.pause_at_fork(recorder)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda number: in_child(lambda: number), range(8))) == list(range(8))
    assert events == ["pause it", "resume it"] * 8


def test_a_pause_that_fails_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Recorder):
        def pause_for_fork(self) -> None:
            super().pause_for_fork()
            raise KeyboardInterrupt

    events: list[str] = []
    failing = Failing(events, "it")
    _fork.pause_at_fork(failing)
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    assert in_child(lambda: True)
    assert in_child(lambda: True)
    assert events == ["pause it", "resume it"] * 2


def test_a_register_that_grows_while_it_is_read_is_read_again() -> None:
    class Growing(weakref.WeakSet[Any]):
        reads = 0

        def __iter__(self) -> Iterator[Any]:
            self.reads += 1
            if self.reads == 1:
                raise RuntimeError("Set changed size during iteration")
            return super().__iter__()

    recorder = Recorder([], "it")
    assert _fork.copy_of(Growing([recorder])) == [recorder]


def test_where_nothing_forks_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "register_at_fork")
    monkeypatch.delattr(threading, "_register_atexit")
    assert "reset_in_child" in runpy.run_path(_fork.__file__)


def test_json_stores_need_no_pause(tmp_path: Path) -> None:
    store = JSONStore(tmp_path)

    def write(ready: threading.Event, go_on: threading.Event) -> None:
        with store._files.writing("sessions/x.json"):
            ready.set()
            assert go_on.wait(SOON)

    with another_thread(write):
        in_child(lambda: store.set(DID, make_session()))
    assert store.get(DID) == make_session()
