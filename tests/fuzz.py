"""Hostile input to everything that parses: ``python -m tests.fuzz`` tries many thousands, the tests some hundreds.

Each target takes one input and may raise what it documents, and nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from atproto_session import ClientMetadata, Keyset, MemoryStore, OAuthCallbackError, OAuthClient, SessionError
from atproto_session._urls import check_url, origin
from atproto_session.discovery import parse_server_metadata
from atproto_session.dpop import Answer, NonceCache, challenge_errors
from atproto_session.identity import check_did, check_handle, parse_account, parse_did_document
from atproto_session.keys import generate_jwk, load_private_key, public_jwk, thumbprint
from atproto_session.metadata import is_subset, parse_scope
from atproto_session.permissions import expand, missing, permits
from atproto_session.server import AuthorizationServer
from atproto_session.session import ClientAuthMethod, from_document, to_document
from atproto_session.stores.codec import Codec
from atproto_session.transport import Response, Transport

from .core import DID, make_session

ISSUER = "https://issuer.example.com"
SERVER_METADATA: dict[str, Any] = {
    "issuer": ISSUER,
    "authorization_endpoint": f"{ISSUER}/authorize",
    "token_endpoint": f"{ISSUER}/token",
    "pushed_authorization_request_endpoint": f"{ISSUER}/par",
    "revocation_endpoint": f"{ISSUER}/revoke",
    "response_types_supported": ["code"],
    "grant_types_supported": ["authorization_code", "refresh_token"],
    "code_challenge_methods_supported": ["S256"],
    "token_endpoint_auth_methods_supported": ["none", "private_key_jwt"],
    "token_endpoint_auth_signing_alg_values_supported": ["ES256"],
    "scopes_supported": ["atproto", "transition:generic"],
    "authorization_response_iss_parameter_supported": True,
    "require_pushed_authorization_requests": True,
    "client_id_metadata_document_supported": True,
    "dpop_signing_alg_values_supported": ["ES256"],
}
DID_DOCUMENT: dict[str, Any] = {
    "@context": ["https://www.w3.org/ns/did/v1"],
    "id": DID,
    "alsoKnownAs": ["at://alice.example.com"],
    "service": [
        {"id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": "https://pds.example.com"}
    ],
}
TOKEN_RESPONSE: dict[str, Any] = {
    "access_token": "access",
    "refresh_token": "refresh",
    "token_type": "DPoP",
    "scope": "atproto",
    "sub": DID,
    "expires_in": 3600,
}
JWK = generate_jwk()

# Inputs

SURPRISES: st.SearchStrategy[Any] = st.sampled_from(
    [
        None, True, -1, 0, 1e308, 10**400, "", " ", "\x00", "\u202e", "\ud800", "a" * 3000, "é", "null", [], {}, [[]],
        "https://127.0.0.1/", "http://issuer.example.com", "https://user:pass@example.com/", "https://[::1]/",
        "https://169.254.169.254/latest", "file:///etc/passwd", "https://example.com\\@evil.example.org/", "//x",
        "did:plc:", "did:web:localhost%3A80", "at://", "javascript:alert(1)", "1970-13-45T99:99:99Z",
    ]
)  # fmt: skip
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40) | SURPRISES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, document: Mapping[str, Any]) -> Any:
    """A good document with some of it gone, replaced or added."""
    result: Any = copy.deepcopy(dict(document))
    for _ in range(draw(st.integers(0, 3))):
        place = result
        while True:
            names = list(place) if isinstance(place, dict) else list(range(len(place)))
            name = draw(st.sampled_from(names)) if names else None
            if name is None:
                break
            if isinstance(place[name], dict | list) and draw(st.booleans()):
                place = place[name]
                continue
            if draw(st.integers(0, 3)) == 0:
                del place[name]
            else:
                place[name] = draw(JSON)
            break
    return result


@st.composite
def damaged_text(draw: st.DrawFn, *texts: str) -> str:
    """A good text, cut and with something in the middle."""
    text = draw(st.sampled_from(texts))
    at, to = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
    return (
        text[:at]
        + draw(st.text(max_size=8) | st.sampled_from(["\n", "\r\n", ".", ":", "%00", "@", "/", "#"]))
        + text[to:]
    )


def encoded(documents: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """JSON as it goes over the wire, whole or not, or anything else."""
    whole = documents.map(lambda document: json.dumps(document).encode())
    return whole | whole.map(lambda data: data[: len(data) // 2]) | st.binary(max_size=60) | st.just(b"[" * 50_000)


# Targets


def check(error: Exception) -> None:
    """An error's message is for people, whatever it is about."""
    assert len(str(error)) < 1000
    assert str(error).isprintable()


class CannedTransport(Transport):
    """Answers every request with one response."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self._response = response

    def request(self, method: str, url: str, **options: Any) -> Response:
        return self._response


def token_response(given_: tuple[int, dict[str, str], bytes]) -> None:
    status, headers, body = given_
    transport = CannedTransport(Response(status, headers, body, f"{ISSUER}/token"))
    server = AuthorizationServer(
        parse_server_metadata(ISSUER, SERVER_METADATA), ClientMetadata.loopback(), None, transport, NonceCache()
    )
    method = ClientAuthMethod("none")
    for act in (
        lambda: server.refresh(make_session(), method),
        lambda: server.exchange_code("code", "verifier", "http://127.0.0.1/", JWK, method),
        lambda: server.push({}, JWK, method),
        lambda: server.revoke(make_session(), method),
    ):
        try:
            act()
        except SessionError as error:
            check(error)


CLIENT = OAuthClient(ClientMetadata.loopback(), store=MemoryStore())


def callback(params: Any) -> None:
    try:
        CLIENT.callback(params)
    except OAuthCallbackError as error:
        check(error)
        if "code" in error.params:
            raise AssertionError("a code in an error") from error


def allowing(*errors: type[Exception]) -> Callable[[Callable[[Any], object]], Callable[[Any], None]]:
    def decorate(act: Callable[[Any], object]) -> Callable[[Any], None]:
        def target(given_: Any) -> None:
            try:
                act(given_)
            except errors as error:
                check(error)

        return target

    return decorate


@dataclass(frozen=True)
class Target:
    inputs: st.SearchStrategy[Any]
    act: Callable[[Any], object]


HEADERS = st.dictionaries(
    st.sampled_from(["Content-Type", "WWW-Authenticate", "DPoP-Nonce", "Retry-After"]),
    st.sampled_from(
        ["application/json", "application/json; charset=utf-8", "text/html", "120", "Fri, 31 Dec 9999 23:59:59 GMT"]
    )
    | st.text(max_size=60),
)
SESSION_DOCUMENT = to_document(DID, make_session())
CODEC = Codec()
PERMISSION_SET = {
    "permissions": [
        {"resource": "repo", "collection": ["com.example.event"], "action": ["create"]},
        {"resource": "rpc", "lxm": ["com.example.getEvent"], "aud": "*", "inheritAud": True},
    ]
}

TARGETS: dict[str, Target] = {
    "handles": Target(
        st.text(max_size=300) | damaged_text("alice.example.com", "a.test"),
        allowing(SessionError)(lambda text: (parse_account(text), check_handle(text))),
    ),
    "DIDs": Target(st.text(max_size=300) | damaged_text(DID, "did:web:example.com"), allowing(SessionError)(check_did)),
    "DID documents": Target(
        JSON | damaged(DID_DOCUMENT), allowing(SessionError)(lambda document: parse_did_document(DID, document))
    ),
    "server metadata": Target(
        JSON | damaged(SERVER_METADATA),
        allowing(SessionError)(lambda document: parse_server_metadata(ISSUER, document)),
    ),
    "token responses": Target(
        st.tuples(
            st.sampled_from([200, 201, 302, 400, 401, 429, 500]), HEADERS, encoded(JSON | damaged(TOKEN_RESPONSE))
        ),
        token_response,
    ),
    "challenges": Target(
        st.text(max_size=400) | damaged_text('DPoP algs="ES256", error="invalid_token", error_description="x"'),
        lambda text: (challenge_errors({"WWW-Authenticate": text}), Answer.of(401, {"WWW-Authenticate": text}, b"")),
    ),
    "callbacks": Target(
        st.dictionaries(
            st.sampled_from(["state", "iss", "code", "error", "error_description", "response"]) | st.text(max_size=8),
            st.text(max_size=40) | st.lists(st.text(max_size=8), max_size=3) | JSON,
            max_size=7,
        )
        | st.text(max_size=200)
        | damaged_text("http://127.0.0.1/?state=a&iss=b&code=c"),
        callback,
    ),
    "stored documents": Target(
        JSON | damaged(SESSION_DOCUMENT), allowing(ValueError)(lambda document: from_document(DID, document))
    ),
    "stored records": Target(
        encoded(JSON | damaged(SESSION_DOCUMENT)), allowing(SessionError)(lambda data: CODEC.decode(DID, data))
    ),
    "keys": Target(
        damaged(JWK),
        lambda jwk: [allowing(ValueError)(act)(jwk) for act in (load_private_key, public_jwk, thumbprint)],
    ),
    "keysets": Target(
        JSON.map(json.dumps) | damaged({"keys": [JWK | {"kid": "a"}]}).map(json.dumps) | st.text(max_size=80),
        allowing(SessionError)(Keyset.from_jwks),
    ),
    "client metadata": Target(
        damaged(ClientMetadata.loopback().document()), allowing(SessionError)(ClientMetadata.from_document)
    ),
    "URLs": Target(
        JSON | damaged_text("https://pds.example.com:8443/xrpc?a=b", "https://a.b/"),
        lambda url: (allowing(ValueError)(check_url)(url), allowing(ValueError)(origin)(str(url))),
    ),
    "scopes": Target(
        st.text(max_size=200) | damaged_text("atproto transition:generic repo:*?action=create"),
        lambda text: (allowing(ValueError)(parse_scope)(text), allowing(ValueError)(lambda t: is_subset(t, t))(text)),
    ),
    "granted scopes": Target(
        st.text(max_size=200)
        | damaged_text("repo?collection=a.b.c&action=create rpc:a.b.c?aud=did:web:a.com%23x blob:*/*"),
        lambda text: (
            permits(text, text),
            permits("transition:generic", text),
            missing(text, text),
            missing(text, "repo:*"),
        ),
    ),
    "permission sets": Target(
        JSON | damaged(PERMISSION_SET),
        allowing(ValueError)(lambda document: expand("include:com.example.auth", document)),
    ),
}


def attack(target: Target, examples: int, seed: int | None = None) -> int:
    """Try ``examples`` inputs and return how many were tried."""
    tried = 0

    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=seed is None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(target.inputs)
    def run(given_: Any) -> None:
        nonlocal tried
        tried += 1
        target.act(given_)

    if seed is not None:
        import hypothesis

        run = hypothesis.seed(seed)(run)
    run()
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=8000, help="inputs for each of the targets")
    parser.add_argument("--seed", type=int, default=None, help="by default another one each time")
    options = parser.parse_args()
    seed = time.time_ns() % 2**32 if options.seed is None else options.seed
    total = 0
    for name, target in TARGETS.items():
        started = time.perf_counter()
        tried = attack(target, options.examples, seed)
        total += tried
        print(f"{name:18} {tried:7} inputs  {time.perf_counter() - started:6.1f} s", flush=True)
    print(f"{'all':18} {total:7} inputs, no surprise (seed {seed})")


if __name__ == "__main__":
    main()
