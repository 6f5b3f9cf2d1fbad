"""Addresses, proxies and texts that come from outside, on every way that they take into the library."""

from __future__ import annotations

import gzip
import io
import socket
import ssl
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
import requests
import trustme
from requests.adapters import HTTPAdapter

from atproto_session import (
    AuthMethodUnsatisfiableError,
    ClientAuthMethod,
    ClientMetadata,
    ClientMetadataError,
    Keyset,
    MemoryStore,
    OAuthCallbackError,
    OAuthClient,
    OAuthResponseError,
    OAuthSession,
    Session,
    SessionError,
    SessionGetter,
    StoreError,
    TransportError,
    open_store,
)
from atproto_session._adapter import HardenedAdapter, Network
from atproto_session._environment import Environment
from atproto_session._signer import Signer
from atproto_session.client_auth import resolve_stored
from atproto_session.discovery import parse_server_metadata
from atproto_session.dpop import NonceCache
from atproto_session.identity import parse_did_document
from atproto_session.keys import generate_jwk
from atproto_session.locks import FileLocks, Locks, ThreadLocks
from atproto_session.stores import complete
from atproto_session.testing.network import Account, LocalNetwork, Response
from atproto_session.transport import Transport

from ..core import DID, FakeAuthority, make_session
from ..fuzz import DID_DOCUMENT, ISSUER, SERVER_METADATA
from ..loopback import LOOPBACK, ScriptedServer, answer, read_request
from ..test_transport import Proxy

PDS_HOST = "pds.example.com"
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "requests_ca_bundle", "curl_ca_bundle")


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# Resource requests


def session_over(adapter: HTTPAdapter) -> OAuthSession:
    """An account at ``https://pds.example.com`` whose requests go over ``adapter``."""
    store = MemoryStore[Session]()
    store.set(DID, make_session())
    signer = Signer(SessionGetter(store, FakeAuthority()), DID, NonceCache())
    return OAuthSession(signer, adapter, make_session(), Environment())


@dataclass(frozen=True)
class PDS:
    """A PDS with TLS on this machine.

    :ivar requests: line and headers of what it was asked.
    """

    server: ScriptedServer
    requests: list[tuple[str, Mapping[str, str]]]

    def network(self, **options: Any) -> Network:
        """A network on which every name leads to it, and this machine's own address to itself, for a proxy."""

        def getaddrinfo(host: str, port: int, *_: object) -> list[tuple[Any, ...]]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (LOOPBACK, port if host == LOOPBACK else self.port))]

        return Network(getaddrinfo=getaddrinfo, **options)

    @property
    def port(self) -> int:
        return self.server.port


@pytest.fixture
def pds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PDS]:
    certificates = trustme.CA()
    certificates.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificates.issue_cert(PDS_HOST).configure_cert(context)
    seen: list[tuple[str, Mapping[str, str]]] = []

    def script(connection: socket.socket) -> None:
        line, headers, _ = read_request(connection)
        seen.append((line, headers))
        connection.sendall(answer(200, b"{}", connection="close", dpop_nonce="n"))

    with ScriptedServer(script, tls=context) as server:
        yield PDS(server, seen)


@pytest.mark.duty(42)
def test_resource_requests_use_the_proxy_of_the_environment(pds: PDS, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tunnel's far end sees the token, the proxy does not; the proxy sees its password, the far end does not."""
    with Proxy(pds.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:word@{LOOPBACK}:{proxy.port}")
        with session_over(HardenedAdapter(network=pds.network())) as session:
            assert session.get("/xrpc/a.b.c").status_code == 200
    assert [line.rpartition(" ")[0] for line in proxy.lines] == [f"CONNECT {PDS_HOST}:443"]
    [(line, headers)] = pds.requests
    assert line == "GET /xrpc/a.b.c HTTP/1.1"
    assert headers["authorization"].startswith("DPoP ")
    assert "proxy-authorization" not in headers


@pytest.mark.duty(42)
def test_hosts_that_are_to_have_no_proxy_have_none(pds: PDS, monkeypatch: pytest.MonkeyPatch) -> None:
    network = pds.network(is_allowed=lambda _: True)
    with Proxy(pds.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:word@{LOOPBACK}:{proxy.port}")
        for no_proxy, seen in ((f"other.example.com,{PDS_HOST}", (0, 2)), ("other.example.com", (2, 4))):
            monkeypatch.setenv("NO_PROXY", no_proxy)
            transport = Transport(network=network)
            with session_over(HardenedAdapter(network=network)) as session:
                assert session.get("/xrpc/a.b.c").status_code == 200
            assert transport.request("GET", f"https://{PDS_HOST}/").status == 200
            assert (len(proxy.lines), len(pds.requests)) == seen


@pytest.mark.duty(42)
def test_a_host_without_proxy_is_judged_by_its_address(pds: PDS, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(pds.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:word@{LOOPBACK}:{proxy.port}")
        monkeypatch.setenv("NO_PROXY", PDS_HOST)
        session = session_over(HardenedAdapter(network=pds.network()))
        with pytest.raises(requests.ConnectionError, match="public Internet"):
            session.get("/xrpc/a.b.c")
    assert (proxy.lines, pds.requests) == ([], [])


@pytest.mark.duty(42)
def test_dns_rebinding_gains_nothing_from_a_resource_request(pds: PDS) -> None:
    """The PDS is public when the first connection is made, and this machine's neighbour at the second."""
    addresses = iter([LOOPBACK, "127.0.0.2", "127.0.0.2"])

    def getaddrinfo(*_: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (next(addresses), pds.port))]

    network = Network(is_allowed=lambda address: address == LOOPBACK, getaddrinfo=getaddrinfo)
    with session_over(HardenedAdapter(network=network)) as session:
        assert session.get("/xrpc/a.b.c").status_code == 200
        with pytest.raises(requests.ConnectionError, match="public Internet"):
            session.get("/xrpc/a.b.c")
    assert pds.server.accepted == 1
    assert list(addresses) == ["127.0.0.2"], "each connection looks the name up exactly once"


@pytest.mark.duty(42)
@pytest.mark.parametrize("allow_http", [False, True])
@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "192.168.1.1", "fd00:ec2::254"])
def test_a_client_takes_no_token_to_an_address_inside(address: str, allow_http: bool) -> None:
    """Of a PDS whose name leads there, whatever the DID document said when the account logged in."""
    looked_up: list[object] = []

    def getaddrinfo(host: str, *_: object) -> list[tuple[Any, ...]]:
        looked_up.append(host)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 0, "", (address, 443))]

    store = MemoryStore[Session]()
    store.set(DID, make_session())
    with OAuthClient(ClientMetadata.loopback(), store=store, allow_http=allow_http) as client:
        client._pool._network = replace(client._pool._network, getaddrinfo=getaddrinfo)
        with pytest.raises(requests.ConnectionError, match="public Internet"):
            client.restore(DID).get("/xrpc/a.b.c")
    assert looked_up == [PDS_HOST]


@pytest.mark.duty(42)
def test_a_resource_request_has_a_timeout_unless_its_caller_has_another() -> None:
    class Recorder(HTTPAdapter):
        timeouts: list[object]

        def send(self, request: Any, stream: Any = False, timeout: Any = None, *_: Any) -> requests.Response:
            self.timeouts.append(timeout)
            response = requests.Response()
            response.status_code, response.request, response.url = 200, request, request.url
            response.headers["DPoP-Nonce"] = "n"
            response.raw = io.BytesIO()
            return response

    recorder = Recorder()
    recorder.timeouts = []
    with session_over(recorder) as session:
        session.get("/xrpc/a.b.c").close()
        session.get("/xrpc/a.b.c", timeout=3).close()
    bounds, own = recorder.timeouts
    assert isinstance(bounds, tuple)
    assert all(0 < bound <= 120 for bound in bounds)
    assert own == 3


@pytest.mark.duty(42)
def test_a_bomb_is_not_even_unpacked() -> None:
    bomb = gzip.compress(bytes(50_000_000))

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer(200, bomb, content_encoding="gzip"))

    with ScriptedServer(script) as server:
        tracemalloc.start()
        try:
            with pytest.raises(TransportError, match="too large"):
                Transport(allow_http=True, max_bytes=len(bomb)).request("GET", f"http://127.0.0.1:{server.port}/")
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert most < 10_000_000


# Text from outside

#: What a terminal would act upon, what turns text around, and far too much of it.
HOSTILE = "\x1b[31m\u202e\x00\n" + "x" * 10_000
LONG_NAME = f"{'a' * 10_000}.example.com"


def check_text(text: str) -> None:
    assert text.isprintable()
    assert len(text) < 700


def check_error(error: BaseException) -> None:
    """Every message of this library's in what a traceback would show."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, SessionError | ValueError):
            check_text(str(current))
        if isinstance(current, OAuthResponseError):
            check_text(current.error or "")
            check_text(current.error_description or "")
        current = current.__cause__


Errors = tuple[type[Exception], ...]


@pytest.mark.duty(43)
@pytest.mark.parametrize(
    "act",
    [
        lambda client: client.authorize(HOSTILE),
        lambda client: client.authorize(LONG_NAME),
        lambda client: client.authorize(f"a{HOSTILE}.test"),
        lambda client: client.authorize(f"did:plc:{HOSTILE}"),
        lambda client: client.authorize(f"did:web:{LONG_NAME}"),
        lambda client: client.authorize(f"did:{'x' * 10_000}:y"),
        lambda client: client.authorize(f"did:web:a.example.com:{'x' * 1900}"),
        lambda client: client.authorize(f"did:web:{'x' * 1900}"),
        lambda client: client.authorize(f"did:plc:{'x' * 1900}"),
        lambda client: client.authorize(f"did:abc:{'x' * 1900}"),
        lambda client: client.authorize(f"https://{HOSTILE}"),
        lambda client: client.authorize(f"https://{LONG_NAME}"),
        lambda client: client.authorize(f"https://a.example.com/{HOSTILE}"),
        lambda client: client.authorize("alice.test", scope=f"atproto {HOSTILE}"),
        lambda client: client.authorize("alice.test", scope=f"atproto {'x' * 10_000}"),
        lambda client: client.authorize("alice.test", redirect_uri=HOSTILE),
        lambda client: client.restore(HOSTILE),
        lambda client: client.restore(DID, session_id=HOSTILE),
        lambda client: client.revoke(HOSTILE),
        lambda client: client.auth(HOSTILE),
        lambda client: client.callback({"state": HOSTILE, "iss": HOSTILE, "error": HOSTILE}),
        lambda client: client.callback(f"http://127.0.0.1/?state={HOSTILE}"),
        lambda client: client.callback(f"http://127.0.0.1/?{'a=b&' * 200}"),
        lambda client: client.sessions.get_session(HOSTILE),
        lambda client: client.sessions.get_session(HOSTILE, True),
        lambda client: client.sessions.set_stored(HOSTILE, make_session()),
    ],
)
def test_what_a_caller_passes_on_is_shown_short_and_printable(
    act: Callable[[OAuthClient], object], client: OAuthClient
) -> None:
    with pytest.raises((SessionError, ValueError)) as caught:
        act(client)
    check_error(caught.value)


@pytest.mark.duty(43)
@pytest.mark.parametrize("hostile", [HOSTILE, "x" * 10_000])
@pytest.mark.parametrize("endpoint", ["par", "token", "refresh", "revoke"])
def test_what_an_authorization_server_says_is_shown_short_and_printable(
    endpoint: str, hostile: str, network: LocalNetwork, client: OAuthClient, account: Account, caplog: Any
) -> None:
    if endpoint in ("refresh", "revoke"):
        client.callback(network.authorize(client.authorize(account.did), account))
    network.fault(endpoint, "oauth_error", error=hostile, description=hostile)
    acts: dict[str, Callable[[], object]] = {
        "revoke": lambda: client.revoke(account.did),
        "refresh": lambda: client.restore(account.did, refresh=True),
    }
    act = acts.get(endpoint, lambda: client.callback(network.authorize(client.authorize(account.did), account)))
    if endpoint == "revoke":
        act()
        assert "could not be revoked" in caplog.text
    else:
        with pytest.raises(OAuthResponseError) as caught:
            act()
        check_error(caught.value)
        assert caught.value.error is not None
    for record in caplog.records:
        if record.name.startswith("atproto_session") and "testing" not in record.name:
            check_text(record.getMessage())


@pytest.mark.duty(43)
def test_what_a_callback_says_is_shown_short_and_printable(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    good = dict(parse_qsl(urlsplit(network.authorize(client.authorize(account.did), account)).query))
    said = good | {"error": HOSTILE, "error_description": HOSTILE}
    with pytest.raises(OAuthCallbackError, match="the log-in failed") as caught:
        client.callback(f"http://127.0.0.1/?{urlencode(said)}")
    check_error(caught.value)


@pytest.mark.duty(43)
@pytest.mark.parametrize("name", sorted(SERVER_METADATA))
@pytest.mark.parametrize("hostile", [HOSTILE, [HOSTILE], {HOSTILE: HOSTILE}, f"https://{LONG_NAME}"])
def test_what_metadata_say_is_shown_short_and_printable(name: str, hostile: object) -> None:
    with pytest.raises(SessionError) as caught:
        parse_server_metadata(ISSUER, SERVER_METADATA | {name: hostile})
    check_error(caught.value)


@pytest.mark.duty(43)
@pytest.mark.parametrize(
    "changes",
    [
        {"id": HOSTILE},
        {"service": HOSTILE},
        {"service": [DID_DOCUMENT["service"][0] | {"serviceEndpoint": HOSTILE}]},
        {"service": [DID_DOCUMENT["service"][0] | {"serviceEndpoint": f"https://{LONG_NAME}"}]},
        {"service": [DID_DOCUMENT["service"][0] | {"serviceEndpoint": f"https://a.example.com/{'x' * 10_000}"}]},
    ],
)
def test_what_a_did_document_says_is_shown_short_and_printable(changes: dict[str, Any]) -> None:
    with pytest.raises(SessionError) as caught:
        parse_did_document(DID, DID_DOCUMENT | changes)
    check_error(caught.value)


@pytest.mark.duty(43)
@pytest.mark.parametrize(
    ("endpoint", "response"),
    [
        ("protected-resource", Response.of_json({"resource": HOSTILE, "authorization_servers": [HOSTILE]})),
        ("protected-resource", Response.of_json({}, content_type="text/" + "x" * 10_000)),
        ("protected-resource", Response.of_text(HOSTILE)),
        ("as-metadata", Response.of_json({"issuer": HOSTILE})),
        ("resolve-handle", Response.of_json({"did": HOSTILE})),
        ("resolve-handle", Response.of_json({"did": "x" * 10_000})),
        ("resolve-handle", Response(200, b"{}", {"Content-Type": "\x1b[31m" + "x" * 10_000})),
        ("plc", Response.of_json({"id": HOSTILE})),
        ("plc", Response(200, b"\x00", {"Content-Encoding": "x" * 10_000})),
        ("par", Response(302, b"", {"Location": HOSTILE})),
        ("par", Response.of_json({"request_uri": [HOSTILE]})),
    ],
)
def test_what_a_server_answers_is_shown_short_and_printable(
    endpoint: str, response: Response, network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    network.fault(endpoint, "custom", respond=lambda _: response, times=None)
    with pytest.raises(SessionError) as caught:
        client.authorize(account.handle)
    check_error(caught.value)


@pytest.mark.duty(43)
@pytest.mark.parametrize("sub", [HOSTILE, "did:plc:" + "x" * 10_000])
def test_whoever_a_token_is_for_is_shown_short_and_printable(
    sub: str, network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    network.fault("token", "wrong_sub", sub=sub)
    with pytest.raises(SessionError) as caught:
        client.callback(network.authorize(client.authorize(network.pds_url), account))
    check_error(caught.value)


@pytest.mark.duty(43)
@pytest.mark.parametrize(
    "to", [f"https://{LONG_NAME}/", "https://evil.example.com/\x1b[31m", f"https://evil.example.com/{'x' * 10_000}"]
)
def test_where_a_resource_server_redirects_is_shown_short_and_printable(
    to: str, network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    network.fault("resource", "redirect", to=to)
    with pytest.raises(TransportError, match="was not sent") as caught:
        session.get("/xrpc/app.test.echo")
    check_error(caught.value)


@pytest.mark.duty(43)
@pytest.mark.parametrize(
    "sent",
    [
        answer(302, location=f"https://{LONG_NAME}/"),
        answer(302, location="https://\x1b[31m.example.com/"),
        answer(200, b"body", content_encoding="x" * 10_000),
        b"HTTP/1.1 200 \x1b[31m" + b"x" * 70_000 + b"\r\n\r\n",
        b"\x1b[31m" * 1000,
        b"HTTP/1.1 200 OK\r\nContent-Length: \x1b[31m, 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\x1b[31m\r\n",
    ],
)
def test_what_is_no_proper_http_is_shown_short_and_printable(sent: bytes) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(sent)

    with ScriptedServer(script) as server, pytest.raises(TransportError) as caught:
        Transport(allow_http=True).request("GET", f"http://127.0.0.1:{server.port}/", redirects=1)
    check_error(caught.value)


@pytest.mark.duty(43)
def test_what_a_proxy_answers_is_shown_short_and_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 403 \x1b[31m" + b"x" * 10_000 + b"\r\n\r\n")

    with ScriptedServer(script) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:hunter2@{LOOPBACK}:{proxy.port}")
        with pytest.raises(TransportError) as caught:
            Transport().request("GET", f"https://{PDS_HOST}/")
    check_error(caught.value)
    assert "hunter2" not in str(caught.value)


class Wrong(dict[str, Any]):
    """A store that holds what is no session."""

    def get(self, key: str, default: object = None) -> Any:
        return 7


@pytest.mark.duty(43)
@pytest.mark.parametrize(
    "act",
    [
        lambda place: open_store(HOSTILE),
        lambda place: open_store(f"{HOSTILE}:x"),
        lambda place: Keyset([generate_jwk() | {"kid": HOSTILE}] * 2),
        lambda place: Keyset.from_env("x" * 10_000),
        lambda place: Keyset.from_files("x" * 10_000),
        lambda place: Keyset.from_files(place / "\x1b[31m"),
        lambda place: ClientMetadata(HOSTILE),
        lambda place: ClientMetadata(f"https://{'a.' * 100}local/x"),
        lambda place: ClientMetadata(f"http://localhost?{'x' * 10_000}=1"),
        lambda place: ClientMetadata("https://a.example.com/x", [HOSTILE]),
        lambda place: ClientMetadata.loopback(f"atproto {HOSTILE}"),
        lambda place: complete(Wrong()).get(HOSTILE),
        lambda place: resolve_stored(
            ClientAuthMethod("private_key_jwt", HOSTILE),
            ClientMetadata(
                "https://a.example.com/x", ["https://a.example.com/y"], token_endpoint_auth_method="private_key_jwt"
            ),
            Keyset.generate(),
            parse_server_metadata(ISSUER, SERVER_METADATA),
        ),
        lambda place: held_twice(ThreadLocks()),
        lambda place: held_twice(FileLocks(place)),
    ],
)
def test_what_configures_a_client_is_shown_short_and_printable(act: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises((SessionError, ValueError)) as caught:
        act(tmp_path)
    assert isinstance(caught.value, ClientMetadataError | StoreError | AuthMethodUnsatisfiableError | TimeoutError)
    check_error(caught.value)


def held_twice(locks: Locks) -> None:
    with locks.hold(HOSTILE, timeout=1), locks.hold(HOSTILE, timeout=0):
        raise NotImplementedError
