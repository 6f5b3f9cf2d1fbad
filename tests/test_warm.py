"""Nothing is left to import once there is a client, but where a fork waits for it: a process that forks in the middle
of an import has a child that stops for ever."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import trustme

from atproto_session import _fork
from atproto_session.testing.network import LocalNetwork

from .core import SOON, Worker
from .loopback import NameServer, ScriptedServer, answer, read_request
from .processes import in_child

PROGRAM = """
import json, socket, sys
from atproto_session import _fork
from atproto_session import ClientMetadata, OAuthClient, SessionError
from atproto_session._adapter import Network
from atproto_session.identity import IdentityResolver
from atproto_session.transport import Transport

options, store, did, https_port, dns_port = json.loads(sys.stdin.readline())
client = OAuthClient(ClientMetadata.loopback(), store=store, **options)
wild = []

def audit(event, arguments):
    if event == "import" and arguments[0] not in sys.modules and not _fork._imports._under_way:
        wild.append(arguments[0])

sys.addaudithook(audit)
print(client.authorize(did), flush=True)
session = client.callback(sys.stdin.readline().strip()).session
session.get("/xrpc/com.atproto.server.getSession").json()
client.restore(did, refresh=True)
session.get("/xrpc/com.atproto.server.getSession").text
try:
    session.get("https://b\\u00fccher.example.com/")
except SessionError:
    pass
session.sign_out()

# DNS and HTTPS, as outside of development.
with _fork.importing():
    import dns.resolver
def getaddrinfo(host, port, *rest):
    host.encode("idna")
    return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", https_port))]

servers = dns.resolver.Resolver(configure=False)
servers.nameservers, servers.port = ["127.0.0.1"], dns_port
resolver = IdentityResolver(
    Transport(network=Network(is_allowed=lambda _: True, getaddrinfo=getaddrinfo)), dns_resolver=servers
)
for handle in ("alice.example.com", "nobody.example.com"):
    try:
        resolver.resolve(handle)
    except SessionError as error:
        print(error, file=sys.stderr)
try:
    Transport().request("GET", "https://nowhere.invalid/")
except SessionError as error:
    pass
for body in ("\\ufeff{}".encode("utf-16"), "{}".encode("utf-32-be"), "\\ufeff{}".encode(), b"\\xff"):
    from_ = sys.modules["atproto_session._bodies"].find_answer(b"HTTP/1.1 200 OK\\r\\n\\r\\n" + body)
used = [name for name in ("dns.rdtypes.ANY.TXT", "filelock") if name in sys.modules]
print(json.dumps([sorted(set(wild)), used]), flush=True)
"""


@pytest.mark.parametrize("store", ["memory:", "json", "sqlite"])
def test_nothing_is_imported_after_the_client_was_made(store: str, network: LocalNetwork, tmp_path: Path) -> None:
    account = network.create_account()
    ca = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("*.example.com", "alice.example.com", "nobody.example.com", "plc.directory").configure_cert(tls)
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    names = NameServer()
    names.records["_atproto.alice.example.com"] = [[f"did={account.did}"]]

    def script(connection: object) -> None:
        read_request(connection)  # type: ignore[arg-type]
        connection.sendall(answer(404))  # type: ignore[attr-defined]

    where = store if store == "memory:" else f"{store}:///{tmp_path}/sessions"
    try:
        with (
            ScriptedServer(script, tls) as web,
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "REQUESTS_CA_BUNDLE": str(tmp_path / "ca.pem")},
                text=True,
            ) as worker,
        ):
            assert worker.stdin is not None
            assert worker.stdout is not None
            job = [network.client_options(), where, account.did, web.port, names.port]
            print(json.dumps(job), file=worker.stdin, flush=True)
            url = worker.stdout.readline().strip()
            said, complaints = worker.communicate(f"{network.authorize(url, account)}\n", timeout=60)
            assert worker.returncode == 0, complaints
            wild, used = json.loads(said)
            assert wild == [], complaints
            assert "dns.rdtypes.ANY.TXT" in used
            assert web.accepted >= 2, complaints
    finally:
        names.close()
    assert "_atproto.alice.example.com" in names.asked


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_waits_for_an_import_that_is_under_way() -> None:
    begun, done = threading.Event(), threading.Event()

    def work() -> None:
        with _fork.importing():
            begun.set()
            time.sleep(0.05)  # what is imported takes its time
            done.set()

    worker = Worker(work)
    assert begun.wait(SOON)
    assert in_child(done.is_set)
    worker.outcome()
