"""Client metadata as the reference has them: the ids of loopback clients, and what authorization servers refuse."""

from __future__ import annotations

import random
from typing import Any

import pytest

from atproto_session.errors import ClientMetadataError
from atproto_session.keys import Keyset
from atproto_session.metadata import ClientMetadata
from tests.pds.harness import RealPDS, ask_reference

KEY = Keyset.generate(1).jwks()["keys"][0]
CLIENT_ID = "https://app.example.com/oauth/client-metadata.json"
CALLBACK = "https://app.example.com/callback"

BASE: dict[str, Any] = {
    "client_id": CLIENT_ID,
    "redirect_uris": [CALLBACK],
    "scope": "atproto transition:generic",
    "token_endpoint_auth_method": "none",
    "grant_types": ["authorization_code", "refresh_token"],
    "response_types": ["code"],
    "dpop_bound_access_tokens": True,
}
CONFIDENTIAL = BASE | {
    "token_endpoint_auth_method": "private_key_jwt",
    "token_endpoint_auth_signing_alg": "ES256",
    "jwks": {"keys": [KEY]},
}
NATIVE = BASE | {"application_type": "native"}
ABSENT = object()

PAGES: list[object] = [
    "https://app.example.com/",
    "https://app.example.com/oauth/#top",
    "https://other.example.org/x?y=z",
    "https://app.test/x",
    "https://printer.local/x",
    "https://localhost/x",
    "https://my_app.example.com/x",
    "HTTPS://app.example.com/",
    "http://app.example.com/",
    "http://127.0.0.1/",
    "https://192.0.2.1/",
    "https://u:p@app.example.com/",
    "data:,x",
    "",
    None,
    7,
]
#: Values that may stand for a member, good and bad.
VALUES: dict[str, list[object]] = {
    "redirect_uris": [
        [],
        [CALLBACK, CALLBACK],
        ["https://my_app.example.com/cb"],
        ["https://other.example.org/cb?x=y"],
        ["https://app.test/cb"],
        ["https://localhost/cb"],
        ["https://192.0.2.1/cb"],
        ["https://app.example.com:443/cb"],
        ["COM.example.app:/cb"],
        ["https://u:p@app.example.com/cb"],
        ["HTTPS://app.example.com/cb"],
        ["HTTP://127.0.0.1/cb"],
        ["http://127.0.0.1/cb", "http://[::1]:8080/"],
        ["http://localhost/cb"],
        ["http://app.example.com/cb"],
        ["com.example.app:/cb"],
        ["com.example.app://cb"],
        ["com.example.other:/cb"],
        ["myapp:/cb"],
        [None],
        CALLBACK,
        None,
    ],
    "scope": [
        "atproto",
        "atproto a atproto",
        "a",
        "",
        "atproto  a",
        "atproto \u00e4",
        "atproto transition:chat.bsky",
        None,
        ["atproto"],
    ],
    "application_type": ["web", "native", "browser", None],
    "token_endpoint_auth_method": ["none", "private_key_jwt", "client_secret_basic", None],
    "token_endpoint_auth_signing_alg": ["ES256", "RS256", None, ABSENT],
    "jwks": [
        {"keys": [KEY]},
        {"keys": [KEY | {"key_ops": ["sign"]}]},
        {"keys": [KEY | {"key_ops": ["verify"], "use": "sig"}]},
        {"keys": [KEY | {"key_ops": []}]},
        {"keys": [KEY | {"alg": "RS256"}]},
        {"keys": [KEY | {"alg": "ES256"}]},
        {"keys": [KEY | {"crv": "P-1"}]},
        {"keys": [{name: KEY[name] for name in KEY if name != "kid"}]},
        {"keys": [KEY | {"d": "AQAB"}]},
        {"keys": [KEY | {"x": ""}]},
        {"keys": [KEY, KEY]},
        {"keys": []},
        {},
        None,
        ABSENT,
    ],
    "jwks_uri": ["https://app.example.com/jwks.json", "http://app.example.com/jwks.json", None],
    "grant_types": [
        ["authorization_code"],
        ["refresh_token", "authorization_code"],
        ["refresh_token"],
        ["authorization_code", "authorization_code"],
        ["authorization_code", "implicit"],
        [],
        "authorization_code",
        None,
    ],
    "response_types": [["code", "none"], ["token"], ["code", "x"], [], "code", None],
    "dpop_bound_access_tokens": [False, "true", None, ABSENT],
    "client_name": ["App", "", None, 7],
    **dict.fromkeys(("client_uri", "logo_uri", "tos_uri", "policy_uri"), PAGES),
    "client_id": [
        "https://app.example.com",
        "https://app.example.com/",
        "https://app.example.com/a/../b",
        "https://app.example.com/a#b",
        "https://u@app.example.com/a",
        "https://192.0.2.1/a",
        "https://app.example.com:8443/a",
        "https://App.example.com/a",
        "https://localhost/a",
        "https://app.test/a",
    ],
    "contacts": [["a@example.com"], ["a"], None, "a@example.com"],
    "subject_type": ["public", "pairwise", None],
    "default_max_age": [60, None],
    "id_token_signed_response_alg": ["ES256", None],
    "require_auth_time": [True, "yes", None],
    "tls_client_certificate_bound_access_tokens": [True, False, None],
    "authorization_details_types": [["a"], [], None],
    "software_id": ["x", None],
}

#: Why we refuse what the reference accepts: member, and what the message says. ``docs/security.rst`` gives the reasons.
STRICTER = [
    ("jwks", "authorization servers do not take the key"),
    ("jwks", "it holds a private key"),
    ("jwks", "every key needs a kid of its own"),
    ("jwks", "it is not a JWKS with at least one key"),
    ("token_endpoint_auth_signing_alg", "it must be ES256"),
    ("scope", "transition:chat.bsky needs transition:generic"),
    ("redirect_uris", "only on the origin of its client_id"),
    ("redirect_uris", "the port of https is left out where it is 443"),
    ("redirect_uris", "the scheme of a native client is that of its client_id"),
    ("client_id", "a host in lower case without a port"),
    (None, "does not name its host by a full name"),
    (None, "holds a user name or a password"),
    (None, "does not use https"),
]


def is_stricter(error: ClientMetadataError) -> bool:
    return any(field in (None, error.field) and text in str(error) for field, text in STRICTER)


def documents(count: int) -> list[dict[str, Any]]:
    draw = random.Random(20)
    made = []
    for _ in range(count):
        document = dict(draw.choice([BASE, CONFIDENTIAL, NATIVE]))
        for name in draw.sample(sorted(VALUES), draw.choice([1, 1, 2])):
            document[name] = draw.choice(VALUES[name])
        made.append({name: value for name, value in document.items() if value is not ABSENT})
    return made


def configurations(count: int) -> list[dict[str, Any]]:
    draw = random.Random(21)
    letters = "abcXYZ019-._~!$&'()*+,;=:@/?%20"
    made = []
    for _ in range(count):
        text = "".join(draw.choices(letters.replace("%20", ""), k=draw.randrange(12)))
        scopes = draw.sample(["a", "transition:generic", f"repo:*?x={text}", f"rpc:{text}z"], draw.randrange(4))
        scopes.insert(draw.randint(0, len(scopes)), "atproto")
        uris = [
            "http://127.0.0.1/",
            "http://[::1]/",
            f"http://127.0.0.1/{text}",
            f"http://[::1]:{draw.randrange(1, 65536)}/a?{text}%20",
        ]
        made.append({"scope": " ".join(scopes), "redirect_uris": draw.choices(uris, k=draw.randrange(1, 5))})
    return made


@pytest.mark.duty(22)
def test_loopback_client_ids_are_those_of_the_reference(real_pds: RealPDS) -> None:
    made = configurations(2000)
    theirs = ask_reference(ids=made)["ids"]
    assert [ClientMetadata.loopback(**configuration).client_id for configuration in made] == theirs


@pytest.mark.duty(18, 19, 20, 21)
def test_documents_are_judged_as_the_reference_does(real_pds: RealPDS) -> None:
    made = documents(4000)
    differing = []
    accepted = 0
    for document, theirs in zip(made, ask_reference(documents=made)["documents"], strict=True):
        try:
            ClientMetadata.from_document(document)
        except ClientMetadataError as error:
            if theirs is None and not is_stricter(error):
                differing.append((document, theirs, str(error)))
        else:
            accepted += 1
            if theirs is not None:
                differing.append((document, theirs, "accepted"))
    assert differing == []
    assert accepted > 500
