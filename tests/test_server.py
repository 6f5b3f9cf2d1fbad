"""What an authorization server's answers come to: errors and what they say, secrets in them, nonces, tokens."""

from __future__ import annotations

import email.utils
import html
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from atproto_session._urls import origin
from atproto_session.client_auth import authentication_params
from atproto_session.discovery import Discovery, ServerMetadata
from atproto_session.dpop import NonceCache
from atproto_session.errors import DiscoveryError, OAuthResponseError, TokenRefreshError, TransportError
from atproto_session.identity import IdentityResolver
from atproto_session.keys import Keyset, generate_jwk
from atproto_session.metadata import ClientMetadata
from atproto_session.server import (
    ANSWER_WITHIN,
    REPLY_WITHIN,
    AccountAuthority,
    AuthorizationServer,
    masked,
    retry_after,
)
from atproto_session.session import ClientAuthMethod, fault_in
from atproto_session.transport import Response, Transport

from .core import DID, KEY, SOON, Gate, make_session, make_tokens, wait_until
from .test_discovery import metadata

ISSUER = "https://auth.example.com"
METADATA = ServerMetadata(
    issuer=ISSUER,
    authorization_endpoint=f"{ISSUER}/authorize",
    token_endpoint=f"{ISSUER}/token",
    pushed_authorization_request_endpoint=f"{ISSUER}/par",
    revocation_endpoint=f"{ISSUER}/revoke",
    token_endpoint_auth_methods_supported=("none", "private_key_jwt"),
    token_endpoint_auth_signing_alg_values_supported=("ES256",),
    dpop_signing_alg_values_supported=("ES256",),
    scopes_supported=("atproto",),
)
NONE = ClientAuthMethod("none")
TOKENS = {"access_token": "new", "token_type": "DPoP", "sub": "did:plc:x", "scope": "atproto", "expires_in": 60}
WITH_NONCE = {"DPoP-Nonce": "nonce"}


class Answering(Transport):
    """Answers every request, and keeps what was sent.

    :ivar sent: the form, the headers and the timeout of each.
    """

    def __init__(self, *answers: Response | Callable[[Mapping[str, str], Mapping[str, str]], Response]) -> None:
        super().__init__()
        self._answers = list(answers)
        self.sent: list[tuple[str, Mapping[str, str], Mapping[str, str], float]] = []

    def request(self, method: str, url: str, **options: Any) -> Response:
        form, headers = options["data"], options["headers"]
        self.sent.append((url, form, headers, options["timeout"]))
        answer = self._answers.pop(0)
        return answer(form, headers) if callable(answer) else answer


def answer(document: object, status: int = 200, headers: Mapping[str, str] = WITH_NONCE) -> Response:
    return Response(status, headers, json.dumps(document).encode(), f"{ISSUER}/token")


def server(transport: Transport, **options: Any) -> AuthorizationServer:
    nonces = options.pop("nonces", None) or NonceCache()
    return AuthorizationServer(METADATA, ClientMetadata.loopback(), None, transport, nonces, **options)


def error_of(response: Response | Callable[..., Response], **options: Any) -> OAuthResponseError:
    with pytest.raises(OAuthResponseError) as caught:
        server(Answering(response), **options).refresh(make_session(), NONE)
    return caught.value


# What is kept of an answer


@pytest.mark.parametrize("has_atproto", [True, False])
def test_a_stranger_fills_no_memory_with_an_answer(has_atproto: bool, caplog: pytest.LogCaptureFixture) -> None:
    scope = " ".join(
        [*(f"repo:com.example.number{number}" for number in range(20_000)), "atproto"][: 20_000 + has_atproto]
    )
    document = TOKENS | {"scope": scope, "sub": "did:web:" + "x" * 100_000, "token_type": "D" * 100_000}
    tokens = server(Answering(answer(document))).refresh(make_session(), NONE)
    assert len(tokens.scope) <= 17_000
    kept = tokens.scope.split()
    assert ("atproto" in kept) is has_atproto
    assert set(kept) <= set(scope.split()), "none is cut in two"
    assert "more scopes than are kept" in caplog.text
    assert len(tokens.sub) + len(tokens.token_type) < 5000
    assert fault_in(tokens, tokens.sub), "and nobody is logged in by it"


def test_a_token_that_no_server_would_take_is_none() -> None:
    for name in ("access_token", "refresh_token"):
        document = TOKENS | {name: "x" * 100_000}
        tokens = server(Answering(answer(document))).refresh(make_session(), NONE)
        assert fault_in(tokens, "did:plc:x") == "tokens that no header can carry"


def test_a_request_uri_that_no_browser_could_open_is_none() -> None:
    with pytest.raises(TransportError, match="gave no request_uri"):
        server(Answering(answer({"request_uri": "urn:" + "x" * 5000}))).push({}, KEY, NONE)


# How long answers are waited for


def test_only_the_answer_to_a_refresh_is_waited_for_that_long() -> None:
    transport = Answering(
        answer(TOKENS), answer(TOKENS), answer({"request_uri": "urn:x"}), Response(204, WITH_NONCE, b"", ISSUER)
    )
    one = server(transport)
    one.refresh(make_session(), NONE)
    one.exchange_code("code", "verifier", "http://127.0.0.1/", KEY, NONE)
    one.push({}, KEY, NONE)
    one.revoke(make_session(), NONE)
    bounds = [timeout for *_, timeout in transport.sent]
    assert bounds == pytest.approx([ANSWER_WITHIN, *[REPLY_WITHIN] * 3], abs=5.0)
    assert ANSWER_WITHIN == 120.0

    transport = Answering(answer(TOKENS), answer(TOKENS))
    one = server(transport, answer_within=7.0, reply_within=5.0)
    one.refresh(make_session(), NONE)
    one.exchange_code("code", "verifier", "http://127.0.0.1/", KEY, NONE)
    assert [timeout for *_, timeout in transport.sent] == pytest.approx([7.0, 5.0], abs=1.0)


# Answers without a nonce


def requests_of(one: AuthorizationServer) -> dict[str, Callable[[], object]]:
    return {
        "par": lambda: one.push({}, KEY, NONE),
        "code": lambda: one.exchange_code("code", "verifier", "http://127.0.0.1/", KEY, NONE),
        "refresh": lambda: one.refresh(make_session(), NONE),
    }


@pytest.mark.duty(28)
@pytest.mark.parametrize("what", ["par", "code", "refresh"])
@pytest.mark.parametrize("strict", [False, True])
def test_one_rule_for_answers_without_a_nonce(what: str, strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    good = answer({"request_uri": "urn:x"} if what == "par" else TOKENS, headers={})
    transport = Answering(good, good)
    ask = requests_of(server(transport, nonces=NonceCache(strict=strict)))[what]
    if strict and what != "refresh":
        with pytest.raises(TransportError, match="without a DPoP nonce") as caught:
            ask()
        assert not caught.value.retryable
        # Tokens that are not used are given back.
        assert [url for url, *_ in transport.sent][1:] == ([f"{ISSUER}/revoke"] if what == "code" else [])
    else:
        assert ask()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert ask()
        assert len(caplog.records) == 1


def test_a_refusal_without_a_nonce_is_the_refusal_that_it_is() -> None:
    error = error_of(answer({"error": "invalid_grant"}, 400, {}), nonces=NonceCache(strict=True))
    assert error.error == "invalid_grant"


# Tokens


@pytest.mark.parametrize("status", [302, 400, 500])
def test_tokens_are_tokens_whatever_status_they_come_with(status: int, caplog: pytest.LogCaptureFixture) -> None:
    tokens = server(Answering(answer(TOKENS, status))).refresh(make_session(), NONE)
    assert tokens.access_token == "new"
    assert f"status {status}" in caplog.text


def test_an_error_with_something_like_a_token_is_an_error() -> None:
    assert error_of(answer({"access_token": "x", "error": "server_error"}, 500)).error == "server_error"


@pytest.mark.parametrize("lifetime", ["60", 60, 60.0])
def test_a_lifetime_in_any_form(lifetime: object) -> None:
    tokens = server(Answering(answer({**TOKENS, "expires_in": lifetime})), clock=lambda: 1000.0).refresh(
        make_session(), NONE
    )
    assert tokens.expires_at is not None
    assert tokens.expires_at.timestamp() == 1060.0


# What errors say


@pytest.mark.parametrize(
    ("document", "error", "description"),
    [
        ({"error": "ExpiredToken", "message": "Token has expired"}, "ExpiredToken", "Token has expired"),
        ({"error": "InvalidRequest", "message": ""}, "InvalidRequest", None),
        ({"error": "x", "error_description": "this", "message": "that"}, "x", "this"),
        ({"error": 5}, None, None),
        ([], None, None),
    ],
)
def test_errors_that_are_not_oauths_can_be_judged(document: object, error: str | None, description: str | None) -> None:
    caught = error_of(answer(document, 400))
    assert (caught.error, caught.error_description) == (error, description)
    assert str(error or "no OAuth error") in str(caught)
    assert not caught.retryable


UNOBTAINED = 'Unable to obtain client metadata for "https://app.example.com/client-metadata.json"'


@pytest.mark.parametrize(
    ("description", "retryable"),
    [
        (UNOBTAINED, True),
        (f"{UNOBTAINED}: Connection refused", True),
        (f"{UNOBTAINED}: Bad Gateway", True),
        (f"{UNOBTAINED}: Service Unavailable", True),
        (f"{UNOBTAINED}: TLS error", True),
        ('Unable to obtain jwks from "https://a.example/jwks" for "https://a.example/c": Connection error', True),
        (f"{UNOBTAINED}: Invalid hostname", False),
        (f"{UNOBTAINED}: unexpected redirect", False),
        (f"{UNOBTAINED}: Not Found", False),
        (f"{UNOBTAINED}: Unexpected response Content-Type (text/html)", False),
        (f'{UNOBTAINED}: Validation of "scope" failed with error: Invalid', False),
        ("client_id does not match", False),
        (None, False),
    ],
)
def test_client_metadata_that_the_server_could_not_fetch_may_be_there_later(
    description: str | None, retryable: bool
) -> None:
    """In the reference server's words."""
    error = error_of(answer({"error": "invalid_client_metadata", "error_description": description}, 400))
    assert error.retryable is retryable
    assert description is None or description in str(error)


def test_the_clock_is_named_where_it_is_wrong() -> None:
    def refused(seconds: float, document: Mapping[str, str], **headers: str) -> str:
        now = 1_800_000_000.0
        date = {"Date": email.utils.formatdate(now + seconds, usegmt=True)}
        return str(error_of(answer(document, 401, {**WITH_NONCE, **date, **headers}), clock=lambda: now))

    proof = {"error": "invalid_dpop_proof", "error_description": 'Failed to verify DPoP proof: "iat" claim'}
    assertion = {"error": "invalid_client", "error_description": '"exp" claim timestamp check failed'}
    for document in (proof, assertion):
        assert "clock of this machine is 300 s behind the server's" in refused(300, document)
        assert "clock of this machine is 300 s ahead of the server's" in refused(-300, document)
        assert "clock" not in refused(2, document)
        assert "clock" not in refused(300, document, Date="yesterday")
    assert "ahead" in refused(-300, proof, Date=time.strftime("%a, %d %b 2020 10:00:00 -0000"))
    assert "machine" not in refused(300, {"error": "invalid_grant", "error_description": "Refresh token expired"})
    assert "machine" not in refused(300, {"error": "invalid_client", "error_description": "unknown key"})


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "120"}, 120.0),
        (429, {"Retry-After": " 1.5 "}, 1.5),
        (503, {"Retry-After": "120"}, 120.0),
        (429, {"Retry-After": "-5"}, 0.0),
        (429, {"Retry-After": "1" * 5000}, 21600.0),
        (429, {"Retry-After": "inf"}, 21600.0),
        (429, {"Retry-After": "nan"}, None),
        (429, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, 21600.0),
        (429, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0.0),
        (429, {"Retry-After": "Fri, 99 Dec 99999 23:59:59 GMT"}, None),
        (429, {"Retry-After": "soon"}, None),
        (429, {"Retry-After": ""}, None),
        (429, {}, None),
        (429, {"RateLimit-Reset": "30"}, 30.0),
        (429, {"X-RateLimit-Reset": "30"}, 30.0),
        (429, {"RateLimit-Reset": "1000000001"}, 0.0),
        (429, {"RateLimit-Reset": "soon"}, None),
        (429, {"Retry-After": "5", "RateLimit-Reset": "30"}, 5.0),
        (400, {"RateLimit-Reset": "30"}, None),
    ],
)
def test_how_long_a_server_wants_to_be_left_alone(
    status: int, headers: Mapping[str, str], seconds: float | None
) -> None:
    assert retry_after(status, headers) == seconds


def test_a_moment_of_the_future_as_bluesky_sends_it() -> None:
    assert retry_after(429, {"RateLimit-Reset": str(int(time.time()) + 300)}) == pytest.approx(300.0, abs=20.0)
    later = email.utils.formatdate(time.time() + 300, usegmt=True)
    assert retry_after(429, {"Retry-After": later}) == pytest.approx(300.0, abs=20.0)
    assert error_of(answer({}, 429, {"RateLimit-Reset": "30"})).retry_after == 30.0


# Secrets

SECRET = "ref-Zm9v+YmFy/QUJD=Rw_x-y.z~1234567890"


def unicode_escaped(text: str) -> str:
    return "".join(f"\\u{ord(letter):04X}" for letter in text)


ENCODINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "for a URL": lambda text: quote(text, safe=""),
    "for a form": quote_plus,
    "for a URL, in lower case": lambda text: quote(text, safe="").replace("%2B", "%2b").replace("%2F", "%2f"),
    "for a URL, twice": lambda text: quote(quote(text, safe="")),
    "every letter for a URL": lambda text: "".join(f"%{ord(letter):02x}" for letter in text),
    "for JSON": lambda text: json.dumps(text).replace("/", "\\/"),
    "every letter for JSON": unicode_escaped,
    "for JSON in JSON": lambda text: json.dumps(json.dumps(text).replace("/", "\\/")),
    "for HTML": lambda text: html.escape(text).replace("+", "&#43;").replace("/", "&#x2F;"),
    "the beginning": lambda text: text[:20],
    "the end": lambda text: text[-20:],
    "in a sentence": lambda text: f"the token {text} is not known, {text!r}",
}


def telling_parts(secret: str) -> set[str]:
    return {secret[start : start + 12] for start in range(len(secret) - 11)}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_was_sent_is_masked_however_it_comes_back(encoding: str) -> None:
    shown = masked(f"Token {ENCODINGS[encoding](SECRET)} is unknown", [SECRET])
    assert "***" in shown
    assert not any(part in shown for part in telling_parts(SECRET))
    assert shown.startswith("Token ")
    assert shown.endswith(" is unknown")


def test_what_is_no_secret_is_not_masked() -> None:
    text = 'Validation of "client_assertion" failed: 100% of it, C:\\new &amp; old'
    assert masked(text, [SECRET, "abc", ""]) == text
    assert masked("the code is code-1", ["code-1"]) == "the code is ***"


KEYSET = Keyset([generate_jwk() | {"kid": "k"}])
CONFIDENTIAL = ClientMetadata(
    client_id="https://app.example.com/client-metadata.json",
    redirect_uris=["https://app.example.com/callback"],
    token_endpoint_auth_method="private_key_jwt",
)


@pytest.mark.parametrize("encoding", ["as it is", "for a URL", "for JSON"])
@pytest.mark.parametrize("member", ["error", "error_description", "message"])
def test_no_echo_reaches_message_attribute_or_log(member: str, encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    """All that is sent, and too long for the message as a whole."""
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []

    def echo(form: Mapping[str, str], headers: Mapping[str, str]) -> Response:
        secrets = [form[name] for name in form if name in SENT] + [headers["DPoP"]]
        seen.extend(secrets)
        said = "x" * 90 + " ".join(ENCODINGS[encoding](secret) for secret in secrets)
        return answer({"error": "invalid_request", member: said}, 400)

    transport = Answering(*[echo] * 4)
    one = AuthorizationServer(METADATA, CONFIDENTIAL, KEYSET, transport, NonceCache())
    method = ClientAuthMethod("private_key_jwt", "k")
    session = make_session()
    session = replace(session, token_set=replace(session.token_set, refresh_token=SECRET))
    for ask in (
        lambda: one.refresh(session, method),
        lambda: one.exchange_code(SECRET, SECRET[::-1], "https://app.example.com/callback", KEY, method),
        lambda: one.push({"state": SECRET}, KEY, method),
        lambda: one.revoke(session, method),
    ):
        with pytest.raises(OAuthResponseError) as caught:
            ask()
        error = caught.value
        shown = f"{error!r} {error.error} {error.error_description} {caplog.text}"
        assert not any(part in shown for secret in seen for part in telling_parts(secret))
    assert SECRET in seen


SENT = {"code", "code_verifier", "refresh_token", "token", "client_assertion", "state"}


def test_the_assertion_is_among_what_is_sent() -> None:
    params = authentication_params(ClientAuthMethod("private_key_jwt", "k"), CONFIDENTIAL, KEYSET, ISSUER)
    assert set(params) & SENT == {"client_assertion"}


def test_the_access_token_of_a_session_is_masked_too() -> None:
    session = make_session()
    token = session.token_set.access_token
    with pytest.raises(OAuthResponseError) as caught:
        server(Answering(answer({"error": "x", "error_description": f"not {token}"}, 400))).refresh(session, NONE)
    assert token not in str(caught.value)


# Who is asked before a refresh

PDS, NEW_PDS = "https://pds.example.com", "https://new.example.com"


class Together(Transport):
    """A directory and servers that answer when all of ``expected`` have been asked."""

    def __init__(self, pds: str, *expected: str) -> None:
        super().__init__()
        self._pds = pds
        self._expected = set(expected)
        self.asked: list[str] = []
        self.all_asked = threading.Event()
        self.dark: set[str] = set()

    def get_json(self, url: str, **options: Any) -> dict[str, Any]:
        self.asked.append(url)
        if self._expected <= set(self.asked):
            self.all_asked.set()
        assert self.all_asked.wait(SOON)
        if url in self.dark:
            raise TransportError("no answer")
        if url.startswith("https://plc."):
            service = {"id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": self._pds}
            return {"id": DID, "service": [service]}
        if url.endswith("oauth-protected-resource"):
            return {"resource": origin(url), "authorization_servers": [ISSUER]}
        return metadata(issuer=ISSUER)


def authority_over(transport: Transport) -> AccountAuthority:
    identities = IdentityResolver(transport, plc_directory="https://plc.example.com")
    client = ClientMetadata.loopback()
    return AccountAuthority(identities, Discovery(transport), transport, NonceCache(), client, None)


def resource(pds: str) -> str:
    return f"{pds}/.well-known/oauth-protected-resource"


DOCUMENT = f"https://plc.example.com/{DID}"
SERVER = f"{ISSUER}/.well-known/oauth-authorization-server"


def test_directory_pds_and_server_are_asked_side_by_side() -> None:
    """Each of them answers only when the others have been asked."""
    transport = Together(PDS, DOCUMENT, resource(PDS), SERVER)
    authority = authority_over(transport)
    session = make_session(token_set=make_tokens(iss=ISSUER, aud=PDS))
    authority.prepare(session)
    assert sorted(transport.asked) == sorted([DOCUMENT, resource(PDS), SERVER])
    transport.asked.clear()
    authority.prepare(session)
    assert sorted(transport.asked) == sorted([DOCUMENT, resource(PDS)]), "the server is known, the rest asked afresh"


def test_an_account_that_has_moved_is_not_judged_by_its_old_pds() -> None:
    transport = Together(NEW_PDS, DOCUMENT)
    transport.dark.add(resource(PDS))
    authority = authority_over(transport)
    session = make_session(token_set=make_tokens(iss=ISSUER, aud=PDS))
    authority.prepare(session)
    assert resource(NEW_PDS) in transport.asked


def test_a_pds_that_is_away_keeps_so_many_threads_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """When accounts have left it, nobody waits for it."""
    monkeypatch.setattr("atproto_session.server._MOST_ASIDE", 3)
    transport, away = Together(NEW_PDS, DOCUMENT), Gate()
    ask = transport.get_json

    def get_json(url: str, **options: Any) -> dict[str, Any]:
        if url == resource(PDS):
            away()
        return ask(url, **options)

    monkeypatch.setattr(transport, "get_json", get_json)
    authority = authority_over(transport)
    for _ in range(6):
        authority.prepare(make_session(token_set=make_tokens(iss=ISSUER, aud=PDS)))
    wait_until(lambda: len(authority._under_way) == 3)
    away.open()
    wait_until(lambda: not authority._under_way)


def test_what_the_pds_answers_counts_however_early_it_was_asked() -> None:
    transport = Together(PDS, DOCUMENT)
    authority = authority_over(transport)
    with pytest.raises(TokenRefreshError, match="now belongs to"):
        authority.prepare(make_session(token_set=make_tokens(iss="https://other.example.com", aud=PDS)))
    transport.dark.add(resource(PDS))
    with pytest.raises(DiscoveryError, match="no answer"):
        authority.prepare(make_session(token_set=make_tokens(iss=ISSUER, aud=PDS)))
