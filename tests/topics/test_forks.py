"""Processes that fork in the middle of things: parent and child go on, and every refresh happens once.

What each part does at a fork is in :mod:`tests.test_fork`; here the whole client is forked.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import jwt
import pytest

from atproto_session import ClientMetadata, Freshness, LockTimeoutError, OAuthClient, Session, _fork
from atproto_session import _steps as steps
from atproto_session._driver import _Driver
from atproto_session._flights import Flight
from atproto_session.dpop import generate_verifier, proof
from atproto_session.keys import generate_jwk, load_private_key
from atproto_session.stores import SQLiteStore, _connections, open_store
from atproto_session.testing.network import Account, LocalNetwork
from atproto_session.testing.network.faults import Fault

from ..core import DID, KEY, SOON, Gate, Worker, wait_until
from ..processes import ROOT, Child, Program, forked, in_child
from ..programs import fork_target
from ..scenes import GET_SESSION, Scene, log_in, store_tokens

# From Python 3.12 on, to fork while other threads run is warned of. That it can be survived is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class ForkScene(Scene):
    """With a client that was made before any fork.

    :ivar lost: the refresh tokens that were used twice, as they may be after an answer was lost.
    """

    def __init__(self, network: LocalNetwork, store: str) -> None:
        super().__init__(network, store)
        self.lost: set[str] = set()

    def expire_in(self, seconds: float) -> None:
        """Let the stored access token expire then, without a word to its server."""
        store_tokens(self.client, self.did, expires_at=datetime.now(UTC) + timedelta(seconds=seconds))

    def request(self) -> int:
        return self.client.restore(self.did).get(GET_SESSION).status_code

    @contextmanager
    def refresh_under_way(self) -> Iterator[Fault]:
        """A refresh of this process, processed by the server, whose answer is held back until the block ends or the
        fault is disarmed; in the end, that it was the only one."""
        before = self.network.rotations
        fault = self.network.fault("refresh", "late")
        worker = Worker(lambda: self.client.sessions.get_session(self.did))
        try:
            assert fault.fired.wait(SOON)
            yield fault
            assert self.network.rotations == before + 1
        finally:
            fault.disarm()
        session = worker.outcome()
        assert isinstance(session, Session)
        assert session.token_set.has_same_tokens(self.stored().token_set)
        assert self.network.rotations == before + 1
        assert self.request() == 200

    def lock_is_free(self) -> bool:
        return self._is_free(self.did)

    def _is_free(self, did: str) -> bool:
        """For another process: a lock of the same file, opened anew."""
        with closing(open_store(self.store)) as store:
            try:
                with store.locks.hold(did, timeout=0):
                    return True
            except LockTimeoutError:
                return False

    def another_account(self) -> Account:
        """One whose lock is in another file, since a thousand files are shared by all accounts. It has logged in."""
        while True:
            other = self.network.create_account()
            with closing(open_store(self.store)) as store, store.locks.hold(self.did, timeout=0):
                if not self._is_free(other.did):
                    continue
            log_in(self.network, self.client, other)
            return other


@pytest.fixture(params=["json", "sqlite"])
def scene(request: pytest.FixtureRequest, network: LocalNetwork, tmp_path: Path) -> Iterator[ForkScene]:
    with closing(ForkScene(network, f"{request.param}:///{tmp_path}/sessions")) as scene:
        yield scene
    assert {token for token, uses in network.refresh_token_uses.items() if uses > 1} == scene.lost


# A refresh under way


def test_a_child_takes_what_the_refresh_of_its_parent_brings(scene: ForkScene) -> None:
    scene.expire_in(-60.0)

    def work(connection: Connection) -> str:
        assert not scene.client.sessions._flights._all
        return fork_target.refresh(scene.client, scene.did, connection.send)

    with scene.refresh_under_way() as fault, forked(work) as child, forked(work) as another:
        # Not at the parent's flight, which ends for nobody here.
        assert child.hear() == another.hear() == "at the lock"
        lookups = scene.network.requests(f"/{scene.did}")
        fault.disarm()
        assert child.result() == another.result() == scene.stored().token_set.access_token
        assert scene.network.requests(f"/{scene.did}") == lookups  # it is found in the store, with no preparations


def test_a_child_goes_on_with_the_old_token_as_others_do(scene: ForkScene) -> None:
    """While it is about to expire, and another process refreshes it."""
    scene.expire_in(9.5)  # less than ten seconds are stale, and these are long enough for a slow machine
    old = scene.stored().token_set.access_token
    with scene.refresh_under_way():
        assert in_child(lambda: scene.client.sessions.get_session(scene.did).token_set.access_token) == old


def test_a_child_closes_its_client_without_waiting_for_its_parent(scene: ForkScene) -> None:
    scene.expire_in(-60.0)
    with scene.refresh_under_way():
        in_child(scene.client.close)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_the_end_of_a_child_is_nothing_to_the_refresh_of_its_parent(scene: ForkScene, how: str) -> None:
    scene.expire_in(-60.0)
    with scene.refresh_under_way():
        with forked(lambda connection: connection.recv()) as child:
            if how == "exit":
                child.say("now")
                assert child.result() == "now"
        assert not scene.lock_is_free()
    assert scene.lock_is_free()


def test_what_a_child_does_is_nothing_to_the_refresh_of_its_parent(scene: ForkScene, network: LocalNetwork) -> None:
    """Another account in the same store."""
    other = scene.another_account()
    scene.expire_in(-60.0)
    before = network.rotations
    fault = network.fault("refresh", "late")
    worker = Worker(lambda: scene.client.sessions.get_session(scene.did))
    assert fault.fired.wait(SOON)

    def work() -> int:
        return scene.client.restore(other.did, True).get(GET_SESSION).status_code

    assert in_child(work) == 200
    assert in_child(partial(scene.client.revoke, other.did)) is None
    assert not scene.lock_is_free()
    fault.disarm()
    worker.outcome()
    assert network.rotations == before + 2
    assert scene.request() == 200


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_of_multiprocessing(scene: ForkScene, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    options = scene.network.client_options()
    process = (
        context.Process(target=fork_target.refresh_inherited, args=(scene.client, scene.did, theirs))
        if method == "fork"
        else context.Process(target=fork_target.refresh_anew, args=(scene.store, options, scene.did, theirs))
    )
    scene.expire_in(-60.0)
    with scene.refresh_under_way() as fault, ours, theirs:
        process.start()
        assert ours.poll(SOON)
        assert ours.recv() == "at the lock"
        fault.disarm()
        assert ours.poll(SOON)
        assert ours.recv() == scene.stored().token_set.access_token
        process.join(SOON)
        assert process.exitcode == 0
        process.close()


def test_a_fork_in_a_listener(scene: ForkScene) -> None:
    """In the thread of the refresh itself, whose locks are released by then."""
    children: list[Child] = []

    def work(connection: Connection) -> int:
        stop()
        return scene.client.restore(scene.did, True).get(GET_SESSION).status_code

    stop = scene.client.sessions.on_updated(lambda event: children.append(Child(work)))
    scene.client.restore(scene.did, True)
    stop()
    (child,) = children
    try:
        assert child.result() == 200
    finally:
        child.end()
    assert scene.network.rotations == 2
    assert scene.request() == 200


def test_a_child_looks_servers_up_without_waiting_for_its_parent(scene: ForkScene) -> None:
    """Flights of the caches, too, end in the parent alone."""
    fault = scene.network.fault("plc", "hold")
    with OAuthClient(ClientMetadata.loopback(), store="memory:", **scene.network.client_options()) as client:
        worker = Worker(lambda: client.authorize(scene.did))
        assert fault.fired.wait(SOON)
        assert in_child(lambda: client.authorize(scene.did)).startswith(scene.network.issuer)
        fault.disarm()
        worker.outcome()


# A parent that ends first, a child that ends as programs do


class ForkParent(Program):
    """A process of :mod:`tests.programs.fork_parent` whose refresh was processed, and whose answer is held back."""

    def __init__(self, scene: ForkScene, child: str) -> None:
        self.fault = scene.network.fault("refresh", "late")
        super().__init__("programs.fork_parent")
        self.say(scene.setup | {"child": child})
        assert self.fault.fired.wait(SOON)
        self.say("fork")
        self.pids: dict[str, int] = self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(SOON)

    def __exit__(self, *error: object) -> None:
        self.fault.disarm()
        self.close()  # until the child has ended, too


def test_a_child_that_ends_as_programs_do_leaves_the_refresh_to_its_parent(scene: ForkScene) -> None:
    """Garbage collection, exit handlers and the wait for threads included."""
    with ForkParent(scene, "exit") as running:
        assert running.hear() == {"child ended": 0}
        assert not scene.lock_is_free()
        running.fault.disarm()
        assert running.hear() == {"of": "parent", "got": scene.stored().token_set.access_token}
    assert running.process.returncode == 0
    assert scene.network.rotations == 1
    assert scene.request() == 200


def test_the_child_of_a_parent_that_was_killed_gets_the_lock(scene: ForkScene) -> None:
    """And finds what its parent has left: an answer that is lost."""
    token = scene.stored().token_set.refresh_token or ""
    with ForkParent(scene, "refresh") as running:
        running.kill()
        os.kill(running.pids["child"], 0)  # it lives
        wait_until(scene.lock_is_free)  # at once in files; a server has to see that a connection has ended
        attempt = scene.stored().attempt
        assert attempt is not None
        assert f"/{running.pids['parent']}/" in attempt.by
        running.say("refresh")
        assert running.hear() == {"of": "child", "error": "TokenRefreshError", "answer_lost": True}
    assert scene.client.sessions.get_stored(scene.did) is None
    assert scene.network.refresh_token_uses[token] == 2
    scene.lost.add(token)


# Connections and locks


def test_no_connection_to_a_server_is_shared(scene: ForkScene) -> None:
    session = scene.client.restore(scene.did)
    assert session.get(GET_SESSION).status_code == 200
    ports = local_ports(scene.client)
    assert len(ports) == 1

    def work() -> tuple[set[int], int, set[int]]:
        return local_ports(scene.client), session.get(GET_SESSION).status_code, local_ports(scene.client)

    inherited, status, own = in_child(work)
    assert inherited == set()
    assert status == 200
    assert len(own) == 1
    assert own.isdisjoint(ports)
    assert session.get(GET_SESSION).status_code == 200
    assert local_ports(scene.client) == ports  # it is alive


def local_ports(client: OAuthClient) -> set[int]:
    """Where the idle connections of a client begin."""
    ports = set()
    pools = client._pool.poolmanager.pools
    for key in pools.keys():  # noqa: SIM118 - it cannot be iterated
        idle = pools[key].pool
        taken = []
        try:
            while True:
                taken.append(idle.get(block=False))
        except Empty:
            pass
        for connection in reversed(taken):
            idle.put(connection, block=False)
        ports |= {connection.sock.getsockname()[1] for connection in taken if connection is not None}
    return ports


def test_an_answer_that_is_being_read_is_not_disturbed(scene: ForkScene) -> None:
    session = scene.client.restore(scene.did)
    fault = scene.network.fault("resource", "drip", interval=0.001, body_only=True)
    answer = session.get(GET_SESSION, stream=True)
    first = answer.raw.read(1)

    def work() -> int:
        status = session.get(GET_SESSION).status_code
        answer.close()
        scene.client.close()
        gc.collect()
        return status

    assert in_child(work) == 200
    fault.disarm()
    assert json.loads(first + answer.raw.read())["did"] == scene.did


def test_no_connection_to_the_database_crosses_a_fork(scene: ForkScene) -> None:
    scene.request()

    def work() -> tuple[list[str], int]:
        inherited = open_files(scene.store)
        return inherited, scene.request()

    assert in_child(work) == ([], 200)
    assert scene.request() == 200


def test_a_fork_waits_for_a_connection_that_is_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that inherited one would believe to have the locks of its parent on the database."""
    url = f"sqlite:///{tmp_path}/sessions"
    with closing(SQLiteStore(tmp_path / "sessions")) as store:
        pool = store._database._connections
        connect, gate, waiting = pool._connect, Gate(), threading.Event()

        def make() -> _connections.Connection:
            connection = connect()
            gate()
            return connection

        def sleep(seconds: float) -> None:
            waiting.set()
            time.sleep(seconds)

        monkeypatch.setattr(pool, "_connect", make)
        monkeypatch.setattr(_fork, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        reading = Worker(lambda: store.get(DID))
        gate.wait_until_reached()
        forking = Worker(lambda: in_child(lambda: open_files(url)))
        try:
            wait_until(lambda: waiting.is_set() or not forking.is_alive())
        finally:
            gate.open()
        assert forking.outcome() == []
        assert reading.outcome() is None


def open_files(url: str) -> list[str]:
    """Of those that this process has open, the ones of a store."""
    place = url.partition(":///")[2]
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:  # that of the directory itself
            continue
        if target.startswith(place):
            found.append(target)
    return found


def test_parent_and_children_write_at_the_same_time(scene: ForkScene) -> None:
    def write(connection: Connection, name: str) -> None:
        session = scene.stored()
        connection.send("ready")
        connection.recv()
        for number in range(25):
            scene.client.sessions.set_stored(f"{scene.did}#{name}-{number}", session)

    with forked(partial(write, name="a")) as a, forked(partial(write, name="b")) as b:
        assert a.hear() == b.hear() == "ready"
        a.say("go")
        b.say("go")
        for number in range(25):
            scene.client.sessions.set_stored(f"{scene.did}#c-{number}", scene.stored())
        a.result()
        b.result()
    names = {f"{scene.did}#{name}-{number}" for name in "abc" for number in range(25)}
    assert set(scene.client._store) == {scene.did, *names}
    assert all(scene.client.sessions.get_stored(name) is not None for name in names)


@pytest.mark.parametrize("kind", ["memory", "json", "sqlite"])
def test_no_lock_that_is_taken_in_the_parent_stops_a_child(
    kind: str, network: LocalNetwork, account: Account, tmp_path: Path
) -> None:
    """Every lock that can be found in a client, those of the connection pools below it included."""
    url = "memory:" if kind == "memory" else f"{kind}:///{tmp_path}/sessions"
    with OAuthClient(ClientMetadata.loopback(), store=url, **network.client_options()) as client:
        client.callback(network.authorize(client.authorize(account.did), account))
        assert client.restore(account.did).get(GET_SESSION).status_code == 200
        locks = locks_in(client)
        assert locks
        taken, over = threading.Event(), threading.Event()

        def take_all() -> None:
            for lock in locks:
                assert lock.acquire(timeout=SOON)
            taken.set()
            over.wait()
            for lock in locks:
                lock.release()

        def work() -> int:
            client.authorize(account.did)
            status = client.restore(account.did, True).get(GET_SESSION).status_code
            client.close()
            return status

        network.rotate_nonces()  # so that there are new ones to be kept
        holder = Worker(take_all)
        try:
            assert taken.wait(SOON)
            assert in_child(work) == 200
        finally:
            over.set()
        holder.outcome()


def locks_in(root: object) -> list[Any]:
    """The locks in an object, and in what it is made of."""
    elsewhere = type, ModuleType, FunctionType, BuiltinFunctionType, CodeType
    kinds = type(threading.Lock()), type(threading.RLock())
    seen, found, left = {id(root)}, [], [root]
    while left:
        for part in gc.get_referents(left.pop()):
            if id(part) in seen or isinstance(part, elsewhere):
                continue
            seen.add(id(part))
            left.append(part)
            if isinstance(part, kinds):
                found.append(part)
    return found


# Many children


def test_workers_that_were_forked_after_the_client_was_made(scene: ForkScene) -> None:
    """As those of a web server that loads the application first: 4 processes with 8 threads each, 20 times."""
    assert scene.request() == 200

    def serve(connection: Connection) -> None:
        while connection.recv() == "go":
            barrier = threading.Barrier(8)
            workers = [Worker(lambda: (barrier.wait(SOON), scene.request())[1]) for _ in range(8)]  # noqa: B023
            connection.send([worker.outcome() for worker in workers])

    children = [Child(serve) for _ in range(4)]
    try:
        for round_ in range(20):
            if round_ % 2:
                scene.expire_in(-60.0)
            else:
                scene.network.expire_access_tokens(scene.did)
            for child in children:
                child.say("go")
            assert [child.hear() for child in children] == [[200] * 8] * 4
            assert scene.network.rotations == round_ + 1
        for child in children:
            child.say("stop")
            child.result()
    finally:
        for child in children:
            child.end()


def test_forks_of_a_parent_that_is_busy(scene: ForkScene) -> None:
    """While its threads make requests and refresh, each new child does the same."""
    enough = threading.Event()

    def work(refresh: bool) -> int:
        return scene.client.restore(scene.did, refresh or "auto").get(GET_SESSION).status_code

    def be_busy(refresh: bool) -> set[int]:
        seen = set()
        while not enough.is_set():
            seen.add(work(refresh))
        return seen

    busy = [Worker(partial(be_busy, refresh)) for refresh in (True, False, False)]
    try:
        for number in range(20):
            assert in_child(partial(work, number % 2 == 0)) == 200
    finally:
        enough.set()
    assert [worker.outcome() for worker in busy] == [{200}] * 3


# Chance


def test_parent_and_children_draw_different_numbers(scene: ForkScene) -> None:
    """Whatever has to be unique, the secret number inside of every signature included: two signatures that share it
    give the private key away."""
    draw(scene.client, scene.did)  # so that every generator has a state to inherit
    children = [Child(lambda _: draw(scene.client, scene.did)) for _ in range(3)]
    try:
        drawn = [draw(scene.client, scene.did), *(child.result() for child in children)]
    finally:
        for child in children:
            child.end()
    for name, values in ((name, [each[name] for each in drawn]) for name in drawn[0]):
        assert len(set(values)) == 4, name


def draw(client: OAuthClient, did: str) -> dict[str, object]:
    client.sessions.get_session(did)
    signed = proof(KEY, "GET", "https://pds.example.com/", clock=lambda: 0.0)
    attempt = _Driver(Flight(did, lambda flight: None), client.sessions._world).do(steps.Sign(1.0, ""))
    return {
        "jti": jwt.decode(signed, options={"verify_signature": False})["jti"],
        "signature": jwt.encode({}, load_private_key(KEY), algorithm="ES256").rpartition(".")[2][:32],
        "request": client.authorize(did),
        "verifier": generate_verifier(),
        "key": generate_jwk()["d"],
        "attempt": attempt.id,
        "jitter": Freshness().random(),
    }
