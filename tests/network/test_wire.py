"""HTTP, as the local network speaks it."""

from __future__ import annotations

import socket
import struct
from urllib.parse import urlsplit

import requests

from atproto_session.testing.network import LocalNetwork


def test_connections_are_kept_alive(network: LocalNetwork) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(network.plc_url).port or 0), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(b"GET /did:plc:x HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while b"did:plc:x" not in answer:
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 404 ")


def test_a_client_that_hangs_up_does_no_harm(network: LocalNetwork) -> None:
    port = urlsplit(network.plc_url).port or 0
    fault = network.fault("plc", "late", times=None)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"GET /did:plc:x HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert fault.fired.wait(10)
            # Closed with a reset, so that the answer cannot be written any more.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    network.clear_faults()
    assert requests.get(f"{network.plc_url}/did:plc:x", timeout=10).status_code == 404
