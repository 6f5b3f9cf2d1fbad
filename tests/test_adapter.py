"""The adapter: answers that are late, connections that are kept, hosts that are trusted."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme

from atproto_session import _adapter
from atproto_session import _steps as steps
from atproto_session._adapter import Bounds, HardenedAdapter, Network, _Idle
from atproto_session._urls import TrustedHosts
from atproto_session.errors import TransportError
from atproto_session.transport import Transport

from .core import wait_until
from .loopback import LOOPBACK, ScriptedServer, answer, network_to, read_request
from .processes import stop

GENEROUS = 30.0
BODY = b'{"access_token": "' + b"a" * 40_000 + b'"}'


@pytest.fixture(scope="module")
def certificates() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(params=["http", "https"])
def tls(request: pytest.FixtureRequest, certificates: trustme.CA) -> ssl.SSLContext | None:
    if request.param == "http":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificates.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture
def ca_bundle(certificates: trustme.CA, tmp_path: Path) -> str:
    certificates.cert_pem.write_to_path(tmp_path / "ca.pem")
    return str(tmp_path / "ca.pem")


# Answers that have arrived


def in_pieces(connection: socket.socket, sent: bytes) -> None:
    """In several TLS records, if it is TLS."""
    for start in range(0, len(sent), 5000):
        connection.sendall(sent[start : start + 5000])


def url_of(server: ScriptedServer, tls: ssl.SSLContext | None) -> str:
    return f"{'https' if tls else 'http'}://localhost:{server.port}/"


STOPPED = """
import sys
from atproto_session.transport import Transport
url, ca_bundle, lenient = sys.argv[1:]
transport = Transport(allow_http=True, ca_bundle=ca_bundle, timeout=3.0)
print(len(transport.request("POST", url, data={"a": "b"}, lenient=lenient == "lenient").body))
"""


@pytest.mark.parametrize("lenient", ["strict", "lenient"])
def test_a_process_that_stood_still_reads_the_answer_that_came_meanwhile(
    lenient: str, tls: ssl.SSLContext | None, ca_bundle: str
) -> None:
    worker: list[subprocess.Popen[str]] = []
    started = threading.Event()

    def script(connection: socket.socket) -> None:
        read_request(connection)
        assert started.wait(GENEROUS)
        stop(worker[0].pid)
        in_pieces(connection, answer(200, BODY, content_type="application/json"))
        time.sleep(3.5)  # until the time of the worker is over, and longer does not matter
        os.kill(worker[0].pid, signal.SIGCONT)

    with ScriptedServer(script, tls) as server:
        command = [sys.executable, "-c", STOPPED, url_of(server, tls), ca_bundle, lenient]
        worker.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        started.set()
        said, _ = worker[0].communicate(timeout=60)
    assert said == f"{len(BODY)}\n"


class JumpingClock:
    """``time``, which is put forward by an hour before the reader's second look, when ``ready`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ready = threading.Event()
        self._offset = 0.0
        self._looks = 0
        original = Bounds.wait

        def wait(bounds: Bounds, read_timeout: float | None) -> float | None:
            self._looks += 1
            if self._looks == 2:
                assert self.ready.wait(GENEROUS)
                self._offset = 3600.0
            return original(bounds, read_timeout)

        monkeypatch.setattr(Bounds, "wait", wait)
        monkeypatch.setattr(_adapter, "time", self)

    def monotonic(self) -> float:
        return time.monotonic() + self._offset


@pytest.mark.parametrize("lenient", [False, True])
def test_what_lies_in_the_socket_when_the_time_is_over_is_read(
    lenient: bool, tls: ssl.SSLContext | None, ca_bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = JumpingClock(monkeypatch)

    def script(connection: socket.socket) -> None:
        read_request(connection)
        in_pieces(connection, answer(200, BODY, content_type="application/json"))
        clock.ready.set()

    with ScriptedServer(script, tls) as server:
        transport = Transport(allow_http=True, ca_bundle=ca_bundle, timeout=GENEROUS)
        assert transport.request("POST", url_of(server, tls), data={}, lenient=lenient).body == BODY


@pytest.mark.parametrize("pause", [0.001, 1000.0])
def test_a_server_that_is_not_done_when_the_time_is_over_is_left(
    pause: float, tls: ssl.SSLContext | None, ca_bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = JumpingClock(monkeypatch)
    never = threading.Event()

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        clock.ready.set()
        while not never.wait(pause):
            connection.sendall(b"a")

    with ScriptedServer(script, tls) as server:
        transport = Transport(allow_http=True, ca_bundle=ca_bundle, timeout=GENEROUS)
        began = time.monotonic()
        with pytest.raises(TransportError, match="timed out") as caught:
            transport.request("POST", url_of(server, tls), data={}, lenient=True)
        never.set()
    assert caught.value.sent
    assert time.monotonic() - began < GENEROUS


def test_a_request_without_bounds_reads_what_came_while_the_process_stood_still() -> None:
    """Python gives up without another look when the time passes in a wait that a signal ends."""

    class Socket:
        timeout: float | None = 5.0

        def gettimeout(self) -> float | None:
            return self.timeout

        def settimeout(self, timeout: float | None) -> None:
            self.timeout = timeout

        def makefile(self, *_: object, **__: object) -> Any:
            return io.BytesIO()

        def recv_into(self, buffer: bytearray) -> int:
            if self.timeout != 0.0:
                raise TimeoutError
            buffer[:2] = b"ok"
            return 2

    sock: Any = Socket()
    buffer = bytearray(10)
    assert _adapter._BoundedReader(sock, Bounds()).readinto(buffer) == 2
    assert buffer[:2] == b"ok"
    assert sock.timeout == 5.0, "as it was, for the next request on this connection"


def test_the_wait_for_a_piece_keeps_to_every_bound() -> None:
    assert Bounds().wait(60.0) == 60.0
    assert Bounds().wait(None) is None
    assert Bounds(within=30.0).wait(1.0) == 1.0
    assert 29.0 < (Bounds(within=30.0).wait(None) or 0) <= 30.0


def test_a_name_server_that_is_dead_leaves_time_to_ask_the_next() -> None:
    """The C library waits 5 seconds for the first."""
    assert Transport()._look_up_timeout > 5.0
    with ScriptedServer(lambda connection: connection.sendall(answer())) as server:
        network = network_to(server.port)

        def getaddrinfo(*arguments: Any) -> list[tuple[Any, ...]]:
            time.sleep(0.3)
            return network.getaddrinfo(*arguments)

        slow = Network(is_allowed=lambda _: True, getaddrinfo=getaddrinfo)
        transport = Transport(allow_http=True, network=slow, connect_timeout=0.25, timeout=GENEROUS)
        assert transport.request("GET", "http://localhost/").status == 200


# A second try


def test_a_connection_that_is_cut_before_anything_was_sent_is_tried_once_more(ca_bundle: str) -> None:
    """The first is closed in the middle of the TLS handshake."""
    numbers = iter(range(10))

    def script(connection: socket.socket) -> None:
        connection.recv(65536)
        if next(numbers):
            connection.sendall(b"no TLS")

    with ScriptedServer(script) as server, pytest.raises(TransportError, match="TLS connection failed") as caught:
        Transport(allow_http=True, ca_bundle=ca_bundle).request("POST", f"https://localhost:{server.port}/", data={})
    assert server.accepted == 2, "and a failure that will not pass ends it"
    assert not caught.value.sent


def test_a_refused_connection_and_a_busy_name_server_are_tried_once_more() -> None:
    with ScriptedServer(lambda connection: connection.sendall(answer())) as server, socket.socket() as closed:
        closed.bind((LOOPBACK, 0))
        ports = iter([None, server.port, closed.getsockname()[1], server.port, None, None])

        def getaddrinfo(*_: object) -> list[tuple[Any, ...]]:
            port = next(ports)
            if port is None:
                raise socket.gaierror(socket.EAI_AGAIN, "try again")
            return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (LOOPBACK, port))]

        transport = Transport(
            allow_http=True, network=Network(is_allowed=lambda _: True, getaddrinfo=getaddrinfo), timeout=GENEROUS
        )
        for _ in range(2):
            assert transport.request("POST", "http://localhost/", data={}).status == 200
        with pytest.raises(TransportError, match="does not resolve"):
            transport.request("POST", "http://localhost/", data={})
        assert list(ports) == []


def test_a_request_that_may_have_been_seen_is_not_tried_again() -> None:
    with ScriptedServer(lambda _: None) as server, pytest.raises(TransportError) as caught:
        Transport(allow_http=True).request("GET", f"http://localhost:{server.port}/")
    assert caught.value.sent
    assert server.accepted == 1


def test_a_request_whose_time_is_over_when_it_is_ready_does_not_leave() -> None:
    """To look a name up and to connect may take long, and the process may stand still."""
    seen: list[bytes] = []
    with ScriptedServer(lambda connection: seen.append(connection.recv(1))) as server:
        with may_arrive_for(0.0), pytest.raises(TransportError, match="too late to send the request") as caught:
            Transport(allow_http=True).request("POST", f"http://localhost:{server.port}/", data={})
        wait_until(lambda: seen)
    assert not caught.value.sent
    assert caught.value.retryable
    assert server.accepted == 1
    assert seen == [b""]


def test_the_system_delivers_no_request_whose_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the network was dead for some time and is back."""
    set_option = socket.socket.setsockopt
    options: list[tuple[object, ...]] = []

    def note(sock: socket.socket, *arguments: Any) -> None:
        options.append(arguments)
        set_option(sock, *arguments)

    monkeypatch.setattr(socket.socket, "setsockopt", note)
    with ScriptedServer(kept_alive) as server:
        for seconds in (12.5, float("inf"), 0.0001):
            with may_arrive_for(seconds):
                assert Transport(allow_http=True).request("GET", f"http://localhost:{server.port}/").status == 200
        times = [value for _, option, value in options if option == socket.TCP_USER_TIMEOUT]
        assert times == [12_500, 600_000, 1]
        monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")  # as on other systems than Linux
        with may_arrive_for(1.0):
            assert Transport(allow_http=True).request("GET", f"http://localhost:{server.port}/").status == 200


@contextlib.contextmanager
def may_arrive_for(seconds: float) -> Iterator[None]:
    token = steps.may_arrive_for.set(lambda: seconds)
    try:
        yield
    finally:
        steps.may_arrive_for.reset(token)


def test_a_second_try_takes_no_more_time_than_there_is() -> None:
    asked = []

    def getaddrinfo(*_: object) -> list[tuple[Any, ...]]:
        asked.append(1)
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    transport = Transport(network=Network(getaddrinfo=getaddrinfo), timeout=0.2)
    with pytest.raises(TransportError):
        transport.request("GET", "https://pds.example.com/")
    assert len(asked) <= 1


def test_a_document_that_is_not_there_for_a_moment_is_asked_for_once_more() -> None:
    answers = iter([answer(503), answer(200, b"{}", content_type="application/json"), answer(502), answer(404)])

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(next(answers))

    with ScriptedServer(script) as server:
        transport = Transport(allow_http=True, timeout=GENEROUS)
        assert transport.get_json(f"http://localhost:{server.port}/") == {}
        with pytest.raises(ValueError, match="404"):
            transport.get_json(f"http://localhost:{server.port}/")


def test_a_document_is_not_asked_for_again_when_there_is_no_time() -> None:
    with ScriptedServer(lambda connection: connection.sendall(answer(503))) as server:
        with pytest.raises(ValueError, match="503"):
            Transport(allow_http=True).get_json(f"http://localhost:{server.port}/", timeout=0.24)
        assert server.accepted == 1


# Connections that are kept


def kept_alive(connection: socket.socket) -> None:
    while True:
        read_request(connection)
        connection.sendall(answer(200, b"ok"))


@contextlib.contextmanager
def servers(number: int) -> Iterator[list[ScriptedServer]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ScriptedServer(kept_alive)) for _ in range(number)]


def ask(http: requests.Session, server: ScriptedServer) -> None:
    assert http.get(f"http://127.0.0.1:{server.port}/").text == "ok"


@contextlib.contextmanager
def session(**options: Any) -> Iterator[requests.Session]:
    with requests.Session() as http:
        http.mount("http://", HardenedAdapter(allow_http=True, **options))
        yield http


def test_connections_to_many_servers_are_kept() -> None:
    with servers(15) as many, session() as http:
        for _ in range(2):
            for server in many:
                ask(http, server)
        assert [server.accepted for server in many] == [1] * 15


def test_the_connection_that_was_idle_longest_is_closed_when_there_are_too_many() -> None:
    with servers(3) as (first, second, third), session(max_idle=2) as http:
        for server in (first, second, first, third, first):
            ask(http, server)
        assert (first.accepted, second.accepted, third.accepted) == (1, 1, 1)
        ask(http, second)
        assert second.accepted == 2
        assert len(http.get_adapter("http://")._idle) == 2  # type: ignore[attr-defined]


def test_a_pool_that_was_closed_in_this_moment_is_of_no_harm() -> None:
    adapter = HardenedAdapter(allow_http=True)
    request = requests.Request("GET", "http://127.0.0.1:1/").prepare()
    adapter.get_connection_with_tls_context(request, verify=True).close()
    assert adapter.get_connection_with_tls_context(request, verify=True).pool is None


class Connection:
    closed = False

    def close(self) -> None:
        self.closed = True


def test_a_connection_that_was_just_taken_is_not_closed() -> None:
    idle = _Idle(5)
    connections = [Connection() for _ in range(3)]
    for connection in connections[:2]:
        idle.put(connection)
    idle.most = 1
    del idle._slots[0]  # as by a thread that has not told anybody yet
    idle.put(connections[2])
    assert [connection.closed for connection in connections] == [False, True, False]
    assert idle.get() is connections[2]
    with pytest.raises(queue.Empty):
        idle.get()
    idle.put(None)
    assert idle.qsize() == 0
    for _ in range(5):
        idle.put(Connection())
    idle._maxsize = idle.qsize()
    with pytest.raises(queue.Full):
        idle.put(Connection())


def test_what_changes_while_the_oldest_is_looked_for() -> None:
    class Changing(dict[Any, Any]):
        tries = 0

        def __iter__(self) -> Iterator[Any]:
            self.tries += 1
            if self.tries == 1:
                raise RuntimeError("dictionary changed size during iteration")
            if self.tries == 2:
                return iter([object()])  # taken by another thread
            return super().__iter__()

    idle, connection = _Idle(5), Connection()
    idle.most = 0
    idle.everywhere = Changing()
    idle.put(connection)
    assert connection.closed
    assert idle.everywhere == {}


# Trusted hosts


def inside(address: str, port: int) -> Callable[..., list[tuple[Any, ...]]]:
    """Every name leads to ``port`` of this machine, which is said to have ``address``."""

    def getaddrinfo(*_: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))]

    return getaddrinfo


@pytest.mark.duty(42)
@pytest.mark.parametrize("trusted", [["pds"], ["PDS", "other"], ["127.0.0.0/8"], ["127.0.0.1"]])
def test_a_trusted_host_may_be_private(trusted: list[str]) -> None:
    by_name = any("." not in host for host in trusted)
    with ScriptedServer(lambda connection: connection.sendall(answer())) as server:
        network = Network(getaddrinfo=inside(LOOPBACK, server.port))
        transport = Transport(allow_http=True, network=network, trusted_hosts=trusted)
        host = "pds" if by_name else LOOPBACK
        assert transport.request("GET", f"http://{host}:{server.port}/").status == 200
        with pytest.raises(TransportError, match="does not use https"):
            Transport(network=network, trusted_hosts=trusted).request("GET", f"http://{host}/")
        with pytest.raises(TransportError, match="full name"):
            transport.request("GET", "https://elsewhere/")
        assert server.accepted == 1


@pytest.mark.duty(42)
def test_of_other_hosts_no_private_address_is_connected_to() -> None:
    with ScriptedServer(lambda connection: connection.sendall(answer())) as server:
        network = Network(getaddrinfo=inside("127.0.0.2", server.port))
        transport = Transport(network=network, trusted_hosts=["pds", "127.0.0.1", "10.0.0.0/8"])
        with pytest.raises(TransportError, match="public Internet") as caught:
            transport.request("GET", "https://pds.example.com/")
        assert server.accepted == 0
    assert not caught.value.retryable


def test_an_adapter_of_a_session_knows_them_too() -> None:
    with ScriptedServer(kept_alive) as server, requests.Session() as http:
        http.mount("http://", HardenedAdapter(trusted_hosts=TrustedHosts.of([LOOPBACK])))
        ask(http, server)
