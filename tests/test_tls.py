"""TLS contexts that connections share, and sessions that are taken up again."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import trustme

from atproto_session import _tls
from atproto_session._adapter import HardenedAdapter
from atproto_session._tls import Contexts, SharedContext
from atproto_session.transport import Transport

from .loopback import LOOPBACK, ScriptedServer, answer, network_to, read_request
from .processes import in_child

HOSTS = ("pds.example.com", "other.example.com")


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[str, trustme.CA]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return str(tmp_path / "ca.pem"), authority


@pytest.fixture
def server(bundle: tuple[str, trustme.CA]) -> Iterator[ScriptedServer]:
    """Answers one request on each connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    bundle[1].issue_cert(*HOSTS).configure_cert(context)

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer(connection="close"))

    with ScriptedServer(script, context) as server:
        yield server


def connect(context: SharedContext, server: ScriptedServer, host: str) -> bool:
    """Make a connection and a request. Whether an earlier session was taken up."""
    with (
        socket.create_connection((LOOPBACK, server.port)) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        tls.sendall(b"GET / HTTP/1.1\r\n\r\n")
        tls.recv(65536)
        context.remember(tls)
        return bool(tls.session_reused)


def test_the_session_of_a_server_is_taken_up_again(bundle: tuple[str, trustme.CA], server: ScriptedServer) -> None:
    context = SharedContext(bundle[0])
    found = [connect(context, server, host) for host in (HOSTS[0], HOSTS[0], HOSTS[1], HOSTS[1], HOSTS[0])]
    assert found == [False, True, False, True, True], "never that of another name"


def test_sessions_of_so_many_servers_are_kept_and_no_more(
    bundle: tuple[str, trustme.CA], server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tls, "_SESSIONS", 1)
    context = SharedContext(bundle[0])
    found = [connect(context, server, host) for host in (HOSTS[0], HOSTS[1], HOSTS[0])]
    assert found == [False, False, False]


def test_a_session_that_does_not_work_is_forgotten(bundle: tuple[str, trustme.CA], server: ScriptedServer) -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.recv(1)

    context = SharedContext(bundle[0])
    connect(context, server, HOSTS[0])
    with ScriptedServer(hang_up) as broken, pytest.raises(OSError):
        connect(context, broken, HOSTS[0])
    assert not connect(context, server, HOSTS[0])


def test_what_is_no_tls_connection_has_no_session(bundle: tuple[str, trustme.CA]) -> None:
    context = SharedContext(bundle[0])
    context.remember(None)
    context.remember(object())
    assert context._sessions == {}


def test_certificates_are_read_once(bundle: tuple[str, trustme.CA], server: ScriptedServer) -> None:
    transport = Transport(ca_bundle=bundle[0], network=network_to(server.port))
    for _ in range(2):
        assert transport.request("POST", f"https://{HOSTS[0]}/", data={}).status == 200
        Path(bundle[0]).write_text("no certificate any more")
    assert server.accepted == 2


def test_a_certificate_of_another_name_or_authority_is_refused(
    bundle: tuple[str, trustme.CA], server: ScriptedServer
) -> None:
    """Also after a good connection, whose session and context are there."""
    for host, verify in (("wrong.example.com", bundle[0]), (HOSTS[0], True)):
        adapter = HardenedAdapter(network=network_to(server.port))
        request = requests.Request("GET", f"https://{HOSTS[0]}/").prepare()
        assert adapter.send(request, verify=bundle[0]).status_code == 200
        with pytest.raises(requests.exceptions.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            adapter.send(requests.Request("GET", f"https://{host}/").prepare(), verify=verify)


def test_without_verification_nothing_is_shared(bundle: tuple[str, trustme.CA], server: ScriptedServer) -> None:
    adapter = HardenedAdapter(network=network_to(server.port))
    request = requests.Request("GET", "https://wrong.example.com/").prepare()
    with pytest.warns(match="Unverified HTTPS request"):
        assert adapter.send(request, verify=False).status_code == 200
    assert adapter._contexts._contexts == {}


def test_a_bundle_may_be_a_directory_and_has_to_be_there(bundle: tuple[str, trustme.CA], tmp_path: Path) -> None:
    contexts = Contexts()
    assert contexts.get(str(tmp_path)) is contexts.get(str(tmp_path))
    assert contexts.get(None) is not contexts.get(bundle[0])
    with pytest.raises(OSError, match="nowhere"):
        HardenedAdapter().send(requests.Request("GET", "https://a.example.com/").prepare(), verify="nowhere.pem")
    Path(bundle[0]).write_text("no certificates")
    with pytest.raises(requests.exceptions.SSLError):
        HardenedAdapter().send(requests.Request("GET", "https://a.example.com/").prepare(), verify=bundle[0])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_has_contexts_of_its_own(bundle: tuple[str, trustme.CA]) -> None:
    contexts = Contexts()
    context = contexts.get(bundle[0])

    def child() -> None:
        assert contexts.get(bundle[0]) is not context

    in_child(child)
    assert contexts.get(bundle[0]) is context
