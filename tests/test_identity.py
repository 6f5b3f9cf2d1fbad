"""Handles and DIDs, resolved on a network of this machine's loopback."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dns.resolver
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from atproto_session._adapter import LOOKUP_THREAD
from atproto_session.errors import ClientMetadataError, IdentityError, LockTimeoutError
from atproto_session.identity import (
    Identity,
    IdentityResolver,
    check_did,
    check_handle,
    normalize_handle,
    parse_did_document,
)
from atproto_session.transport import Transport

from .loopback import NameServer, ScriptedServer, Web, answer, closed_port, json_answer, network_to

ALICE = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
BOB = "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb"
HANDLE = "alice.example.com"
PDS = "https://pds.example.com"
GENEROUS = 20.0


def document(did: str = ALICE, handle: str | None = HANDLE, pds: str = PDS) -> dict[str, Any]:
    return {
        "@context": ["https://www.w3.org/ns/did/v1"],
        "id": did,
        "alsoKnownAs": [] if handle is None else [f"at://{handle}"],
        "service": [{"id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": pds}],
    }


# Syntax


@pytest.mark.duty(5)
@pytest.mark.parametrize(
    "handle",
    [
        "a.co",
        "alice.example.com",
        "8.cn",
        "xn--ls8h.test.xn--fiqs8s",
        f"{'a' * 63}.com",
        f"{'a.' * 125}com",
        "a--b.c0m",
    ],
)
def test_a_handle(handle: str) -> None:
    assert check_handle(handle) == handle
    assert check_handle(handle.upper()) == handle


@pytest.mark.duty(5)
@pytest.mark.parametrize(
    "handle",
    [
        "",
        "com",
        ".com",
        "alice.",
        "alice..com",
        ".alice.com",
        "alice.com.",
        "-alice.com",
        "alice-.com",
        "alice.-com",
        "alice.c_m",
        "alice.0com",
        "127.0.0.1",
        "@alice.example.com",
        "alice .example.com",
        "alice.example.com\n",
        "\u0430lice.example.com",
        "alice\u3002example.com",
        f"{'a' * 64}.com",
        f"{'a.' * 126}com",
    ],
)
def test_no_handle(handle: str) -> None:
    with pytest.raises(IdentityError) as caught:
        check_handle(handle)
    assert caught.value.reason == "malformed"
    assert str(caught.value).isprintable()


@pytest.mark.duty(5)
@pytest.mark.parametrize(
    "pasted",
    [
        "alice.example.com",
        " @Alice.Example.COM\n",
        "\u2068\u202aalice.example.com\u202c\u2069",
        "@ alice.exa\u200bmple.com",
        "alice\x00.example\x7f.com",
    ],
)
def test_a_handle_as_people_paste_it(pasted: str) -> None:
    assert normalize_handle(pasted) == "alice.example.com"


@pytest.mark.duty(5)
@pytest.mark.parametrize("pasted", ["alice example.com", "@@alice.example.com", "https://alice.example.com"])
def test_no_more_is_made_good_than_that(pasted: str) -> None:
    with pytest.raises(IdentityError):
        normalize_handle(pasted)


@pytest.mark.duty(6)
@pytest.mark.parametrize(
    "domain", ["alt", "arpa", "example", "internal", "invalid", "local", "localhost", "onion", "TEST", "Local"]
)
def test_reserved_domains_fail_at_once(domain: str) -> None:
    with pytest.raises(IdentityError, match="not a domain of the Internet") as caught:
        check_handle(f"alice.{domain}")
    assert caught.value.reason == "unsupported"


@pytest.mark.duty(6)
def test_dot_test_is_for_development() -> None:
    assert check_handle("alice.test", allow_http=True) == "alice.test"
    with pytest.raises(IdentityError):
        check_handle("alice.local", allow_http=True)


@pytest.mark.duty(11)
@pytest.mark.parametrize("did", [ALICE, "did:web:example.com", "did:web:localhost", "did:web:localhost%3A2583"])
def test_a_did(did: str) -> None:
    assert check_did(did) == did


@pytest.mark.duty(11)
@pytest.mark.parametrize(
    ("did", "reason"),
    [
        ("", "malformed"),
        ("did:", "malformed"),
        ("did:plc", "malformed"),
        ("did:plc:", "malformed"),
        ("DID:plc:aaaaaaaaaaaaaaaaaaaaaaaa", "malformed"),
        ("did:plc:AAAAAAAAAAAAAAAAAAAAAAAA", "malformed"),
        ("did:plc:aaaaaaaaaaaaaaaaaaaaaaa", "malformed"),
        ("did:plc:aaaaaaaaaaaaaaaaaaaaaaaaa", "malformed"),
        ("did:plc:aaaaaaaaaaaaaaaaaaaaaaa1", "malformed"),
        (f"{ALICE}\n", "malformed"),
        (f"{ALICE}#fragment", "malformed"),
        ("did:web:com", "malformed"),
        ("did:web:127.0.0.1", "malformed"),
        ("did:web:example.com%3A443", "malformed"),
        ("did:web:example.com%2Fpath", "malformed"),
        ("did:web:localhost%3A", "malformed"),
        ("did:web:example.com/path", "malformed"),
        (f"did:web:{'a.' * 1100}com", "malformed"),
        ("did:web:example.com:alice", "unsupported"),
        ("did:key:zQ3shZc2QzApp2oymGvQbzP8eKheVshBHbU4ZYjeXqwSKEn6N", "unsupported"),
    ],
)
def test_malformed_and_unsupported_dids_are_told_apart(did: str, reason: str) -> None:
    with pytest.raises(IdentityError) as caught:
        check_did(did)
    assert caught.value.reason == reason


@given(st.text() | st.from_regex(r"\A@?did:[a-z]{3}:[a-z2-7:.%]*\Z") | st.from_regex(r"\A[a-zA-Z0-9.-]*\Z"))
def test_any_text_is_right_or_an_identity_error(text: str) -> None:
    for check in (check_did, check_handle, normalize_handle):
        try:
            checked = check(text)
        except IdentityError as error:
            outcome = error.reason in ("malformed", "unsupported")
        else:
            outcome = check(checked) == checked
        assert outcome


# DID documents


@pytest.mark.duty(12)
def test_a_document_names_the_pds_and_claims_a_handle() -> None:
    claimed = document()
    claimed["alsoKnownAs"] = [
        "https://example.com",
        "c.example.com",
        7,
        "at://not a handle",
        "at://ALICE.example.com",
        "at://b.example.com",
    ]
    claimed["service"] = [
        "junk",
        {"id": "#atproto_labeler", "type": "AtprotoLabeler", "serviceEndpoint": "https://labels.example.com"},
        {"id": "#atproto_pds", "type": "Other", "serviceEndpoint": "https://other.example.com"},
        {"id": f"{BOB}#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": "https://bob.example.com"},
        {
            "id": f"{ALICE}#atproto_pds",
            "type": "AtprotoPersonalDataServer",
            "serviceEndpoint": "https://PDS.example.com:443/",
        },
        *document(pds="https://second.example.com")["service"],
    ]
    assert parse_did_document(ALICE, claimed) == Identity(ALICE, HANDLE, PDS)


@pytest.mark.duty(12)
@pytest.mark.parametrize(
    "endpoint",
    [
        None,
        {"uri": PDS},
        [PDS],
        "http://pds.example.com",
        "https://10.0.0.1",
        "https://user@pds.example.com",
        "https://pds.example.com/path",
        "https://pds.example.com?query",
        "http://localhost:2583",
    ],
)
def test_the_pds_is_an_https_origin(endpoint: object) -> None:
    faulty = document()
    faulty["service"][0]["serviceEndpoint"] = endpoint
    with pytest.raises(IdentityError, match="the PDS in the DID document"):
        parse_did_document(ALICE, faulty)


@pytest.mark.duty(12)
def test_the_pds_may_be_on_this_machine_in_development() -> None:
    local = document(pds="http://localhost:2583")
    assert parse_did_document(ALICE, local, allow_http=True).pds == "http://localhost:2583"


@pytest.mark.duty(11, 12)
@pytest.mark.parametrize(
    ("faulty", "complaint"),
    [
        ([], "not its DID document"),
        ({}, "not its DID document"),
        (document(BOB), "not its DID document"),
        (document("did:plc:AAAAAAAAAAAAAAAAAAAAAAAA"), "not its DID document"),
        (document() | {"service": {}}, "names no PDS"),
        (document() | {"service": []}, "names no PDS"),
    ],
)
def test_the_document_is_of_the_did_and_has_a_pds(faulty: object, complaint: str) -> None:
    with pytest.raises(IdentityError, match=complaint):
        parse_did_document(ALICE, faulty)


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text()
    | st.sampled_from([ALICE, f"at://{HANDLE}", PDS, "#atproto_pds"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(["id", "type"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(_json, st.sampled_from(["id", "alsoKnownAs", "service", None]))
def test_any_document_is_right_or_an_identity_error(value: object, member: str | None) -> None:
    given_document = value if member is None else document() | {member: value}
    try:
        identity = parse_did_document(ALICE, given_document)
    except IdentityError:
        return
    assert identity.did == ALICE
    assert identity.pds == PDS


# Resolution


@dataclass
class World:
    """A network with one web server for all hosts and one DNS server."""

    web: Web
    names: NameServer
    transport: Transport

    def resolver(self, **options: Any) -> IdentityResolver:
        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers, resolver.port = ["127.0.0.1"], self.names.port
        return IdentityResolver(self.transport, **{"dns_resolver": resolver} | options)

    def publish(self, did: str, document: object) -> None:
        self.web.answers[f"plc.directory/{did}"] = json_answer(document, content_type="application/did+ld+json")

    def point_by_dns(self, handle: str, *records: list[str]) -> None:
        self.names.records[f"_atproto.{handle}"] = list(records)

    def point_by_https(self, handle: str, response: bytes | Callable[[], bytes]) -> None:
        self.web.answers[f"{handle}/.well-known/atproto-did"] = response


@pytest.fixture(scope="session")
def _certificates() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def world(_certificates: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _certificates.issue_cert("plc.directory", "example.com", "*.example.com", LONG_HANDLE).configure_cert(context)
    _certificates.cert_pem.write_to_path(tmp_path / "ca.pem")
    web, names = Web(), NameServer()
    with ScriptedServer(web.script, tls=context) as server:
        network = network_to(server.port, {"inside.example.com": "127.0.0.2"}, blocked="127.0.0.2")
        transport = Transport(ca_bundle=str(tmp_path / "ca.pem"), network=network)
        yield World(web, names, transport)
        # A look-up that was not needed any more may still be under way.
        for thread in threading.enumerate():
            if thread.name == LOOKUP_THREAD:
                thread.join(GENEROUS)
    names.close()


LONG_HANDLE = f"{'a' * 60}.{'b' * 60}.{'c' * 60}.{'d' * 60}.com"


@pytest.mark.duty(4, 7, 10)
def test_a_handle_by_dns(world: World) -> None:
    world.publish(ALICE, document())
    world.point_by_dns(HANDLE, ["v=spf1 -all"], ["did=did:plc:aaaaaaaa", "aaaaaaaaaaaaaaaa"], ["DID=", "x"])
    assert world.resolver().resolve(" @Alice.Example.com ") == Identity(ALICE, HANDLE, PDS)


@pytest.mark.duty(7)
def test_the_same_did_twice_is_no_contradiction(world: World) -> None:
    world.publish(ALICE, document())
    world.point_by_dns(HANDLE, [f"did={ALICE}"], ["did=", ALICE])
    assert world.resolver().resolve(HANDLE).did == ALICE


@pytest.mark.duty(7)
@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ([[f"did={ALICE}"], [f"did={BOB}"]], "contradict"),
        ([["did="]], "no usable DID"),
        ([["did=did:plc:short"]], "no usable DID"),
        ([[f"did={ALICE} "]], "no usable DID"),
    ],
)
def test_dns_records_that_cannot_be_right_fail_whatever_https_says(
    world: World, records: list[list[str]], complaint: str
) -> None:
    world.publish(ALICE, document())
    world.point_by_dns(HANDLE, *records)
    world.point_by_https(HANDLE, answer(200, ALICE.encode()))
    with pytest.raises(IdentityError, match=complaint) as caught:
        world.resolver().resolve(HANDLE)
    assert not caught.value.retryable


@pytest.mark.duty(8)
@pytest.mark.parametrize(
    "records", [None, [], [["v=spf1"]], [["didn't=see"]]], ids=["no name", "no TXT", "other", "similar"]
)
@pytest.mark.parametrize("response", [answer(200, f"\n {ALICE}\r\n".encode()), answer(203, ALICE.encode())])
def test_a_handle_by_https(world: World, records: list[list[str]] | None, response: bytes) -> None:
    world.publish(ALICE, document())
    if records is not None:
        world.point_by_dns(HANDLE, *records)
    world.point_by_https(HANDLE, response)
    assert world.resolver().resolve(HANDLE) == Identity(ALICE, HANDLE, PDS)


@pytest.mark.duty(8)
def test_https_may_redirect(world: World) -> None:
    world.publish(ALICE, document())
    world.point_by_https(HANDLE, answer(301, location="https://www.example.com/did"))
    world.web.answers["www.example.com/did"] = answer(200, ALICE.encode())
    assert world.resolver().resolve(HANDLE).did == ALICE


@pytest.mark.duty(8, 42)
@pytest.mark.parametrize(
    ("response", "complaint", "retryable"),
    [
        (answer(404), "answered 404", False),
        (answer(429), "answered 429", True),
        (answer(500), "answered 500", True),
        (answer(200, b"<html>"), "without a DID", False),
        (answer(200, b"\xff\xfe"), "without a DID", False),
        (answer(200, b"a" * 10_000), "too large", False),
        (answer(302, location="http://www.example.com/"), "does not use https", False),
        (answer(302, location="https://inside.example.com/"), "not one of the public Internet", False),
        (answer(302, location=f"https://{HANDLE}/.well-known/atproto-did"), "answered 302", False),
        (b"", "cut off", True),
    ],
)
def test_a_handle_that_does_not_resolve(world: World, response: bytes, complaint: str, retryable: bool) -> None:
    world.point_by_https(HANDLE, response)
    with pytest.raises(IdentityError, match=f"no DNS record; .*{complaint}") as caught:
        world.resolver().resolve(HANDLE)
    assert caught.value.reason == "failed"
    assert caught.value.retryable is retryable


@pytest.mark.duty(9)
def test_dns_wins_a_conflict_and_waits_for_nobody(world: World) -> None:
    release = threading.Event()

    def late() -> bytes:
        release.wait(GENEROUS)
        return answer(200, BOB.encode())

    world.publish(ALICE, document())
    world.point_by_dns(HANDLE, [f"did={ALICE}"])
    world.point_by_https(HANDLE, late)
    assert world.resolver().resolve(HANDLE).did == ALICE
    assert not release.is_set()
    release.set()


@pytest.mark.duty(9)
def test_dns_and_https_are_asked_side_by_side(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The DNS answers only after the web server has been asked."""
    asked = threading.Event()

    def by_https() -> bytes:
        asked.set()
        return answer(200, ALICE.encode())

    def resolve(*_: object, **__: object) -> None:
        assert asked.wait(GENEROUS)
        raise dns.resolver.NXDOMAIN

    world.publish(ALICE, document())
    world.point_by_https(HANDLE, by_https)
    monkeypatch.setattr(dns.resolver.Resolver, "resolve", resolve)
    assert world.resolver().resolve(HANDLE).did == ALICE


@pytest.mark.duty(9)
def test_a_name_too_long_for_the_prefix_uses_https(world: World) -> None:
    world.publish(ALICE, document(handle=LONG_HANDLE))
    world.point_by_https(LONG_HANDLE, answer(200, ALICE.encode()))
    assert world.resolver().resolve(LONG_HANDLE) == Identity(ALICE, LONG_HANDLE, PDS)
    assert world.names.asked == []


@pytest.mark.duty(9)
def test_a_name_server_that_is_away_leaves_https(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atproto_session.identity._DNS_TIMEOUT", 0.1)
    world.publish(ALICE, document())
    world.names.records[f"_atproto.{HANDLE}"] = None
    world.point_by_https(HANDLE, answer(200, ALICE.encode()))
    assert world.resolver().resolve(HANDLE).did == ALICE
    world.point_by_https(HANDLE, answer(404))
    with pytest.raises(IdentityError, match=r"the DNS failed \(LifetimeTimeout\)") as caught:
        world.resolver().resolve(HANDLE)
    assert caught.value.retryable


def test_a_machine_without_dns_leaves_https(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolver(*_: object) -> None:
        raise PermissionError("/etc/resolv.conf")

    monkeypatch.setattr(dns.resolver, "Resolver", resolver)
    with pytest.raises(IdentityError, match="the DNS cannot be reached") as caught:
        IdentityResolver(world.transport).resolve(HANDLE)
    assert caught.value.retryable


@pytest.mark.duty(42)
def test_the_time_is_bounded(world: World) -> None:
    release = threading.Event()

    def late() -> bytes:
        release.wait(GENEROUS)
        return answer(404)

    world.point_by_https(HANDLE, late)
    with pytest.raises(IdentityError, match=r"did not answer in time|timed out") as caught:
        world.resolver(timeout=0.3).resolve(HANDLE)
    assert caught.value.retryable
    with pytest.raises((IdentityError, LockTimeoutError)):
        world.resolver().resolve(HANDLE, timeout=0.1)
    release.set()


@pytest.mark.duty(10)
@pytest.mark.parametrize("claimed", ["mallory.example.com", None])
def test_a_log_in_by_a_handle_that_the_document_does_not_claim_fails(world: World, claimed: str | None) -> None:
    world.publish(ALICE, document(handle=claimed))
    world.point_by_dns(HANDLE, [f"did={ALICE}"])
    with pytest.raises(IdentityError, match="does not claim it"):
        world.resolver().resolve(HANDLE)


@pytest.mark.duty(10)
def test_an_account_by_its_did_is_shown_with_its_verified_handle(world: World) -> None:
    world.publish(ALICE, document())
    world.point_by_dns(HANDLE, [f"did={ALICE}"])
    assert world.resolver().resolve(f" {ALICE}\n") == Identity(ALICE, HANDLE, PDS)


@pytest.mark.duty(10)
@pytest.mark.parametrize("handle", [HANDLE, "bob.example.com", "alice.invalid", None])
def test_an_account_whose_handle_does_not_verify_is_shown_without_one(world: World, handle: str | None) -> None:
    world.publish(ALICE, document(handle=handle))
    world.point_by_dns("bob.example.com", [f"did={BOB}"])
    assert world.resolver().resolve(ALICE) == Identity(ALICE, None, PDS)


@pytest.mark.duty(11)
def test_did_web(world: World) -> None:
    world.web.answers["example.com/.well-known/did.json"] = json_answer(document("did:web:example.com", None))
    assert world.resolver().resolve_did("did:web:example.com").pds == PDS


@pytest.mark.duty(11)
@pytest.mark.parametrize(
    "did", ["did:web:alice.local", "did:web:localhost", "did:web:localhost%3A2583", "did:web:a.test"]
)
def test_did_web_of_a_reserved_domain_fails_at_once(world: World, did: str) -> None:
    with pytest.raises(IdentityError, match="not a domain of the Internet") as caught:
        world.resolver().resolve_did(did)
    assert caught.value.reason == "unsupported"
    assert world.web.asked == []


@pytest.mark.duty(11)
def test_did_web_of_this_machine_in_development() -> None:
    web = Web()
    with ScriptedServer(web.script) as server:
        did = f"did:web:localhost%3A{server.port}"
        web.answers[f"localhost:{server.port}/.well-known/did.json"] = json_answer(document(did, None))
        resolver = IdentityResolver(Transport(allow_http=True), allow_http=True)
        assert resolver.resolve_did(did).did == did


@pytest.mark.duty(11)
@pytest.mark.parametrize(
    ("response", "complaint", "retryable"),
    [
        (json_answer({}, 404), "404", False),
        (json_answer({}, 503), "503", True),
        (answer(302, location=f"https://plc.directory/{BOB}"), "302", False),
        (answer(200, b"<html>"), "not JSON", False),
        (json_answer(document(BOB)), "not its DID document", False),
        (b"", "cut off", True),
    ],
)
def test_a_did_that_does_not_resolve(world: World, response: bytes, complaint: str, retryable: bool) -> None:
    world.web.answers[f"plc.directory/{ALICE}"] = response
    with pytest.raises(IdentityError, match=complaint) as caught:
        world.resolver().resolve_did(ALICE)
    assert caught.value.reason == "failed"
    assert caught.value.retryable is retryable


def test_a_directory_that_cannot_be_reached_is_retryable() -> None:
    with closed_port() as port:
        resolver = IdentityResolver(
            Transport(allow_http=True), plc_directory=f"http://localhost:{port}/", allow_http=True
        )
        with pytest.raises(IdentityError, match="connection refused") as caught:
            resolver.resolve_did(ALICE)
    assert caught.value.retryable


@pytest.mark.duty(13)
def test_log_ins_use_the_cache_for_less_than_ten_minutes_and_refreshes_never(world: World) -> None:
    now = 1000.0
    world.publish(ALICE, document(handle=None))
    resolver = world.resolver(clock=lambda: now)

    def asked() -> int:
        return world.web.asked.count(f"plc.directory/{ALICE}")

    for _ in range(2):
        resolver.resolve(ALICE)
        assert asked() == 1
    now += 599.0
    resolver.resolve(ALICE)
    assert asked() == 2
    world.publish(ALICE, document(handle=None, pds="https://new.example.com"))
    assert resolver.resolve_did(ALICE).pds == "https://new.example.com"
    assert resolver.resolve_did(ALICE).handle is None
    assert asked() == 4


@pytest.mark.duty(13)
def test_the_cache_can_be_given_and_failures_are_not_kept(world: World) -> None:
    cache: dict[str, Any] = {}

    class Cache:
        def get(self, key: str, /) -> Any:
            return cache.get(key)

        def set(self, key: str, value: Any, /) -> None:
            cache[key] = value

        def delete(self, key: str, /) -> None:
            raise NotImplementedError

    resolver = world.resolver(cache=Cache())
    with pytest.raises(IdentityError):
        resolver.resolve(ALICE)
    world.publish(ALICE, document(handle=None))
    assert resolver.resolve(ALICE).did == ALICE
    assert list(cache) == [ALICE]


@pytest.mark.parametrize("account", ["", "alice", "did:plc:short", "did:key:abc", "alice.onion"])
def test_what_is_neither_handle_nor_did_is_not_looked_up(world: World, account: str) -> None:
    with pytest.raises(IdentityError) as caught:
        world.resolver().resolve(account)
    assert caught.value.reason in ("malformed", "unsupported")
    assert (world.web.asked, world.names.asked) == ([], [])


# A handle resolver

ASK = f"resolver.example.com/xrpc/com.atproto.identity.resolveHandle?handle={HANDLE}"


def test_a_handle_resolver_is_asked_instead_of_the_domain(world: World) -> None:
    world.publish(ALICE, document())
    world.web.answers[ASK] = json_answer({"did": ALICE})
    resolver = world.resolver(handle_resolver="https://resolver.example.com/")
    assert resolver.resolve(HANDLE) == Identity(ALICE, HANDLE, PDS)
    assert world.names.asked == []
    assert world.web.asked == [ASK, f"plc.directory/{ALICE}"]


@pytest.mark.parametrize(
    ("response", "complaint", "retryable"),
    [
        (json_answer({"error": "InvalidRequest"}, 400), "400", False),
        (json_answer({}, 502), "502", True),
        (json_answer({}), "no usable DID", False),
        (json_answer({"did": ["x"]}), "no usable DID", False),
        (json_answer({"did": "did:key:abc"}), "neither did:plc nor did:web", False),
        (b"", "cut off", True),
    ],
)
def test_a_handle_resolver_that_cannot_help(world: World, response: bytes, complaint: str, retryable: bool) -> None:
    world.web.answers[ASK] = response
    with pytest.raises(IdentityError, match=complaint) as caught:
        world.resolver(handle_resolver="https://resolver.example.com").resolve(HANDLE)
    assert caught.value.retryable is retryable


@pytest.mark.parametrize("name", ["plc_directory", "handle_resolver"])
def test_a_service_that_is_no_url_is_a_configuration_error(name: str) -> None:
    with pytest.raises(ClientMetadataError, match=f"{name} does not use https") as caught:
        IdentityResolver(Transport(), **{name: "http://localhost:2582"})  # type: ignore[arg-type]
    assert caught.value.field == name
