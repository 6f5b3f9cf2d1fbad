"""The HTTP client against servers that misbehave in every way there is."""

from __future__ import annotations

import gzip
import itertools
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from atproto_session import _threads
from atproto_session._adapter import Bounds, HardenedAdapter, Network, look_up_aside
from atproto_session._environment import Environment
from atproto_session.errors import TransportError
from atproto_session.transport import Response, Transport, UnusableResponse

from .loopback import LOOPBACK, ScriptedServer, Web, answer, closed_port, json_answer, network_to, read_request

GENEROUS = 20.0


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "requests_ca_bundle", "curl_ca_bundle"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def replying(*pieces: bytes) -> Callable[[socket.socket], None]:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        for piece in pieces:
            connection.sendall(piece)

    return script


def endless(start: bytes, again: bytes, pause: float = 0.0) -> Callable[[socket.socket], None]:
    """Sends ``again`` for ever, until the client has gone."""
    never = threading.Event()

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(start)
        while not never.wait(pause):
            connection.sendall(again)

    return script


def endless_silence(connection: socket.socket) -> None:
    """Read, and say nothing."""
    while connection.recv(65536):
        pass


def reset(connection: socket.socket) -> None:
    """Read the request and close with a RST."""
    read_request(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def fetch(server: ScriptedServer, **options: Any) -> Response:
    return Transport(allow_http=True, **options).request("GET", f"http://127.0.0.1:{server.port}/path?query")


def failure(script: Callable[[socket.socket], None], **options: Any) -> TransportError:
    with ScriptedServer(script) as server, pytest.raises(TransportError) as caught:
        fetch(server, **options)
    return caught.value


def failure_of_https(
    script: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None, **options: Any
) -> TransportError:
    with ScriptedServer(script, tls) as server, pytest.raises(TransportError) as caught:
        Transport(network=network_to(server.port), **options).request("GET", "https://pds.example.com/")
    return caught.value


# What it sends and returns


def test_a_form_is_posted_and_the_answer_read() -> None:
    seen = []

    def script(connection: socket.socket) -> None:
        seen.append(read_request(connection))
        connection.sendall(json_answer({"a": 1}, status=201))

    with ScriptedServer(script) as server:
        url = f"http://127.0.0.1:{server.port}/token"
        response = Transport(allow_http=True, user_agent="tester").request(
            "POST", url, data={"a": "b c", "d": "&"}, headers={"DPoP": "proof"}
        )
    line, headers, body = seen[0]
    assert line == "POST /token HTTP/1.1"
    assert body == b"a=b+c&d=%26"
    assert headers["content-type"] == "application/x-www-form-urlencoded"
    assert headers["dpop"] == "proof"
    assert headers["user-agent"] == "tester"
    assert (response.status, response.json(), response.url) == (201, {"a": 1}, url)
    assert response.headers["CONTENT-TYPE"] == response.content_type == "application/json"


def test_a_printed_response_hides_what_it_carries() -> None:
    assert "secret" not in repr(Response(200, {"X": "secret"}, b"secret", "https://pds.example.com"))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"NaN", b"[" * 100_000, b"1" * 5000, b"\xef\xbb\xbf{}"], ids=lambda body: str(body[:4])
)
def test_what_is_not_json_is_a_value_error_that_quotes_nothing(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"^is not JSON$") as caught:
        Response(200, {}, body, "https://pds.example.com").json()
    assert caught.value.__cause__ is None


@pytest.mark.duty(14)
@pytest.mark.parametrize(
    ("sent", "complaint", "retryable"),
    [
        (json_answer({}, 404), "404", False),
        (json_answer({}, 201), "201", False),
        (json_answer({}, 429), "429", True),
        (json_answer({}, 503), "503", True),
        (answer(302, location="/elsewhere"), "302", False),
        (json_answer({}, content_type="text/html"), "text/html", False),
        (answer(200, b"{}"), "no type", False),
        (json_answer([]), "not an object", False),
        (answer(200, b"<html>", content_type="application/json"), "not JSON", False),
    ],
)
def test_a_document_is_a_json_object_with_status_200(sent: bytes, complaint: str, retryable: bool) -> None:
    with ScriptedServer(replying(sent)) as server, pytest.raises(UnusableResponse, match=complaint) as caught:
        Transport(allow_http=True).get_json(f"http://localhost:{server.port}/")
    assert caught.value.retryable is retryable
    assert server.accepted == (2 if "503" in complaint else 1)


def test_a_document_may_be_declared_with_parameters_or_as_anything_where_that_is_asked_for() -> None:
    with ScriptedServer(replying(json_answer({"a": 1}, content_type="Application/JSON; charset=utf-8"))) as server:
        assert Transport(allow_http=True).get_json(f"http://localhost:{server.port}/") == {"a": 1}
    with ScriptedServer(replying(json_answer({"a": 1}, content_type="text/plain"))) as server:
        assert Transport(allow_http=True).get_json(f"http://localhost:{server.port}/", media_type=None) == {"a": 1}


# Whether the request left


def test_refused_connection_is_not_sent() -> None:
    with closed_port() as port, pytest.raises(TransportError, match="connection refused") as caught:
        Transport(allow_http=True).request("GET", f"http://127.0.0.1:{port}/path")
    assert not caught.value.sent
    assert caught.value.retryable
    assert str(caught.value) == f"cannot reach http://127.0.0.1:{port}: connection refused"


def test_name_that_does_not_resolve_is_not_sent() -> None:
    def getaddrinfo(*_: object) -> list[tuple[object, ...]]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    with pytest.raises(TransportError, match="does not resolve") as caught:
        Transport(network=Network(getaddrinfo=getaddrinfo)).request("GET", "https://pds.example.com/")
    assert not caught.value.sent


@pytest.mark.parametrize("found", [[], [(socket.AF_INET, 4711, 0, "", (LOOPBACK, 1))]], ids=["none", "unusable"])
def test_name_without_a_usable_address_is_not_sent(found: list[tuple[object, ...]]) -> None:
    network = Network(is_allowed=lambda _: True, getaddrinfo=lambda *_: found)
    with pytest.raises(TransportError, match="cannot reach") as caught:
        Transport(network=network).request("GET", "https://pds.example.com/")
    assert not caught.value.sent


@pytest.mark.duty(42)
def test_endless_look_up_is_left_behind_and_not_sent() -> None:
    release = threading.Event()

    def getaddrinfo(*_: object) -> list[tuple[object, ...]]:
        release.wait(GENEROUS)
        return []

    with pytest.raises(TransportError, match="timed out") as caught:
        Transport(network=Network(getaddrinfo=getaddrinfo), timeout=0.05).request("GET", "https://pds.example.com/")
    release.set()
    assert not caught.value.sent


def test_time_that_is_over_is_not_sent() -> None:
    with ScriptedServer(replying(answer())) as server, pytest.raises(TransportError, match="timed out") as caught:
        fetch(server, timeout=-1.0)
    assert not caught.value.sent
    assert server.accepted == 0


def test_tls_that_fails_is_not_sent(certificates: trustme.CA) -> None:
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificates.issue_cert("pds.example.com").configure_cert(server_side)
    untrusted = failure_of_https(replying(answer()), tls=server_side)
    assert "certificate is not valid" in str(untrusted)
    assert not untrusted.sent
    garbled = failure_of_https(lambda connection: connection.sendall(b"not TLS at all\r\n\r\n"))
    assert "the TLS connection failed" in str(garbled)
    assert not garbled.sent


@pytest.mark.duty(42)
def test_tls_that_never_answers_is_not_sent() -> None:
    error = failure_of_https(endless_silence, connect_timeout=0.1)
    assert "timed out" in str(error)
    assert not error.sent


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (replying(), "cut off"),
        (reset, "cut off"),
        (replying(b"HTTP/1.1 200"), "cut off"),
        (replying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"), "cut off"),
        (replying(answer(200, b"12345")[:-1]), "cut off"),
        (replying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n123"), "cut off"),
        (replying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhello\r\n"), "no usable answer"),
        (replying(b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n"), "no usable answer"),
        (replying(b"SSH-2.0-OpenSSH_9.9\r\n"), "not HTTP"),
    ],
    ids=[
        "closed",
        "reset",
        "half a status",
        "half the headers",
        "half a body",
        "half a chunk",
        "no chunk",
        "two lengths",
        "no HTTP",
    ],
)
def test_what_fails_after_the_request_left_is_sent(script: Callable[[socket.socket], None], message: str) -> None:
    error = failure(script)
    assert error.sent
    assert error.retryable
    assert "path" not in str(error)
    assert "query" not in str(error)
    assert message in str(error)


def test_what_the_caller_was_handling_already_is_not_given_as_the_reason() -> None:
    with closed_port() as port:
        try:
            os.environ["NO SUCH VARIABLE"]
        except KeyError:
            with pytest.raises(TransportError, match="connection refused"):
                Transport(allow_http=True).request("GET", f"http://127.0.0.1:{port}/")


# Bounds


@pytest.mark.duty(42)
@pytest.mark.parametrize(
    "script",
    [
        endless(b"", b"H", pause=0.01),
        endless(b"HTTP/1.1 200 OK\r\nX: ", b"a", pause=0.01),
        endless(b"HTTP/1.1 200 OK\r\n\r\n", b"a", pause=0.01),
        endless(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"a", pause=0.01),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n", pause=0.01),
        endless_silence,
    ],
    ids=["status", "header", "body", "body of known length", "chunks", "silence"],
)
def test_a_server_that_drips_is_left_in_time(script: Callable[[socket.socket], None]) -> None:
    began = time.monotonic()
    errors = (failure(script, timeout=timeout) for timeout in (0.3, 2.0, GENEROUS / 2))
    error = next(error for error in errors if error.sent)  # a busy machine may need longer to connect
    assert "timed out" in str(error)
    assert time.monotonic() - began < GENEROUS


@pytest.mark.duty(42)
@pytest.mark.parametrize(
    "script",
    [
        endless(b"", b"H" * 1000),
        endless(b"HTTP/1.1 200 OK\r\n", b"X: " + b"a" * 1000 + b"\r\n"),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        endless(b"HTTP/1.1 200 OK\r\n\r\n", b"a" * 1000),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;" + b"x" * 1000 + b"\r\na\r\n"),
        replying(answer(200, b"a" * 10_001)),
        replying(answer(200, gzip.compress(bytes(5_000_000)), content_encoding="gzip")),
    ],
    ids=["status", "headers", "interim answers", "body", "chunk extensions", "a byte too much", "gzip bomb"],
)
def test_an_answer_without_end_is_left(script: Callable[[socket.socket], None]) -> None:
    error = failure(script, max_bytes=10_000)
    assert error.sent
    assert "timed out" not in str(error)


def test_an_answer_may_end_with_its_connection() -> None:
    with ScriptedServer(replying(b"HTTP/1.0 200 OK\r\n\r\nbody")) as server:
        assert fetch(server).body == b"body"
    with ScriptedServer(replying(b"HTTP/1.0 200 OK\r\n\r\n")) as server:
        assert fetch(server).body == b""


def test_the_largest_answer_is_read() -> None:
    with ScriptedServer(replying(answer(200, b"a" * 10_000))) as server:
        assert len(fetch(server, max_bytes=10_000).body) == 10_000


def test_gzip_that_was_not_asked_for_is_undone_all_the_same() -> None:
    with ScriptedServer(replying(answer(200, gzip.compress(b"a" * 10_000), content_encoding="GZIP"))) as server:
        assert fetch(server, max_bytes=10_000).body == b"a" * 10_000
    with ScriptedServer(replying(answer(204, content_encoding="br"))) as server:
        assert fetch(server).body == b""


@pytest.mark.parametrize(
    ("body", "coding", "message"),
    [
        (zlib.compress(b"a"), "deflate", "not asked for"),
        (gzip.compress(gzip.compress(b"a")), "gzip, gzip", "not asked for"),
        (b"plain", "gzip", "not the gzip"),
        (gzip.compress(b"a" * 1000)[:-12], "gzip", "cut off"),
    ],
)
def test_other_codings_are_refused(body: bytes, coding: str, message: str) -> None:
    error = failure(replying(answer(200, body, content_encoding=coding)))
    assert message in str(error)
    assert not error.retryable


@pytest.mark.duty(42)
def test_a_dead_address_leaves_time_for_the_next() -> None:
    """The first address accepts no connection (its backlog is full), the second does."""
    with ScriptedServer(replying(answer(200, b"there"))) as server, socket.socket() as deaf:
        deaf.bind((LOOPBACK, 0))
        deaf.listen(0)
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", address)
            for address in (deaf.getsockname(), (LOOPBACK, server.port))
        ]
        network = Network(is_allowed=lambda _: True, getaddrinfo=lambda *_: found)
        response = Transport(allow_http=True, network=network, connect_timeout=2.0).request("GET", "http://localhost/")
        for filler in fillers:
            filler.close()
    assert response.body == b"there"


# Addresses


@pytest.mark.duty(42)
def test_a_name_that_leads_inside_is_refused_without_a_byte_sent() -> None:
    with ScriptedServer(replying(answer())) as server:
        network = Network(getaddrinfo=network_to(server.port).getaddrinfo)
        with pytest.raises(TransportError, match="not one of the public Internet") as caught:
            Transport(network=network).request("GET", "https://pds.example.com/")
    assert server.accepted == 0
    assert not caught.value.sent
    assert not caught.value.retryable


@pytest.mark.duty(42)
def test_development_reaches_loopback_and_nothing_else_inside() -> None:
    with ScriptedServer(replying(answer())) as server:
        assert fetch(server).status == 200
    network = Network(is_allowed=Network.default(allow_http=True).is_allowed, getaddrinfo=_inside)
    with pytest.raises(TransportError, match="public Internet"):
        Transport(allow_http=True, network=network).request("GET", "https://pds.example.com/")


def _inside(*_: object) -> list[tuple[object, ...]]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("10.0.0.1", 443))]


@pytest.mark.duty(42)
def test_dns_rebinding_gains_nothing() -> None:
    """A name that is public when it is looked up first and private when it is looked up next."""
    addresses = iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"])
    with ScriptedServer(replying(answer())) as server:

        def getaddrinfo(*_: object) -> list[tuple[object, ...]]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (next(addresses), server.port))]

        network = Network(is_allowed=lambda address: address != "127.0.0.2", getaddrinfo=getaddrinfo)
        transport = Transport(allow_http=True, network=network)
        assert transport.request("GET", "http://localhost/").status == 200
        with pytest.raises(TransportError, match="public Internet"):
            transport.request("GET", "http://localhost/")
    assert server.accepted == 1
    assert list(addresses) == ["127.0.0.2"], "each connection looks the name up exactly once"


@pytest.mark.duty(42)
def test_of_several_addresses_only_public_ones_are_tried() -> None:
    with ScriptedServer(replying(answer())) as server, ScriptedServer(replying(answer())) as inner:
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", address)
            for address in (("127.0.0.2", inner.port), (LOOPBACK, server.port))
        ]
        network = Network(is_allowed=lambda address: address == LOOPBACK, getaddrinfo=lambda *_: found)
        assert Transport(allow_http=True, network=network).request("GET", "http://localhost/").status == 200
    assert (server.accepted, inner.accepted) == (1, 0)


@pytest.mark.duty(17, 42)
@pytest.mark.parametrize(
    "url", ["http://pds.example.com/", "https://user:hunter2@pds.example.com/", "https://10.0.0.1/"]
)
def test_an_improper_url_is_not_fetched(url: str) -> None:
    with pytest.raises(TransportError, match="not fetched") as caught:
        Transport().request("GET", url)
    assert not caught.value.sent
    assert not caught.value.retryable
    assert "hunter2" not in str(caught.value)


# Redirects, proxies, and what the user's machine is set up to add


@pytest.mark.duty(8, 42)
def test_redirects_are_followed_only_as_far_as_is_asked() -> None:
    web = Web()
    with ScriptedServer(web.script) as server:
        at = f"localhost:{server.port}"
        web.answers = {
            f"{at}/1": answer(302, location="/2"),
            f"{at}/2": answer(307, location=f"http://{at}/3"),
            f"{at}/3": answer(200, b"end"),
            f"{at}/none": answer(301),
        }
        transport = Transport(allow_http=True)
        assert transport.request("GET", f"http://{at}/1").status == 302
        assert transport.request("GET", f"http://{at}/1", redirects=1).status == 307
        followed = transport.request("GET", f"http://{at}/1", redirects=3)
        assert (followed.status, followed.url) == (200, f"http://{at}/3")
        assert transport.request("GET", f"http://{at}/none", redirects=3).status == 301


@pytest.mark.duty(42)
@pytest.mark.parametrize(
    "location",
    [
        *(
            "http://pds.example.com/",
            "https://10.0.0.1/",
            "file:///etc/passwd",
            "https://[",
            "/\\evil",
            "https:///",
        ),
        *(
            "javascript:alert(1)",
            "data:text/html,x",
            "mailto:a@example.com",
            "https://a:b/",
            "https://[::1",
            "http://a\x00b",
        ),
    ],
)
def test_a_redirect_to_an_improper_url_is_refused(location: str) -> None:
    server = ScriptedServer(replying(answer(302, location=location)))
    with server, pytest.raises(TransportError, match="redirects to an address that") as caught:
        Transport(allow_http=True).request("GET", f"http://localhost:{server.port}/", redirects=3)
    assert caught.value.sent
    assert not caught.value.retryable


@pytest.mark.duty(42)
def test_the_address_is_judged_on_every_hop() -> None:
    with ScriptedServer(replying(answer(302, location="https://inside.example.com/"))) as server:
        network = network_to(server.port, {"inside.example.com": "127.0.0.2"}, blocked="127.0.0.2")
        with pytest.raises(TransportError, match=r"inside\.example\.com: its address is not one of the public"):
            Transport(allow_http=True, network=network).request("GET", "http://localhost/", redirects=3)
    assert server.accepted == 1


@pytest.fixture
def certificates() -> trustme.CA:
    return trustme.CA()


class Proxy(ScriptedServer):
    """An HTTP proxy for which every host is ``upstream``. Refuses without the password."""

    def __init__(self, upstream: int) -> None:
        self.lines: list[str] = []
        self._upstream = upstream
        super().__init__(self._serve)

    def _serve(self, connection: socket.socket) -> None:
        line, headers, _ = read_request(connection)
        self.lines.append(line)
        if "proxy-authorization" not in headers:
            connection.sendall(answer(407))
        elif line.startswith("CONNECT "):
            connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            with socket.create_connection((LOOPBACK, self._upstream)) as upstream:
                back = threading.Thread(target=_copy, args=(upstream, connection))
                back.start()
                _copy(connection, upstream)
                back.join()
        else:
            connection.sendall(answer(200, b"by proxy"))


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one side has gone, which ends the copying


@pytest.mark.duty(42)
def test_a_proxy_of_the_environment_is_used_and_its_own_address_is_the_operators(
    monkeypatch: pytest.MonkeyPatch, certificates: trustme.CA, tmp_path: Path
) -> None:
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificates.issue_cert("pds.example.com").configure_cert(server_side)
    certificates.cert_pem.write_to_path(tmp_path / "ca.pem")
    with ScriptedServer(replying(answer(200, b"tunnelled")), tls=server_side) as server, Proxy(server.port) as proxy:
        ca_bundle = str(tmp_path / "ca.pem")
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:word@127.0.0.1:{proxy.port}")
        transport = Transport(ca_bundle=ca_bundle)
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        assert transport.request("GET", "https://pds.example.com/").body == b"tunnelled", "the environment is read once"
        transport = Transport(ca_bundle=ca_bundle)
        with pytest.raises(TransportError, match="407") as declined:
            transport.request("GET", "https://pds.example.com/")
        with pytest.raises(TransportError, match="full name"):
            transport.request("GET", "https://10.0.0.1/")
        monkeypatch.setenv("HTTP_PROXY", f"http://user:word@127.0.0.1:{proxy.port}")
        assert Transport(allow_http=True).request("GET", "http://localhost/").body == b"by proxy"
    assert not declined.value.sent
    assert [line.rpartition(" ")[0] for line in proxy.lines] == [
        "CONNECT pds.example.com:443",
        "CONNECT pds.example.com:443",
        "GET http://localhost/",
    ]


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "http://"])
def test_a_proxy_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(TransportError, match=r"(?i)proxy") as caught:
        Transport().request("GET", "https://pds.example.com/")
    assert not caught.value.sent
    assert not caught.value.retryable


def test_neither_netrc_nor_cookies_get_into_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login alice password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    seen = []

    def script(connection: socket.socket) -> None:
        seen.append(read_request(connection)[1])
        connection.sendall(answer(200, set_cookie="a=b; Path=/"))

    with ScriptedServer(script) as server:
        transport = Transport(allow_http=True)
        for _ in range(2):
            transport.request("GET", f"http://127.0.0.1:{server.port}/")
    assert len(seen) == 2
    assert not any(name in headers for headers in seen for name in ("authorization", "cookie"))


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_ca_bundle_of_the_environment_is_used(
    name: str, monkeypatch: pytest.MonkeyPatch, certificates: trustme.CA, tmp_path: Path
) -> None:
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificates.issue_cert("pds.example.com").configure_cert(server_side)
    certificates.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv(name, str(tmp_path / "ca.pem"))
    with ScriptedServer(replying(answer()), tls=server_side) as server:
        response = Transport(network=network_to(server.port)).request("GET", "https://pds.example.com/")
    assert response.status == 200


# Any bytes at all

_fragments = st.sampled_from(
    b"HTTP/1.1 |200|302| OK|\r\n|\n|: |Content-Length|-1|Transfer-Encoding|chunked|Content-Encoding|gzip|Location|"
    b"Set-Cookie|\r\n\r\n|0\r\n|{}|\x00|\xff|https://[".split(b"|")
)


@pytest.fixture(scope="module")
def parrot() -> Iterator[tuple[list[bytes], ScriptedServer]]:
    """A server that answers with what is in the list."""
    says = [b""]

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(says[0])

    with ScriptedServer(script) as server:
        yield says, server


@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n"]),
    rest=st.lists(_fragments | st.binary(max_size=20), max_size=20),
)
def test_any_answer_is_an_answer_or_a_transport_error(
    parrot: tuple[list[bytes], ScriptedServer], start: bytes, rest: list[bytes]
) -> None:
    says, server = parrot
    says[0] = start + b"".join(rest)
    try:
        response = Transport(allow_http=True).request("GET", f"http://127.0.0.1:{server.port}/", redirects=1)
    except TransportError as error:
        outcome = error.sent and str(error).isprintable()
    else:
        outcome = 100 <= response.status <= 999
    assert outcome


# The adapter in a session of its own, as resource requests use it


def session(**options: Any) -> requests.Session:
    session = requests.Session()
    session.mount("http://", HardenedAdapter(**options))
    return session


def kept_alive(answers: int) -> Callable[[socket.socket], None]:
    """Answers that many requests on one connection, reads one more, and closes."""

    def script(connection: socket.socket) -> None:
        for _ in range(answers):
            read_request(connection)
            connection.sendall(answer(200, b"ok"))
        read_request(connection)

    return script


def test_connections_are_kept_and_a_request_on_one_that_dies_is_sent_and_not_repeated() -> None:
    with ScriptedServer(kept_alive(2)) as server, session(allow_http=True) as http:
        url = f"http://127.0.0.1:{server.port}/"
        for _ in range(2):
            assert http.get(url).text == "ok"
        bounds = Bounds()
        with pytest.raises(requests.ConnectionError):
            http.get(url, timeout=bounds)  # type: ignore[arg-type]
    assert bounds.sent
    assert server.accepted == 1


def test_outside_of_an_exchange_the_timeouts_of_the_request_hold() -> None:
    with (
        ScriptedServer(endless_silence) as server,
        session(allow_http=True) as http,
        pytest.raises(requests.ReadTimeout),
    ):
        http.get(f"http://127.0.0.1:{server.port}/", timeout=(GENEROUS, 0.05))


@pytest.mark.duty(42)
def test_an_answer_that_is_streamed_keeps_to_the_bounds_of_its_exchange() -> None:
    server = ScriptedServer(endless(b"HTTP/1.1 200 OK\r\n\r\n", b"a", pause=0.01))
    with server, session(allow_http=True) as http:
        bounds: Any = Bounds(within=0.3)
        streamed = http.get(f"http://127.0.0.1:{server.port}/", stream=True, timeout=bounds)
        with pytest.raises(requests.ConnectionError):
            b"".join(streamed.iter_content())


@pytest.mark.duty(42)
def test_the_adapter_by_itself_connects_to_public_addresses_only() -> None:
    refused = pytest.raises(requests.ConnectionError, match="public Internet")
    bounds: Any = Bounds()
    with ScriptedServer(kept_alive(1)) as server, session() as http, refused:
        http.get(f"http://127.0.0.1:{server.port}/", timeout=bounds)
    assert server.accepted == 0
    assert not bounds.sent


def test_bounds_are_those_of_one_request_whatever_a_signal_handler_asks_for_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The handler's request is made while the first one is on its way, in its thread."""
    with ScriptedServer(kept_alive(1)) as outer, ScriptedServer(replying(answer(200, b"a" * 5000))) as inner:
        handled: list[str] = []
        network = network_to(outer.port)

        def getaddrinfo(*arguments: Any) -> list[tuple[Any, ...]]:
            with session(allow_http=True) as http:
                handled.append(http.get(f"http://127.0.0.1:{inner.port}/").text)
            return network.getaddrinfo(*arguments)

        bounds: Any = Bounds(max_bytes=4000)
        with session(network=Network(is_allowed=lambda _: True, getaddrinfo=getaddrinfo)) as http:
            assert http.get("http://pds.example.com/", timeout=bounds).text == "ok"
    assert handled == ["a" * 5000]


def test_a_forked_child_uses_no_connection_of_its_parent() -> None:
    program = """
import os, sys, requests
from atproto_session._adapter import HardenedAdapter
http = requests.Session()
http.mount("http://", HardenedAdapter(allow_http=True))
url = sys.argv[1]
http.get(url)
child = os.fork()
if not child:
    sys.exit(http.get(url).text != "ok")
_, status = os.waitpid(child, 0)
sys.exit(status or http.get(url).text != "ok")
"""
    numbers = itertools.count()
    asked_on: list[int] = []

    def script(connection: socket.socket) -> None:
        number = next(numbers)
        while True:
            read_request(connection)
            asked_on.append(number)
            connection.sendall(answer(200, b"ok"))

    with ScriptedServer(script) as server:
        command = [sys.executable, "-c", program, f"http://127.0.0.1:{server.port}/"]
        assert subprocess.run(command, check=False, timeout=60).returncode == 0
    assert asked_on == [0, 1, 0]


def test_a_lookup_that_cannot_have_a_thread_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(_threads._crew, "_idle", [])
    with pytest.raises(TransportError, match="no thread") as caught:
        Transport().request("GET", "https://pds.example.com/")
    assert not caught.value.sent


def test_what_is_raised_in_a_spawned_thread_reaches_whoever_asks() -> None:
    def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        look_up_aside(work).get(GENEROUS)


# Connections that are kept


def keeping(times: int, replies: bytes = answer(200, b"{}", content_type="application/json")) -> Callable[..., None]:
    """Answers so many requests on a connection, and closes it when another one comes."""

    def script(connection: socket.socket) -> None:
        for _ in range(times):
            read_request(connection)
            connection.sendall(replies)
        read_request(connection)

    return script


def test_documents_share_a_connection_and_nothing_else_does() -> None:
    with ScriptedServer(keeping(5)) as server:
        transport, url = Transport(allow_http=True), f"http://127.0.0.1:{server.port}/"
        for _ in range(3):
            transport.get_json(url)
        assert server.accepted == 1
        for number in range(3):
            assert transport.request("POST", url, data={"refresh_token": "x"}, lenient=True).status == 200
            assert server.accepted == 2 + number
        transport.get_json(url)
        assert server.accepted == 4
        transport.close()
        transport.get_json(url)
        assert server.accepted == 5
        transport.close()


def test_a_document_is_asked_for_again_if_the_connection_had_been_kept_too_long(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ScriptedServer(keeping(1)) as server:
        transport, url = Transport(allow_http=True), f"http://127.0.0.1:{server.port}/"
        for number in range(3):
            assert transport.get_json(url) == {}
            assert server.accepted == 1 + number
    assert caplog.messages == []


def test_an_answer_that_had_begun_is_not_asked_for_again() -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer(200, b"{}"))
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Le")

    with ScriptedServer(script) as server:
        transport, url = Transport(allow_http=True), f"http://127.0.0.1:{server.port}/"
        transport.request("GET", url)
        with pytest.raises(TransportError, match="cut off"):
            transport.request("GET", url)
        assert server.accepted == 1


def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atproto_session.transport._IDLE_FOR", -1.0)
    with ScriptedServer(keeping(9)) as server:
        transport, url = Transport(allow_http=True), f"http://127.0.0.1:{server.port}/"
        for number in range(3):
            transport.get_json(url)
            assert server.accepted == 1 + number


def test_a_body_that_is_too_large_ends_its_connection() -> None:
    with ScriptedServer(keeping(2, answer(200, b"a" * 200_000))) as server:
        transport, url = Transport(allow_http=True, max_bytes=999), f"http://127.0.0.1:{server.port}/"
        for number in range(2):
            with pytest.raises(TransportError, match="too large"):
                transport.request("GET", url)
            assert server.accepted == 1 + number


def test_an_address_needs_no_look_up_and_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("atproto_session._adapter.spawn", no_thread)
    with ScriptedServer(keeping(1)) as server:
        assert Transport(allow_http=True).get_json(f"http://127.0.0.1:{server.port}/") == {}
        with pytest.raises(TransportError, match="no thread"):
            Transport(allow_http=True).get_json(f"http://localhost:{server.port}/")


def test_an_environment_that_is_not_trusted_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "nowhere.pem")
    with ScriptedServer(keeping(1)) as server:
        transport = Transport(allow_http=True, environment=Environment(trusted=False))
        assert transport.get_json(f"http://127.0.0.1:{server.port}/") == {}
    with pytest.raises(TransportError, match="resolve"):
        transport.request("GET", "https://nowhere.invalid/")
