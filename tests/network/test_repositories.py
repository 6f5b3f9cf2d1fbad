"""What only the local network can show of records and blobs; the rest is in ``tests/pds/test_same_rules.py``."""

from __future__ import annotations

from typing import Any

import pytest

from atproto_session.testing.network import Account, LocalNetwork, MethodError, Request, Response
from atproto_session.testing.network.repositories import dag_cbor

from .raw import LoggedIn, error_of

CREATE = "/xrpc/com.atproto.repo.createRecord"


def post(alice: LoggedIn, path: str, **options: Any) -> tuple[int, str, str]:
    answer = alice.client.call(alice.client.issuer, path, alice.tokens.access, method="POST", **options)
    return answer.status_code, *error_of(answer)


@pytest.mark.parametrize("data", [b"nonsense", b"[]"])
def test_a_body_that_is_no_object_is_refused(alice: LoggedIn, data: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert post(alice, CREATE, data=data, headers=headers)[:2] == (400, "InvalidRequest")


def test_a_record_is_not_created_twice(alice: LoggedIn) -> None:
    body = {"repo": alice.account.did, "collection": "com.example.note", "rkey": "self", "record": {}}
    assert post(alice, CREATE, json=body)[0] == 200
    assert post(alice, CREATE, json=body)[:2] == (400, "InvalidRequest")


@pytest.mark.parametrize("value", [{"$link": "bad!"}, {"$link": 7}, {"$bytes": "a"}, 2**63, -(2**63) - 1])
def test_values_that_the_data_model_does_not_have_are_refused(alice: LoggedIn, value: object) -> None:
    body = {"repo": alice.account.did, "collection": "com.example.note", "record": {"value": value}}
    assert post(alice, CREATE, json=body) == (400, "InvalidRequest", "Bad record")


def test_a_blob_may_be_too_large_and_may_not_be_granted(network: LocalNetwork, alice: LoggedIn) -> None:
    path = "/xrpc/com.atproto.repo.uploadBlob"
    assert post(alice, path, data=bytes(5 * 1024 * 1024 + 1))[:2] == (413, "PayloadTooLarge")
    callback = network.authorize(alice.client.authorize_url(), alice.account, scope="atproto")
    code = callback.partition("code=")[2]
    tokens = alice.client.exchange(code).json()
    answer = alice.client.call(network.pds_url, path, tokens["access_token"], method="POST", data=b"x")
    assert error_of(answer) == ("ScopeMissingError", 'Missing required scope "blob:application/octet-stream"')


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (23, "17"),
        (24, "1818"),
        (2**63 - 1, "1b7fffffffffffffff"),
        (-(2**63), "3b7fffffffffffffff"),
        ({"bb": [], "a": None, "c": {"$bytes": "AQ"}}, "a36161f6616341016262" + "6280"),
        ("ä", "62c3a4"),
    ],
)
def test_dag_cbor_is_deterministic(value: object, encoded: str) -> None:
    assert dag_cbor(value).hex() == encoded


def test_methods_are_added(network: LocalNetwork, alice: LoggedIn) -> None:
    def get_timeline(request: Request, account: Account) -> object:
        if "bad" in request.parameters:
            raise MethodError("it is bad", "BadTimeline")
        if "teapot" in request.parameters:
            return Response.of_text("short and stout", 418)
        return {"feed": [], "of": account.handle}

    network.add_method("app.bsky.feed.getTimeline", get_timeline)
    network.add_method("com.example.write", lambda request, account: {"length": len(request.body)}, verb="POST")
    path = "/xrpc/app.bsky.feed.getTimeline"

    def get(path: str) -> tuple[int, object]:
        answer = alice.client.call(network.pds_url, path, alice.tokens.access)
        return answer.status_code, answer.json() if "json" in answer.headers["Content-Type"] else answer.text

    assert get(path) == (200, {"feed": [], "of": alice.account.handle})
    assert get(f"{path}?bad=1") == (400, {"error": "BadTimeline", "message": "it is bad"})
    assert get(f"{path}?teapot=1") == (418, "short and stout")
    wrong = "Incorrect HTTP method (POST) expected GET"
    assert post(alice, path) == (400, "InvalidRequest", wrong)
    answer = alice.client.call(
        network.pds_url, "/xrpc/com.example.write", alice.tokens.access, method="POST", data=b"four"
    )
    assert answer.json() == {"length": 4}
