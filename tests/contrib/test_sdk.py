"""The Python SDK over one of our sessions: signing, errors, ``me``, and what it does not do. Posts, pictures, likes and
profiles are in ``tests/pds/test_sdk.py``."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import atproto  # type: ignore[import-untyped]
import httpx
import pytest
from atproto import exceptions

from atproto_session import (
    LockTimeoutError,
    OAuthClient,
    OAuthSession,
    SessionError,
    SessionNotFoundError,
    StoreError,
    TransportError,
)
from atproto_session.contrib.sdk import Client, SessionEndedError
from atproto_session.testing.network import Account, LocalNetwork, Request, Response

from ..core import Worker
from ..scenes import ECHO, GET_SESSION, store_tokens, stored


@pytest.fixture
def sdk(session: OAuthSession) -> Client:
    return Client(session)


def handle_of(sdk: Client) -> Any:
    return sdk.com.atproto.server.get_session().handle


def profile_answer(network: LocalNetwork, status: int, **members: Any) -> Any:
    """What the next request is answered with."""
    return network.fault(
        "resource", "custom", respond=lambda request: Response.of_json(members, status).with_headers(DPoP_Nonce="any")
    )


# Calls


def test_calls_are_signed_and_refreshed(sdk: Client, network: LocalNetwork, account: Account) -> None:
    assert handle_of(sdk) == "alice.test"
    network.expire_access_tokens(account.did)
    workers = [Worker(lambda: handle_of(sdk)) for _ in range(8)]
    assert [worker.outcome() for worker in workers] == ["alice.test"] * 8
    assert (network.rotations, network.replays) == (1, 0)


def test_nothing_of_the_sdk_s_own_sessions_runs(
    sdk: Client, network: LocalNetwork, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: object) -> None:
        raise AssertionError("the SDK looks after its own session")

    for name in (
        "_get_and_set_session",
        "_import_session_string",
        "_refresh_and_set_session",
        "_should_refresh_session",
    ):
        monkeypatch.setattr(atproto.Client, name, run)
    network.expire_access_tokens(account.did)
    assert handle_of(sdk) == "alice.test"
    assert sdk.login().handle == "alice.test"
    assert sdk.clone().me.handle == "alice.test"


def echo(sdk: Client) -> Any:
    """What the server has seen."""
    return sdk.request.get(url=f"{sdk._base_url.removesuffix('/xrpc')}{ECHO}").content


def test_a_clone_is_the_same_account_with_headers_of_its_own(sdk: Client, network: LocalNetwork) -> None:
    sdk.request.add_additional_headers_source(lambda: {"X-Mine": "1"})
    chat = sdk.with_bsky_chat_proxy().with_labelers(["did:plc:ar7c4by46qjdydhdevvrndac"])
    assert isinstance(chat, Client)
    seen = echo(chat)["headers"]
    assert seen["atproto-proxy"] == "did:web:api.bsky.chat#bsky_chat"
    assert seen["atproto-accept-labelers"] == "did:plc:ar7c4by46qjdydhdevvrndac;redact"
    assert (seen["x-mine"], seen["authorization"]) == ("1", "DPoP")
    assert "atproto-proxy" not in echo(sdk)["headers"]
    assert chat.oauth_session is sdk.oauth_session
    assert network.requests(GET_SESSION) == 0, "a clone asks nothing"


def test_bytes_arrive_as_they_are(sdk: Client, network: LocalNetwork) -> None:
    sent: list[Request] = []
    blob = {"$type": "blob", "ref": {"$link": "bafkreigh2akiscaildc"}, "mimeType": "image/png", "size": 3}

    def respond(request: Request) -> Response:
        sent.append(request)
        return Response.of_json({"blob": blob}).with_headers(DPoP_Nonce="any")

    handle_of(sdk)
    network.fault("resource", "custom", respond=respond)
    assert sdk.upload_blob(b"\x00\xff\x80").blob.size == 3
    assert [request.body for request in sent] == [b"\x00\xff\x80"]


def test_the_timeout_is_ours_or_the_caller_s(session: OAuthSession) -> None:
    assert Client(session).request._client.timeout == httpx.Timeout(60.0, connect=10.0)
    given = Client(session, timeout=3.0)
    assert given.request._client.timeout == given.clone().request._client.timeout == httpx.Timeout(3.0)


# Who it is


def test_me_is_the_profile(sdk: Client, network: LocalNetwork, account: Account) -> None:
    handle_of(sdk)
    profile_answer(network, 200, did=account.did, handle="alice.test", displayName="Alice")
    assert (sdk.me.did, sdk.me.display_name) == (account.did, "Alice")
    assert sdk.me is sdk.me
    assert sdk.clone().me is sdk.me


@pytest.mark.parametrize("status", [400, 403, 404, 501])
def test_me_is_a_name_where_there_is_no_profile(
    status: int, sdk: Client, network: LocalNetwork, account: Account
) -> None:
    handle_of(sdk)
    profile_answer(network, status, error="Something", message="is missing")
    assert (sdk.me.did, sdk.me.handle, sdk.me.display_name) == (account.did, "alice.test", None)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_me_is_not_made_up_where_the_server_is_sick(status: int, sdk: Client, network: LocalNetwork) -> None:
    handle_of(sdk)
    profile_answer(network, status, error="Something", message="is wrong")
    with pytest.raises(exceptions.RequestErrorBase):
        sdk.me  # noqa: B018
    network.fault("resource", "cut_before")
    with pytest.raises(exceptions.NetworkError):
        sdk.me  # noqa: B018
    assert sdk.me.handle == "alice.test"


def test_logging_in_needs_nothing_and_takes_nothing(sdk: Client, network: LocalNetwork) -> None:
    assert sdk.login().handle == "alice.test"
    assert sdk.login(fetch_bsky_profile=False) is None
    options: list[dict[str, Any]] = [
        {"login": "alice.test", "password": "x"},
        {"session_string": "a:::b"},
        {"auth_factor_token": "1"},
    ]
    for given in options:
        with pytest.raises(exceptions.AtProtocolError, match="leave the call"):
            sdk.login(**given)
    with pytest.raises(exceptions.AtProtocolError, match="restore"):
        sdk.export_session_string()
    with pytest.raises(exceptions.AtProtocolError, match="on_session_updated"):
        sdk.on_session_change(print)


# Errors


def test_a_session_that_is_gone(sdk: Client, session: OAuthSession) -> None:
    session.sign_out()
    for expected in (SessionEndedError, exceptions.UnauthorizedError, exceptions.LoginRequiredError):
        with pytest.raises(expected, match="log in") as caught:
            handle_of(sdk)
        cause = caught.value.__cause__
        assert isinstance(cause, SessionNotFoundError)
        assert (str(caught.value), caught.value.response) == (str(cause), None)
    with pytest.raises(SessionNotFoundError):
        Client(session)


def test_a_wait_that_is_over(sdk: Client, client: OAuthClient, session: OAuthSession, network: LocalNetwork) -> None:
    store_tokens(client, session.did, expires_at=datetime.now(UTC) - timedelta(seconds=60))
    session._signer._timeout = 0.05
    session._signer.forget()
    fault = network.fault("refresh", "late", seconds=None)
    with pytest.raises(exceptions.InvokeTimeoutError) as caught:
        handle_of(sdk)
    assert isinstance(caught.value.__cause__, LockTimeoutError)
    fault.release.set()


def test_a_refresh_that_fails_for_now(
    sdk: Client, client: OAuthClient, session: OAuthSession, network: LocalNetwork
) -> None:
    store_tokens(client, session.did, expires_at=datetime.now(UTC) - timedelta(seconds=60))
    session._signer.forget()
    network.fault("refresh", "status", status=503)
    with pytest.raises(exceptions.NetworkError) as caught:
        handle_of(sdk)
    assert isinstance(caught.value.__cause__, SessionError)
    assert caught.value.__cause__.retryable


def test_what_is_wrong_here(sdk: Client, session: OAuthSession, monkeypatch: pytest.MonkeyPatch) -> None:
    sdk.update_base_url("https://elsewhere.example.com")
    with pytest.raises(exceptions.RequestException) as caught:
        handle_of(sdk)
    assert isinstance(caught.value.__cause__, TransportError)

    def broken(*args: object, **options: object) -> None:
        raise StoreError("the store cannot be read")

    monkeypatch.setattr(session._signer, "flow", broken)
    with pytest.raises(exceptions.RequestException, match="the store cannot be read") as caught:
        sdk.upload_blob(b"x")
    assert isinstance(caught.value.__cause__, StoreError)


@pytest.mark.parametrize(
    ("action", "options", "expected"),
    [
        ("cut_before", {}, exceptions.NetworkError),
        ("rewritten", {"rewrite": lambda head, body: head + body[:-5], "ending": "close"}, exceptions.NetworkError),
        ("status", {"status": 429}, exceptions.RequestException),
        ("status", {"status": 403}, exceptions.UnauthorizedError),
    ],
    ids=["cut", "cut in the middle", "429", "403"],
)
def test_what_the_sdk_says_itself(
    action: str, options: dict[str, Any], expected: type[Exception], sdk: Client, network: LocalNetwork
) -> None:
    handle_of(sdk)
    network.fault("resource", action, **options)
    with pytest.raises(expected) as caught:
        handle_of(sdk)
    assert not isinstance(caught.value.__cause__, SessionError)


def test_no_message_has_a_token(sdk: Client, client: OAuthClient, session: OAuthSession) -> None:
    tokens = stored(client, session.did).token_set
    session.sign_out()
    with pytest.raises(SessionEndedError) as caught:
        handle_of(sdk)
    for text in (str(caught.value), repr(caught.value), repr(sdk), repr(sdk.request)):
        assert tokens.access_token not in text
        assert (tokens.refresh_token or tokens.access_token) not in text
