"""The records and the document that they are stored as."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atproto_session.session import (
    Attempt,
    ClientAuthMethod,
    Freshness,
    Rest,
    Session,
    SessionDeletedEvent,
    SessionUpdatedEvent,
    TokenSet,
    fault_in,
    from_document,
    subject_of,
    to_document,
)

DID = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
SECRET = "secret-value"
KEY = {"kty": "EC", "crv": "P-256", "x": "x-1", "y": "y-1", "d": SECRET}
TOKENS = TokenSet(
    iss="https://issuer.example.com",
    sub=DID,
    aud="https://pds.example.com",
    scope="atproto",
    refresh_token=f"refresh-{SECRET}",
    access_token=f"access-{SECRET}",
    expires_at=datetime(2030, 1, 2, 3, 4, 5, 678000, tzinfo=UTC),
)
SESSION = Session(KEY, ClientAuthMethod("private_key_jwt", "key-1"), TOKENS)

#: As @atproto/oauth-client-node writes it.
NODE_DOCUMENT = {
    "dpopJwk": KEY,
    "authMethod": {"method": "private_key_jwt", "kid": "key-1"},
    "tokenSet": {
        "iss": "https://issuer.example.com",
        "sub": DID,
        "aud": "https://pds.example.com",
        "scope": "atproto",
        "refresh_token": f"refresh-{SECRET}",
        "access_token": f"access-{SECRET}",
        "token_type": "DPoP",
        "expires_at": "2030-01-02T03:04:05.678Z",
    },
}


# Records


def test_nothing_that_is_printed_shows_a_token_or_a_key() -> None:
    records = [
        SESSION,
        TOKENS,
        SessionUpdatedEvent(DID, KEY, None, TOKENS),
        SessionDeletedEvent(DID, ValueError("why")),
    ]
    for record in records:
        assert SECRET not in f"{record!r} {record} {[record]}"
        assert DID in repr(record)


def test_a_local_time_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        replace(TOKENS, expires_at=datetime(2030, 1, 1))


def test_the_same_tokens_and_the_same_grant() -> None:
    assert TOKENS.has_same_tokens(replace(TOKENS, scope="other", expires_at=None))
    assert not TOKENS.has_same_tokens(replace(TOKENS, access_token="other"))
    assert not TOKENS.has_same_tokens(replace(TOKENS, refresh_token=None))
    assert SESSION.is_same_grant(replace(SESSION, dpop_key={**KEY, "kid": "named", "d": "?"}))
    assert not SESSION.is_same_grant(replace(SESSION, dpop_key={**KEY, "x": "x-2"}))


@pytest.mark.parametrize(
    ("left", "drawn", "stale", "expired"),
    [
        (-1.0, 0.0, True, True),
        (0.0, 0.0, True, True),
        (9.9, 0.0, True, False),
        (10.0, 0.0, False, False),
        (10.0, 0.001, True, False),
        (25.0, 0.49, False, False),
        (25.0, 0.51, True, False),
        (40.0, 0.999, False, False),
        (3600.0, 0.999, False, False),
    ],
)
def test_stale_is_what_ends_within_the_margin_and_a_random_part(
    left: float, drawn: float, stale: bool, expired: bool
) -> None:
    now = 1_900_000_000.0
    freshness = Freshness(clock=lambda: now, random=lambda: drawn)
    tokens = replace(TOKENS, expires_at=datetime.fromtimestamp(now, UTC) + timedelta(seconds=left))
    assert freshness.is_stale(tokens) is stale
    assert freshness.is_expired(tokens) is expired


def test_without_a_time_of_expiry_nothing_is_ever_stale() -> None:
    tokens = replace(TOKENS, expires_at=None)
    assert not Freshness().is_stale(tokens)
    assert not Freshness().is_expired(tokens)


def test_the_key_of_a_session_cannot_be_changed() -> None:
    changes: list[Callable[[Any], object]] = [
        lambda key: key.pop("d"),
        lambda key: key.update(d=""),
        lambda key: key.__setitem__("d", ""),
        lambda key: key.__delitem__("d"),
    ]
    for change in changes:
        with pytest.raises(TypeError, match="cannot be changed") as caught:
            change(SESSION.dpop_key)
        assert SESSION.dpop_key["d"] not in str(caught.value)
    for copied in (pickle.loads(pickle.dumps(SESSION)), copy.deepcopy(SESSION), replace(SESSION)):
        assert copied == SESSION
    mine = {"kty": "EC", "d": "secret"}
    session = replace(SESSION, dpop_key=mine)
    mine.clear()
    assert session.dpop_key == {"kty": "EC", "d": "secret"}, "it is a copy"


def test_the_account_in_a_key() -> None:
    assert subject_of(DID) == DID
    assert subject_of(f"{DID}#work#1") == DID


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"token_type": "dpop", "scope": "transition:generic atproto"}, None),
        ({"sub": "did:plc:other"}, "another account"),
        ({"scope": "atproto:x notatproto"}, "without the scope atproto"),
        ({"token_type": "Bearer"}, "not bound to its key"),
        ({"access_token": "a\nb"}, "no header can carry"),
        ({"refresh_token": "a\udc80"}, "no header can carry"),
        ({"refresh_token": None}, None),
    ],
)
def test_what_is_wrong_with_issued_tokens(changes: dict[str, Any], fault: str | None) -> None:
    found = fault_in(replace(TOKENS, **changes), DID)
    assert (found is None) if fault is None else fault in str(found)


# The document


def test_the_document_is_the_one_of_the_node_client() -> None:
    document = to_document(DID, SESSION)
    own = document.pop("atprotoSession")
    assert document == NODE_DOCUMENT
    assert own == {"version": 1, "key": DID}
    assert from_document(DID, NODE_DOCUMENT) == SESSION


def test_the_document_of_everything() -> None:
    session = replace(
        SESSION,
        attempt=Attempt("a1", "host:1", 1.5, 2.5, answers_lost=3, lock="1:2", is_over=True),
        rest=Rest(4.5, 2, "OAuthResponseError", "503", {"status": 503, "error": None}),
        client_id="https://app.example.com/client.json",
        began_at=3.5,
        refreshed_at=5.5,
        after_lost_answer=True,
    )
    document = to_document(DID, session)
    assert document["atprotoSession"] == {
        "version": 1,
        "key": DID,
        "clientId": "https://app.example.com/client.json",
        "beganAt": 3.5,
        "refreshedAt": 5.5,
        "afterLostAnswer": True,
        "attempt": {
            "id": "a1",
            "by": "host:1",
            "startedAt": 1.5,
            "answerBy": 2.5,
            "answersLost": 3,
            "lock": "1:2",
            "isOver": True,
        },
        "rest": {
            "until": 4.5,
            "failures": 2,
            "error": "OAuthResponseError",
            "message": "503",
            "details": {"status": 503, "error": None},
        },
    }
    assert SECRET not in json.dumps(document["atprotoSession"])
    assert from_document(DID, document) == session


@pytest.mark.parametrize("method", [None, "legacy"])
def test_documents_from_before_the_method_was_recorded(method: str | None) -> None:
    document = {**NODE_DOCUMENT, "authMethod": method}
    assert from_document(DID, document).auth_method is None
    assert "authMethod" not in to_document(DID, replace(SESSION, auth_method=None))


def test_a_public_client() -> None:
    session = replace(SESSION, auth_method=ClientAuthMethod("none"))
    assert to_document(DID, session)["authMethod"] == {"method": "none"}
    assert from_document(DID, to_document(DID, session)) == session


@pytest.mark.parametrize(
    "text",
    [
        "2030-01-02T03:04:05.678Z",
        "2030-01-02T03:04:05.678+00:00",
        "2030-01-02T03:04:05.678",
        "2030-01-02T05:04:05.678+02:00",
    ],
)
def test_times_of_expiry_are_read_in_every_zone(text: str) -> None:
    document = {**NODE_DOCUMENT, "tokenSet": {**NODE_DOCUMENT["tokenSet"], "expires_at": text}}
    assert from_document(DID, document) == SESSION


def test_times_of_expiry_are_written_in_utc() -> None:
    assert TOKENS.expires_at is not None
    there = TOKENS.expires_at.astimezone(timezone(timedelta(hours=-9)))
    document = to_document(DID, replace(SESSION, token_set=replace(TOKENS, expires_at=there)))
    assert document["tokenSet"]["expires_at"] == "2030-01-02T03:04:05.678Z"


def changed(path: str, value: object) -> dict[str, Any]:
    """The document with one member set, or taken out."""
    document = copy.deepcopy(
        to_document(
            DID, replace(SESSION, attempt=Attempt("a1", "host:1", 1.0, 2.0), rest=Rest(1.0, 1, "StoreError", "?"))
        )
    )
    *parents, name = path.split(".")
    members = document
    for parent in parents:
        members = members[parent]
    if value is GONE:
        del members[name]
    else:
        members[name] = value
    return document


GONE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dpopJwk", GONE, "dpopJwk is not a JSON object"),
        ("dpopJwk", SECRET, "dpopJwk is not a JSON object"),
        ("tokenSet", GONE, "tokenSet is not a JSON object"),
        ("tokenSet", [SECRET], "tokenSet is not a JSON object"),
        ("tokenSet.iss", GONE, "iss is missing"),
        ("tokenSet.sub", 12, "sub is missing or not a string"),
        ("tokenSet.aud", "", "aud is missing"),
        ("tokenSet.scope", None, "scope is missing"),
        ("tokenSet.token_type", GONE, "token_type is missing"),
        ("tokenSet.access_token", GONE, "access_token is missing"),
        ("tokenSet.access_token", [SECRET], "access_token is missing or not a string"),
        ("tokenSet.refresh_token", "", "refresh_token is missing"),
        ("tokenSet.refresh_token", f"{SECRET}\n", "refresh_token has characters that no token has"),
        ("tokenSet.access_token", f"{SECRET}\udc80", "access_token has characters that no token has"),
        ("tokenSet.expires_at", SECRET, "expires_at is not a date"),
        ("tokenSet.expires_at", 1900000000, "expires_at is not a date"),
        ("tokenSet.expires_at", "9999-12-31T23:59:59-23:00", "expires_at is not a date"),
        ("authMethod", SECRET, "authMethod is not a JSON object"),
        ("authMethod.method", SECRET, "authMethod names no method"),
        ("authMethod.kid", GONE, "kid is missing"),
        ("atprotoSession", SECRET, "atprotoSession is not a JSON object"),
        ("atprotoSession.version", 2, "later release"),
        ("atprotoSession.version", SECRET, "version is not a number"),
        ("atprotoSession.key", "did:plc:other", "another key"),
        ("atprotoSession.attempt", SECRET, "attempt is not a JSON object"),
        ("atprotoSession.attempt.id", GONE, "id is missing"),
        ("atprotoSession.attempt.by", "", "by is missing"),
        ("atprotoSession.attempt.lock", 1, "lock is missing or not a string"),
        ("atprotoSession.attempt.startedAt", True, "startedAt is not a number"),
        ("atprotoSession.refreshedAt", float("nan"), "refreshedAt is not a finite number"),
        ("atprotoSession.rest.until", float("inf"), "until is not a finite number"),
        ("atprotoSession.rest.until", 10**400, "until is not a finite number"),
    ],
)
def test_a_document_that_is_not_a_session_names_the_member_and_no_value(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_document(DID, changed(path, value))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("document", [None, [], "text", 1])
def test_what_is_no_document_at_all(document: object) -> None:
    with pytest.raises(ValueError, match="the document is not a JSON object"):
        from_document(DID, document)


def test_an_attempt_may_leave_its_times_out() -> None:
    document = changed("atprotoSession.attempt", {"id": "a1", "by": "host:1"})
    assert from_document(DID, document).attempt == Attempt("a1", "host:1", 0.0, 0.0, 0, "")


@pytest.mark.parametrize("member", ["refreshedAt", "attempt", "rest", "version", "key"])
def test_members_of_our_own_may_be_missing(member: str) -> None:
    document = changed("atprotoSession.refreshedAt", 1.0)
    document["atprotoSession"].pop(member, None)
    assert from_document(DID, document).token_set == TOKENS


texts = st.text(min_size=1)
tokens = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1)
numbers = st.floats(min_value=0, max_value=1e12)
times = st.datetimes(timezones=st.just(UTC)).map(lambda time: time.replace(microsecond=time.microsecond // 1000 * 1000))
sessions = st.builds(
    Session,
    dpop_key=st.dictionaries(texts, texts),
    auth_method=st.sampled_from([None, ClientAuthMethod("none")])
    | st.builds(ClientAuthMethod, st.just("private_key_jwt"), texts),
    token_set=st.builds(
        TokenSet,
        iss=texts,
        sub=texts,
        aud=texts,
        scope=texts,
        refresh_token=st.none() | tokens,
        access_token=tokens,
        token_type=texts,
        expires_at=st.none() | times,
    ),
    attempt=st.none() | st.builds(Attempt, texts, texts, numbers, numbers, st.integers(0, 1000)),
    rest=st.none() | st.builds(Rest, numbers, st.integers(0, 1000), st.text(min_size=1), st.text(min_size=1)),
    client_id=st.none() | st.text(min_size=1),
    began_at=st.none() | numbers,
    refreshed_at=st.none() | numbers,
)


@given(key=st.text(), session=sessions)
def test_every_session_comes_back(key: str, session: Session) -> None:
    assert from_document(key, json.loads(json.dumps(to_document(key, session)))) == session


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
paths = [
    "dpopJwk",
    "authMethod",
    "authMethod.method",
    "tokenSet",
    "tokenSet.expires_at",
    "tokenSet.scope",
    "atprotoSession",
    "atprotoSession.version",
    "atprotoSession.attempt",
    "atprotoSession.attempt.answersLost",
]


@given(path=st.sampled_from(paths), value=json_values)
def test_a_spoilt_document_is_a_session_or_a_value_error(path: str, value: object) -> None:
    with suppress(ValueError):
        assert isinstance(from_document(DID, changed(path, value)), Session)
