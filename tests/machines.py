"""Several machines: network namespaces, each with a link of its own to one that has the servers.

The workers of a machine reach the store over its link, and, since the local network is on this machine's loopback, have
forwarders on theirs that lead there, over the link as well. To cut a link is to let what is sent disappear, as when a
cable is pulled: no connection is told. ``python -m tests.machines`` (``make machines``) puts the stores through much
more of this than the tests do.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from atproto_session import ClientMetadata, OAuthClient
from atproto_session.testing.network import Account, LocalNetwork

from .core import RESTLESS, SOON, wait_until
from .processes import Program, stop
from .scenes import log_in, store_tokens, stored
from .servers import SERVERS, Missing, Redis, Server, connect_mysql

_NEW_NETWORK = 0x40000000
_numbers = itertools.count()


def check_possible() -> None:
    """
    :raises Missing: there can be no namespaces here.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise Missing("needs network namespaces: run as root, with Debian's iproute2")
    probe = f"atproto-{os.getpid()}-probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        raise Missing("needs network namespaces, which this machine does not allow")
    ip("netns", "del", probe)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr}")


def enter(name: str) -> None:
    """Have this thread be in that namespace. The sockets that it makes stay there."""
    with Path(f"/run/netns/{name}").open("rb") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "setns")


class Machine:
    """One machine.

    :param clock: by how many seconds its clock is ahead.
    """

    def __init__(self, hub: str, number: int, *, clock: float = 0.0) -> None:
        self.name = f"{hub}-{number}"
        self.hub_address, self._address = f"10.213.{number}.1", f"10.213.{number}.2"
        self._hub, self._link, self._clock = hub, f"link{number}", clock
        ip("netns", "add", self.name)
        ip("-n", hub, "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("-n", hub, "addr", "add", f"{self.hub_address}/24", "dev", self._link)
        ip("-n", self.name, "addr", "add", f"{self._address}/24", "dev", "eth0")
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "link", "set", "eth0", "up")
        self.heal()

    def cut(self) -> None:
        ip("-n", self._hub, "link", "set", self._link, "down")

    def heal(self) -> None:
        ip("-n", self._hub, "link", "set", self._link, "up")

    @property
    def prefix(self) -> tuple[str, ...]:
        # Not the monotonic clock, by which waiting is measured.
        fake = ("env", "FAKETIME_DONT_FAKE_MONOTONIC=1", "faketime", "-m", "-f", f"{self._clock:+}s")
        clock = fake if self._clock else ()
        return ("ip", "netns", "exec", self.name, *clock)


class Machines:
    """So many machines, beside the one with the servers. A context manager.

    :ivar hub: the namespace of the servers.
    """

    def __init__(self, network: LocalNetwork, clocks: list[float]) -> None:
        check_possible()
        if any(clocks) and shutil.which("faketime") is None:
            raise Missing("needs clocks that differ: apt-get install faketime")
        self._network = network
        self._clocks = clocks
        self._listeners: list[socket.socket] = []
        self.hub = f"atproto-{os.getpid()}-{next(_numbers)}"
        self.machines: list[Machine] = []

    def __enter__(self) -> Self:
        ip("netns", "add", self.hub)
        try:
            ip("-n", self.hub, "link", "set", "lo", "up")
            for number, clock in enumerate(self._clocks):
                self.machines.append(Machine(self.hub, number, clock=clock))
            for port in {urlsplit(url).port for url in (self._network.plc_url, self._network.pds_url)}:
                self._forward(self.hub, "0.0.0.0", port, None, "127.0.0.1")
                for machine in self.machines:
                    self._forward(machine.name, "127.0.0.1", port, machine.name, machine.hub_address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for name in [*(machine.name for machine in self.machines), self.hub]:
            ip("netns", "del", name)

    def _forward(self, of: str, address: str, port: int | None, into: str | None, target: str) -> None:
        """What comes to a port in one namespace goes on to the same port from another."""
        ready: list[socket.socket] = []
        begun = threading.Event()

        def listen() -> None:
            enter(of)
            ready.append(socket.create_server((address, port or 0)))
            begun.set()

        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
        (listener,) = ready
        self._listeners.append(listener)

        def accept() -> None:
            if into is not None:
                enter(into)
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=connect, args=(near,), daemon=True).start()

        def connect(near: socket.socket) -> None:
            if into is not None:
                enter(into)
            try:
                far = socket.create_connection((target, port or 0), timeout=SOON)
            except OSError:
                near.close()
                return
            far.settimeout(None)
            with near, far:
                there = threading.Thread(target=pump, args=(near, far), daemon=True)
                there.start()
                pump(far, near)
                there.join()

        threading.Thread(target=accept, daemon=True).start()


def pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for one, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with suppress(OSError):
            one.shutdown(how)


class Worker:
    """A worker on a machine: a process of :mod:`tests.programs.machine_worker`."""

    def __init__(self, machine: Machine, setup: dict[str, Any]) -> None:
        self.machine = machine
        self._program = Program("programs.machine_worker", prefix=machine.prefix, is_measured=False)
        self._program.say(setup | {"machine": machine.name})

    def wait_until_ready(self) -> None:
        assert self._program.hear() == {"ready": True}

    def begin(self, action: str, **details: Any) -> None:
        self._program.say({"do": action} | details)

    def go_on(self) -> None:
        self._program.say({})

    def hear(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._program.hear()
        return answer

    def do(self, action: str, **details: Any) -> dict[str, Any]:
        self.begin(action, **details)
        return self.hear()

    def stop(self) -> None:
        stop(self._program.process.pid)

    def wake(self) -> None:
        self._program.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._program.process.kill()
        self._program.process.communicate()

    def close(self) -> None:
        self.wake()
        self._program.close()


class Stage:
    """A store on a server, machines with workers that share it, and accounts that are logged in.

    :param engine: ``"redis"``, ``"postgresql"`` or ``"mysql"``.
    :param workers: on which machines, by their numbers.
    :param without_locks: compare-and-set is all that they have.
    :param times: those of refreshes, where not the default.
    """

    def __init__(
        self,
        engine: str,
        clean_up: ExitStack,
        *,
        workers: list[int],
        clocks: list[float] | None = None,
        without_locks: bool = False,
        times: dict[str, float] | None = None,
        durable: bool = True,
    ) -> None:
        self.network = clean_up.enter_context(LocalNetwork())
        self.machines = clean_up.enter_context(Machines(self.network, clocks or [0.0] * (max(workers) + 1)))
        prefix = ("ip", "netns", "exec", self.machines.hub)
        if engine == "redis":
            saving = ("--appendonly", "yes", "--appendfsync", "always") if durable else ()
            server: Server = Redis(*saving, host="0.0.0.0", prefix=prefix)
        else:
            server = SERVERS[engine](host="0.0.0.0", prefix=prefix)
        self.engine = engine
        self.server = clean_up.enter_context(server)
        self.url = server.local_url
        options = self.network.client_options()
        metadata = ClientMetadata.loopback()
        self.client = clean_up.enter_context(OAuthClient(metadata, store=self.url, times=RESTLESS, **options))
        self.workers: list[Worker] = []
        self.setups: list[dict[str, Any]] = []
        for number in workers:
            machine = self.machines.machines[number]
            setup = {
                "store": server.url.replace("0.0.0.0", machine.hub_address),
                "options": options,
                "without_locks": without_locks,
                "times": times or {},
            }
            self.setups.append(setup)
            self.workers.append(Worker(machine, setup))
            clean_up.callback(self.workers[-1].close)
        for worker in self.workers:
            worker.wait_until_ready()

    def account(self) -> Account:
        account = self.network.create_account()
        log_in(self.network, self.client, account)
        return account

    def expire(self, account: Account) -> None:
        """As the clock would have it."""
        store_tokens(self.client, account.did, expires_at=datetime.fromtimestamp(1, UTC))

    def token(self, account: Account) -> str:
        return stored(self.client, account.did).token_set.access_token

    def check(self, rotations: int) -> None:
        """Nothing was lost: no token was used twice, and so many were used."""
        assert self.network.replays == 0
        assert set(self.network.refresh_token_uses.values()) <= {1}
        assert self.network.rotations == rotations


def all_do(workers: list[Worker], action: str, **details: Any) -> list[dict[str, Any]]:
    for worker in workers:
        worker.begin(action, **details)
    return [worker.hear() for worker in workers]


def tokens_of(answers: list[dict[str, Any]]) -> set[str]:
    errors = [error for answer in answers for error in answer["errors"]]
    assert errors == [], errors
    return {token for answer in answers for token in answer["ok"]}


# What happens


def herd(stage: Stage, rounds: int, *, threads: int = 4) -> None:
    """Everybody wants a good token at the same moment."""
    account = stage.account()
    for number in range(1, rounds + 1):
        stage.expire(account)
        tokens = tokens_of(all_do(stage.workers, "restore", did=account.did, threads=threads))
        assert tokens == {stage.token(account)}
        stage.check(number)


def cut_links(stage: Stage, cuts: int, seed: int = 1) -> None:
    """The link of the worker that refreshes is cut before its request is sent, while the server has it, or when the
    answer is on its way; others want the same; the link is healed."""
    draw = random.Random(seed)
    one, *others = stage.workers
    rotations = stage.network.rotations
    for number in range(cuts):
        account = stage.account()
        instant = ["announced", "send", "hold", "late"][number % 4]
        fault = None if instant in ("announced", "send") else stage.network.fault("refresh", instant, after=0)
        one.begin("refresh", did=account.did, pause_at=instant, timeout=60.0)
        if fault is None:
            assert one.hear() == {"at": instant}
        else:
            assert fault.fired.wait(SOON)
        one.machine.cut()
        stage.expire(account)
        for other in others:
            other.begin("refresh", did=account.did, timeout=60.0)
        if fault is None:
            one.go_on()
        else:
            fault.disarm()
        time.sleep(draw.uniform(0.2, 3.0))  # so long the link is away
        one.machine.heal()
        answers = [worker.hear() for worker in stage.workers]
        # Who could not reach the store or the server says so; nobody has lost the session.
        assert not [error for answer in answers for error in answer["errors"] if "log in" in error], answers
        assert stage.network.replays == 0
        assert tokens_of([one.do("restore", did=account.did, timeout=60.0)]) == {stage.token(account)}
        assert stage.network.rotations > rotations
        rotations = stage.network.rotations
    stage.check(rotations)


def stop_workers(stage: Stage, pauses: int) -> None:
    """A worker that refreshes stands still for longer than its attempt counts. Another machine's goes on without it."""
    one, other, *_ = stage.workers
    rotations = stage.network.rotations
    for number in range(pauses):
        account = stage.account()
        stage.expire(account)
        one.begin("restore", did=account.did, pause_at=["attempt", "announced", "send"][number % 3], timeout=60.0)
        assert "at" in one.hear()
        one.stop()
        one.go_on()
        tokens = tokens_of([other.do("restore", did=account.did, timeout=60.0)])
        one.wake()
        answer = one.hear()
        assert set(answer["ok"]) <= tokens
        assert not [error for error in answer["errors"] if "too late" not in error], answer
        assert tokens == {stage.token(account)}
        rotations += 1
        stage.check(rotations)


def end_lock_connections(stage: Stage, times: int) -> None:
    """The server ends the connection of the lock under which a refresh is sent, and another worker gets the lock."""
    one, other, *_ = stage.workers
    for number in range(times):
        account = stage.account()
        rotations = stage.network.rotations
        stage.expire(account)
        fault = stage.network.fault("refresh", ["hold", "late"][number % 2])
        one.begin("restore", did=account.did)
        assert fault.fired.wait(SOON)
        END_LOCK[stage.engine](stage.url)
        other.begin("restore", did=account.did, pause_at="found")
        assert other.hear() == {"at": "found"}
        fault.disarm()
        other.go_on()
        assert tokens_of([one.hear(), other.hear()]) == {stage.token(account)}
        stage.check(rotations + 1)


def end_lock_in_postgresql(url: str) -> None:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        ended = connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_locks WHERE locktype = 'advisory' AND granted"
        ).fetchall()
    assert ended == [(True,)]


def end_lock_in_mysql(url: str) -> None:
    """Only the name of a lock leads to its connection, so all others are ended with it."""
    with closing(connect_mysql(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT id FROM information_schema.processlist WHERE user = 'tester' AND id <> CONNECTION_ID()")
        ended = [number for (number,) in cursor.fetchall()]
        for number in ended:
            with suppress(Exception):  # it has ended by itself
                cursor.execute(f"KILL CONNECTION {number}")
        assert ended


def end_lock_in_redis(url: str) -> None:
    """A lease ends with no connection. It is taken away, and every connection is ended."""
    import redis

    with redis.Redis.from_url(url) as connection:
        (lock,) = (key for key in connection.scan_iter("*lock:*") if not key.endswith(b":released"))
        assert connection.delete(lock) == 1
        connection.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


END_LOCK = {"postgresql": end_lock_in_postgresql, "mysql": end_lock_in_mysql, "redis": end_lock_in_redis}


def stop_server_when_announced(stage: Stage, times: int) -> list[float]:
    """The server of the sessions goes away when a worker has announced its refresh, so that this cannot be taken back,
    and the worker lives on. Its request does not arrive: it finds out before, or its link is cut. Brings how long
    another worker of its machine needs when the server is back."""
    one = stage.workers[0]
    (other,) = (worker for worker in stage.workers[1:] if worker.machine is one.machine)
    waits = []
    for number in range(times):
        account = stage.account()
        rotations = stage.network.rotations
        stage.expire(account)
        instant = ["announced", "send"][number % 2]
        one.begin("restore", did=account.did, pause_at=instant)
        assert one.hear() == {"at": instant}
        stage.server.stop()
        if instant == "send":
            one.machine.cut()
        one.go_on()
        (error,) = one.hear()["errors"]
        # The forwarder on its machine takes the request, and cannot pass it on.
        assert error.startswith("StoreError" if instant == "announced" else "RefreshInterruptedError"), error
        one.machine.heal()
        stage.server.start()
        stored_session = stored(stage.client, account.did)
        assert stored_session.attempt is not None, "it could be taken back"
        began = time.monotonic()
        tokens = tokens_of([other.do("restore", did=account.did)])
        waits.append(time.monotonic() - began)
        assert tokens == {stage.token(account)}
        stage.check(rotations + 1)
    return waits


def restart_server(stage: Stage, restarts: int, seed: int = 2) -> None:
    """In the middle of a herd."""
    draw = random.Random(seed)
    for number in range(restarts):
        account = stage.account()
        rotations = stage.network.rotations
        stage.expire(account)
        for worker in stage.workers:
            worker.begin("restore", did=account.did, threads=4, timeout=60.0)
        time.sleep(draw.uniform(0.0, 0.05))
        (stage.server.kill if number % 2 else stage.server.stop)()
        time.sleep(draw.uniform(0.0, 1.0))
        stage.server.start()
        answers = [worker.hear() for worker in stage.workers]
        assert not [error for answer in answers for error in answer["errors"] if "log in" in error], answers
        tokens = tokens_of(all_do(stage.workers, "restore", did=account.did, timeout=60.0))
        assert tokens == {stage.token(account)}
        stage.check(rotations + 1)


def lose_everything(stage: Stage) -> None:
    """Redis forgets, at rest and in the middle of a refresh."""
    import redis

    account, another = stage.account(), stage.account()
    one, other, *_ = stage.workers
    fault = stage.network.fault("refresh", "late")
    one.begin("refresh", did=account.did)
    assert fault.fired.wait(SOON)
    with redis.Redis.from_url(stage.url) as connection:
        connection.flushall()
    fault.disarm()
    for answer in (one.hear(), other.do("restore", did=another.did), other.do("restore", did=account.did)):
        assert answer["ok"] == []
        (error,) = answer["errors"]
        assert error.startswith(("SessionNotFoundError", "TokenRevokedError")), error
    wait_until(lambda: stage.network.revocations == 1)  # what nobody can find again is ended
    log_in(stage.network, stage.client, account)
    one.do("refresh", did=account.did)
    assert tokens_of(all_do(stage.workers, "restore", did=account.did)) == {stage.token(account)}


def kill_worker(stage: Stage, kills: int) -> list[float]:
    """A worker is killed just before its request leaves. Brings how long another one of its machine needs."""
    waits = []
    for _ in range(kills):
        account = stage.account()
        stage.expire(account)
        victim = Worker(stage.workers[0].machine, stage.setups[0])
        victim.wait_until_ready()
        victim.begin("restore", did=account.did, pause_at="send")
        assert victim.hear() == {"at": "send"}
        victim.kill()
        began = time.monotonic()
        tokens = tokens_of([stage.workers[0].do("restore", did=account.did)])
        waits.append(time.monotonic() - began)
        assert tokens == {stage.token(account)}
    return waits


# All of it

#: As the tests do it, and as ``make machines`` does.
FEW = {"rounds": 3, "cuts": 2, "pauses": 1, "ended": 2, "restarts": 2, "kills": 1, "stops": 1}
MANY = {"rounds": 20, "cuts": 50, "pauses": 50, "ended": 20, "restarts": 10, "kills": 10, "stops": 10}


def go_through(engine: str, numbers: dict[str, int]) -> Iterator[str]:
    """Everything that is promised on many machines. Brings a line about each part."""
    with ExitStack() as clean_up:
        stage = Stage(engine, clean_up, workers=[0, 0, 1, 1, 2, 2, 3, 3], clocks=[0.0, 5.0, 0.0, -5.0])
        herd(stage, numbers["rounds"])
        yield f"8 workers in 4 namespaces: {numbers['rounds']} refreshes in {numbers['rounds']} rounds"
        waits = kill_worker(stage, numbers["kills"])
        assert max(waits) < 10.0, "the lease and the attempt last for 15 s; it is a matter of milliseconds"
        yield f"a worker killed on this machine: waited for {max(waits):.2f} s at most, {len(waits)} times"
        waits = stop_server_when_announced(stage, numbers["stops"])
        assert max(waits) < 10.0, "as above"
        yield f"the server away when a refresh was announced: waited for {max(waits):.2f} s at most, {len(waits)} times"
        stage.workers[1], stage.workers[2] = stage.workers[2], stage.workers[1]  # the first two on different machines
        cut_links(stage, numbers["cuts"])
        yield f"the link cut and healed: 0 sessions lost over {numbers['cuts']} cuts"
        end_lock_connections(stage, numbers["ended"])
        yield f"the connection of a lock ended: 0 sessions lost over {numbers['ended']}"
        restart_server(stage, numbers["restarts"])
        yield f"the server restarted during a herd: 0 sessions lost over {numbers['restarts']} restarts"
        stop_workers(stage, numbers["pauses"])
        yield f"a worker stopped past its lease: 0 sessions lost over {numbers['pauses']} pauses"
        if engine == "redis":
            lose_everything(stage)
            yield "Redis lost its memory: log in again, and no other session"


def go_without_locks(engine: str, numbers: dict[str, int]) -> Iterator[str]:
    with ExitStack() as clean_up:
        stage = Stage(engine, clean_up, workers=[0, 1, 2, 3], without_locks=True)
        herd(stage, numbers["rounds"], threads=8)
        yield f"4 workers of 8 threads without any lock: {numbers['rounds']} refreshes in {numbers['rounds']} rounds"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, number in MANY.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--engine", action="append", choices=list(END_LOCK), help="by default all")
    numbers = vars(parser.parse_args())
    for engine in numbers.pop("engine") or END_LOCK:
        for part in (go_through, go_without_locks):
            for line in part(engine, numbers):
                print(f"{engine}: {line}", flush=True)


if __name__ == "__main__":
    main()
