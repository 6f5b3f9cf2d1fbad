"""From a PDS to its authorization server, on a network of this machine's loopback."""

from __future__ import annotations

import socket
import ssl
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from atproto_session import _flights
from atproto_session._adapter import Network
from atproto_session._flights import Flight
from atproto_session.discovery import Discovery, ServerMetadata, parse_server_metadata
from atproto_session.errors import DiscoveryError, TransportError
from atproto_session.transport import Transport, origin

from .loopback import ScriptedServer, Web, answer, closed_port, json_answer, network_to

PDS = "https://pds.example.com"
ISSUER = "https://auth.example.com"
RESOURCE = "pds.example.com/.well-known/oauth-protected-resource"
SERVER = "auth.example.com/.well-known/oauth-authorization-server"


def resource(**changes: object) -> dict[str, Any]:
    return {"resource": PDS, "authorization_servers": [ISSUER]} | changes


def metadata(**changes: object) -> dict[str, Any]:
    return {
        "issuer": ISSUER,
        "authorization_endpoint": f"{ISSUER}/oauth/authorize",
        "token_endpoint": f"{ISSUER}/oauth/token",
        "pushed_authorization_request_endpoint": f"{ISSUER}/oauth/par",
        "revocation_endpoint": f"{ISSUER}/oauth/revoke",
        "response_types_supported": ["code"],
        "grant_types_supported": ["authorization_code", "refresh_token"],
        "code_challenge_methods_supported": ["S256"],
        "token_endpoint_auth_methods_supported": ["none", "private_key_jwt"],
        "token_endpoint_auth_signing_alg_values_supported": ["ES256", "RS256"],
        "scopes_supported": ["atproto", "transition:generic"],
        "authorization_response_iss_parameter_supported": True,
        "require_pushed_authorization_requests": True,
        "require_request_uri_registration": True,
        "client_id_metadata_document_supported": True,
        "dpop_signing_alg_values_supported": ["ES256"],
    } | changes


# Server metadata


@pytest.mark.duty(16)
def test_metadata_that_keep_to_the_rules() -> None:
    assert parse_server_metadata(ISSUER, metadata()) == ServerMetadata(
        issuer=ISSUER,
        authorization_endpoint=f"{ISSUER}/oauth/authorize",
        token_endpoint=f"{ISSUER}/oauth/token",
        pushed_authorization_request_endpoint=f"{ISSUER}/oauth/par",
        revocation_endpoint=f"{ISSUER}/oauth/revoke",
        token_endpoint_auth_methods_supported=("none", "private_key_jwt"),
        token_endpoint_auth_signing_alg_values_supported=("ES256", "RS256"),
        dpop_signing_alg_values_supported=("ES256",),
        scopes_supported=("atproto", "transition:generic"),
    )


@pytest.mark.duty(16)
@pytest.mark.parametrize("absent", ["revocation_endpoint", "require_request_uri_registration"])
def test_what_may_be_absent(absent: str) -> None:
    document = metadata()
    del document[absent]
    assert parse_server_metadata(ISSUER, document).token_endpoint


ENDPOINTS = [name for name in metadata() if name.endswith("_endpoint")]
IMPROPER_URLS: list[object] = ["http://auth.example.com", "https://10.0.0.1", "https://a@b.example.com", "", 1, []]


@pytest.mark.duty(15, 16, 17)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("issuer", f"{ISSUER}/"),
        ("issuer", "https://evil.example.com"),
        *((name, url) for name in ENDPOINTS for url in IMPROPER_URLS),
        *(
            (name, None)
            for name in metadata()
            if name not in ("revocation_endpoint", "require_request_uri_registration")
        ),
        ("response_types_supported", ["token"]),
        ("response_types_supported", "code"),
        ("grant_types_supported", ["authorization_code"]),
        ("grant_types_supported", ["refresh_token"]),
        ("code_challenge_methods_supported", ["plain"]),
        ("code_challenge_methods_supported", ["S256", 1]),
        ("token_endpoint_auth_methods_supported", ["none"]),
        ("token_endpoint_auth_methods_supported", ["private_key_jwt"]),
        ("token_endpoint_auth_signing_alg_values_supported", ["RS256"]),
        ("token_endpoint_auth_signing_alg_values_supported", ["ES256", "none"]),
        ("scopes_supported", []),
        ("authorization_response_iss_parameter_supported", "true"),
        ("require_pushed_authorization_requests", 1),
        ("client_id_metadata_document_supported", False),
        ("require_request_uri_registration", False),
        ("require_request_uri_registration", None),
        ("dpop_signing_alg_values_supported", ["RS256"]),
    ],
)
def test_metadata_that_break_a_rule_are_refused_by_the_name_of_the_field(name: str, value: object) -> None:
    with pytest.raises(DiscoveryError, match=f"cannot be used: {name} ") as caught:
        parse_server_metadata(ISSUER, metadata(**{name: value}))
    assert not caught.value.retryable


def test_metadata_are_an_object() -> None:
    with pytest.raises(DiscoveryError, match="not a JSON object"):
        parse_server_metadata(ISSUER, [])


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from([ISSUER, "ES256", "code", "none"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(sorted(metadata())), _json, min_size=1, max_size=3))
def test_any_metadata_are_right_or_a_discovery_error(changes: dict[str, object]) -> None:
    try:
        parsed = parse_server_metadata(ISSUER, metadata(**changes))
    except DiscoveryError as error:
        complaint = str(error)
    else:
        complaint = ""
        assert parsed.issuer == ISSUER
    assert not complaint or any(name in complaint for name in changes)


# Discovery


class World:
    def __init__(self, transport: Transport, web: Web) -> None:
        self.transport = transport
        self.web = web
        self.now = 1000.0
        self.discovery = Discovery(transport, clock=lambda: self.now)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    certificates = trustme.CA()
    certificates.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificates.issue_cert("*.example.com").configure_cert(context)
    web = Web({RESOURCE: json_answer(resource()), SERVER: json_answer(metadata())})
    with ScriptedServer(web.script, tls=context) as server:
        yield World(Transport(ca_bundle=str(tmp_path / "ca.pem"), network=network_to(server.port)), web)


@pytest.mark.duty(14)
@pytest.mark.parametrize("pds", [PDS, f"{PDS}/", "https://PDS.example.com:443"])
def test_the_authorization_server_of_a_pds(world: World, pds: str) -> None:
    assert world.discovery.authorization_server_of(pds) == ISSUER


@pytest.mark.duty(14)
@pytest.mark.parametrize(
    ("response", "complaint"),
    [
        (json_answer(resource(), 201), "status 201"),
        (json_answer(resource(), 404), f"^{PDS} offers no log-in by OAuth$"),
        (json_answer(resource(), 410), "offers no log-in by OAuth"),
        (json_answer(resource(), 403), "status 403"),
        (json_answer(resource(padding="x" * 100_000)), "too large"),
        (answer(302, location=f"{PDS}/elsewhere"), "status 302"),
        (json_answer(resource(), content_type="text/plain"), "text/plain"),
        (json_answer([resource()]), "not an object"),
        (json_answer(resource(resource="https://other.example.com")), "another server"),
        (json_answer(resource(resource=f"{PDS}/")), "another server"),
        (json_answer(resource(resource=None)), "another server"),
        (json_answer(resource(authorization_servers=[])), "exactly one"),
        (json_answer(resource(authorization_servers=[ISSUER, ISSUER])), "exactly one"),
        (json_answer(resource(authorization_servers=ISSUER)), "exactly one"),
        (json_answer(resource(authorization_servers=None)), "exactly one"),
        (json_answer(resource(authorization_servers=[1])), "not a URL"),
        (json_answer(resource(authorization_servers=["http://auth.example.com"])), "https"),
        (json_answer(resource(authorization_servers=["http://localhost:2583"])), "https"),
        (json_answer(resource(authorization_servers=["https://a@auth.example.com"])), "user name"),
        (json_answer(resource(authorization_servers=[f"{ISSUER}/"])), "more than an origin"),
        (json_answer(resource(authorization_servers=[f"{ISSUER}/path"])), "more than an origin"),
        (json_answer(resource(authorization_servers=[f"{ISSUER}?query"])), "more than an origin"),
        (json_answer(resource(authorization_servers=[f"{ISSUER}:443"])), "more than an origin"),
        (json_answer(resource(authorization_servers=["https://10.0.0.1"])), "full name"),
    ],
)
def test_a_pds_that_does_not_name_its_authorization_server(world: World, response: bytes, complaint: str) -> None:
    world.web.answers[RESOURCE] = response
    with pytest.raises(DiscoveryError, match=complaint) as caught:
        world.discovery.authorization_server_of(PDS)
    assert not caught.value.retryable


@pytest.mark.duty(15, 16)
def test_the_metadata_of_an_authorization_server(world: World) -> None:
    assert world.discovery.metadata(ISSUER) == parse_server_metadata(ISSUER, metadata())


@pytest.mark.duty(15)
@pytest.mark.parametrize(
    "response",
    [
        json_answer(metadata(), 404),
        answer(301, location=f"{ISSUER}/elsewhere"),
        json_answer(metadata(), content_type="text/html"),
        json_answer(metadata(issuer="https://evil.example.com")),
        json_answer(metadata(issuer=f"{ISSUER}/")),
    ],
)
def test_an_authorization_server_without_metadata_of_its_own(world: World, response: bytes) -> None:
    world.web.answers[SERVER] = response
    with pytest.raises(DiscoveryError) as caught:
        world.discovery.metadata(ISSUER)
    assert not caught.value.retryable


@pytest.mark.duty(15, 42)
@pytest.mark.parametrize("issuer", ["", "http://auth.example.com", f"{ISSUER}/", "https://10.0.0.1", "https://a\n.b"])
def test_what_cannot_be_an_issuer_is_not_asked(world: World, issuer: str) -> None:
    with pytest.raises(DiscoveryError, match=r"^the issuer"):
        world.discovery.metadata(issuer)
    assert world.web.asked == []


@pytest.mark.duty(14, 15)
@pytest.mark.parametrize("response", [b"", json_answer({}, 503), json_answer({}, 429)])
def test_a_server_that_is_away_for_now_is_retryable(world: World, response: bytes) -> None:
    world.web.answers = {RESOURCE: response, SERVER: response}
    with pytest.raises(DiscoveryError) as of_pds:
        world.discovery.authorization_server_of(PDS)
    with pytest.raises(DiscoveryError) as of_server:
        world.discovery.metadata(ISSUER)
    assert of_pds.value.retryable
    assert of_server.value.retryable


@pytest.mark.duty(14, 15)
@pytest.mark.parametrize(("reason", "retryable"), [(socket.EAI_NONAME, False), (socket.EAI_FAIL, True)])
def test_a_host_that_does_not_exist_is_final(reason: int, retryable: bool) -> None:
    def getaddrinfo(host: str, *_: object) -> Any:
        raise socket.gaierror(reason, "the name does not resolve")

    discovery = Discovery(Transport(network=Network(getaddrinfo=getaddrinfo)))
    for look_up in (discovery.authorization_server_of, discovery.metadata, discovery.from_server_url):
        with pytest.raises(DiscoveryError, match="the name does not resolve") as caught:
            look_up(PDS)
        assert caught.value.retryable is retryable


class Answering(Transport):
    """A transport that needs no network: ``answers`` makes the document for a URL, or raises."""

    def __init__(self, answers: Callable[[str], dict[str, Any]]) -> None:
        super().__init__()
        self._answers = answers

    def get_json(self, url: str, **_: Any) -> dict[str, Any]:
        return self._answers(url)


@pytest.mark.duty(42)
def test_padded_documents_do_not_fill_the_memory() -> None:
    def padded(url: str) -> dict[str, Any]:
        server = origin(url)
        padding = [f"{number:x>1000}" for number in range(100)]
        if url.endswith("protected-resource"):
            return resource(resource=server, authorization_servers=[server], padding=padding)
        endpoints = {name: f"{server}/{name:x<1900}" for name in ENDPOINTS}
        lists = {name: [*value, *padding] for name, value in metadata().items() if isinstance(value, list)}
        return metadata(issuer=server, padding=padding, **endpoints, **lists)

    discovery = Discovery(Answering(padded))
    discovery.metadata(ISSUER)
    tracemalloc.start()
    for number in range(500):
        server = f"https://{number}.example.com"
        assert discovery.metadata(discovery.authorization_server_of(server)).scopes_supported == (
            "atproto",
            "transition:generic",
        )
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 10_000_000


@pytest.mark.duty(42)
def test_an_endpoint_that_is_too_long_is_refused() -> None:
    with pytest.raises(DiscoveryError, match="token_endpoint is too long"):
        parse_server_metadata(ISSUER, metadata(token_endpoint=f"{ISSUER}/{'x' * 2048}"))


def test_lists_hold_what_has_to_be_there_and_a_few_others() -> None:
    scopes = [*(f"scope:{number}" for number in range(1000)), "x" * 1000, "atproto"]
    parsed = parse_server_metadata(ISSUER, metadata(scopes_supported=scopes))
    assert parsed.scopes_supported[:2] == ("atproto", "scope:0")
    assert len(parsed.scopes_supported) == 16


def test_those_who_wait_for_a_silent_server_are_told_the_same_after_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    everybody = threading.Semaphore(0)
    asked = []

    class Waiting(Flight[Any]):
        def wait(self, *args: Any) -> Any:
            everybody.release()
            return super().wait(*args)

    def silent(url: str) -> dict[str, Any]:
        asked.append(url)
        for _ in range(20):
            assert everybody.acquire(timeout=20.0)
        raise TransportError("cannot reach https://pds.example.com: timed out")

    monkeypatch.setattr(_flights, "Flight", Waiting)
    discovery = Discovery(Answering(silent))
    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(discovery.authorization_server_of, PDS, fresh=True) for _ in range(20)]
        failures = [future.exception(20.0) for future in futures]
    assert len(asked) == 1
    assert {type(failure) for failure in failures} == {DiscoveryError}
    assert {str(failure) for failure in failures} == {"cannot reach https://pds.example.com: timed out"}


def test_servers_of_a_private_network_that_are_trusted() -> None:
    """As in a network of containers, where hosts have single labels."""
    web = Web()
    with ScriptedServer(web.script) as server:
        pds, issuer = "http://pds:2583", "http://auth:8080"
        endpoints = dict.fromkeys(ENDPOINTS, f"{issuer}/x")
        web.answers = {
            "pds:2583/.well-known/oauth-protected-resource": json_answer(
                {"resource": pds, "authorization_servers": [issuer]}
            ),
            "auth:8080/.well-known/oauth-authorization-server": json_answer(metadata(issuer=issuer, **endpoints)),
        }
        network = network_to(server.port)
        transport = Transport(allow_http=True, network=network, trusted_hosts=["pds", "auth"])
        discovery = Discovery(transport, allow_http=True)
        assert discovery.metadata(discovery.from_server_url(pds)).token_endpoint == f"{issuer}/x"
        with pytest.raises(DiscoveryError, match="does not use https"):
            discovery.authorization_server_of("http://elsewhere:2583")
        half = Discovery(Transport(allow_http=True, network=network, trusted_hosts=["pds"]), allow_http=True)
        with pytest.raises(DiscoveryError, match=r"the authorization server in .* does not use https"):
            half.authorization_server_of(pds)


def test_answers_are_kept_for_a_while_unless_fresh_ones_are_asked_for(world: World) -> None:
    discovery = world.discovery
    for _ in range(2):
        discovery.authorization_server_of(PDS)
        discovery.metadata(ISSUER)
    assert world.web.asked == [RESOURCE, SERVER]
    discovery.authorization_server_of(PDS, fresh=True)
    discovery.metadata(ISSUER, fresh=True)
    assert world.web.asked == [RESOURCE, SERVER] * 2
    world.now += 599.0
    discovery.authorization_server_of(PDS)
    assert world.web.asked.count(RESOURCE) == 3


def test_a_failure_is_not_kept_and_the_cache_can_be_given(world: World) -> None:
    kept: dict[str, tuple[float, Any]] = {}

    class Cache:
        def get(self, key: str, /) -> tuple[float, Any] | None:
            return kept.get(key)

        def set(self, key: str, value: tuple[float, Any], /) -> None:
            kept[key] = value

        def delete(self, key: str, /) -> None:
            raise NotImplementedError

    discovery = Discovery(world.transport, cache=Cache())
    good = world.web.answers.pop(SERVER)
    with pytest.raises(DiscoveryError):
        discovery.metadata(ISSUER)
    world.web.answers[SERVER] = good
    assert discovery.metadata(ISSUER).issuer == ISSUER
    assert list(kept) == [f"https://{SERVER}"]


@pytest.mark.duty(4, 17)
@pytest.mark.parametrize("url", [PDS, ISSUER, f" {ISSUER}/ ", f"{PDS}/some/path?query"])
def test_a_server_url_is_of_a_pds_or_of_an_authorization_server(world: World, url: str) -> None:
    assert world.discovery.from_server_url(url) == ISSUER


@pytest.mark.duty(17)
def test_a_server_url_is_tried_as_a_pds_first(world: World) -> None:
    world.web.answers[SERVER.replace("auth", "pds")] = json_answer(metadata(issuer=PDS))
    assert world.discovery.from_server_url(PDS) == ISSUER
    assert world.web.asked == [RESOURCE]


@pytest.mark.duty(17)
@pytest.mark.parametrize(
    "url", ["", "at://alice.example.com", "http://pds.example.com", "https://10.0.0.1/", "https://a@b.c"]
)
def test_a_server_url_that_is_improper_is_not_asked(world: World, url: str) -> None:
    with pytest.raises(DiscoveryError, match="the address of the server"):
        world.discovery.from_server_url(url)
    assert world.web.asked == []


@pytest.mark.duty(17)
def test_a_server_that_is_neither(world: World) -> None:
    with pytest.raises(DiscoveryError, match="neither a PDS") as caught:
        world.discovery.from_server_url("https://www.example.com")
    assert not caught.value.retryable
    world.web.answers[RESOURCE] = json_answer({}, 503)
    with pytest.raises(DiscoveryError, match="neither a PDS") as away:
        world.discovery.from_server_url(PDS)
    assert away.value.retryable


def test_development_has_its_servers_on_this_machine() -> None:
    web = Web()
    with ScriptedServer(web.script) as server, closed_port() as closed:
        local = f"http://localhost:{server.port}"
        host = f"localhost:{server.port}"
        web.answers[f"{host}/.well-known/oauth-protected-resource"] = json_answer(
            {"resource": local, "authorization_servers": [local]}
        )
        endpoints = dict.fromkeys(ENDPOINTS, f"{local}/x")
        web.answers[f"{host}/.well-known/oauth-authorization-server"] = json_answer(metadata(issuer=local, **endpoints))
        discovery = Discovery(Transport(allow_http=True), allow_http=True)
        assert discovery.from_server_url(local) == local
        assert discovery.metadata(local).token_endpoint == f"{local}/x"
        with pytest.raises(DiscoveryError, match="connection refused") as caught:
            discovery.authorization_server_of(f"http://localhost:{closed}")
    assert caught.value.retryable
