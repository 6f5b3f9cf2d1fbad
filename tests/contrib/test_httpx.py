"""httpx over one of our sessions."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import requests
import urllib3
from urllib3.util import Retry

from atproto_session import (
    ClientMetadata,
    LockTimeoutError,
    OAuthClient,
    OAuthSession,
    SessionNotFoundError,
    TransportError,
)
from atproto_session.contrib.httpx import Client, OAuthTransport
from atproto_session.testing.network import Account, LocalNetwork, Request, Response

from ..core import Worker
from ..scenes import ECHO, GET_SESSION, log_in, store_tokens


@pytest.fixture
def http(session: OAuthSession) -> Iterator[httpx.Client]:
    with Client(session) as http:
        yield http


def answer_with(network: LocalNetwork, response: Response, **options: Any) -> None:
    def respond(request: Request) -> Response:
        return response.with_headers(DPoP_Nonce="any")

    network.fault("resource", "custom", respond=respond, **options)


# Requests


def test_requests_are_signed_and_go_to_the_account_s_server(http: httpx.Client, account: Account) -> None:
    assert http.get(GET_SESSION).json()["handle"] == account.handle
    echo = http.post(ECHO, params={"a": ["1", "ö"]}, json={"b": 2}, headers={"X-Own": "c"}).json()
    assert (echo["did"], echo["method"], echo["query"]) == (account.did, "POST", {"a": ["1", "ö"]})
    assert echo["headers"]["authorization"] == "DPoP"
    assert (echo["headers"]["x-own"], echo["headers"]["content-type"]) == ("c", "application/json")
    assert echo["headers"]["user-agent"].startswith("python-httpx/")


def test_a_token_of_the_caller_s_is_left_out(http: httpx.Client) -> None:
    assert http.get(ECHO, headers={"Authorization": "Bearer mine"}).json()["headers"]["authorization"] == "DPoP"


def in_pieces(data: bytes) -> Iterator[bytes]:
    yield data[:10]
    yield data[10:]


@pytest.mark.parametrize(
    "options",
    [
        lambda data: {"content": data},
        lambda data: {"content": in_pieces(data)},
        lambda data: {"content": io.BytesIO(data)},
        lambda data: {"content": in_pieces(data), "headers": {"Content-Length": str(len(data))}},
    ],
    ids=["bytes", "generator", "file", "known length"],
)
def test_bodies_arrive_whole(options: Callable[[bytes], dict[str, Any]], http: httpx.Client) -> None:
    data = bytes(range(256)) * 1000
    echo = http.post(ECHO, **options(data)).json()
    assert (echo["length"], echo["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert not {"transfer-encoding", "content-length"} <= echo["headers"].keys()


def test_forms_with_files_arrive(http: httpx.Client) -> None:
    echo = http.post(ECHO, data={"a": "b"}, files={"c": io.BytesIO(b"file")}).json()
    assert echo["length"] > 100
    assert echo["headers"]["content-type"].startswith("multipart/form-data")


def test_nothing_goes_elsewhere(http: httpx.Client, network: LocalNetwork) -> None:
    with pytest.raises(TransportError, match="are for"):
        http.get("https://elsewhere.example.com/")
    network.fault("resource", "redirect", to="https://elsewhere.example.com/")
    with pytest.raises(TransportError, match="are for"):
        http.get(ECHO, follow_redirects=True)


def test_redirects_are_httpx_s(http: httpx.Client) -> None:
    there = "/xrpc/app.test.redirect"
    assert http.get(there, params={"to": ECHO}).status_code == 302
    response = http.get(there, params={"to": ECHO}, follow_redirects=True)
    assert (response.status_code, len(response.history)) == (200, 1)


def test_headers_arrive_as_httpx_writes_them(http: httpx.Client) -> None:
    sent = [(b"X-Two", b"a"), (b"X-Two", b"b"), (b"X-Far", "日本".encode())]
    seen = http.get(ECHO, headers=sent).json()["headers"]
    assert seen["x-two"] == "a, b"
    assert seen["x-far"].encode("latin-1").decode() == "日本"
    with pytest.raises(httpx.LocalProtocolError, match="header"):
        http.get(ECHO, headers={"X-Two": "lines\nof text"})


# Tokens


def test_each_try_has_a_proof_of_its_own(network: LocalNetwork, account: Account) -> None:
    """The server has seen the proof of the first try, and takes it once."""
    metadata = ClientMetadata.loopback(scope="atproto transition:generic")
    eager = Retry(3, status_forcelist=[503], allowed_methods=None)
    with OAuthClient(metadata, store="memory:", retries=eager, **network.client_options()) as client:
        session = log_in(network, client, account)
        session._signer._sleep = lambda seconds: None
        with Client(session) as http:
            http.get(ECHO)
            fault = network.fault("resource", "status", processed=True, times=2)
            assert http.post(ECHO, content=b"hello").json()["length"] == 5
    assert fault.count == 2


def test_an_expired_token_is_refreshed_once(http: httpx.Client, network: LocalNetwork, client: OAuthClient) -> None:
    (did,) = client._store
    network.expire_access_tokens(did)
    workers = [Worker(lambda: http.post(ECHO, content=b"hello").json()["length"]) for _ in range(8)]
    assert [worker.outcome() for worker in workers] == [5] * 8
    assert (network.rotations, network.replays) == (1, 0)


def test_a_refused_token_is_found_out_in_a_body_without_length(
    http: httpx.Client, network: LocalNetwork, account: Account
) -> None:
    """As some servers say it: in words alone, and in chunks."""
    http.get(ECHO)
    answer_with(network, replace(Response.of_json({"error": "ExpiredToken", "message": "it has"}, 400), chunked=True))
    assert http.get(ECHO).status_code == 200
    assert network.rotations == 1


def test_a_body_that_httpx_streams_is_sent_once(
    http: httpx.Client, network: LocalNetwork, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    http.get(ECHO)
    network.expire_access_tokens(account.did)
    response = http.post(ECHO, content=in_pieces(b"x" * 100))
    assert response.status_code == 401
    assert "could be read only once" in caplog.text
    assert "could be read only once" in response.reason_phrase
    assert http.post(ECHO, content=in_pieces(b"x" * 100)).status_code == 401
    assert http.post(ECHO, content=b"x" * 100).status_code == 200


def test_a_nonce_is_fetched_before_a_body_that_httpx_streams(http: httpx.Client, network: LocalNetwork) -> None:
    assert http.post(ECHO, content=in_pieces(b"x" * 100)).status_code == 200
    assert network.requests(ECHO) == 1


def test_a_session_that_is_gone_is_our_error(http: httpx.Client, session: OAuthSession) -> None:
    session.sign_out()
    with pytest.raises(SessionNotFoundError):
        http.get(GET_SESSION)
    with pytest.raises(SessionNotFoundError):
        Client(session)


def test_an_account_that_moves_is_followed(http: httpx.Client, network: LocalNetwork, session: OAuthSession) -> None:
    moved_to = network.move_account(session.did)
    session.token_info(refresh=True)
    response = http.get(ECHO)
    assert response.json()["headers"]["host"] == moved_to.partition("//")[2]


# Answers


def test_an_answer_is_streamed_as_it_comes(http: httpx.Client, network: LocalNetwork) -> None:
    packed = gzip.compress(b"hello" * 100_000)
    response = Response(200, headers={"Content-Encoding": "gzip", "Content-Type": "text/plain"}, body=packed)
    answer_with(network, response, times=3)
    assert http.get(ECHO).text == "hello" * 100_000
    with http.stream("GET", ECHO) as streamed:
        assert b"".join(streamed.iter_raw()) == packed
    with http.stream("GET", ECHO) as streamed:
        assert b"".join(streamed.iter_bytes()) == b"hello" * 100_000
        assert streamed.headers["Content-Encoding"] == "gzip"


def test_an_answer_that_had_to_be_read_is_given_as_it_was(http: httpx.Client, network: LocalNetwork) -> None:
    document = {"error": "InvalidRequest", "message": "no"}
    packed = gzip.compress(Response.of_json(document).body)
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json", "X-Own": "1"}
    answer_with(network, Response(400, headers=headers, body=packed))
    response = http.get(ECHO)
    assert (response.status_code, response.json(), response.headers["X-Own"]) == (400, document, "1")


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [("gzip, deflate, br, zstd", "gzip, deflate"), ("br", "identity"), ("gzip;q=0.5", "gzip;q=0.5"), ("", "identity")],
)
def test_only_codings_are_asked_for_that_both_know(
    http: httpx.Client, wanted: str, sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which those are is up to the Python and to what else is installed."""
    known = {"Accept-Encoding": "gzip, deflate"}
    monkeypatch.setattr("atproto_session.contrib.httpx.default_headers", lambda: known)
    assert http.get(ECHO, headers={"Accept-Encoding": wanted}).json()["headers"]["accept-encoding"] == sent


def test_cookies_are_httpx_s(http: httpx.Client, network: LocalNetwork) -> None:
    answer_with(network, Response(200, headers={"Set-Cookie": "a=1"}))
    http.get(ECHO)
    assert http.cookies["a"] == "1"
    assert http.get(ECHO).json()["headers"]["cookie"] == "a=1"


# Bounds and failures


def sends(session: OAuthSession, request: httpx.Request) -> Any:
    """The timeout that a request is sent with."""
    seen: list[Any] = []

    class Watching(requests.adapters.HTTPAdapter):
        def send(self, request: Any, stream: bool = False, timeout: Any = None, *more: Any, **options: Any) -> Any:
            seen.append(timeout)
            return super().send(request, stream, timeout, *more, **options)

    session.mount("http://", Watching())
    OAuthTransport(session).handle_request(request).close()
    return seen[-1]


def test_timeouts_are_httpx_s_within_ours(session: OAuthSession, network: LocalNetwork) -> None:
    url = network.pds_url + ECHO
    with Client(session, timeout=httpx.Timeout(7.0, connect=3.0)) as http:
        assert sends(session, http.build_request("GET", url)) == (3.0, 7.0)
        assert sends(session, http.build_request("GET", url, timeout=None)) == (None, None)
    assert sends(session, httpx.Request("GET", url)) == (10.0, 60.0)
    session.total_timeout = 5.0
    assert max(sends(session, httpx.Request("GET", url))) <= 5.0


def test_the_time_in_all_is_bounded(http: httpx.Client, session: OAuthSession, network: LocalNetwork) -> None:
    http.get(ECHO)
    session.total_timeout = 0.2
    fault = network.fault("resource", "late", seconds=None)
    with pytest.raises(httpx.ReadTimeout) as caught:
        http.get(ECHO)
    assert isinstance(caught.value.__cause__, requests.exceptions.ReadTimeout)
    assert caught.value.request.url.path == ECHO
    fault.release.set()


def test_waiting_for_a_refresh_is_bounded_by_the_client(
    http: httpx.Client, network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    store_tokens(client, session.did, expires_at=datetime.now(UTC) - timedelta(seconds=60))
    session._signer._timeout = 0.05
    session._signer.forget()
    fault = network.fault("refresh", "late", seconds=None)
    with pytest.raises(LockTimeoutError):
        http.get(ECHO)
    fault.release.set()


@pytest.mark.parametrize("action", ["cut_before", "cut_after"])
def test_a_connection_that_is_cut(action: str, http: httpx.Client, network: LocalNetwork) -> None:
    http.get(ECHO)
    network.fault("resource", action)
    with pytest.raises(httpx.ReadError) as caught:
        http.get(ECHO)
    assert isinstance(caught.value.__cause__, requests.ConnectionError)


def test_an_answer_that_is_cut(http: httpx.Client, network: LocalNetwork) -> None:
    http.get(ECHO)
    network.fault("resource", "rewritten", rewrite=lambda head, body: head + body[:-5], ending="close")
    with pytest.raises(httpx.RemoteProtocolError) as caught:
        http.get(ECHO)
    assert isinstance(caught.value.__cause__, urllib3.exceptions.ProtocolError)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (requests.exceptions.ConnectTimeout(), httpx.ConnectTimeout),
        (requests.exceptions.ProxyError(), httpx.ProxyError),
        (requests.exceptions.SSLError(), httpx.ConnectError),
        (requests.exceptions.ContentDecodingError(), httpx.DecodingError),
        (requests.exceptions.ChunkedEncodingError(), httpx.RemoteProtocolError),
        (requests.exceptions.InvalidURL(), httpx.LocalProtocolError),
        (requests.exceptions.RetryError("often"), httpx.ReadError),
    ],
    ids=lambda value: "" if isinstance(value, type) else type(value).__name__,
)
def test_failures_on_the_way_are_httpx_s(
    raised: Exception, expected: type[Exception], http: httpx.Client, session: OAuthSession
) -> None:
    class Failing(requests.adapters.HTTPAdapter):
        def send(self, *args: Any, **options: Any) -> requests.Response:
            raise raised

    session.mount("http://", Failing())
    with pytest.raises(expected) as caught:
        http.get(ECHO)
    assert type(caught.value) is expected
    assert caught.value.__cause__ is raised
    assert str(caught.value) == str(raised)


def test_nobody_listens(http: httpx.Client, network: LocalNetwork) -> None:
    http.get(ECHO)
    network.__exit__(None, None, None)
    with pytest.raises(httpx.ConnectError):
        http.get(ECHO)


# What httpx has beside


def test_an_asynchronous_client_says_what_to_do(session: OAuthSession, network: LocalNetwork) -> None:
    async def call(within: bool) -> None:
        http = httpx.AsyncClient(transport=OAuthTransport(session))  # type: ignore[arg-type]
        if within:
            async with http:
                """It is not entered."""
        try:
            await http.get(network.pds_url + ECHO)
        finally:
            await http.aclose()

    for within in (True, False):
        with pytest.raises(TypeError, match=r"asyncio\.to_thread"):
            asyncio.run(call(within))


def test_from_asynchronous_code_it_is_called_in_threads(http: httpx.Client, account: Account) -> None:
    async def call() -> list[httpx.Response]:
        return await asyncio.gather(*(asyncio.to_thread(http.get, GET_SESSION) for _ in range(5)))

    assert [response.json()["did"] for response in asyncio.run(call())] == [account.did] * 5


def test_an_auth_for_requests_says_what_to_use(client: OAuthClient, account: Account, network: LocalNetwork) -> None:
    auth: Any = client.auth(account.did)
    with httpx.Client(auth=auth) as http, pytest.raises(TypeError, match=r"use atproto_session\.contrib\.httpx"):
        http.get(network.pds_url + GET_SESSION)
    with pytest.raises(TypeError, match=r"use atproto_session\.contrib\.httpx"):
        httpx.get(network.pds_url + GET_SESSION, auth=auth)


def test_it_shows_no_token(session: OAuthSession) -> None:
    assert repr(OAuthTransport(session)) == f"<OAuthTransport <OAuthSession {session.did}>>"
