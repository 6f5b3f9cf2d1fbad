"""Servers on this machine's loopback that do what a test tells them, and a network on which all names lead to them."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

from atproto_session._adapter import Network

LOOPBACK = "127.0.0.1"


class ScriptedServer:
    """Gives each connection that it accepts to ``script``, in a thread of its own.

    :ivar accepted: how many connections there were.
    """

    def __init__(self, script: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> None:
        self.accepted = 0
        self._script = script
        self._tls = tls
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._open.add(connection)
            thread = threading.Thread(target=self._run, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _run(self, connection: socket.socket) -> None:
        # A client that goes away in the middle is what many of these tests are about.
        with contextlib.suppress(OSError), connection:
            if self._tls is None:
                self._script(connection)
            else:
                # Not by wrapping in ``accept``: the handshake of a client that fails must not stop the others.
                with self._tls.wrap_socket(connection, server_side=True) as encrypted:
                    self._open.add(encrypted)
                    self._script(encrypted)


def read_request(connection: socket.socket) -> tuple[str, dict[str, str], bytes]:
    """Request line, headers by lower-case name, and body of the next request; ``OSError`` if none comes."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    line, *fields = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    while len(body) < int(headers.get("content-length", "0")):
        body += connection.recv(65536)
    return line, headers, body


def answer(status: int = 200, body: bytes = b"", **headers: str) -> bytes:
    """An HTTP answer; ``content_type="..."`` is a header's name as Python writes it."""
    fields = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode() + body


def json_answer(document: object, status: int = 200, content_type: str = "application/json") -> bytes:
    return answer(status, json.dumps(document).encode(), content_type=content_type)


@dataclass
class Web:
    """The answers of all web servers there are, by host and path (``"pds.example.com/.well-known/..."``).

    A value that is a function is called when it is asked for. Anything else is 404.

    :ivar asked: the keys that were asked for.
    """

    answers: dict[str, bytes | Callable[[], bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def script(self, connection: socket.socket) -> None:
        line, headers, _ = read_request(connection)
        key = headers["host"] + line.split(" ")[1]
        self.asked.append(key)
        found = self.answers.get(key, answer(404))
        connection.sendall(found() if callable(found) else found)


def network_to(port: int, addresses: Mapping[str, str] | None = None, *, blocked: str = "") -> Network:
    """A network on which every name leads to ``port`` of this machine.

    :param addresses: the loopback addresses of some names; the others have 127.0.0.1.
    :param blocked: an address that may not be connected to.
    """

    def getaddrinfo(host: str, *_: object) -> list[tuple[Any, ...]]:
        address = (addresses or {}).get(host, LOOPBACK)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))]

    return Network(is_allowed=lambda address: address != blocked, getaddrinfo=getaddrinfo)


class NameServer:
    """A DNS server with TXT records.

    :ivar records: by name without the last dot, each a list of records, each a list of strings. A name that is missing
        does not exist; one with ``None`` is never answered; one with ``[]`` has records of other types only.
    """

    def __init__(self) -> None:
        self.records: dict[str, list[list[str]] | None] = {}
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((LOOPBACK, 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        # An empty datagram is no DNS message, and ends the loop.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", (LOOPBACK, self.port))
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            wire, client = self._socket.recvfrom(65536)
            if not wire:
                return
            query = dns.message.from_wire(wire)
            name = query.question[0].name
            asked = name.to_text(omit_final_dot=True)
            self.asked.append(asked)
            response = dns.message.make_response(query)
            response.flags |= dns.flags.RA
            records = self.records.get(asked, [])
            if records is None:
                continue
            if asked not in self.records:
                response.set_rcode(dns.rcode.NXDOMAIN)
            elif records:
                quoted = [" ".join(f'"{string}"' for string in strings) for strings in records]
                response.answer.append(dns.rrset.from_text(name, 60, "IN", "TXT", *quoted))
            self._socket.sendto(response.to_wire(), client)


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port where nobody listens, and nobody else will as long as this lasts."""
    with socket.socket() as bound:
        bound.bind((LOOPBACK, 0))
        yield bound.getsockname()[1]
