"""A ``requests`` adapter for addresses that somebody else chose.

What it adds to the usual one:

- The address is judged when the connection is made, and that very address is connected to, so that a name which
  resolves to something else a moment later (DNS rebinding) gains nothing.
- A request and its answer, from the look-up of the name to the last byte, can be bounded in time and size.
- It is known whether a request that failed may have reached the server.

Proxies of the environment (``HTTPS_PROXY``) are used. A proxy looks the names up, so judging addresses falls to it, and
its own address, which the operator chose, is not judged.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import queue
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util import Timeout

from . import _steps as steps
from ._fork import Turns, reset_in_child
from ._threads import Promise, spawn
from ._tls import Contexts, SharedContext
from ._urls import NOBODY, TrustedHosts, is_public_address, is_public_or_loopback
from .errors import TransportError

T = TypeVar("T")

#: What the threads of :func:`look_up_aside` are called.
LOOKUP_THREAD = "atproto_session lookup"
#: An answer that may be odd is looked at after so long a silence: it may be whole, and its server not say so. Seconds.
_QUIET = 0.5
#: How long an answer that had begun to arrive when its time was over may go on, in seconds.
_LATE = 2.0
#: The longest that the system is told to deliver a request within, in seconds.
_LONGEST = 600.0
_PIECE = 16 * 1024

#: A child that is forked in the middle of another thread's getaddrinfo may stop for ever in its own (glibc's locks are
#: not reset). A look-up that takes longer than this waits for a DNS server, and then holds none of them.
_look_ups = Turns(patience=2.0)


@dataclass(frozen=True)
class Network:
    """What lies between a host's name and a connection. Only tests and unusual networks need another one.

    :ivar is_allowed: whether an IP address may be connected to.
    :ivar getaddrinfo: looks names up, as :func:`socket.getaddrinfo` does.
    :ivar trusted: hosts that may be connected to whatever ``is_allowed`` says.
    """

    is_allowed: Callable[[str], bool] = is_public_address
    getaddrinfo: Callable[..., list[tuple[Any, ...]]] = socket.getaddrinfo
    trusted: TrustedHosts = NOBODY

    @classmethod
    def default(cls, *, allow_http: bool = False) -> Network:
        """The public Internet; with ``allow_http`` loopback as well."""
        return cls(is_allowed=is_public_or_loopback) if allow_http else cls()

    def trusting(self, hosts: TrustedHosts | Iterable[str]) -> Network:
        """The same with ``hosts`` as its trusted ones, if there are any.

        :raises ValueError: an entry is no host.
        """
        trusted = TrustedHosts.of(hosts)
        return self if trusted == NOBODY else replace(self, trusted=trusted)

    def permits(self, host: str, address: str) -> bool:
        """Whether a connection may go to ``address``, which ``host`` resolves to."""
        return self.is_allowed(address) or host in self.trusted or address in self.trusted


# One request and its answer


class Refused(OSError):
    """An address or an answer broke a rule of this library; trying again will not help."""


class TooLate(TimeoutError):
    """A request was ready to leave when it must not any more."""


class Bounds(Timeout):
    """What one request and its answer keep to, and whether the request left. Given where requests takes a timeout::

        bounds = Bounds(within=10.0)
        try:
            answer = adapter.send(request, timeout=bounds)
        except requests.RequestException:
            ... bounds.sent ...

    An answer that is read later keeps to them as well.

    :param within: seconds for all of it, from now on; ``None``: only the timeouts below.
    :param connect: seconds for connecting, and for the TLS handshake.
    :param look_up: seconds for looking the name up. ``None``: it has to happen within ``connect``.
    :param read: seconds for every wait for more of the answer.
    :param max_bytes: how many bytes may arrive, headers included; ``None``: any number.
    :param is_whole: tells of all bytes that have arrived whether nothing more is needed. The bytes are kept for it.
    :ivar sent: the server may have seen something of the request. As long as it is ``False`` it provably has not: the
        name did not resolve, the connection was refused, the TLS handshake failed, the proxy declined.
    :ivar reused: the connection had carried a request before.
    :ivar answered: something of the answer has arrived.
    :ivar received: all bytes that have arrived, where ``is_whole`` was given.
    :ivar ended_early: the answer was whole before its server ended it.
    """

    def __init__(
        self,
        *,
        within: float | None = None,
        connect: float | None = None,
        look_up: float | None = None,
        read: float | None = None,
        max_bytes: int | None = None,
        is_whole: Callable[[bytes], bool] | None = None,
    ) -> None:
        super().__init__(connect=connect, read=read)
        self.deadline = None if within is None else time.monotonic() + within
        self.look_up = look_up
        self.is_whole = is_whole
        self.sent = False
        self.reused = False
        self.answered = False
        self.received = bytearray()
        self.ended_early = False
        self._bytes_left = max_bytes
        self._readers: list[_BoundedReader] = []
        self._late_until: float | None = None

    def wait(self, read_timeout: float | None) -> float | None:
        """How long to wait for the next piece of the answer, in seconds; ``None``: for ever."""
        now = time.monotonic()
        if self.deadline is None:
            return read_timeout
        if now < self.deadline:
            waits = [self.deadline - now]
            waits += [] if read_timeout is None else [read_timeout]
            waits += [] if self.is_whole is None else [_QUIET]
            return min(waits)
        # The time is over. What has arrived is taken all the same: this process may have stood still. So is what
        # follows it at once, since it may not all have found room in the socket.
        if self._late_until is None:
            self._late_until = now + _LATE
            return 0.0
        return max(0.0, self._late_until - now)

    @property
    def is_over(self) -> bool:
        """Whether there is no time left."""
        return self.deadline is None or time.monotonic() >= self.deadline

    def begin(self, *, reused: bool) -> None:
        """The request is about to leave."""
        self.sent, self.reused, self.answered = True, reused, False
        self.close()  # what belongs to the answer of a proxy
        self.received.clear()

    def keep(self, piece: memoryview) -> None:
        """Count ``piece``, which has arrived, and keep it if it is needed."""
        self.answered = self.answered or len(piece) > 0
        if self._bytes_left is not None:
            self._bytes_left -= len(piece)
            if self._bytes_left < 0:
                raise Refused("its answer is too large")
        if self.is_whole is not None:
            self.received += piece

    def read_rest(self, within: float | None = None) -> None:
        """Read on where http.client has given up, until there is nothing more. The bytes are in ``received``.

        :param within: seconds at most.
        """
        if within is not None and self.deadline is not None:
            self.deadline = min(self.deadline, time.monotonic() + within)
        for reader in self._readers:
            with contextlib.suppress(OSError):
                while reader.readinto(bytearray(_PIECE)):
                    pass

    def close(self) -> None:
        """Let go of the sockets that were kept open for :meth:`read_rest`."""
        while self._readers:
            self._readers.pop().release()


# The way from an adapter's ``send`` to the connection leads through requests and urllib3, which carry nothing along.
# Every ``send`` sets its own, so that what a signal handler asks for in the middle of a request is not taken for it.
_current_bounds: ContextVar[Bounds | None] = ContextVar("atproto_session_bounds", default=None)


def _bounds() -> Bounds:
    return _current_bounds.get() or Bounds()


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
    """Reads a socket for ``http.client`` within the bounds of a request.

    A timeout on the socket alone bounds the wait for each piece, so that a server which sends a byte now and then
    holds its client for ever.
    """

    def __init__(self, sock: socket.socket, bounds: Bounds) -> None:
        super().__init__()
        self._sock = sock
        self._held = sock.makefile("rb", buffering=0)  # the socket stays open until this is closed
        self._read_timeout = sock.gettimeout()
        self._bounds = bounds
        self.at_end = False
        if bounds.is_whole is not None:
            bounds._readers.append(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        bounds = self._bounds
        while True:
            try:
                received = self._receive(buffer, bounds.wait(self._read_timeout))
            except TimeoutError:
                if bounds.is_whole is not None and bounds.is_whole(bytes(bounds.received)):
                    received, bounds.ended_early = 0, True  # the server only does not say that this is all
                elif bounds.is_whole is None or bounds.is_over:
                    raise
                else:
                    continue
            bounds.keep(memoryview(buffer)[:received])
            self.at_end = received == 0
            return received

    def _receive(self, buffer: Any, wait: float | None) -> int:
        if wait != 0.0:
            self._sock.settimeout(wait)
            with contextlib.suppress(TimeoutError):
                return self._sock.recv_into(buffer)
        # It may have come while this process stood still, in which case the time is over before anybody looks.
        self._sock.settimeout(0.0)
        try:
            return self._sock.recv_into(buffer)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise TimeoutError("timed out") from None
        finally:
            self._sock.settimeout(self._read_timeout)

    def close(self) -> None:
        if self._bounds.is_whole is None:
            self.release()
        super().close()

    def release(self) -> None:
        self._held.close()

    def makefile(self, mode: str) -> io.BufferedReader:
        # All that http.client wants of the socket it is given.
        return io.BufferedReader(self)


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        self._bounds = _bounds()
        self._reader = _BoundedReader(sock, self._bounds)
        super().__init__(cast(socket.socket, self._reader), *args, **options)

    def begin(self) -> None:
        self._begin()
        # http.client skips 100 alone of the interim answers (RFC 9110 section 15.2).
        while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            self.headers = self.msg = None  # type: ignore[assignment]
            self._begin()
        # urllib3 would write them into the log and go on without the headers that follow.
        if self._bounds.is_whole is not None and self.headers.defects:
            raise http.client.HTTPException("malformed headers")
        # urllib3 rejects this as well, but leaves the socket open.
        if len({length.strip() for length in ",".join(self.headers.get_all("Content-Length", [])).split(",")}) > 1:
            raise http.client.HTTPException("contradictory lengths")

    def _begin(self) -> None:
        super().begin()
        # http.client takes an answer that was cut off among its headers for a whole one without a body.
        if self._reader.at_end:
            raise http.client.IncompleteRead(b"")


class _Connection(HTTPConnection):
    response_class = _BoundedResponse

    def __init__(self, *args: Any, network: Network | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._network = network or Network()
        self._is_used = False

    def _new_conn(self) -> socket.socket:
        self._is_used = False
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
        limits = _bounds()
        if limits.look_up is None:
            found = self._look_up(deadline, limits.deadline)
        else:
            found = self._look_up(time.monotonic() + limits.look_up, limits.deadline)
            deadline = None if patience is None else time.monotonic() + patience
        bounds = (deadline, limits.deadline)
        # The address of a proxy is the operator's choice, and that of the host behind it is not known here.
        allowed = [entry for entry in found if self.proxy or self._network.permits(self.host, entry[4][0])]
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
        if _is_address(host):
            left = None  # nobody is asked

        def look_up() -> list[tuple[Any, ...]]:
            with _look_ups.turn():
                return self._network.getaddrinfo(host, self.port, socket.AF_UNSPEC, socket.SOCK_STREAM)

        # Nothing interrupts getaddrinfo, so where there is a bound it is left behind when the time is over.
        return look_up() if left is None else look_up_aside(look_up).get(left)

    def request(self, *args: Any, **options: Any) -> None:
        bounds = _bounds()
        if self.is_closed:
            self.connect()
        if bounds.deadline is not None:
            self.timeout = _time_left(bounds.deadline)
        self._check_may_arrive()
        bounds.begin(reused=self._is_used)
        self._is_used = True
        super().request(*args, **options)

    def _check_may_arrive(self) -> None:
        """
        :raises TooLate: the request must not leave any more.
        """
        may_arrive_for = steps.may_arrive_for.get()
        if may_arrive_for is None:
            return
        if (left := may_arrive_for()) <= 0:
            self.close()
            raise TooLate("it was too late to send it")
        # Nor must the system deliver it later, when a network that is dead by now is back.
        if self.sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(min(left, _LONGEST) * 1000)))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _TLSConnection(_Connection, HTTPSConnection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if isinstance(self.ssl_context, SharedContext):
            self.ca_certs = self.ca_cert_dir = None  # it has them; urllib3 would read them again

    def close(self) -> None:
        if isinstance(self.ssl_context, SharedContext):
            self.ssl_context.remember(self.sock)
        super().close()


class _IdleSlot:
    """An idle connection. No two are equal, so that each can be found again."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.since = time.monotonic()


class _Idle(queue.LifoQueue[Any]):
    """The idle connections of a pool, without the lock of urllib3's own queue. Another thread may hold that when a
    process forks, and the child, where nobody releases it, would stop for ever when it drops the pool or exits.

    :ivar everywhere: those of all pools of an adapter, oldest first, with the pool of each. The oldest are closed when
        there are more than ``most``.
    :ivar longest: for how long one may be idle, in seconds.
    """

    # Lists and dictionaries do what is asked of them here in one step.

    def __init__(self, maxsize: int = 0) -> None:
        self._maxsize = maxsize
        self._slots: list[_IdleSlot] = []
        self.everywhere: dict[_IdleSlot, _Idle] = {}
        self.most = maxsize
        self.longest = float("inf")

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        while True:
            try:
                slot = self._slots.pop()
            except IndexError:
                raise queue.Empty from None
            self.everywhere.pop(slot, None)
            if time.monotonic() - slot.since <= self.longest:
                return slot.connection
            slot.connection.close()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if item is None:  # which urllib3 fills its queues with
            return
        if not self.most:
            item.close()
            return
        if len(self._slots) >= self._maxsize:
            raise queue.Full
        slot = _IdleSlot(item)
        self.everywhere[slot] = self
        self._slots.append(slot)
        while len(self.everywhere) > self.most:
            with contextlib.suppress(RuntimeError, StopIteration):  # another thread changes it
                oldest = next(iter(self.everywhere))
                pool = self.everywhere.pop(oldest, None)
                if pool is not None:
                    pool.drop(oldest)

    def drop(self, slot: _IdleSlot) -> None:
        """Close a connection, unless a request has just taken it."""
        with contextlib.suppress(ValueError):
            self._slots.remove(slot)
            slot.connection.close()

    def qsize(self) -> int:
        return len(self._slots)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection
    QueueCls = _Idle


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection
    QueueCls = _Idle


_POOLS = {"http": _Pool, "https": _TLSPool}


class HardenedAdapter(HTTPAdapter):
    """A ``requests`` adapter that connects to public addresses only, never repeats a request of its own accord, and
    can tell whether one has left (:class:`Bounds`). Pools connections as any adapter does, safe for threads; a forked
    child starts with none.

    :param allow_http: for development: loopback addresses are allowed.
    :param pool_connections: of how many servers connections are kept.
    :param pool_maxsize: how many idle connections are kept for each server.
    :param max_idle: how many idle connections are kept in all; the ones that have been idle longest are closed. With 0
        each request has a connection of its own.
    :param idle_for: for how long a connection is kept idle, in seconds.
    :param contexts: the TLS contexts, if they are to be shared with another adapter.
    :param network: replaces the policy for addresses and the look-up of names, for tests and unusual networks.
    :param trusted_hosts: names, addresses and networks (CIDR) that may be private.
    :raises ValueError: an entry of ``trusted_hosts`` is none of these.
    """

    def __init__(
        self,
        *,
        allow_http: bool = False,
        pool_connections: int = 1000,
        pool_maxsize: int = 10,
        max_idle: int = 256,
        idle_for: float = float("inf"),
        contexts: Contexts | None = None,
        network: Network | None = None,
        trusted_hosts: TrustedHosts | Iterable[str] = (),
    ) -> None:
        self._network = (network or Network.default(allow_http=allow_http)).trusting(trusted_hosts)
        self._servers, self._maxsize, self._max_idle = pool_connections, pool_maxsize, max_idle
        self._idle_for = idle_for
        self._contexts = contexts or Contexts()
        self._idle: dict[_IdleSlot, _Idle] = {}
        super().__init__(pool_connections=pool_connections, pool_maxsize=pool_maxsize, max_retries=0)
        reset_in_child(self)

    def send(  # noqa: PLR0917 - as in requests
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """As in requests.

        :param timeout: may be :class:`Bounds`, too.
        """
        outside = _current_bounds.set(timeout if isinstance(timeout, Bounds) else None)
        try:
            return super().send(request, stream, timeout, verify, cert, proxies)
        finally:
            _current_bounds.reset(outside)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if proxy.lower().startswith("socks"):
            raise requests.exceptions.InvalidProxyURL("SOCKS proxies are not supported; set an HTTP proxy")
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = _POOLS
        return manager

    def get_connection_with_tls_context(
        self, request: requests.PreparedRequest, verify: Any, proxies: Any = None, cert: Any = None
    ) -> Any:
        pool: Any = super().get_connection_with_tls_context(request, verify, proxies, cert)
        # A client's certificate would become one of all connections. For a proxy that is spoken to over TLS, urllib3
        # takes the settings of the connection behind it.
        over_tls = pool.proxy is not None and pool.proxy.scheme == "https"
        if pool.scheme == "https" and verify and cert is None and not over_tls:
            try:
                pool.conn_kw["ssl_context"] = self._contexts.get(None if verify is True else verify)
            except ssl.SSLError as error:  # it holds no certificates
                raise requests.exceptions.SSLError(error, request=request) from error
        # Not among the pool manager's options: it makes its keys of those that it knows, and knows no others.
        pool.conn_kw["network"] = self._network
        if pool.pool is not None:  # which it is where the pool manager has just closed it
            pool.pool.everywhere, pool.pool.most = self._idle, self._max_idle
            pool.pool.longest = self._idle_for
        return pool

    def reset_after_fork(self) -> None:
        self.proxy_manager = {}
        self._idle = {}
        self.init_poolmanager(self._servers, self._maxsize)


def look_up_aside(work: Callable[[], T]) -> Promise[T]:
    """Do ``work`` in a thread that nobody has to wait for, and that does not keep the interpreter from exiting.

    :raises TransportError: no thread can be started.
    """
    try:
        return spawn(work, LOOKUP_THREAD)
    except RuntimeError as error:
        raise TransportError("no thread can be started to look names up in; nothing was sent") from error
