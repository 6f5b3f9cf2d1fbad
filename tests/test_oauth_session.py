"""Requests of an account: tokens that are refused, adapters of a program's own. The rest is in ``test_client.py`` and
``topics/test_duty_flow.py``."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from urllib3.util import Retry

from atproto_session import OAuthClient, OAuthSession, TokenInvalidError, TransportError, oauth_session
from atproto_session.testing.network import LocalNetwork

from .scenes import GET_SESSION


@pytest.fixture
def pauses(session: OAuthSession) -> list[float]:
    """How long requests have waited. No time passes."""
    waited: list[float] = []
    session._signer._sleep = waited.append
    return waited


class Canned(BaseAdapter):
    """Answers what it was told to, and keeps what it was sent."""

    def __init__(self, *answers: tuple[int, dict[str, Any], dict[str, str]]) -> None:
        super().__init__()
        self._answers: Iterator[tuple[int, dict[str, Any], dict[str, str]]] = iter(answers)
        self.sent: list[dict[str, str]] = []

    def send(self, request: requests.PreparedRequest, *options: Any, **more: Any) -> requests.Response:
        status, document, headers = next(self._answers)
        self.sent.append(dict(request.headers))
        response = requests.Response()
        response.status_code, response.url, response.request = status, request.url or "", request
        response.headers.update({"Content-Type": "application/json", **headers})
        response.raw = io.BytesIO(json.dumps(document).encode())
        response.headers["Content-Length"] = str(len(json.dumps(document)))
        return response

    def close(self) -> None:
        pass


OK: tuple[int, dict[str, Any], dict[str, str]] = (200, {}, {"DPoP-Nonce": "n"})


def test_a_server_that_refuses_new_tokens_for_a_moment_ends_no_session(
    network: LocalNetwork, session: OAuthSession, pauses: list[float]
) -> None:
    """It was just started, or lags behind."""
    network.reject_access_tokens(session.did)
    waited = session._signer._sleep

    def recover(seconds: float) -> None:
        waited(seconds)
        if len(pauses) == 3:
            network.accept_access_tokens(session.did)

    session._signer._sleep = recover
    assert session.get(GET_SESSION).json()["did"] == session.did
    assert pauses == [0.5, 1.0, 2.0]
    assert (network.rotations, network.replays, network.revocations) == (1, 0, 0)


def test_a_server_that_refuses_new_tokens_for_good_ends_it_here_and_there(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession, pauses: list[float]
) -> None:
    network.reject_access_tokens(session.did)
    with pytest.raises(TokenInvalidError) as caught:
        session.get(GET_SESSION)
    assert caught.value.did == session.did
    assert tuple(pauses) == oauth_session._PAUSES
    assert client.sessions.get_stored(session.did) is None
    assert (network.rotations, network.revocations) == (1, 1)


def test_an_expired_token_that_an_xrpc_error_tells_of(network: LocalNetwork, session: OAuthSession) -> None:
    canned = Canned((400, {"error": "ExpiredToken"}, {}), OK)
    session.mount("", canned)
    assert session.get(GET_SESSION).status_code == 200
    first, second = canned.sent
    assert first["Authorization"] != second["Authorization"]
    assert network.rotations == 1


@pytest.mark.parametrize(("status", "error"), [(400, "InvalidRequest"), (403, "ExpiredToken"), (401, "Other")])
def test_other_errors_are_not_about_the_token(
    status: int, error: str, network: LocalNetwork, session: OAuthSession
) -> None:
    session.mount("", Canned((status, {"error": error}, {})))
    assert session.get(GET_SESSION).status_code == status
    assert network.rotations == 0


def test_a_mounted_adapter_sends_what_was_signed_and_to_nobody_else(session: OAuthSession) -> None:
    canned = Canned(OK)
    session.mount("http://", canned)
    session.mount("https://", canned)
    assert session.get(GET_SESSION).status_code == 200
    assert canned.sent[0]["Authorization"].startswith("DPoP ")
    assert canned.sent[0]["DPoP"]
    with pytest.raises(TransportError, match="are for"):
        session.get("https://elsewhere.example.com/")
    assert len(canned.sent) == 1


def test_a_mounted_adapter_does_not_repeat_a_proof(network: LocalNetwork, session: OAuthSession) -> None:
    adapter = HTTPAdapter(max_retries=Retry(3, status_forcelist=[503]))
    session.mount("http://", adapter)
    assert session.get(GET_SESSION).status_code == 200
    assert adapter.max_retries.total == 0


def test_a_body_that_cannot_be_sent_again(
    network: LocalNetwork, session: OAuthSession, caplog: pytest.LogCaptureFixture
) -> None:
    network.expire_access_tokens(session.did)
    session.get(GET_SESSION, timeout=10)
    network.expire_access_tokens(session.did)
    response = session.post("/xrpc/app.test.echo", data=iter([b"once"]))
    assert response.status_code == 401
    assert "cannot be sent again" in caplog.text


def test_auth_for_another_library(client: OAuthClient, session: OAuthSession) -> None:
    class Request:
        """Stands for httpx's."""

    with pytest.raises(TypeError, match="is for requests"):
        client.auth(session.did)(Request())  # type: ignore[arg-type]
