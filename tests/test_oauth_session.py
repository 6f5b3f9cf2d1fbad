"""Requests of an account: adapters of a program's own, tries, bounds, odd arguments. How they are signed is in
``test_signer.py``, the rest in ``test_client.py`` and ``topics/test_duty_flow.py``."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urljoin

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry, Timeout

from atproto_session import (
    ClientMetadata,
    MemoryStore,
    OAuthClient,
    OAuthSession,
    Session,
    SessionGetter,
    TransportError,
    _fork,
)
from atproto_session._environment import Environment
from atproto_session._signer import Signer
from atproto_session.dpop import NonceCache
from atproto_session.oauth_session import retry_after
from atproto_session.testing.network import Account, LocalNetwork

from .canned import OK, Canned
from .core import DID, FakeAuthority, Worker, make_session
from .scenes import ECHO, GET_SESSION, log_in

EAGER = Retry(3, status_forcelist=[503], allowed_methods=None)


@pytest.fixture
def retrying(network: LocalNetwork, account: Account) -> Iterator[OAuthSession]:
    """A session whose client sends requests again. No time passes."""
    metadata = ClientMetadata.loopback(scope="atproto transition:generic")
    with OAuthClient(metadata, store="memory:", retries=EAGER, **network.client_options()) as client:
        session = log_in(network, client, account)
        session._signer._sleep = lambda seconds: None
        yield session


@pytest.fixture
def own() -> Iterator[requests.Session]:
    """A session of requests' own that sends requests again."""
    with requests.Session() as own:
        own.mount("http://", HTTPAdapter(max_retries=EAGER))
        yield own


# Adapters of one's own


@pytest.mark.parametrize("is_mounted", [True, False])
def test_a_mounted_adapter_sends_what_was_signed_and_to_nobody_else(is_mounted: bool, session: OAuthSession) -> None:
    canned = Canned(OK)
    if is_mounted:
        session.mount("http", canned)
    else:
        session.adapters[""] = canned
    assert session.get(GET_SESSION).status_code == 200
    assert canned.sent[0]["Authorization"].startswith("DPoP ")
    assert canned.sent[0]["DPoP"]
    with pytest.raises(TransportError, match="are for"):
        session.get("https://elsewhere.example.com/")
    assert len(canned.sent) == 1
    session.close()
    assert canned.closed
    assert session.adapters["http" if is_mounted else ""] is canned


def test_closing_a_session_leaves_its_clients_connections(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[object] = []
    monkeypatch.setattr(client._pool, "close", lambda: closed.append(1))
    with session:
        session.get(GET_SESSION)
    assert closed == []


# Tries


@pytest.mark.parametrize("way", ["mounted", "auth", "client"])
def test_each_try_has_a_proof_of_its_own(
    way: str, network: LocalNetwork, client: OAuthClient, retrying: OAuthSession, own: requests.Session
) -> None:
    """The answers are lost after the server has seen the proofs, which it takes once."""
    session = log_in(network, client, network.create_account("bob.test"))
    session.mount("http://", own.adapters["http://"])
    url, auth = network.pds_url + ECHO, client.auth(session.did)
    post: Callable[[], requests.Response] = {
        "mounted": lambda: session.post(ECHO, b"hello"),
        "auth": lambda: own.post(url, b"hello", auth=auth),
        "client": lambda: retrying.post(ECHO, b"hello"),
    }[way]
    assert post().status_code == 200
    fault = network.fault("resource", "status", processed=True, times=2)
    response = post()
    assert (response.status_code, response.history) == (200, [])
    assert response.json()["length"] == 5
    assert fault.count == 2
    network.fault("resource", "cut_after")
    assert post().status_code == 200
    assert network.rotations == 0


def test_tries_end(network: LocalNetwork, retrying: OAuthSession, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = network.fault("resource", "status", times=None)
    responses: list[requests.Response] = []
    send = retrying._adapter._below.send

    def recorded(*arguments: Any) -> requests.Response:
        responses.append(send(*arguments))
        return responses[-1]

    monkeypatch.setattr(retrying._adapter._below, "send", recorded)
    with pytest.raises(requests.exceptions.RetryError):
        retrying.get(ECHO)
    assert fault.count == 4
    assert [response.raw.closed for response in responses] == [True] * 4, "nobody else closes them"
    retrying._adapter._retries = EAGER.new(raise_on_status=False)
    assert retrying.get(ECHO).status_code == 503
    retrying._adapter._retries = EAGER.new(allowed_methods=["GET"])
    assert retrying.post(ECHO).status_code == 503
    assert fault.count == 9
    fault.disarm()
    fault = network.fault("resource", "cut_before", times=None)
    with pytest.raises(requests.ConnectionError):
        retrying.post(ECHO)
    assert fault.count == 1
    with pytest.raises(requests.ConnectionError):
        retrying.get(ECHO)
    assert fault.count == 5


def test_a_body_that_is_gone_is_not_tried_again(network: LocalNetwork, retrying: OAuthSession) -> None:
    fault = network.fault("resource", "status", times=None)
    assert retrying.post(ECHO, data=iter([b"once"])).status_code == 503
    assert fault.count == 1


def test_tries_without_an_error_of_urllib3(session: OAuthSession) -> None:
    class Broken(Canned):
        def send(self, *args: Any, **options: Any) -> requests.Response:
            raise requests.ConnectionError

    session.mount("http://", Broken())
    with pytest.raises(requests.ConnectionError):
        session.get(ECHO)


@pytest.mark.parametrize(
    ("headers", "waited"),
    [
        ({"Retry-After": "7"}, 7),
        ({"RateLimit-Reset": "7"}, 7),
        ({"RateLimit-Reset": "5", "Retry-After": "7"}, 7),
        ({"RateLimit-Reset": "soon"}, None),
        ({"Retry-After": "soon"}, 0),
        ({}, None),
    ],
)
def test_the_time_that_a_server_names_is_waited_for(
    headers: dict[str, str], waited: float | None, network: LocalNetwork, retrying: OAuthSession
) -> None:
    pauses: list[float] = []
    retrying._signer._sleep = pauses.append
    network.fault("resource", "status", status=429, headers=headers)
    assert retrying.get(ECHO).status_code == (429 if waited is None else 200)
    assert pauses == ([] if waited is None else [waited])


def test_the_time_that_a_server_names_counts_only_if_it_is_to(network: LocalNetwork, retrying: OAuthSession) -> None:
    pauses: list[float] = []
    retrying._signer._sleep = pauses.append
    retrying._adapter._retries = EAGER.new(status_forcelist=[429], respect_retry_after_header=False)
    network.fault("resource", "status", status=429, headers={"Retry-After": "7"})
    assert retrying.get(ECHO).status_code == 200
    assert pauses == [0]


def test_when_a_limit_ends() -> None:
    now = 1_800_000_000.5
    assert retry_after({"RateLimit-Reset": "1800000007"}, now) == "7"
    assert retry_after({"RateLimit-Reset": "1799999999"}, now) == "0"
    assert retry_after({"RateLimit-Reset": "60"}, now) == "60"
    assert retry_after({"RateLimit-Reset": "-1"}, now) is None
    assert retry_after({"RateLimit-Reset": "9" * 5000}, now) is None


def test_token_requests_are_not_tried_again(network: LocalNetwork, retrying: OAuthSession) -> None:
    fault = network.fault("refresh", "status", times=None)
    with pytest.raises(Exception, match="503"):
        retrying.token_info(refresh=True)
    assert fault.count == 1


# Time


def test_a_total_bound(network: LocalNetwork, session: OAuthSession) -> None:
    session.get(ECHO)
    session.total_timeout = 0.5
    fault = network.fault("resource", "drip", interval=0.05)
    with pytest.raises((requests.exceptions.Timeout, requests.ConnectionError)):
        session.get(ECHO)
    fault.disarm()
    session.total_timeout = 60.0
    assert session.get(ECHO).status_code == 200
    for timeout in (5, (5, 6), Timeout(5)):
        assert session.get(ECHO, timeout=timeout).status_code == 200  # type: ignore[arg-type]


def test_a_total_bound_is_one_for_all_tries_and_redirects(
    network: LocalNetwork, session: OAuthSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.monotonic()]
    session._signer.monotonic = lambda: now[0]
    session.total_timeout = 60.0
    bounds: list[object] = []
    send = session._adapter.send

    def watched(request: requests.PreparedRequest, **options: Any) -> requests.Response:
        bounds.append(options["timeout"])
        return send(request, **options)

    monkeypatch.setattr(session._adapter, "send", watched)
    assert session.get("/xrpc/app.test.redirect", params={"to": ECHO}).status_code == 200
    assert len(bounds) == 2
    assert bounds[0] is bounds[1]
    canned = Canned((302, {}, {"Location": ECHO, "DPoP-Nonce": "n"}), OK)
    canned.before_answer = lambda: now.__setitem__(0, now[0] + 59.0)
    session.mount("", canned)
    assert session.get("/xrpc/app.test.redirect", timeout=(3, None)).status_code == 200
    waits = [options["timeout"] for options in canned.options]
    assert waits[0][0] == 3
    assert 55 < waits[0][1] < 65
    assert max(waits[1]) < 5
    session.mount("", canned := Canned((302, {}, {"Location": ECHO, "DPoP-Nonce": "n"})))
    canned.before_answer = lambda: now.__setitem__(0, now[0] + 99.0)
    with pytest.raises(requests.exceptions.Timeout, match="total_timeout"):
        session.get("/xrpc/app.test.redirect")


def test_no_try_begins_that_its_bound_does_not_allow(network: LocalNetwork, retrying: OAuthSession) -> None:
    retrying.total_timeout = 30.0
    network.fault("resource", "status", status=429, headers={"Retry-After": "3600"})
    assert retrying.get(ECHO).status_code == 429


def test_a_refresh_is_waited_for_within_the_bound(network: LocalNetwork, session: OAuthSession) -> None:
    session.get(ECHO)
    network.expire_access_tokens(session.did)
    fault = network.fault("refresh", "late")
    session.total_timeout = 0.3
    with pytest.raises(TimeoutError) as caught:
        session.get(ECHO)
    assert getattr(caught.value, "did", None) == session.did
    fault.release.set()
    session.total_timeout = None
    assert session.get(ECHO).status_code == 200
    assert network.replays == 0


# Odd arguments


def test_urls_that_are_none(network: LocalNetwork, session: OAuthSession) -> None:
    assert session.get(GET_SESSION.encode()).json()["did"] == session.did
    request = requests.Request("GET")
    request.url = GET_SESSION.encode()
    assert session.send(session.prepare_request(request)).json()["did"] == session.did
    for url in (None, ["/xrpc/a"], 1):
        with pytest.raises(TypeError, match="url of a request"):
            session.get(url)  # type: ignore[arg-type]
    for wrong in (
        "at://did:plc:abc/app.bsky.feed.post/1",
        "ftp://example.com/",
        "//elsewhere.example.com/",
        "mailto:a",
    ):
        with pytest.raises(TransportError):
            session.get(wrong)


def test_retries_that_are_none(client: OAuthClient) -> None:
    with pytest.raises(TypeError, match="number of tries, or None, not str"):
        OAuthClient(client.metadata, store="memory:", retries="3")  # type: ignore[arg-type]
    OAuthClient(client.metadata, store="memory:", retries=3).close()


def test_neither_sessions_nor_authentication_can_be_copied_away(client: OAuthClient, session: OAuthSession) -> None:
    for thing in (session, client.auth(session.did)):
        for copied in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled or copied"):
                copied(thing)


def test_a_response_can_be_pickled(session: OAuthSession) -> None:
    assert pickle.loads(pickle.dumps(session.get(GET_SESSION))).json()["did"] == session.did


def test_threads_may_share_a_session(network: LocalNetwork, session: OAuthSession) -> None:
    start = threading.Barrier(8)

    def work() -> int:
        start.wait()
        return sum(session.get(GET_SESSION).status_code == 200 for _ in range(5))

    network.expire_access_tokens(session.did)
    assert [worker.outcome() for worker in [Worker(work) for _ in range(8)]] == [5] * 8
    assert network.rotations == 1


def test_auth_for_another_library(client: OAuthClient, session: OAuthSession) -> None:
    class Request:
        """Stands for httpx's."""

    with pytest.raises(TypeError, match="is for requests"):
        client.auth(session.did)(Request())  # type: ignore[arg-type]


# What a session of requests is and does


@pytest.fixture
def like(monkeypatch: pytest.MonkeyPatch) -> requests.Session:
    """A session of requests' own, in an environment with proxies."""
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.com:3128")
    monkeypatch.setenv("ALL_PROXY", "http://any.example.com:3128")
    monkeypatch.setenv("NO_PROXY", "direct.example.com")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/bundle.pem")
    return requests.Session()


@pytest.fixture
def ours(like: requests.Session) -> OAuthSession:
    store = MemoryStore[Session]()
    store.set(DID, make_session())
    signer = Signer(SessionGetter(store, FakeAuthority()), DID, NonceCache())
    return OAuthSession(signer, HTTPAdapter(), make_session(), Environment())


PDS = "https://pds.example.com"
Change = Callable[[requests.Session], object]


def test_it_has_what_a_new_session_of_requests_has(ours: OAuthSession, like: requests.Session) -> None:
    ours.headers["X"] = "1"
    ours.params["a"] = "1"  # type: ignore[index]
    ours.proxies["https"] = "x"
    ours.hooks["response"].append(lambda response, **_: response)
    ours.cookies.set("a", "b")
    for fresh in (like, OAuthSession(ours._signer, HTTPAdapter(), make_session(), Environment())):
        theirs = {name: value for name, value in vars(fresh).items() if not name.startswith("_")}
        assert set(vars(like)) <= set(theirs)
        assert (fresh.headers.get("X"), fresh.params, fresh.proxies, len(fresh.cookies)) == (None, {}, {}, 0)
        assert (fresh.hooks, fresh.max_redirects, fresh.stream, fresh.verify) == ({"response": []}, 30, False, True)


CHANGES: dict[str, Change] = {
    "nothing": lambda session: None,
    "proxies": lambda session: session.proxies.update(https="http://own:1", all="http://all:1"),
    "no proxies": lambda session: setattr(session, "proxies", None),
    "no trust": lambda session: setattr(session, "trust_env", False),
    "no verification": lambda session: setattr(session, "verify", False),
    "certificate": lambda session: setattr(session, "cert", "/cert.pem"),
    "stream": lambda session: setattr(session, "stream", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize(
    "arguments",
    [
        (PDS, {}, None, None, None),
        ("http://pds.example.com", None, False, True, ("/a", "/b")),
        ("https://direct.example.com", {}, None, "/own.pem", None),
        (PDS, {"no_proxy": "pds.example.com"}, None, False, None),
        (PDS, {"https": None, "http": "http://mine:1"}, True, None, None),
    ],
)
def test_settings_are_merged_as_in_requests(
    change: Change, arguments: tuple[Any, ...], ours: OAuthSession, like: requests.Session
) -> None:
    url, proxies, *rest = arguments
    merged = []
    for session in (ours, like):
        change(session)
        merged.append(session.merge_environment_settings(url, proxies and dict(proxies), *rest))
    # requests takes proxies that are None for "do not read the environment".
    if proxies is None:
        assert {**merged[0], "proxies": None} == {**merged[1], "proxies": None}
    else:
        assert dict(merged[0]["proxies"]) == dict(merged[1]["proxies"])
        assert {**merged[0], "proxies": None} == {**merged[1], "proxies": None}


@pytest.mark.parametrize("change", list(CHANGES.values())[:4], ids=list(CHANGES)[:4])
@pytest.mark.parametrize("url", [PDS, "https://direct.example.com", "http://pds.example.com"])
def test_redirects_and_prepared_requests_have_the_proxies_that_they_have_in_requests(
    change: Change, url: str, ours: OAuthSession, like: requests.Session
) -> None:
    request = requests.Request("GET", url, headers={"Proxy-Authorization": "x"}).prepare()
    found = []
    for session in (ours, like):
        change(session)
        trusted = session.trust_env
        for proxies in ({}, {"https": "http://given:1"}, {"no_proxy": "pds.example.com"}):
            copied = request.copy()
            found.append((session.rebuild_proxies(copied, proxies), dict(copied.headers)))  # type: ignore[no-untyped-call]
        assert session.trust_env is trusted
    assert found[:3] == found[3:]


@pytest.mark.parametrize("change", list(CHANGES.values())[:4], ids=list(CHANGES)[:4])
def test_what_was_prepared_before_is_sent_by_the_proxies_that_it_has_in_requests(
    change: Change, ours: OAuthSession, like: requests.Session
) -> None:
    sent = []

    class Recorder(Canned):
        def send(self, request: requests.PreparedRequest, *settings: Any, **options: Any) -> requests.Response:
            sent.append(dict(settings[-1] if settings else options["proxies"]))
            return super().send(request)

    for session in (ours, like):
        change(session)
        session.adapters.clear()
        session.adapters[""] = Recorder(OK)
        session.send(requests.Request("GET", f"{PDS}/xrpc/a").prepare())
    assert sent[0] == sent[1]


PREPARED: list[tuple[Change, dict[str, Any]]] = [
    (lambda session: None, {}),
    (lambda session: None, {"headers": {"X": "1", "Accept": None}, "params": {"a": [1, 2], "b": None}}),
    (lambda session: session.headers.update({"Accept": None}), {}),  # type: ignore[dict-item]
    (lambda session: session.headers.update({"Y": "2"}), {"headers": {"y": "3"}, "json": {"a": 1}}),
    (lambda session: setattr(session, "headers", {"Y": "2"}), {"data": b"abc"}),
    (lambda session: setattr(session, "headers", None), {"headers": {"y": "3"}}),
    (lambda session: setattr(session, "params", {"c": "d"}), {"params": {"c": "e", "f": "g"}}),
    (lambda session: setattr(session, "params", {"c": "d", "e": None}), {}),
    (lambda session: session.cookies.set("a", "b"), {"cookies": {"c": "d"}, "data": {"e": "f"}}),
    (lambda session: setattr(session, "hooks", {"response": [print]}), {}),
    (lambda session: setattr(session, "auth", ("user", "word")), {}),
    (lambda session: setattr(session, "auth", ("user", "word")), {"auth": ("other", "word")}),
    (lambda session: None, {"files": {"file": ("name", b"content", "text/plain")}, "hooks": {"response": [print]}}),
]


@pytest.mark.parametrize(("change", "options"), PREPARED)
def test_requests_are_prepared_as_in_requests(
    change: Change, options: dict[str, Any], ours: OAuthSession, like: requests.Session
) -> None:
    like.auth = lambda request: request  # requests would read ~/.netrc
    prepared = []
    for session in (ours, like):
        change(session)
        prepared.append(session.prepare_request(requests.Request("post", f"{PDS}/a?b=%20c", **options)))
    found, expected = prepared
    boundaries = [request.headers.get("Content-Type", "").partition("boundary=")[2] for request in prepared]
    for request, boundary in zip(prepared, boundaries, strict=True):
        if boundary:
            request.headers["Content-Type"] = "multipart"
            request.body = request.body.replace(boundary.encode(), b"-")  # type: ignore[union-attr, arg-type]
    for name in ("method", "url", "headers", "body", "hooks"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("pds", [PDS, f"{PDS}/", f"{PDS}/path"])
@pytest.mark.parametrize("path", ["/xrpc/a", "/a/../b/./c", "//pds.example.com/x", "xrpc/a", "?a=b", "/a//b", "", "."])
def test_a_relative_url_is_taken_from_the_pds(path: str, pds: str, ours: OAuthSession) -> None:
    ours._adapter.audience = pds
    expected = requests.Request("GET", urljoin(pds, path)).prepare().url
    assert ours.prepare_request(requests.Request("GET", path)).url == expected


def test_names_beyond_ascii_are_prepared_where_no_fork_happens(
    ours: OAuthSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way: list[bool] = []
    prepare = requests.PreparedRequest.prepare

    def watched(self: requests.PreparedRequest, **options: Any) -> None:
        under_way.append(bool(_fork._imports._under_way))
        prepare(self, **options)

    monkeypatch.setattr(requests.PreparedRequest, "prepare", watched)
    assert (
        ours.prepare_request(requests.Request("GET", "https://b\u00fccher.example/")).url
        == "https://xn--bcher-kva.example/"
    )
    ours.prepare_request(requests.Request("GET", "/xrpc/a"))
    assert under_way == [True, False]


def test_a_client_that_does_not_trust_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.com:3128")
    store = MemoryStore[Session]()
    store.set(DID, make_session())
    for trust_env, found in ((False, {}), (True, {"https": "http://proxy.example.com:3128"})):
        with OAuthClient(ClientMetadata.loopback(), store=store, trust_env=trust_env) as client:
            session = client.restore(DID)
            assert session.trust_env is trust_env
            assert session.merge_environment_settings(PDS, {}, None, None, None)["proxies"] == found
            assert client._transport._environment.trusted is trust_env
            monkeypatch.setenv("ALL_PROXY", "http://late.example.com")
            assert session.merge_environment_settings(PDS, {}, None, None, None)["proxies"] == found
            monkeypatch.delenv("ALL_PROXY")


@pytest.mark.parametrize(("wrong", "problem"), [("5", TypeError), (True, TypeError), (-1, ValueError)])
def test_a_total_timeout_is_a_number_of_seconds(wrong: Any, problem: type[Exception], session: OAuthSession) -> None:
    session.total_timeout = wrong
    with pytest.raises(problem, match="total_timeout is a number of seconds"):
        session.get(GET_SESSION)
