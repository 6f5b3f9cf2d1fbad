"""What scopes permit. That the reference is of the same opinion is in ``pds/test_permissions.py``."""

from __future__ import annotations

from typing import Any

import pytest

from atproto_session import TokenInfo
from atproto_session.permissions import expand, missing, permits

POST = "repo:app.bsky.feed.post"
FEED = "rpc:app.bsky.feed.getFeed"
VIEW = "did:web:api.bsky.app%23bsky_appview"


@pytest.mark.duty(44)
@pytest.mark.parametrize(
    ("granted", "asked"),
    [
        (POST, POST),
        (POST, f"{POST}?action=create"),
        (POST, f"{POST}?action=delete&action=create"),
        (f"{POST}?action=create {POST}?action=update&action=delete", POST),
        ("repo:*", POST),
        ("repo:*?action=create", f"{POST}?action=create"),
        ("repo?collection=app.bsky.feed.like&collection=app.bsky.feed.post", POST),
        ("repo?action=create&collection=*", "repo?collection=app.bsky.feed.like&action=create"),
        ("repo:%61pp.bsky.feed.post", POST),
        (f"{FEED}?aud={VIEW}", f"{FEED}?aud=did:web:api.bsky.app#bsky_appview"),
        (f"{FEED}?aud=*", f"{FEED}?aud={VIEW}"),
        (f"rpc:*?aud={VIEW}", f"{FEED}?aud={VIEW}"),
        ("rpc:a.b.c?aud=did:web:192.0.2.1%23x", "rpc:a.b.c?aud=did:web:192.0.2.1%23x"),
        ("blob:image/*", "blob:image/png"),
        ("blob:*/*", "blob:image/*"),
        ("blob?accept=video/mp4&accept=image/*", "blob?accept=image/png&accept=image/gif"),
        ("account:email", "account?attr=email&action=read"),
        ("account:email?action=manage", "account:email"),
        ("identity:*", "identity:handle"),
        ("transition:generic", f"{POST} blob:*/* {FEED}?aud=*"),
        ("transition:generic", f"rpc:*?aud={VIEW}"),
        ("transition:chat.bsky", "rpc:chat.bsky.convo.getLog?aud=*"),
        ("transition:email", "account:email"),
        ("atproto transition:email", " atproto  transition:email "),
        ("include:app.bsky.full", "include?nsid=app.bsky.full"),
        ("new:thing", "new:thing"),
    ],
)
def test_what_is_granted_is_permitted(granted: str, asked: str) -> None:
    assert TokenInfo(None, None, f"atproto {granted} include:app.bsky.x?aud=*", "", "", "").permits(asked)


@pytest.mark.parametrize(
    ("granted", "asked"),
    [
        (f"{POST}?action=create", POST),
        (f"{POST}?action=create", f"{POST}?action=update"),
        (POST, "repo:app.bsky.feed.like"),
        (POST, "repo:*"),
        ("repo:app.bsky.feed.*", POST),
        ("repo:app.bsky.feed", "repo:app.bsky.feed.post"),
        (f"{FEED}?aud={VIEW}", f"{FEED}?aud=*"),
        (FEED, FEED),
        (f"{FEED}?aud={VIEW}", f"{FEED}?aud=did:web:api.bsky.app"),
        (f"{FEED}?aud={VIEW}&aud={VIEW}", f"{FEED}?aud={VIEW}"),
        ("rpc:*?aud=*", f"{FEED}?aud={VIEW}"),
        ("rpc:a.b.c?aud=did:web:1.2.3.999%23x", "rpc:a.b.c?aud=did:web:1.2.3.999%23x"),
        ("blob:image/png", "blob:image/*"),
        ("blob:image/png", "blob:IMAGE/PNG"),
        ("blob", "blob:image/png"),
        ("account:email", "account:email?action=manage"),
        ("account:email", "account:status"),
        ("identity:handle", "identity:*"),
        ("transition:generic", "rpc:chat.bsky.convo.getLog?aud=*"),
        ("transition:generic", "account:email"),
        ("transition:generic", "identity:handle"),
        ("transition:email", "account:email?action=read&action=manage"),
        ("include:app.bsky.full", POST),
        ("include:app.bsky.full", f"include:app.bsky.full?aud={VIEW}"),
        ("atproto", "transition:generic"),
        (f"{POST}?action=write", f"{POST}?action=write"),
        (f"{POST}?x=y", f"{POST}?x=y"),
        ("repo:app.bsky.feed.post?collection=app.bsky.feed.like", "repo:app.bsky.feed.like"),
        ("repo:%zz", "repo:%zz"),
        ("repo:%E4", "repo:%E4"),
        (f"repo:{'a.' * 160}b", f"repo:{'a.' * 160}b"),
        ("repo", "repo"),
        (POST, f"{POST} identity:handle"),
        (POST, ""),
        ("", POST),
    ],
)
def test_what_is_not_granted_is_not_permitted(granted: str, asked: str) -> None:
    assert not permits(granted, asked)


@pytest.mark.parametrize("asked", [None, b"atproto", ["atproto"], 7])
def test_a_question_is_a_string(asked: Any) -> None:
    with pytest.raises(TypeError, match="scope is a string, such as 'repo:"):
        TokenInfo(None, None, "atproto", "", "", "").permits(asked)


def test_what_was_not_granted_is_known() -> None:
    asked = f"atproto {POST} blob:image/png include:com.example.auth new:thing repo:odd"
    assert missing(asked, asked) == []
    assert missing("atproto repo:* blob:*/* new:thing repo:odd", asked) == ["include:com.example.auth"]
    assert missing("atproto", asked) == asked.split()[1:]
    assert missing(f"rpc:com.example.x?aud={VIEW} {POST}", "include:com.example.auth include:org.example.auth") == [
        "include:org.example.auth"
    ]


def test_a_permission_set_is_expanded() -> None:
    event, view = "com.example.calendar.event", "did:web:api.example.com#calendar"
    permissions = [
        {"type": "permission", "resource": "repo", "collection": [event, event], "action": ["create", "delete"]},
        {"resource": "repo", "collection": [event, "com.example.calendar.day"]},
        {"resource": "rpc", "lxm": [event], "inheritAud": True},
        {"resource": "rpc", "lxm": [event], "aud": "*"},
        {"resource": "rpc", "lxm": [event], "aud": view},
        {"resource": "repo", "collection": ["com.example.other"]},
        {"resource": "repo", "collection": ["*"]},
        {"resource": "repo", "collection": []},
        {"resource": "repo", "collection": event},
        {"resource": "repo", "collection": [7]},
        {"resource": "repo", "collection": [event], "x": "y"},
        {"resource": "blob", "accept": ["*/*"]},
    ]
    include = f"include:com.example.calendar.auth?aud={view.replace('#', '%23')}"
    expanded = expand(include, {"type": "permission-set", "permissions": permissions})
    assert expanded == [
        f"repo:{event}?action=create&action=delete",
        f"repo?collection={event}&collection=com.example.calendar.day",
        f"rpc:{event}?aud=did:web:api.example.com%23calendar",
        f"rpc:{event}?aud=*",
    ]
    assert permits(" ".join(expanded), " ".join(expanded))
    assert expand("include:com.example.calendar.auth", {"permissions": permissions[2:4]}) == [f"rpc:{event}?aud=*"]


@pytest.mark.parametrize(
    ("include", "permission_set"),
    [
        ("repo:a.b.c", {"permissions": []}),
        ("include:a", {"permissions": []}),
        (None, {"permissions": []}),
        ("include:a.b.c", None),
        ("include:a.b.c", {}),
        ("include:a.b.c", {"permissions": ["repo"]}),
    ],
)
def test_what_is_no_permission_set_is_an_error(include: Any, permission_set: Any) -> None:
    with pytest.raises(ValueError, match="is no"):
        expand(include, permission_set)
