"""What scopes permit, as ``@atproto/oauth-scopes`` has it, which the PDS asks; and what a server grants."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from atproto_session import ClientMetadata, OAuthClient, OAuthResponseError, permissions
from atproto_session.testing.network import Account
from tests.pds.harness import Browser, RealPDS, ask_reference

from ..core import RESTLESS

POST = "repo:app.bsky.feed.post"

#: Values that are right somewhere, and such that are wrong everywhere or almost.
NSIDS = ["app.bsky.feed.post", "app.bsky.feed.like", "chat.bsky.convo.getLog", "com.example.calendar.event", "*"]
SERVICES = [
    "did:web:api.bsky.app#bsky_appview",
    "did:web:api.bsky.app%23bsky_appview",
    "did:plc:abcdefghijklmnopqrstuvwx#chat",
    "did:web:localhost%253A3000%23x",
    "did:web:api.example.com:8080%23x",
    "did:web:api.example.com%253A8080%23x",
    "did:web:127.0.0.1%23x",
    "did:web:1.2.3%23x",
    "did:web:api_x.example.com%23x/y?z",
    "did:key:z6Mk%23x",
    "did:web:api.bsky.app",
    "did:web:api.bsky.app%23",
    "did:web:api.bsky.app%23a%23b",
    "https://api.bsky.app",
    "*",
]
MEDIA = [
    "image/png",
    "image/*",
    "*/*",
    "video/mp4",
    "IMAGE/PNG",
    "image",
    "image/",
    "/png",
    "*/png",
    "image/p*",
    "a/b/c",
]
ODD = [
    "",
    "%",
    "%zz",
    "%E4",
    "a",
    "a.b",
    "app.bsky.feed.post ",
    "app..post",
    "app.bsky.9x",
    "-a.b.c",
    "%61.b.c",
    "é.b.c",
]
ACTIONS = ["create", "update", "delete", "read", "manage", "write", "*", ""]
ATTRIBUTES = ["email", "repo", "status", "handle", "*", "password"]
STATIC = [
    "atproto",
    "transition:generic",
    "transition:email",
    "transition:chat.bsky",
    "openid",
    "include:app.bsky.full",
]
NAMES = {
    "repo": {"collection": NSIDS, "action": ACTIONS},
    "rpc": {"lxm": NSIDS, "aud": SERVICES},
    "blob": {"accept": MEDIA},
    "account": {"attr": ATTRIBUTES, "action": ACTIONS},
    "identity": {"attr": ATTRIBUTES},
    "repository": {"collection": NSIDS},
}


def scope(draw: random.Random) -> str:
    if draw.random() < 0.1:
        return draw.choice(STATIC)
    resource = draw.choice(list(NAMES))
    parameters = NAMES[resource]

    def value(name: str) -> str:
        return draw.choice(ODD if draw.random() < 0.04 else parameters[name])

    first, *others = parameters
    text, query = resource, []
    if draw.random() < 0.7:
        text += f":{value(first)}"
    if draw.random() < (0.03 if ":" in text else 0.95):
        query += [f"{first}={value(first)}" for _ in range(draw.choice([1, 1, 2, 3]))]
    for name in others:
        needed = 0.9 if resource == "rpc" else 0.5
        if draw.random() < needed:
            query += [f"{name}={value(name)}" for _ in range(draw.choice([1, 1, 1, 2]) if name != "aud" else 1)]
    if draw.random() < 0.03:
        query.append(draw.choice(["x=y", "action", "aud=*", "=", "", "lxm=%2A", "collection=%2a", "?action=create"]))
    draw.shuffle(query)
    return (f"{text}?{'&'.join(query)}" if query or draw.random() < 0.02 else text).replace(" ", "+")


def test_what_is_granted_is_what_the_reference_permits(real_pds: RealPDS) -> None:
    draw = random.Random(15)
    questions = []
    for _ in range(6000):
        granted = [scope(draw) for _ in range(draw.randrange(1, 7))]
        # Half of the questions are near to what was granted.
        asked = draw.choice(granted).partition("&")[0] if draw.random() < 0.4 else scope(draw)
        questions.append({"granted": " ".join(granted), "scope": asked})
    theirs = ask_reference(questions=questions)["questions"]
    # What is no permission is asked by its name.
    named = [
        each["scope"] in each["granted"].split(" ") and each["scope"].startswith((*STATIC, "repository"))
        for each in questions
    ]
    ours = [permissions.permits(**each) for each in questions]
    differing = [
        (each, mine, yours)
        for each, mine, yours, name in zip(questions, ours, theirs, named, strict=True)
        if mine != (yours or name)
    ]
    assert differing[:20] == [], len(differing)
    assert sum(map(bool, theirs)) > 600


def permission(draw: random.Random) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "permission", "resource": draw.choice(["repo", "rpc", "rpc", "blob"])}
    names = [
        "com.example.calendar.event",
        "com.example.calendar.x.y",
        "com.example.calendar",
        "com.other.a",
        "*",
        "a",
        7,
    ]
    services = ["*", "did:web:api.example.com#calendar", None, ["*"], "x"]
    options: dict[str, list[Any]] = {
        "collection": [draw.choices(names[:3], k=2), [draw.choice(names)], "com.example.calendar.event", []],
        "lxm": [draw.choices(names[:3], k=2), [draw.choice(names)], None],
        "action": [["create"], ["create", "delete", "create"], ["write"], "create", ["update", "delete", "create"]],
        "aud": services,
        "inheritAud": [True, True, False, None],
        "accept": [["*/*"]],
    }
    wanted = {"repo": ["collection", "action"], "rpc": ["lxm", "aud", "inheritAud"]}.get(entry["resource"], ["accept"])
    for name in wanted:
        if draw.random() < (0.9 if name in ("collection", "lxm") else 0.5):
            entry[name] = draw.choice(options[name])
    if draw.random() < 0.05:
        entry["extra"] = "x"
    return entry


def test_permission_sets_are_expanded_as_the_reference_does(real_pds: RealPDS) -> None:
    draw = random.Random(16)
    includes = [
        "include:com.example.calendar.auth",
        "include:com.example.calendar.auth?aud=did:web:api.example.com%23calendar",
        "include?nsid=com.example.auth",
    ]
    sets: list[dict[str, Any]] = [
        {"include": draw.choice(includes), "permissions": [permission(draw) for _ in range(4)]} for _ in range(3000)
    ]
    ours = [permissions.expand(each["include"], {"permissions": each["permissions"]}) for each in sets]
    theirs = ask_reference(sets=sets, ours=ours)
    assert theirs["ours"] == ask_reference(ours=theirs["sets"])["ours"]
    assert sum(map(len, ours)) > 400


@pytest.fixture
def narrow(real_pds: RealPDS) -> Iterator[OAuthClient]:
    """A client that is registered for little, and for something that the server does not know."""
    metadata = ClientMetadata.loopback(f"atproto {POST}?action=create repo:app.bsky.feed.like new:thing")
    with OAuthClient(metadata, store="memory:", times=RESTLESS, **real_pds.client_options()) as client:
        yield client


def test_what_is_permitted_is_what_the_server_lets_through(
    browser: Browser, narrow: OAuthClient, pds_account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    session = narrow.callback(browser.authorize(narrow.authorize(pds_account.did), pds_account)).session
    warnings = [record.getMessage() for record in caplog.records if "did not grant" in record.getMessage()]
    assert warnings == [f"{session.token_info().iss} did not grant new:thing to {pds_account.did}"]
    info = session.token_info()
    assert not info.permits("new:thing")
    for action, method in (("create", "createRecord"), ("delete", "deleteRecord")):
        body = {"repo": session.did, "collection": "app.bsky.feed.post", "rkey": "3kzzzzzzzzz2a"}
        if action == "create":
            body |= {"record": {"text": "x", "createdAt": "2026-01-01T00:00:00Z"}}  # type: ignore[dict-item]
        answer = session.post(f"/xrpc/com.atproto.repo.{method}", json=body)
        assert answer.ok == info.permits(f"{POST}?action={action}"), answer.text
    assert not info.permits(POST)


def test_a_narrower_scope_may_be_asked_for_and_the_server_decides(
    browser: Browser, narrow: OAuthClient, pds_account: Account
) -> None:
    with pytest.raises(OAuthResponseError, match="is not declared in the client metadata") as caught:
        narrow.authorize(pds_account.did, scope="atproto repo:app.bsky.feed.like?action=delete")
    assert caught.value.error == "invalid_scope"
    url = narrow.authorize(pds_account.did, scope="atproto repo:app.bsky.feed.like")
    session = narrow.callback(browser.authorize(url, pds_account)).session
    assert session.token_info().permits("repo:app.bsky.feed.like?action=delete")
