"""Handles and DIDs, resolved on a network of this machine's loopback."""

from __future__ import annotations

import socket
import ssl
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dns.resolver
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from atproto_session import _flights
from atproto_session._adapter import LOOKUP_THREAD, Network
from atproto_session._flights import Flight
from atproto_session.errors import ClientMetadataError, IdentityError, LockTimeoutError, TransportError
from atproto_session.identity import (
    Identity,
    IdentityResolver,
    check_did,
    check_handle,
    parse_account,
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
        "at://alice.example.com",
        "AT://Alice.example.com/",
        "at://alice.example.com/app.bsky.feed.post/3k?x#y",
        "https://bsky.app/profile/alice.example.com",
        "HTTPS://bsky.app/profile/alice.example.com/",
        "http://deer.social/profile/@alice.example.com/post/3k",
        "bsky.app/profile/alice.example.com?ref=share",
        '"alice.example.com"',
        "\u201c@alice.example.com\u201d",
        "\u00ab alice.example.com \u00bb",
        "'\u00b4alice.example.com`,",
        "<https://bsky.app/profile/alice.example.com>",
        "(@alice.example.com)",
        "alice.example.com.",
        "alice.example.com/",
        "alice\uff0eexample\uff61com\u3002",
        "\uff20\uff41lice.example.\uff43\uff4f\uff4d",
        "\uff41\uff54\uff1a\uff0f\uff0falice.example.com",
        "\u00a0alice.example.com\u3000",
    ],
)
def test_a_handle_as_people_paste_it(pasted: str) -> None:
    assert parse_account(pasted) == ("handle", "alice.example.com")


@pytest.mark.duty(5)
@pytest.mark.parametrize(
    ("pasted", "handle"),
    [
        ("b\u00fccher.example.com", "xn--bcher-kva.example.com"),
        ("@B\u00dcCHER.example.com", "xn--bcher-kva.example.com"),
        ("bu\u0308cher.example.com", "xn--bcher-kva.example.com"),
        ("stra\u00dfe.example.com", "xn--strae-oqa.example.com"),
        ("\u4f8b\u3048\u3002\u30c6\u30b9\u30c8.com", "xn--r8jz45g.xn--zckzah.com"),
        ("at://b\u00fccher.example.com", "xn--bcher-kva.example.com"),
        ("https://bsky.app/profile/b%C3%BCcher.example.com", "xn--bcher-kva.example.com"),
        ("xn--bcher-kva.example.com", "xn--bcher-kva.example.com"),
    ],
)
def test_a_handle_beyond_ascii(pasted: str, handle: str) -> None:
    assert parse_account(pasted) == ("handle", handle)


@pytest.mark.duty(4)
@pytest.mark.parametrize(
    "pasted",
    [
        ALICE,
        f" '{ALICE}' ",
        f"@{ALICE}",
        f"DID:PLC:{ALICE[8:]}",
        f"at://{ALICE}/app.bsky.feed.post/3k",
        f"https://bsky.app/profile/{ALICE}",
        f"https://bsky.app/profile/{ALICE.replace(':', '%3A')}/lists/3k",
        f"{ALICE}/",
    ],
)
def test_a_did_as_people_paste_it(pasted: str) -> None:
    assert parse_account(pasted) == ("did", ALICE)


@pytest.mark.duty(4)
@pytest.mark.parametrize(
    "pasted", ["https://alice.example.com", " 'https://alice.example.com' ", "<https://alice.example.com>"]
)
def test_the_url_of_a_server(pasted: str) -> None:
    assert parse_account(pasted) == ("server", "https://alice.example.com")


def test_the_url_of_a_server_is_checked_elsewhere() -> None:
    assert parse_account("http://[::1]:2583/profile") == ("server", "http://[::1]:2583/profile")


@pytest.mark.duty(5)
@pytest.mark.parametrize(
    "pasted",
    [
        "",
        " @ ",
        "alice",
        "alice example.com",
        "@@alice.example.com",
        "alice@example.com",
        "at://",
        "at:///",
        "https://bsky.app/profile/alice",
        "did:key:zQ3shZc2QzApp2oymGvQbzP8eKheVshBHbU4ZYjeXqwSKEn6N",
        "did:plc:short",
        "\u2603.example.com",
        "b\u00fccher..example.com",
        "\u00fc" * 300 + ".com",
        "x" * 5000,
        "\u00e4 alice.example.com",
        "\ud800.example.com",
    ],
)
def test_no_more_is_made_good_than_that(pasted: str) -> None:
    with pytest.raises(IdentityError) as caught:
        parse_account(pasted)
    assert caught.value.reason in ("malformed", "unsupported")
    assert not caught.value.retryable
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("account", [None, b"alice.example.com", ["alice.example.com"], 1])
def test_an_account_is_text(account: Any) -> None:
    with pytest.raises(TypeError, match=f"account is a handle, .* not {type(account).__name__}"):
        parse_account(account)


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
    for check in (check_did, check_handle, lambda text: parse_account(text).name):
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
@pytest.mark.parametrize(
    "response",
    [
        answer(200, f"\n {ALICE}\r\n".encode()),
        answer(203, ALICE.encode()),
        answer(200, f"\ufeff{ALICE}".encode()),
        answer(200, f"{ALICE}\r\n# my account\r\n".encode()),
        answer(200, f"{ALICE}\n{BOB}\n".encode()),
    ],
)
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
        (answer(200, b" \n"), "without a DID", False),
        (answer(403), "answered 403", False),
        (answer(408), "answered 408", True),
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
    said = "does not resolve at the moment" if retryable else f"no account has the handle {HANDLE}; check its spelling"
    assert said in str(caught.value)
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
        (json_answer({}, 404), f"the account {ALICE} does not exist; check its spelling$", False),
        (json_answer({}, 410), f"the account {ALICE} is there no more$", False),
        (json_answer(document() | {"padding": "x" * 100_000}), "too large", False),
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


@pytest.mark.parametrize(("reason", "retryable"), [(socket.EAI_NONAME, False), (socket.EAI_FAIL, True)])
def test_a_host_that_does_not_exist_is_final(world: World, reason: int, retryable: bool) -> None:
    def getaddrinfo(host: str, *_: object) -> Any:
        raise socket.gaierror(reason, "the name does not resolve")

    resolver = IdentityResolver(
        Transport(network=Network(getaddrinfo=getaddrinfo)), dns_resolver=world.resolver()._dns_resolver
    )
    with pytest.raises(IdentityError, match="the name does not resolve") as of_handle:
        resolver.resolve(HANDLE)
    with pytest.raises(IdentityError, match="the name does not resolve") as of_did:
        resolver.resolve_did("did:web:example.com")
    assert [of_handle.value.retryable, of_did.value.retryable] == [retryable] * 2


def test_a_server_is_no_account(world: World) -> None:
    with pytest.raises(IdentityError, match="is the URL of a server") as caught:
        world.resolver().resolve(PDS)
    assert caught.value.reason == "malformed"


# Handle resolvers

ASK = f"resolver.example.com/xrpc/com.atproto.identity.resolveHandle?handle={HANDLE}"
ASK_ANOTHER = ASK.replace("resolver", "another", 1)
RESOLVER = "https://resolver.example.com/"
OWN = f"{HANDLE}/.well-known/atproto-did"


@pytest.mark.parametrize("response", [answer(404), answer(403), answer(503), answer(200, b"<html>"), b""])
def test_a_handle_resolver_is_asked_where_the_domain_has_no_answer(world: World, response: bytes) -> None:
    world.publish(ALICE, document())
    world.point_by_https(HANDLE, response)
    world.web.answers[ASK] = json_answer({"did": ALICE})
    assert world.resolver(handle_resolver=RESOLVER).resolve(HANDLE) == Identity(ALICE, HANDLE, PDS)
    assert world.names.asked == [f"_atproto.{HANDLE}"]
    assert world.web.asked[-2:] == [ASK, f"plc.directory/{ALICE}"]


@pytest.mark.parametrize("way", ["dns", "https"])
def test_the_domain_knows_better_than_a_handle_resolver(world: World, way: str) -> None:
    world.publish(ALICE, document())
    world.web.answers[ASK] = json_answer({"did": BOB})
    if way == "dns":
        world.point_by_dns(HANDLE, [f"did={ALICE}"])
    else:
        world.point_by_https(HANDLE, answer(200, ALICE.encode()))
    assert world.resolver(handle_resolver=RESOLVER).resolve(HANDLE).did == ALICE
    assert ASK not in world.web.asked


@pytest.mark.parametrize("first", [answer(403), answer(400), answer(503), json_answer({"did": "no"}), b""])
def test_handle_resolvers_are_asked_one_after_the_other(world: World, first: bytes) -> None:
    world.publish(ALICE, document())
    world.web.answers |= {ASK: first, ASK_ANOTHER: json_answer({"did": ALICE})}
    resolver = world.resolver(handle_resolver=[RESOLVER, "https://another.example.com"])
    assert resolver.resolve(HANDLE).did == ALICE
    assert world.web.asked[-2:] == [ASK_ANOTHER, f"plc.directory/{ALICE}"]


def test_a_domain_that_does_not_answer_leaves_time_for_a_handle_resolver(world: World) -> None:
    release = threading.Event()

    def late() -> bytes:
        release.wait(GENEROUS)
        return answer(404)

    world.publish(ALICE, document())
    world.point_by_https(HANDLE, late)
    world.web.answers[ASK] = json_answer({"did": ALICE})
    assert world.resolver(handle_resolver=RESOLVER, timeout=5.0).resolve(HANDLE).did == ALICE
    release.set()


def test_dot_test_is_left_to_a_handle_resolver(world: World) -> None:
    world.publish(ALICE, document(handle="alice.test"))
    ask = ASK.replace(HANDLE, "alice.test")
    world.web.answers[ask] = json_answer({"did": ALICE})
    resolver = world.resolver(handle_resolver=RESOLVER, allow_http=True)
    assert resolver.resolve("alice.test").handle == "alice.test"
    assert world.names.asked == []
    assert world.web.asked == [ask, f"plc.directory/{ALICE}"]
    with pytest.raises(IdentityError, match=r"no account has the handle bob\.test; check its spelling"):
        resolver.resolve("bob.test")
    assert world.names.asked == []


def test_a_handle_resolver_on_this_machine_is_asked_at_once(world: World) -> None:
    web = Web()
    with ScriptedServer(web.script) as server:
        local = f"http://localhost:{server.port}"
        web.answers[f"localhost:{server.port}/xrpc/com.atproto.identity.resolveHandle?handle={HANDLE}"] = json_answer(
            {"did": ALICE}
        )
        web.answers[f"localhost:{server.port}/{ALICE}"] = json_answer(document())
        resolver = IdentityResolver(
            Transport(allow_http=True),
            plc_directory=local,
            handle_resolver=local,
            allow_http=True,
            dns_resolver=world.resolver()._dns_resolver,
        )
        assert resolver.resolve(HANDLE).did == ALICE
    assert world.names.asked == []


@pytest.mark.parametrize(
    ("response", "complaint", "retryable"),
    [
        (json_answer({"error": "InvalidRequest"}, 400), "does not know it", False),
        (json_answer({}, 404), "does not know it", False),
        (json_answer({}, 403), "403", False),
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
    assert ("check its spelling" in str(caught.value)) is not retryable


def test_those_who_wait_for_a_silent_directory_are_told_the_same_after_one_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everybody = threading.Semaphore(0)
    asked = []

    class Waiting(Flight[Any]):
        def wait(self, *args: Any) -> Any:
            everybody.release()
            return super().wait(*args)

    def silent(url: str) -> dict[str, Any]:
        asked.append(url)
        for _ in range(20):
            assert everybody.acquire(timeout=GENEROUS)
        raise TransportError("cannot reach https://plc.directory: timed out")

    monkeypatch.setattr(_flights, "Flight", Waiting)
    resolver = IdentityResolver(Answering(silent))
    with ThreadPoolExecutor(20) as pool:
        failures = [future.exception(GENEROUS) for future in [pool.submit(resolver.resolve, ALICE) for _ in range(20)]]
    assert len(asked) == 1
    assert {type(failure) for failure in failures} == {IdentityError}
    assert {str(failure) for failure in failures} == {
        f"{ALICE} does not resolve: cannot reach https://plc.directory: timed out"
    }


# Private networks


def test_trusted_hosts_may_be_directory_pds_resolver_and_handle() -> None:
    """As in a network of containers, where hosts have single labels."""
    web = Web()
    with ScriptedServer(web.script) as server:
        network = network_to(server.port)
        transport = Transport(
            allow_http=True, network=network, trusted_hosts=["plc", "pds", "alice.internal", "web.internal"]
        )
        resolver = IdentityResolver(
            transport, plc_directory="http://plc:2582", handle_resolver="http://pds:2583", allow_http=True
        )
        web.answers = {
            f"plc:2582/{ALICE}": json_answer(document(handle="alice.test", pds="http://pds:2583")),
            f"plc:2582/{BOB}": json_answer(document(BOB, handle=None, pds="http://elsewhere:2583")),
            "pds:2583/xrpc/com.atproto.identity.resolveHandle?handle=alice.test": json_answer({"did": ALICE}),
        }
        assert resolver.resolve("alice.test") == Identity(ALICE, "alice.test", "http://pds:2583")
        with pytest.raises(IdentityError, match="does not use https"):
            resolver.resolve_did(BOB)
        with pytest.raises(ClientMetadataError, match="does not use https"):
            IdentityResolver(transport, plc_directory="http://elsewhere:2582", allow_http=True)
    assert resolver.parse("alice.internal").name == "alice.internal"
    with pytest.raises(IdentityError, match="not a domain of the Internet"):
        resolver.parse("bob.internal")
    assert resolver._document_url("did:web:web.internal") == "https://web.internal/.well-known/did.json"


# Memory


class Answering(Transport):
    """A transport that needs no network: ``answers`` makes the document for a URL."""

    def __init__(self, answers: Callable[[str], dict[str, Any]]) -> None:
        super().__init__()
        self._answers = answers

    def get_json(self, url: str, **_: Any) -> dict[str, Any]:
        return self._answers(url)


@pytest.mark.duty(42)
def test_padded_documents_do_not_fill_the_memory() -> None:
    def padded(url: str) -> dict[str, Any]:
        did = url.rpartition("/")[2]
        padding = [f"at://{'x' * 1000}{number}" for number in range(100)]
        return document(did, None) | {"padding": padding, "alsoKnownAs": padding}

    resolver = IdentityResolver(Answering(padded))
    resolver.resolve(ALICE)
    tracemalloc.start()
    for number in range(1000):
        resolver.resolve("did:plc:" + "".join("abcdefghij"[int(digit)] for digit in f"{number:024}"))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 5_000_000


@pytest.mark.parametrize("name", ["plc_directory", "handle_resolver"])
def test_a_service_that_is_no_url_is_a_configuration_error(name: str) -> None:
    with pytest.raises(ClientMetadataError, match=f"{name} does not use https") as caught:
        IdentityResolver(Transport(), **{name: "http://localhost:2582"})  # type: ignore[arg-type]
    assert caught.value.field == name


@pytest.mark.parametrize("url", [5, b"https://resolver.example.com", [None], [RESOLVER, "resolver.example.com"], ""])
def test_handle_resolvers_are_urls(url: Any) -> None:
    with pytest.raises(ClientMetadataError, match=r"^handle_resolver ") as caught:
        IdentityResolver(Transport(), handle_resolver=url)
    assert caught.value.field == "handle_resolver"
