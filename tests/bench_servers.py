"""The servers that the benchmarks speak to, over TLS, in a process of their own: what they do is not measured.

Every name under ``bench.example.com`` is a PDS and its authorization server, and ``plc.bench.example.com`` the
directory. They answer what such servers answer, check nothing, and count: refreshes, and tokens that came twice.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

DOMAIN = "bench.example.com"
DIRECTORY = f"https://plc.{DOMAIN}"
STATISTICS = "/statistics"
#: How many accounts of the directory there are on each server; the number of a DID tells its server.
LETTERS = "abcdefghijklmnopqrstuvwxyz234567"


def did_of(number: int) -> str:
    return "did:plc:" + "".join(LETTERS[number >> 5 * place & 31] for place in range(24))


def number_of(did: str) -> int:
    return sum(LETTERS.index(letter) << 5 * place for place, letter in enumerate(did.removeprefix("did:plc:")))


def server_of(number: int, servers: int) -> str:
    """The origin of the server of an account."""
    return f"https://s{number % servers}.{DOMAIN}"


class Answers:
    """What the servers say."""

    def __init__(self, servers: int, lifetime: float, latency: float) -> None:
        self._servers = servers
        self._lifetime = lifetime
        self._latency = latency
        self._spent: set[str] = set()
        self.refreshes = 0
        self.replays = 0

    def to(self, method: str, host: str, path: str, body: bytes) -> dict[str, Any]:
        origin = f"https://{host}"
        if path == STATISTICS:
            return {"refreshes": self.refreshes, "replays": self.replays}
        if method == "POST":
            return self._tokens(body)
        if path.startswith("/did:"):
            return self._identity(path[1:])
        if path == "/.well-known/oauth-protected-resource":
            return {"resource": origin, "authorization_servers": [origin]}
        if path == "/.well-known/oauth-authorization-server":
            return metadata(origin)
        return {"active": True}

    def _identity(self, did: str) -> dict[str, Any]:
        pds = server_of(number_of(did), self._servers)
        service = {"id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": pds}
        return {"id": did, "alsoKnownAs": [f"at://x.{DOMAIN}"], "service": [service]}

    def _tokens(self, body: bytes) -> dict[str, Any]:
        spent = parse_qs(body.decode())["refresh_token"][0]
        did = spent.partition("~")[0]
        time.sleep(self._latency)
        self.refreshes += 1
        self.replays += spent in self._spent
        self._spent.add(spent)
        return {
            "access_token": secrets.token_urlsafe(300),
            "refresh_token": f"{did}~{secrets.token_urlsafe(32)}",
            "token_type": "DPoP",
            "scope": "atproto transition:generic",
            "sub": did,
            "expires_in": self._lifetime,
        }


def metadata(issuer: str) -> dict[str, Any]:
    """The metadata of an authorization server, as the reference server has them."""
    return {
        "issuer": issuer,
        "authorization_endpoint": f"{issuer}/oauth/authorize",
        "token_endpoint": f"{issuer}/oauth/token",
        "pushed_authorization_request_endpoint": f"{issuer}/oauth/par",
        "revocation_endpoint": f"{issuer}/oauth/revoke",
        "response_types_supported": ["code"],
        "response_modes_supported": ["query", "fragment"],
        "grant_types_supported": ["authorization_code", "refresh_token"],
        "code_challenge_methods_supported": ["S256"],
        "scopes_supported": ["atproto", "transition:generic"],
        "token_endpoint_auth_methods_supported": ["none", "private_key_jwt"],
        "token_endpoint_auth_signing_alg_values_supported": ["ES256"],
        "dpop_signing_alg_values_supported": ["ES256"],
        "authorization_response_iss_parameter_supported": True,
        "require_pushed_authorization_requests": True,
        "client_id_metadata_document_supported": True,
        "require_request_uri_registration": True,
    }


def serve(connection: socket.socket, context: ssl.SSLContext, answers: Answers) -> None:
    """Answer the requests of one connection."""
    with suppress(OSError), context.wrap_socket(connection, server_side=True) as tls, tls.makefile("rb") as stream:
        tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while line := stream.readline():
            method, path, _ = line.decode("latin-1").split(" ")
            headers: dict[str, str] = {}
            while field := stream.readline().decode("latin-1").strip():
                name, _, value = field.partition(":")
                headers[name.lower()] = value.strip()
            body = stream.read(int(headers.get("content-length", "0")))
            data = json.dumps(answers.to(method, headers["host"], path, body)).encode()
            ends = headers.get("connection", "").lower() == "close"
            tls.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nDPoP-Nonce: a-nonce\r\n"
                + (b"Connection: close\r\n" if ends else b"")
                + b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
            )
            if ends:
                return


def main() -> None:
    """Serve until the standard input ends. The first line of the output is the port."""
    import requests  # not above: the programs whose start is measured import this module, too
    import trustme

    directory, servers, lifetime, latency = json.loads(sys.argv[1])
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(f"*.{DOMAIN}").configure_cert(context)
    usual = Path(requests.utils.DEFAULT_CA_BUNDLE_PATH).read_bytes()
    Path(directory, "ca.pem").write_bytes(usual + authority.cert_pem.bytes())
    answers = Answers(servers, lifetime, latency)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection, context, answers), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()


@contextmanager
def running(
    directory: Path, *, servers: int = 1, lifetime: float = 3600.0, latency: float = 0.0
) -> Iterator[dict[str, str]]:
    """The servers, and the variables of the environment by which a process finds them (:func:`lead_there`)."""
    import subprocess

    settings = json.dumps([str(directory), servers, lifetime, latency])
    with subprocess.Popen(
        [sys.executable, "-m", __spec__.name, settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the servers have no pipes")
        try:
            port = process.stdout.readline().strip()
            yield {"BENCH_PORT": port, "REQUESTS_CA_BUNDLE": str(directory / "ca.pem")}
        finally:
            process.stdin.close()


def lead_there() -> None:
    """Let all names of theirs lead to the servers in this process. To be called before anything of the library is
    imported."""
    port = int(os.environ["BENCH_PORT"])
    usual: Any = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: object, **options: object) -> list[tuple[Any, ...]]:
        if not str(host).endswith(DOMAIN):
            return list(usual(host, *arguments, **options))
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]

    socket.getaddrinfo = getaddrinfo


def statistics(environment: dict[str, str]) -> dict[str, int]:
    """What the servers have counted."""
    context = ssl.create_default_context(cafile=environment["REQUESTS_CA_BUNDLE"])
    with (
        socket.create_connection(("127.0.0.1", int(environment["BENCH_PORT"]))) as plain,
        context.wrap_socket(plain, server_hostname=f"plc.{DOMAIN}") as tls,
    ):
        tls.sendall(f"GET {STATISTICS} HTTP/1.1\r\nHost: plc.{DOMAIN}\r\nConnection: close\r\n\r\n".encode())
        counts: dict[str, int] = json.loads(tls.makefile("rb").read().partition(b"\r\n\r\n")[2])
    return counts


if __name__ == "__main__":
    main()
