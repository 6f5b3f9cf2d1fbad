"""What a refresh comes to when servers and networks fail, over the stores that processes share.

A case says what goes wrong on the local network and what its caller gets. The rest follows from what the server did,
and is what the library promises: an answer that was lost leaves a trace, and costs the session only if the server had
processed the request; whatever else goes wrong costs nothing.
"""

from __future__ import annotations

import gzip
import random
import re
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import requests

from atproto_session import (
    ClientMetadata,
    DiscoveryError,
    Freshness,
    IdentityError,
    LockTimeoutError,
    OAuthClient,
    OAuthResponseError,
    RefreshInterruptedError,
    Session,
    SessionDeletedEvent,
    SessionError,
    SessionNotFoundError,
    SessionUpdatedEvent,
    TokenRefreshError,
    TransportError,
)
from atproto_session._terms import Times
from atproto_session.testing.network import LocalNetwork, Response

from ..core import RESTLESS, SOON, Worker, an_answer_within, wait_until
from ..loopback import closed_port
from ..scenes import GET_SESSION

OTHER_DID = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"


class Record(Enum):
    """What is stored afterwards."""

    UNTOUCHED = "as it was: nothing was even written"
    CLEAR = "as it was"
    IN_DOUBT = "as it was, with an attempt whose answer may be lost"
    NEW = "the new tokens"
    GONE = "nothing"


@dataclass(frozen=True)
class Ending:
    """What the caller gets and what is stored."""

    error: type[SessionError] | None
    record: Record
    retryable: bool = False


RENEWED = Ending(None, Record.NEW)
INTERRUPTED = Ending(RefreshInterruptedError, Record.IN_DOUBT, retryable=True)
DOUBTFUL = Ending(OAuthResponseError, Record.IN_DOUBT, retryable=True)
REFUSED = Ending(OAuthResponseError, Record.CLEAR)
REFUSED_FOR_NOW = Ending(OAuthResponseError, Record.CLEAR, retryable=True)
NEVER_SENT = Ending(TransportError, Record.CLEAR, retryable=True)
OVER = Ending(TokenRefreshError, Record.GONE)
NO_IDENTITY = Ending(IdentityError, Record.UNTOUCHED)
NO_IDENTITY_NOW = Ending(IdentityError, Record.UNTOUCHED, retryable=True)
NO_SERVER = Ending(DiscoveryError, Record.UNTOUCHED)
NO_SERVER_NOW = Ending(DiscoveryError, Record.UNTOUCHED, retryable=True)


@dataclass(frozen=True)
class Case:
    """Something that goes wrong, once.

    :ivar processed: the server has used the refresh token by the time that it goes wrong.
    :ivar revoked: what the server issued has to be given back.
    :ivar times: to how many requests it has to happen so that one refresh fails.
    """

    endpoint: str
    action: str
    ending: Ending
    options: Mapping[str, Any] = field(default_factory=dict)
    processed: bool = False
    revoked: bool = False
    times: int = 1

    @property
    def loses_the_answer(self) -> bool:
        return self.processed and self.ending.record is Record.IN_DOUBT

    def happen(self, network: LocalNetwork) -> Any:
        return network.fault(self.endpoint, self.action, times=self.times, **self.options)


def answer(body: object, status: int = 200, **headers: str) -> dict[str, Any]:
    """The options of a fault that answers so, without processing anything."""
    text = body if isinstance(body, bytes) else Response.of_json(body).body
    response = Response(status, text, {"Content-Type": "application/json"} | headers)
    return {"respond": lambda request: response}


def refresh(action: str, ending: Ending, *, times: int = 1, revoked: bool = False, **options: Any) -> Case:
    """A case at the token endpoint."""
    always_processed = action in {
        *("cut_after", "drip", "late", "no_nonce", "no_expires_in", "rewritten"),
        *("wrong_sub", "scope_without_atproto", "wrong_token_type"),
    }
    processed = always_processed or options.get("processed", False)
    return Case("refresh", action, ending, options, processed=processed, revoked=revoked, times=times)


HUGE = 600_000
DID_DOCUMENT_OF_ANOTHER = {
    "id": OTHER_DID,
    "service": [{"id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": "http://localhost:1"}],
}

#: What can go wrong with the refresh request itself.
ANSWERS: dict[str, Case] = {
    "cut off before it is processed": refresh("cut_before", INTERRUPTED),
    "cut off after it was processed": refresh("cut_after", INTERRUPTED),
    "503 of a gateway, never processed": refresh("status", DOUBTFUL, status=503),
    "503 of a gateway, processed": refresh("status", DOUBTFUL, status=503, processed=True),
    "502 with a page of HTML": refresh("html", DOUBTFUL, status=502),
    "500 server_error": refresh("oauth_error", DOUBTFUL, error="server_error", status=500),
    "500 server_error, processed": refresh("oauth_error", DOUBTFUL, error="server_error", status=500, processed=True),
    "500 invalid_grant": refresh("oauth_error", DOUBTFUL, error="invalid_grant", status=500),
    "403 of a firewall": refresh("html", DOUBTFUL, status=403),
    "403 of a firewall, processed": refresh("html", DOUBTFUL, status=403, processed=True),
    "a redirect": refresh("redirect", DOUBTFUL, to="http://localhost:1/oauth/token", status=307),
    "429": refresh("status", REFUSED_FOR_NOW, status=429),
    "a page of HTML": refresh("html", INTERRUPTED),
    "a page of HTML, processed": refresh("html", INTERRUPTED, processed=True),
    "nothing": refresh("custom", INTERRUPTED, **answer(b"")),
    "half a document": refresh("custom", INTERRUPTED, **answer(b'{"access_token": "acc-')),
    "a list": refresh("custom", INTERRUPTED, **answer([])),
    "no access token": refresh("custom", INTERRUPTED, **answer({"token_type": "DPoP", "sub": OTHER_DID})),
    "too large": refresh("oversize", INTERRUPTED, size=HUGE),
    "too large, in chunks": refresh("oversize", INTERRUPTED, size=HUGE, chunked=True),
    "too large, processed": refresh("oversize", INTERRUPTED, size=HUGE, processed=True),
    "a nonce demanded once": refresh("nonce_challenge", RENEWED),
    "a nonce demanded each time": refresh("nonce_challenge", REFUSED, times=2),
    "invalid_client": refresh("oauth_error", REFUSED, error="invalid_client", status=401),
    "invalid_dpop_proof": refresh("oauth_error", REFUSED, error="invalid_dpop_proof", status=401),
    "invalid_grant": refresh("oauth_error", OVER, error="invalid_grant"),
    "tokens of another account": refresh("wrong_sub", OVER, revoked=True),
    "tokens of nobody": refresh("wrong_sub", OVER, revoked=True, sub=""),
    "tokens without atproto": refresh("scope_without_atproto", OVER, revoked=True),
    "tokens with a scope that only looks like it": refresh(
        "scope_without_atproto", OVER, revoked=True, scope="atproto:x xatproto"
    ),
    "tokens that are not bound": refresh("wrong_token_type", OVER, revoked=True),
    "no nonce": refresh("no_nonce", RENEWED),
    "no expires_in": refresh("no_expires_in", RENEWED),
}

#: What can go wrong on the way to it.
PREPARATIONS: dict[str, Case] = {
    "the PLC directory cuts off": Case("plc", "cut_before", NO_IDENTITY_NOW),
    "the PLC directory is down": Case("plc", "status", NO_IDENTITY_NOW, {"status": 503}, times=2),
    "the PLC directory is busy": Case("plc", "status", NO_IDENTITY_NOW, {"status": 429}),
    "the PLC directory knows no such DID": Case("plc", "status", NO_IDENTITY, {"status": 404}),
    "the PLC directory redirects": Case("plc", "redirect", NO_IDENTITY, {"to": "http://localhost:1/"}),
    "the PLC directory answers with HTML": Case("plc", "html", NO_IDENTITY),
    "the DID document is huge": Case("plc", "oversize", NO_IDENTITY, {"size": HUGE, "chunked": True}),
    "the DID document of another": Case("plc", "custom", NO_IDENTITY, answer(DID_DOCUMENT_OF_ANOTHER)),
    "the PDS cuts off": Case("protected-resource", "cut_before", NO_SERVER_NOW),
    "the PDS is down": Case("protected-resource", "status", NO_SERVER_NOW, {"status": 503}, times=2),
    "the PDS is down for a moment": Case("protected-resource", "status", RENEWED, {"status": 502}),
    "the PDS redirects": Case("protected-resource", "redirect", NO_SERVER, {"to": "http://localhost:1/"}),
    "the PDS answers with HTML": Case("protected-resource", "html", NO_SERVER),
    "the PDS speaks for another": Case(
        "protected-resource", "custom", NO_SERVER, answer({"resource": "http://localhost:1"})
    ),
    "the issuer's metadata are cut off": Case("as-metadata", "cut_before", NO_SERVER_NOW),
    "the issuer's metadata are down": Case("as-metadata", "status", NO_SERVER_NOW, {"status": 503}, times=2),
    "the issuer's metadata are of another": Case(
        "as-metadata", "custom", NO_SERVER, answer({"issuer": "http://localhost:1"})
    ),
}

CASES = ANSWERS | PREPARATIONS


# Answers that break rules and can be read


def changed(change: Callable[[bytes], bytes] = bytes, **fields: str) -> Callable[[bytes, bytes], bytes]:
    """Another body, and other fields in the head; its ``Content-Length`` fits unless it is given."""

    def rewrite(head: bytes, body: bytes) -> bytes:
        sent = change(body)
        return with_fields(head, **({"Content_Length": str(len(sent))} | fields)) + sent

    return rewrite


def with_fields(head: bytes, **fields: str) -> bytes:
    names = {name.replace("_", "-"): value for name, value in fields.items()}
    lines = [line for line in head.split(b"\r\n")[:-2] if line.partition(b":")[0].decode() not in names]
    lines += [f"{name}: {value}".encode("latin-1") for name, value in names.items() if value]
    return b"\r\n".join([*lines, b"", b""])


def in_chunks(end: bytes) -> Callable[[bytes, bytes], bytes]:
    def rewrite(head: bytes, body: bytes) -> bytes:
        pieces = (body[:20], body[20:])
        chunks = b"".join(b"%x;name=value\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        return with_fields(head, Content_Length="", Transfer_Encoding="chunked") + chunks + end

    return rewrite


def preceded_by(start: bytes) -> Callable[[bytes, bytes], bytes]:
    return lambda head, body: start + head + body


def in_head(old: bytes, new: bytes) -> Callable[[bytes, bytes], bytes]:
    return lambda head, body: head.replace(old, new, 1) + body


def raw_deflate(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(body) + compressor.flush()


def in_two_members(body: bytes) -> bytes:
    return gzip.compress(body[:30]) + gzip.compress(body[30:])


EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n"

ODD_ANSWERS: dict[str, tuple[Callable[[bytes, bytes], bytes], str]] = {
    "103 before it": (preceded_by(EARLY_HINTS), "close"),
    "several interim answers": (preceded_by(b"HTTP/1.1 100 Continue\r\n\r\n" + 2 * EARLY_HINTS), "keep"),
    "x-gzip": (changed(gzip.compress, Content_Encoding="x-gzip"), "close"),
    "several gzip members": (changed(in_two_members, Content_Encoding="gzip"), "close"),
    "gzip without its trailer": (changed(lambda body: gzip.compress(body)[:-8], Content_Encoding="gzip"), "close"),
    "gzip with a wrong checksum": (
        changed(lambda body: gzip.compress(body)[:-8] + bytes(8), Content_Encoding="gzip"),
        "close",
    ),
    "gzip that is not declared": (changed(gzip.compress), "close"),
    "gzip twice": (changed(lambda body: gzip.compress(gzip.compress(body)), Content_Encoding="gzip, gzip"), "close"),
    "gzip that is none": (changed(Content_Encoding="gzip"), "close"),
    "an empty coding": (changed(Content_Encoding=" "), "close"),
    "a coding that is none": (changed(Content_Encoding="br"), "close"),
    "a coding nobody knows": (changed(Content_Encoding="utf-8"), "close"),
    "deflate": (changed(zlib.compress, Content_Encoding="deflate"), "close"),
    "raw deflate": (changed(raw_deflate, Content_Encoding="deflate"), "close"),
    "a byte order mark": (changed(lambda body: b"\xef\xbb\xbf" + body), "close"),
    "UTF-16": (changed(lambda body: body.decode().encode("utf-16")), "close"),
    "UTF-32 without a mark": (changed(lambda body: body.decode().encode("utf-32-be")), "close"),
    "text behind it": (changed(lambda body: body + b"<!-- cached -->"), "close"),
    "NUL behind it": (changed(lambda body: b"\r\n" + body + bytes(3)), "close"),
    "too great a length": (changed(Content_Length="100000"), "close"),
    "too great a length, connection kept": (changed(Content_Length="100000"), "keep"),
    "too great a length, connection reset": (changed(Content_Length="100000"), "reset"),
    "too small a length": (changed(Content_Length="20"), "keep"),
    "no length": (changed(Content_Length=""), "keep"),
    "a length that is none": (changed(Content_Length="many"), "close"),
    "a negative length": (changed(Content_Length="-1"), "keep"),
    "two lengths": (changed(Content_Length="20, 4000"), "keep"),
    "no last chunk": (in_chunks(b""), "close"),
    "no last chunk, connection kept": (in_chunks(b""), "keep"),
    "half a last chunk": (in_chunks(b"0\r\n"), "reset"),
    "no chunk for a last chunk": (in_chunks(b"what?\r\n"), "keep"),
    "chunks that are none": (changed(Content_Length="", Transfer_Encoding="chunked"), "close"),
    "chunks that are not declared": (
        lambda head, body: with_fields(head, Content_Length="") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        "close",
    ),
    "a page of HTML by name": (changed(Content_Type="text/html"), "close"),
    "no type": (changed(Content_Type=""), "close"),
    "a header without end": (changed(X_Padding="x" * 70_000), "close"),
    "too many headers": (changed(bytes, **{f"X_{number}": "x" for number in range(150)}), "close"),
    "a header without a colon": (in_head(b"\r\n", b"\r\nnonsense\r\n"), "keep"),
    "a header with a name of spaces": (in_head(b"\r\n", b"\r\n  : x\r\n"), "keep"),
    "lines that end in LF": (lambda head, body: head.replace(b"\r\n", b"\n") + body, "close"),
    "another version": (in_head(b"HTTP/1.1", b"HTTP/2"), "keep"),
    "an empty line before it": (preceded_by(b"\r\n"), "close"),
    "204": (in_head(b"200 OK", b"204 No Content"), "keep"),
    "a redirect that is none": (in_head(b"200 OK", b"302 Found"), "close"),
    "500": (in_head(b"200 OK", b"500 Oh"), "close"),
    "numbers that are none": (
        changed(lambda body: body.replace(b'"expires_in":', b'"x": NaN, "y": ' + b"1" * 5000 + b', "expires_in":')),
        "close",
    ),
    "a lifetime in quotes": (changed(lambda body: re.sub(rb'("expires_in": )(\d+)', rb'\1"\2"', body)), "close"),
    "what is no UTF-8": (changed(lambda body: body.replace(b"{", b'{"x": "\xff", ')), "close"),
}


class Stage:
    """An account that is logged in, and a worker that has not used it yet.

    :ivar before: the session as the log-in left it.
    :ivar events: what the worker's listeners were told.
    :ivar writes: how often the worker wrote to the store.
    """

    def __init__(self, network: LocalNetwork, store: str) -> None:
        self.network = network
        self.store = store
        account = network.create_account()
        self.did = account.did
        with self.another_worker() as client:
            client.callback(network.authorize(client.authorize(account.did), account))
            self.before = client.sessions.get_session(self.did)
        self.events: list[SessionUpdatedEvent | SessionDeletedEvent] = []
        self.client = self.another_worker(on_session_updated=self.events.append, on_session_deleted=self.events.append)
        self.writes = 0
        sessions = self.client.sessions
        replace = sessions._store.replace

        def counted(*arguments: Any) -> bool:
            self.writes += 1
            return replace(*arguments)

        sessions._store.replace = counted  # type: ignore[method-assign]

    def another_worker(self, **options: Any) -> OAuthClient:
        options = {"times": RESTLESS, **self.network.client_options(), **options}
        return OAuthClient(ClientMetadata.loopback(), store=self.store, **options)

    def refresh(self, **options: Any) -> Session:
        return self.client.sessions.get_session(self.did, True, **options)

    @property
    def stored(self) -> Session | None:
        return self.client.sessions.get_stored(self.did)

    @property
    def token(self) -> str:
        """The refresh token that the log-in brought."""
        return self.before.token_set.refresh_token or ""

    @property
    def uses(self) -> int:
        """How often the server has seen it."""
        return self.network.refresh_token_uses[self.token]

    def check_record(self, expected: Record) -> None:
        stored = self.stored
        if expected in (Record.UNTOUCHED, Record.CLEAR):
            assert stored == self.before
            assert (self.writes == 0) is (expected is Record.UNTOUCHED)
        elif expected is Record.IN_DOUBT:
            assert stored is not None
            assert stored.token_set == self.before.token_set
            assert stored.attempt is not None
            assert stored.attempt.answers_lost == 0
        elif expected is Record.NEW:
            assert stored is not None
            assert stored.attempt is None
            info = self.network.session_of(stored.token_set.access_token)
            assert info is not None
            assert info.current
            assert not stored.token_set.has_same_tokens(self.before.token_set)
        else:
            assert stored is None

    def check_events(self, expected: Record) -> None:
        kinds: dict[Record, list[type]] = {Record.NEW: [SessionUpdatedEvent], Record.GONE: [SessionDeletedEvent]}
        assert [type(event) for event in self.events] == kinds.get(expected, [])
        assert {event.sub for event in self.events} <= {self.did}

    def check_next_use(self, record: Record, *, processed: bool) -> None:
        """Another worker uses the session, as it was left to it, and then this one again."""
        spent_before = self.uses
        with self.another_worker() as other:
            if record is Record.GONE:
                with pytest.raises(SessionNotFoundError):
                    other.restore(self.did)
            elif record is Record.IN_DOUBT and processed:
                with pytest.raises(TokenRefreshError, match="an earlier refresh had been lost") as caught:
                    other.restore(self.did, refresh=True)
                assert caught.value.answer_lost
                assert caught.value.login_required
                assert self.uses == spent_before + 1
                with pytest.raises(SessionNotFoundError):
                    other.restore(self.did)
            else:
                assert other.restore(self.did, refresh=True).get(GET_SESSION).json()["did"] == self.did
                assert self.uses == 1, "the one time that it is good for"
                assert self.client.restore(self.did, refresh=True).get(GET_SESSION).json()["did"] == self.did
                assert self.network.replays == 0


@pytest.fixture(params=["sqlite", "json"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}:///{tmp_path}/sessions"


@pytest.fixture
def stage(network: LocalNetwork, store: str) -> Iterator[Stage]:
    stage = Stage(network, store)
    with stage.client:
        yield stage


def forget_metadata(client: OAuthClient, issuer: str) -> None:
    """As it does after some minutes."""
    client._discovery._servers._cache.delete(metadata_url(issuer))


def metadata_url(issuer: str) -> str:
    return f"{issuer}/.well-known/oauth-authorization-server"


@contextmanager
def a_token_endpoint_at(url: str, stage: Stage) -> Iterator[Callable[[], Session]]:
    """What refreshes in the block, once its worker has been told that this is where tokens come from."""
    metadata = requests.get(metadata_url(stage.network.issuer), timeout=SOON).json() | {"token_endpoint": url}
    fault = stage.network.fault("as-metadata", "custom", **answer(metadata))

    def act() -> Session:
        try:
            return stage.refresh()
        finally:
            forget_metadata(stage.client, stage.network.issuer)

    yield act
    assert fault.count == 1


def check(stage: Stage, case: Case, act: Callable[[], Session], caplog: pytest.LogCaptureFixture) -> None:
    """Everything that is promised of a case, once it happens to ``act``."""
    ending = case.ending
    if ending.error is None:
        renewed = act()
        assert stage.stored is not None
        assert stage.stored.token_set.has_same_tokens(renewed.token_set)
    else:
        with pytest.raises(SessionError) as caught:
            act()
        error = caught.value
        assert type(error) is ending.error, error
        assert error.retryable is ending.retryable
        assert error.login_required is (ending.record is Record.GONE)
        assert error.retry_after is None
        for token in (*stage.network.refresh_token_uses, stage.before.token_set.access_token):
            assert token not in f"{error!r} {error.__cause__!r} {caplog.text}"
    assert stage.uses == (case.processed or ending.record is Record.NEW)
    assert stage.network.revocations == case.revoked
    stage.check_record(ending.record)
    stage.check_events(ending.record)
    stage.network.clear_faults()
    stage.check_next_use(ending.record, processed=case.processed)


@pytest.mark.parametrize("name", CASES)
def test_a_fault(name: str, stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]
    fault = case.happen(stage.network)
    check(stage, case, stage.refresh, caplog)
    assert fault.count == case.times


#: Those that are no oddity to anybody.
QUIET = {"x-gzip", "an empty coding", "103 before it", "several interim answers", "a lifetime in quotes"}
QUIET |= {"lines that end in LF", "a length that is none"}


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_an_answer_that_can_be_read_is_read(name: str, stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    rewrite, ending = ODD_ANSWERS[name]
    get_a_nonce(stage)
    case = Case("refresh", "rewritten", RENEWED, {"rewrite": rewrite, "ending": ending}, processed=True)
    case.happen(stage.network)
    check(stage, case, stage.refresh, caplog)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (name not in QUIET), [record.message for record in warnings]
    renewed = stage.stored
    assert renewed is not None
    for token in (renewed.token_set.access_token, renewed.token_set.refresh_token or "none"):
        assert token not in caplog.text


@pytest.mark.parametrize("kept", [30, -1])
@pytest.mark.parametrize("name", [name for name in ODD_ANSWERS if "gzip" not in name and "deflate" not in name])
def test_half_a_document_is_no_answer_however_it_comes(
    name: str, kept: int, network: LocalNetwork, tmp_path: Path
) -> None:
    """No part of a token is taken for a token."""
    rewrite, _ = ODD_ANSWERS[name]
    stage = Stage(network, f"json:///{tmp_path}/sessions")
    with stage.client:
        network.fault("refresh", "rewritten", rewrite=lambda head, body: rewrite(head, body[:kept]), ending="close")
        with pytest.raises((RefreshInterruptedError, OAuthResponseError)):
            stage.refresh()


@pytest.mark.parametrize("name", ["too great a length", "gzip that is none", "UTF-16", "two lengths", "no last chunk"])
def test_a_refusal_that_can_be_read_is_read(name: str, stage: Stage) -> None:
    rewrite, ending = ODD_ANSWERS[name]
    get_a_nonce(stage)
    stage.network.revoke_sessions(stage.did)
    stage.network.fault("refresh", "rewritten", rewrite=rewrite, ending=ending)
    with pytest.raises(TokenRefreshError) as caught:
        stage.refresh()
    assert not caught.value.answer_lost
    assert stage.stored is None


def test_a_request_that_was_never_sent(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with closed_port() as port, a_token_endpoint_at(f"http://localhost:{port}/oauth/token", stage) as act:
        check(stage, Case("token", "none listens", NEVER_SENT), act, caplog)


def test_a_name_that_does_not_exist(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with a_token_endpoint_at("https://nowhere.invalid/oauth/token", stage) as act:
        check(stage, Case("token", "no such name", NEVER_SENT), act, caplog)


def test_a_handshake_that_fails(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    url = f"{stage.network.issuer.replace('http:', 'https:')}/oauth/token"
    with a_token_endpoint_at(url, stage) as act:
        check(stage, Case("token", "speaks no TLS", NEVER_SENT), act, caplog)


def test_a_redirect_is_not_followed(stage: Stage) -> None:
    stage.network.fault("refresh", "redirect", to=f"{stage.network.issuer}/elsewhere", status=307)
    with pytest.raises(OAuthResponseError, match="307"):
        stage.refresh()
    assert stage.network.requests("/elsewhere") == 0


def test_retry_after_keeps_every_worker_away_until_then(stage: Stage) -> None:
    fault = stage.network.fault("refresh", "status", status=429, headers={"Retry-After": "120"}, times=None)
    with pytest.raises(OAuthResponseError) as caught:
        stage.refresh()
    assert caught.value.retryable
    assert caught.value.retry_after == 120
    assert stage.stored is not None
    assert stage.stored.attempt is None
    assert (stage.uses, stage.events) == (0, [])

    now = stage.stored.rest.until if stage.stored.rest else 0.0
    with stage.another_worker(freshness=Freshness(clock=lambda: now - 1)) as early:
        with pytest.raises(OAuthResponseError, match=r"answered (429|503)") as caught:
            early.restore(stage.did, refresh=True)
        assert caught.value.retryable
        assert caught.value.retry_after == pytest.approx(1.0)
    assert fault.count == 1, "not even asked"
    fault.disarm()
    with stage.another_worker(freshness=Freshness(clock=lambda: now + 1)) as later:
        assert later.restore(stage.did, refresh=True).get(GET_SESSION).status_code == 200
    assert stage.uses == 1
    assert stage.stored.rest is None


def test_retry_after_of_a_gateway_that_may_have_cut_off_an_answer(stage: Stage) -> None:
    """Everybody waits until then, and the doubt outlives the waiting."""
    headers = {"Retry-After": "120"}
    fault = stage.network.fault("refresh", "status", status=503, headers=headers, processed=True)
    with stage.another_worker(times=Times()) as worker, pytest.raises(OAuthResponseError) as caught:
        worker.restore(stage.did, refresh=True)
    assert (caught.value.status, caught.value.retryable, caught.value.retry_after) == (503, True, 120)
    left = stage.stored
    assert left is not None
    assert left.attempt is not None
    assert left.token_set == stage.before.token_set

    now = left.rest.until if left.rest else 0.0
    with stage.another_worker(freshness=Freshness(clock=lambda: now - 1)) as early:
        with pytest.raises(OAuthResponseError, match=r"answered (429|503)") as caught:
            early.restore(stage.did, refresh=True)
        assert caught.value.retry_after == pytest.approx(1.0)
    assert (stage.stored, stage.uses, fault.count) == (left, 1, 1)
    with stage.another_worker(freshness=Freshness(clock=lambda: now + 1)) as later:
        with pytest.raises(TokenRefreshError) as lost:
            later.restore(stage.did, refresh=True)
        assert lost.value.answer_lost
    assert stage.stored is None
    assert stage.uses == 2


def test_an_answer_that_comes_after_its_caller_has_left(stage: Stage) -> None:
    fault = stage.network.fault("refresh", "late")
    patience = 0.2
    while not fault.fired.is_set():
        with pytest.raises(LockTimeoutError) as caught:
            stage.refresh(timeout=patience)
        assert caught.value.retryable
        patience *= 2
    assert stage.stored is not None
    assert stage.stored.attempt is not None, "the request is out"
    fault.release.set()
    stage.client.sessions.close()
    stage.check_record(Record.NEW)
    stage.check_events(Record.NEW)
    assert (stage.uses, stage.network.rotations) == (1, 1)
    renewed = stage.stored
    with stage.another_worker() as other:
        assert other.restore(stage.did).get(GET_SESSION).status_code == 200
    assert stage.stored == renewed, "which had no reason to refresh"


@pytest.mark.parametrize(
    ("action", "options"),
    [("late", {}), ("drip", {"interval": 0.05}), ("drip", {"interval": 0.05, "body_only": True})],
    ids=["late", "dripping", "dripping body"],
)
def test_an_answer_that_does_not_come_within_its_bound(
    action: str,
    options: dict[str, Any],
    stage: Stage,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    get_a_nonce(stage)
    case = refresh(action, INTERRUPTED, **options)
    fault = case.happen(stage.network)
    released: list[bool] = []

    def act() -> Session:
        try:
            with an_answer_within(2.0, monkeypatch):
                return stage.refresh()
        finally:
            released.append(fault.release.is_set())
            assert fault.fired.wait(SOON)

    check(stage, case, act, caplog)
    assert released == [False], "whoever waited was let go by the bound"


def get_a_nonce(stage: Stage) -> None:
    """So that the first request to the token endpoint is the one that counts."""
    assert stage.client.restore(stage.did).get(GET_SESSION).status_code == 200


def test_a_request_that_is_processed_after_everybody_has_given_up(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_a_nonce(stage)
    fault = stage.network.fault("refresh", "hold")
    with an_answer_within(2.0, monkeypatch), pytest.raises(RefreshInterruptedError):
        stage.refresh()
    assert fault.fired.wait(SOON)
    assert stage.uses == 0
    stage.check_record(Record.IN_DOUBT)
    fault.release.set()
    wait_until(lambda: stage.network.rotations == 1)
    stage.check_next_use(Record.IN_DOUBT, processed=True)


@pytest.mark.parametrize("endpoint", ["plc", "protected-resource", "as-metadata"])
def test_preparations_that_do_not_come_to_an_end(endpoint: str, stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.client._identities._timeout = stage.client._transport.timeout = 0.5
    ending = NO_IDENTITY_NOW if endpoint == "plc" else NO_SERVER_NOW
    check_case = Case(endpoint, "drip", ending, {"interval": 0.05})
    check_case.happen(stage.network)
    check(stage, check_case, stage.refresh, caplog)


def test_without_a_new_refresh_token_the_old_one_goes_on(stage: Stage) -> None:
    stage.network.fault("refresh", "no_refresh_token", times=2)
    for number in (1, 2):
        session = stage.refresh()
        assert session.token_set.refresh_token == stage.token
        assert session.token_set.access_token != stage.before.token_set.access_token
        assert stage.stored is not None
        assert stage.stored.token_set.has_same_tokens(session.token_set)
        assert stage.stored.attempt is None
        assert stage.uses == number
    with stage.another_worker() as other:
        assert other.restore(stage.did).get(GET_SESSION).status_code == 200
        other.restore(stage.did, refresh=True)
    assert stage.stored is not None
    assert stage.stored.token_set.refresh_token != stage.token
    assert stage.network.replays == 0


def test_without_expires_in_tokens_serve_until_they_are_refused(stage: Stage) -> None:
    stage.network.fault("refresh", "no_expires_in")
    assert stage.refresh().token_set.expires_at is None
    with stage.another_worker() as other:
        session = other.restore(stage.did)
        assert session.get(GET_SESSION).status_code == 200
        assert stage.network.rotations == 1
        stage.network.expire_access_tokens(stage.did)
        assert session.get(GET_SESSION).status_code == 200
    assert stage.network.rotations == 2


def test_an_account_that_went_to_another_issuer(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.network.move_account_to_other_issuer(stage.did)
    requests_before = stage.network.token_requests
    with pytest.raises(TokenRefreshError, match="now belongs to the authorization server"):
        stage.refresh()
    assert stage.network.token_requests == requests_before
    assert (stage.uses, stage.network.revocations) == (0, 0)
    # Nobody has ended it, and whoever runs the servers may have made a mistake.
    stage.check_record(Record.UNTOUCHED)
    stage.check_events(Record.UNTOUCHED)


@pytest.mark.parametrize("processed", [False, True])
def test_where_wanted_a_doubtful_token_is_not_sent_again(stage: Stage, processed: bool) -> None:
    stage.network.fault("refresh", "cut_after" if processed else "cut_before")
    with pytest.raises(RefreshInterruptedError):
        stage.refresh()
    with (
        stage.another_worker(on_interrupted="fail") as other,
        pytest.raises(TokenRefreshError, match="not asked for again") as caught,
    ):
        other.restore(stage.did, refresh=True)
    assert caught.value.answer_lost
    assert stage.uses == processed
    stage.check_record(Record.IN_DOUBT)


def test_a_loss_that_is_followed_by_other_faults_is_remembered(stage: Stage) -> None:
    for name in (
        "cut off after it was processed",
        "the PLC directory is down",
        "invalid_client",
        "503 of a gateway, never processed",
        "429",
        "a page of HTML",
    ):
        fault = CASES[name].happen(stage.network)
        with pytest.raises(SessionError):
            stage.refresh()
        assert fault.count == CASES[name].times
        assert stage.stored is not None
        assert stage.stored.attempt is not None
    assert (stage.uses, stage.events) == (1, [])
    stage.check_next_use(Record.IN_DOUBT, processed=True)


def test_resource_requests_carry_a_refresh_that_fails_to_their_callers(stage: Stage) -> None:
    session = stage.client.restore(stage.did)
    stage.network.expire_access_tokens(stage.did)
    stage.network.fault("refresh", "cut_before")
    with pytest.raises(RefreshInterruptedError):
        session.get(GET_SESSION)
    assert session.get(GET_SESSION).json()["did"] == stage.did
    assert (stage.uses, stage.network.rotations) == (1, 1)


# A thousand faults


#: How often each fault is drawn. Those that cost a session cost a log-in as well.
MATRIX = {name: 1 if case.loses_the_answer or case.ending is OVER else 3 for name, case in CASES.items()}
#: Often enough to happen where no answer was lost as well, which is what it must not be taken for.
MATRIX["invalid_grant"] = 6
FAULTS_AT_LEAST = 1000
LANES = 4


class Lane(threading.Thread):
    """Two workers with three callers that share one account after another, while everything goes wrong.

    Several lanes share a store. Each has a network of its own, so that it knows whom a fault has hit.

    :ivar injected: how often each fault happened.
    :ivar outcomes: what the callers got.
    :ivar ends: how many accounts ended, and why.
    """

    def __init__(self, number: int, store: str, faults: int) -> None:
        super().__init__(name=f"lane {number}", daemon=True)
        self._random = random.Random(f"lane {number}")
        self._not_yet = [name for position, name in enumerate(MATRIX) if position % LANES == number]
        self._store = store
        self._faults = faults
        self.injected: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self._said_to_be_lost: list[str] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with LocalNetwork() as network:
                self._network = network
                options = {"store": self._store, **network.client_options()}
                with (
                    OAuthClient(ClientMetadata.loopback(), times=RESTLESS, **options) as one,
                    OAuthClient(ClientMetadata.loopback(), times=RESTLESS, **options) as two,
                ):
                    self._workers = (one, two)
                    self._run()
        except BaseException as error:
            self.error = error

    def _run(self) -> None:
        did = self._log_in()
        while self.injected.total() < self._faults:
            if not self._survives_a_round(did):
                did = self._log_in()
        assert self._workers[0].restore(did, refresh=True).get(GET_SESSION).status_code == 200

    def _log_in(self) -> str:
        account = self._network.create_account()
        client = self._random.choice(self._workers)
        client.callback(self._network.authorize(client.authorize(account.did), account))
        return account.did

    def _survives_a_round(self, did: str) -> bool:
        """Let up to three things go wrong while three callers want new tokens. Whether the session outlives it."""
        before = self._workers[0].sessions.get_session(did, False)
        names = self._random.choices(list(MATRIX), list(MATRIX.values()), k=self._random.randint(1, 3))
        if self._not_yet:  # so that each happens, whatever chance brings
            names[0] = self._not_yet[-1]
        faults = [(name, CASES[name].happen(self._network)) for name in names]
        for client in self._workers:
            forget_metadata(client, before.token_set.iss)
        token = before.token_set.access_token
        self._said_to_be_lost.clear()
        callers = [Worker(self._caller(self._workers[number % 2], did, rejected=token)) for number in range(3)]
        for caller in callers:
            caller.outcome()
        self._network.clear_faults()
        happened = [CASES[name] for name, fault in faults if fault.count]
        self.injected.update({name: fault.count for name, fault in faults})
        self._not_yet = [name for name in self._not_yet if not self.injected[name]]
        return self._check(did, before, happened)

    def _caller(self, client: OAuthClient, did: str, **options: Any) -> Callable[[], None]:
        def call() -> None:
            try:
                client.sessions.get_session(did, **options)
                self.outcomes["a session"] += 1
            except SessionError as error:
                self.outcomes[type(error).__name__] += 1
                if isinstance(error, TokenRefreshError) and error.answer_lost:
                    self._said_to_be_lost.append(did)

        return call

    def _check(self, did: str, before: Session, happened: list[Case]) -> bool:
        token = before.token_set.refresh_token or ""
        lost = sum(case.loses_the_answer for case in happened)
        ended = any(case.ending is OVER for case in happened)
        uses = self._network.refresh_token_uses
        assert uses[token] <= 1 + lost, f"sent {uses[token]} times, while {lost} answers were lost: {happened}"
        if not self._is_in_doubt(before, happened):
            assert not self._said_to_be_lost, f"no answer was lost: {happened}"
        stored = self._workers[0].sessions.get_stored(did)
        if stored is not None and uses[token] and stored.token_set.refresh_token == token:
            assert stored.attempt is not None, f"the loss left no trace: {happened}"
            assert lost
            self._caller(self._random.choice(self._workers), did, refresh=True)()  # which is to find out
            stored = self._workers[0].sessions.get_stored(did)
            assert stored is None
        if stored is None:
            assert lost or ended, f"the session was lost to {happened}"
            if not ended:
                assert self._said_to_be_lost, f"nobody was told that an answer was lost: {happened}"
            self.ends["since an answer was lost" if self._said_to_be_lost else "for another reason"] += 1
            return False
        info = self._network.session_of(stored.token_set.refresh_token or "")
        assert info is not None
        assert info.current, f"what is stored is dead after {happened}"
        return True

    def _is_in_doubt(self, before: Session, happened: list[Case]) -> bool:
        """Whether an answer may have been lost, as far as a worker can know."""
        return (
            before.attempt is not None
            or before.after_lost_answer
            or any(case.ending.record is Record.IN_DOUBT for case in happened)
        )


@pytest.mark.timeout(900)
def test_a_thousand_faults(tmp_path: Path, record_testsuite_property: Callable[[str, object], None]) -> None:
    """``pytest --junitxml`` writes down how often each fault happened, and what the callers got."""
    store = f"sqlite:///{tmp_path}/sessions.db"
    lanes = [Lane(number, store, -(-FAULTS_AT_LEAST // LANES)) for number in range(LANES)]
    for lane in lanes:
        lane.join(800)
        assert not lane.is_alive(), "still at work"
        if lane.error is not None:
            raise lane.error
    injected = sum((lane.injected for lane in lanes), Counter())
    for name in CASES:
        record_testsuite_property(f"faults: {name}", injected[name])
    for outcome, count in sum((lane.outcomes for lane in lanes), Counter()).items():
        record_testsuite_property(f"callers got: {outcome}", count)
    ends = sum((lane.ends for lane in lanes), Counter())
    for reason, count in ends.items():
        record_testsuite_property(f"accounts ended: {reason}", count)
    assert injected.total() >= FAULTS_AT_LEAST
    assert len(ends) == 2
    assert set(injected) == set(CASES), "every one of them"
