"""A ``requests`` adapter for addresses that somebody else chose.

What it adds to the usual one:

- The address is judged when the connection is made, and that very address is connected to, so that a name which
  resolves to something else a moment later (DNS rebinding) gains nothing.
- The whole of an exchange, from the look-up of the name to the last byte, can be bounded in time and size.
- It is known whether a request that failed may have reached the server.

Proxies of the environment (``HTTPS_PROXY``) are used. A proxy looks the names up, so judging addresses falls to it, and
its own address, which the operator chose, is not judged.
"""

from __future__ import annotations

import http.client
import io
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

import requests
from requests.adapters import DEFAULT_POOLSIZE, HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from ._fork import Turns, reset_in_child
from ._threads import start_thread
from ._urls import is_public_address, is_public_or_loopback
from .errors import TransportError

T = TypeVar("T")

#: What the threads of :func:`spawn` are called.
LOOKUP_THREAD = "atproto_session lookup"

#: A child that is forked in the middle of another thread's getaddrinfo may stop for ever in its own (glibc's locks are
#: not reset). A look-up that takes longer than this waits for a DNS server, and then holds none of them.
_look_ups = Turns(patience=2.0)


@dataclass(frozen=True)
class Network:
    """What lies between a host's name and a connection. Only tests and unusual networks need another one.

    :ivar is_allowed: whether an IP address may be connected to.
    :ivar getaddrinfo: looks names up, as :func:`socket.getaddrinfo` does.
    """

    is_allowed: Callable[[str], bool] = is_public_address
    getaddrinfo: Callable[..., list[tuple[Any, ...]]] = socket.getaddrinfo

    @classmethod
    def default(cls, *, allow_http: bool = False) -> Network:
        """The public Internet; with ``allow_http`` loopback as well."""
        return cls(is_allowed=is_public_or_loopback) if allow_http else cls()


# One request and its answer


class Refused(OSError):
    """An address or an answer broke a rule of this library; trying again will not help."""


class Exchange:
    """One request and its answer: the bounds they keep to, and whether the request left.

    Whatever a :class:`HardenedAdapter` sends inside of ``with exchange:`` belongs to it. An answer that is read later
    still keeps to the bounds. ::

        with Exchange(timeout=10) as exchange:
            try:
                answer = adapter.send(request)
            except requests.RequestException:
                ... exchange.sent ...

    :param timeout: seconds for all of it, from now on; ``None``: only the timeouts that the request brings.
    :param max_bytes: how many bytes may arrive, headers included; ``None``: any number.
    :ivar sent: the server may have seen something of the request. As long as it is ``False`` it provably has not: the
        name did not resolve, the connection was refused, the TLS handshake failed, the proxy declined.
    """

    def __init__(self, *, timeout: float | None = None, max_bytes: int | None = None) -> None:
        self.sent = False
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self._bytes_left = max_bytes
        self._outside: Token[Exchange | None]

    def __enter__(self) -> Exchange:
        self._outside = _current_exchange.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current_exchange.reset(self._outside)

    def count(self, received: int) -> None:
        if self._bytes_left is not None:
            self._bytes_left -= received
            if self._bytes_left < 0:
                raise Refused("its answer is too large")


# The way from an adapter's ``send`` to the connection leads through requests and urllib3, which carry nothing along.
_current_exchange: ContextVar[Exchange | None] = ContextVar("atproto_session_exchange", default=None)


def _exchange() -> Exchange:
    return _current_exchange.get() or Exchange()


def _time_left(*deadlines: float | None) -> float | None:
    """Seconds until the first of ``deadlines``; ``None`` if there is none."""
    real = [deadline for deadline in deadlines if deadline is not None]
    if not real:
        return None
    left = min(real) - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class _BoundedReader(io.RawIOBase):
    """Reads a socket for ``http.client`` within an exchange's bounds.

    A timeout on the socket alone bounds the wait for each piece, so that a server which sends a byte now and then
    holds its client for ever.
    """

    def __init__(self, sock: socket.socket, exchange: Exchange) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._exchange = exchange
        self.at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        if self._exchange.deadline is not None:
            self._sock.settimeout(_time_left(self._exchange.deadline))
        received = self._raw.readinto(buffer)
        self._exchange.count(received or 0)
        self.at_end = received == 0
        return received

    def close(self) -> None:
        self._raw.close()
        super().close()

    def makefile(self, mode: str) -> io.BufferedReader:
        # All that http.client wants of the socket it is given.
        return io.BufferedReader(self)


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        self._reader = _BoundedReader(sock, _exchange())
        super().__init__(cast(socket.socket, self._reader), *args, **options)

    def begin(self) -> None:
        super().begin()
        # http.client takes an answer that was cut off among its headers for a whole one without a body.
        if self._reader.at_end:
            raise http.client.IncompleteRead(b"")
        # urllib3 rejects this as well, but leaves the socket open.
        if len({length.strip() for length in ",".join(self.headers.get_all("Content-Length", [])).split(",")}) > 1:
            raise http.client.HTTPException("contradictory lengths")


class _Connection(HTTPConnection):
    response_class = _BoundedResponse

    def __init__(self, *args: Any, network: Network | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._network = network or Network()

    def _new_conn(self) -> socket.socket:
        try:
            connected = self._connect_to_one_address()
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(f"connecting to {self.host} timed out") from error
        except OSError as error:
            raise NewConnectionError(self, str(error)) from error
        sys.audit("http.client.connect", self, self.host, self.port)
        return connected

    def _connect_to_one_address(self) -> socket.socket:
        patience = self.timeout
        deadline = None if patience is None else time.monotonic() + patience
        bounds = (deadline, _exchange().deadline)
        found = self._look_up(*bounds)
        # The address of a proxy is the operator's choice, and that of the host behind it is not known here.
        allowed = [entry for entry in found if self.proxy or self._network.is_allowed(entry[4][0])]
        if found and not allowed:
            raise Refused("its address is not one of the public Internet")
        failure = OSError("it has no address")
        for number, entry in enumerate(allowed):
            left = _time_left(*bounds)
            # Each address gets its share of the time, so that a dead one does not cost those after it theirs.
            share = None if left is None else left / (len(allowed) - number)
            try:
                connected = self._connect(entry, share)
                connected.settimeout(_time_left(*bounds))  # for the TLS handshake
            except OSError as error:
                failure = error
            else:
                return connected
        raise failure

    def _connect(self, entry: tuple[Any, ...], timeout: float | None) -> socket.socket:
        family, kind, protocol, _, address = entry
        sock = socket.socket(family, kind, protocol)
        try:
            for option in self.socket_options or ():
                sock.setsockopt(*option)
            sock.settimeout(timeout)
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock

    def _look_up(self, *bounds: float | None) -> list[tuple[Any, ...]]:
        left = _time_left(*bounds)
        host = self.host.strip("[]")

        def look_up() -> list[tuple[Any, ...]]:
            with _look_ups.turn():
                return self._network.getaddrinfo(host, self.port, socket.AF_UNSPEC, socket.SOCK_STREAM)

        # Nothing interrupts getaddrinfo, so where there is a bound it is left behind when the time is over.
        return look_up() if left is None else spawn(look_up).result(left)

    def request(self, *args: Any, **options: Any) -> None:
        exchange = _exchange()
        if self.is_closed:
            self.connect()
        if exchange.deadline is not None:
            self.timeout = _time_left(exchange.deadline)
        exchange.sent = True
        super().request(*args, **options)


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Idle(queue.LifoQueue[Any]):
    """The idle connections of a pool, without the lock of urllib3's own queue. Another thread may hold that when a
    process forks, and the child, where nobody releases it, would stop for ever when it drops the pool or exits."""

    def __init__(self, maxsize: int = 0) -> None:
        self._maxsize = maxsize
        self._connections: list[Any] = []  # whose append and pop are atomic

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        try:
            return self._connections.pop()
        except IndexError:
            raise queue.Empty from None

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if len(self._connections) >= self._maxsize:
            raise queue.Full
        self._connections.append(item)

    def qsize(self) -> int:
        return len(self._connections)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection
    QueueCls = _Idle


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection
    QueueCls = _Idle


_POOLS = {"http": _Pool, "https": _TLSPool}


class HardenedAdapter(HTTPAdapter):
    """A ``requests`` adapter that connects to public addresses only, never repeats a request of its own accord, and
    can tell whether one has left (:class:`Exchange`). Pools connections as any adapter does, safe for threads; a forked
    child starts with none.

    :param allow_http: for development: loopback addresses are allowed.
    :param pool_maxsize: how many idle connections are kept for each host.
    :param network: replaces the policy for addresses and the look-up of names, for tests and unusual networks.
    """

    def __init__(self, *, allow_http: bool = False, pool_maxsize: int = 10, network: Network | None = None) -> None:
        self._network = network or Network.default(allow_http=allow_http)
        self._maxsize = pool_maxsize
        super().__init__(pool_maxsize=pool_maxsize, max_retries=0)
        reset_in_child(self)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if proxy.lower().startswith("socks"):
            raise requests.exceptions.InvalidProxyURL("SOCKS proxies are not supported; set an HTTP proxy")
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = _POOLS
        return manager

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        # Not among the pool manager's options: it makes its keys of those that it knows, and knows no others.
        pool.conn_kw["network"] = self._network
        return pool

    def reset_after_fork(self) -> None:
        self.proxy_manager = {}
        self.init_poolmanager(DEFAULT_POOLSIZE, self._maxsize)


class Spawned(Generic[T]):
    """What a thread of :func:`spawn` will bring. Unlike a ``Future``, it has no lock that an exception which strikes
    the waiting thread could leave taken, where the other one would then stop for ever."""

    def __init__(self) -> None:
        self._outcomes: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def set(self, result: T | None, error: BaseException | None) -> None:
        self._outcomes.put((result, error))

    def result(self, timeout: float) -> T:
        """What the work returned, or the error that it raised. To be asked for once.

        :raises TimeoutError: it took longer than ``timeout`` seconds.
        """
        try:
            result, error = self._outcomes.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError("timed out") from None
        if error is not None:
            raise error
        return cast(T, result)


def spawn(work: Callable[[], T]) -> Spawned[T]:
    """Run ``work`` in a thread that nobody has to wait for, and that does not keep the interpreter from exiting.

    :raises TransportError: no thread can be started.
    """
    spawned: Spawned[T] = Spawned()

    def run() -> None:
        try:
            spawned.set(work(), None)
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever asks for the result
            spawned.set(None, error)

    try:
        start_thread(threading.Thread(target=run, name=LOOKUP_THREAD, daemon=True))
    except RuntimeError as error:
        raise TransportError("no thread can be started to look names up in; nothing was sent") from error
    return spawned
