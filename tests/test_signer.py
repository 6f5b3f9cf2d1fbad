"""How requests of an account are signed: tokens and proofs that are refused, bodies that can be sent once."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from atproto_session import OAuthClient, OAuthSession, SessionNotFoundError, TokenInvalidError, _signer
from atproto_session._signer import Refusals
from atproto_session.dpop import NonceCache
from atproto_session.testing.network import Account, LocalNetwork, Response

from .canned import OK, Canned, CannedAnswer
from .core import DID, Worker, make_session
from .scenes import ECHO, GET_SESSION, log_in, store_tokens

REPLAYED: CannedAnswer = (401, {}, {"WWW-Authenticate": 'DPoP error="invalid_dpop_proof"', "DPoP-Nonce": "n"})


@pytest.fixture
def pauses(session: OAuthSession) -> list[float]:
    """How long requests have waited. No time passes."""
    waited: list[float] = []
    session._signer._sleep = waited.append
    return waited


def after(number: int, pauses: list[float], then: Callable[[], object]) -> Callable[[float], None]:
    """A sleep without time, in whose ``number``th call something happens."""

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == number:
            then()

    return sleep


# Tokens that are refused


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
    assert tuple(pauses) == _signer.PAUSES
    assert client.sessions.get_stored(session.did) is None
    assert (network.rotations, network.revocations) == (1, 1)


def test_one_refresh_answers_a_refusal_however_many_requests_meet_it(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession, pauses: list[float]
) -> None:
    network.reject_access_tokens(session.did)
    session.total_timeout = 0.4  # less than the first pause
    for _ in range(3):
        assert session.get(GET_SESSION).status_code == 401
        other = client.restore(session.did)
        other.total_timeout = 0.4
        assert other.get(GET_SESSION).status_code == 401
    assert (network.rotations, pauses) == (1, [])
    session.total_timeout = None
    network.accept_access_tokens(session.did)
    assert session.get(GET_SESSION).status_code == 200
    network.expire_access_tokens(session.did)
    assert session.get(GET_SESSION).status_code == 200, "a token that was accepted once is replaced at once"
    assert (network.rotations, pauses) == (2, [])


def test_a_refusal_lasts_over_the_requests_that_meet_it(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession, pauses: list[float]
) -> None:
    """A caller that never waits to the end learns it all the same."""
    network.reject_access_tokens(session.did)
    signer, real = session._signer, session._signer._clock
    later = [0.0]
    signer._clock = lambda: real() + later[0]
    signer.monotonic = lambda: sum(pauses)
    flow_deadline = 0.6  # room for one pause of 0.5 s

    def call() -> requests.Response:
        request = session.prepare_request(requests.Request("GET", GET_SESSION))
        flow = signer.flow(request, network.pds_url, deadline=sum(pauses) + flow_deadline)
        signed = next(flow)
        while True:
            response = client._pool.send(signed)
            try:
                signed = flow.send(response)
            except StopIteration:
                return response

    assert call().status_code == 401
    assert pauses == [0.5]
    later[0] = 6.0
    assert call().status_code == 401
    later[0] = 8.0
    with pytest.raises(TokenInvalidError):
        call()
    assert (network.rotations, network.revocations) == (1, 1)
    with pytest.raises(SessionNotFoundError):
        client.restore(session.did)


def test_threads_that_meet_a_refusal_spend_one_token(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    network.reject_access_tokens(session.did)
    sessions = [client.restore(session.did) for _ in range(6)]
    for each in sessions:
        each._signer._sleep = after(2, [], lambda: network.accept_access_tokens(session.did))
    workers = [Worker(lambda each=each: each.get(GET_SESSION).status_code) for each in sessions]  # type: ignore[misc]
    assert [worker.outcome() for worker in workers] == [200] * 6
    assert (network.rotations, network.replays) == (1, 0)


def test_no_connection_is_kept_while_time_passes(session: OAuthSession) -> None:
    refused: CannedAnswer = (
        401,
        {},
        {"WWW-Authenticate": 'DPoP error="invalid_token"', "DPoP-Nonce": "n", "Content-Length": "100000"},
    )
    canned = Canned(refused, refused, OK)
    session.mount("", canned)
    closed: list[bool] = []
    session._signer._sleep = lambda seconds: closed.append(canned.responses[-1].raw.closed)
    assert session.get(GET_SESSION, stream=True).status_code == 200
    assert closed == [True]


def test_a_wait_that_is_interrupted_leaves_everything_usable(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    session._signer._sleep = interrupt
    network.reject_access_tokens(session.did)
    with pytest.raises(KeyboardInterrupt):
        session.get(GET_SESSION)
    network.accept_access_tokens(session.did)
    assert session.get(GET_SESSION).status_code == 200
    assert client.restore(session.did, refresh=True).get(GET_SESSION).status_code == 200


def test_what_is_renewed_during_a_wait_is_used(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession, pauses: list[float]
) -> None:
    def recover() -> None:
        client.restore(session.did, refresh=True)
        network.accept_access_tokens(session.did)

    network.reject_access_tokens(session.did)
    session._signer._sleep = after(1, pauses, recover)
    assert session.get(GET_SESSION).status_code == 200
    assert network.rotations == 2


def test_a_session_that_is_renewed_before_it_is_ended_stays(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.reject_access_tokens(session.did)
    session._signer._sleep = lambda seconds: None
    delete = client.sessions.delete_rejected

    def renew_first(*args: Any) -> None:
        client.sessions.get_session(session.did, True)
        delete(*args)

    monkeypatch.setattr(client.sessions, "delete_rejected", renew_first)
    assert session.get(GET_SESSION).status_code == 401
    assert client.sessions.get_stored(session.did) is not None


def test_a_server_whose_tokens_have_expired_already_is_not_asked_for_ever(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    with LocalNetwork(access_token_lifetime=0.0) as hasty:
        account = hasty.create_account()
        with OAuthClient(client.metadata, store="memory:", **hasty.client_options()) as other:
            session = log_in(hasty, other, account)
            assert session.get(GET_SESSION).status_code == 401
            assert hasty.rotations <= 4
            assert other.sessions.get_stored(session.did) is not None


def test_refusals_that_are_remembered() -> None:
    refusals, refused, newer = Refusals(), make_session(1), make_session(2, refreshed_at=100.0)
    refusals.add(DID, refused, 99.0, 98.0)
    assert refusals.before(DID, refused, 100.0, 100.0) is None, "the very token"
    earlier = refusals.before(DID, newer, 101.0, 101.0)
    assert earlier is not None
    refusals.add(DID, refused, 102.0, 98.0)
    assert refusals.before(DID, newer, 103.0, 103.0) is earlier, "another request's refusal of the same token"
    assert refusals.before(DID, make_session(2, refreshed_at=98.0), 101.0, 101.0) is None, "issued before"
    assert refusals.before("did:web:other", newer, 101.0, 101.0) is None
    assert refusals.before(DID, newer, 99.0 + 61.0, 160.0) is None, "long ago"
    refusals.end(DID, 104.0)
    refusals.end(DID, 105.0)
    refusals.end("did:web:other", 104.0)
    assert refusals.before(DID, newer, 106.0, 103.0) is earlier, "it had left before a token was accepted"
    assert refusals.before(DID, newer, 106.0, 104.0) is None, "another refusal"
    refusals.add(DID, refused, 106.0, 103.0)
    assert refusals.before(DID, newer, 106.0, 103.0) is earlier, "so had this one"
    refusals.add(DID, refused, 107.0, 106.0)
    assert refusals.before(DID, make_session(3, refreshed_at=108.0), 109.0, 108.0) is not None
    refusals.add("did:web:other", newer, 300.0, 299.0)
    assert list(refusals._refusals) == ["did:web:other"]
    refusals.forget("did:web:other")
    refusals.forget("did:web:other")


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, "ExpiredToken"), (401, "ExpiredToken"), (401, "InvalidToken"), (401, "invalid_token")],
)
def test_an_expired_token_that_an_xrpc_error_tells_of(
    status: int, error: str, network: LocalNetwork, session: OAuthSession
) -> None:
    canned = Canned((status, {"error": error}, {}), OK)
    session.mount("", canned)
    assert session.get(GET_SESSION).status_code == 200
    first, second = canned.sent
    assert first["Authorization"] != second["Authorization"]
    assert network.rotations == 1


def test_words_alone_end_no_session(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession, pauses: list[float]
) -> None:
    """``com.atproto.server.confirmEmail`` says the same of the token in an email."""
    canned = Canned(*[(400, {"error": "ExpiredToken"}, {})] * 5)
    session.mount("", canned)
    for _ in range(2):
        assert session.post("/xrpc/com.atproto.server.confirmEmail").status_code == 400
    assert (len(canned.sent), network.rotations, pauses) == (3, 1, [])
    assert client.sessions.get_stored(session.did) is not None


@pytest.mark.parametrize(
    ("status", "error", "headers"),
    [
        (400, "InvalidRequest", {}),
        (400, "InvalidToken", {}),
        (403, "ExpiredToken", {}),
        (401, "Other", {}),
        (401, "InvalidToken", {"Content-Type": "text/plain"}),
        (401, "InvalidToken", {"WWW-Authenticate": 'DPoP error="insufficient_scope"'}),
        (403, "invalid_token", {"WWW-Authenticate": 'DPoP error="invalid_token"'}),
        (400, "invalid_token", {"WWW-Authenticate": 'DPoP error="invalid_token"'}),
    ],
)
def test_other_errors_are_not_about_the_token(
    status: int, error: str, headers: dict[str, str], network: LocalNetwork, session: OAuthSession
) -> None:
    session.mount("", Canned((status, {"error": error}, headers)))
    assert session.get(GET_SESSION).status_code == status
    assert network.rotations == 0


def test_a_long_refusal_that_is_the_callers_to_read(network: LocalNetwork, session: OAuthSession) -> None:
    """It is not read, only let go of."""
    headers = {"WWW-Authenticate": 'DPoP error="invalid_token"', "Content-Type": "application/json"}
    refusal = Response(401, b"{" + b" " * 100_000, headers, chunked=True)
    network.fault("resource", "custom", respond=lambda request: refusal)
    with session.get(ECHO, stream=True) as response:
        assert response.status_code == 200
    assert network.rotations == 1


def test_the_audience_may_end_with_a_slash(client: OAuthClient, network: LocalNetwork, session: OAuthSession) -> None:
    store_tokens(client, session.did, aud=f"{network.pds_url}/")
    assert client.restore(session.did).get(network.pds_url + GET_SESSION).status_code == 200


# Proofs that are refused


def test_a_proof_that_the_server_has_seen_is_replaced_once(network: LocalNetwork, session: OAuthSession) -> None:
    canned = Canned(REPLAYED, OK, REPLAYED, REPLAYED)
    session.mount("", canned)
    assert session.get(GET_SESSION).status_code == 200
    assert session.get(GET_SESSION).status_code == 401
    assert len({sent["DPoP"] for sent in canned.sent}) == 4
    assert len({sent["Authorization"] for sent in canned.sent}) == 1
    assert network.rotations == 0


def test_the_servers_own_words_for_a_replay(network: LocalNetwork, session: OAuthSession) -> None:
    session.get(ECHO)
    fault = network.fault("resource", "oauth_error", error="invalid_dpop_proof", status=401)
    assert session.get(ECHO).status_code == 200
    assert fault.count == 1


# Bodies that can be sent once


class Pipe(io.BytesIO):
    """Tells where it is, but cannot go back."""

    def seekable(self) -> bool:
        return False


class TellOnly:
    """A body of known length that can tell where it is, and no more."""

    def __init__(self, text: bytes) -> None:
        self._file = io.BytesIO(text)
        self.read, self.tell = self._file.read, self._file.tell
        self.len = len(text)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)


@pytest.mark.parametrize("body", [lambda: iter([b"01234", b"56789"]), lambda: Pipe(b"0123456789")])
@pytest.mark.parametrize("way", ["session", "auth"])
@pytest.mark.parametrize("expired", [False, True])
def test_a_nonce_is_fetched_before_a_body_that_can_be_sent_once(
    body: Callable[[], Any], way: str, expired: bool, network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    if expired:
        network.expire_access_tokens(session.did)
    client._nonces._nonces.clear()
    if way == "session":
        response = session.post(ECHO, data=body())
    else:
        response = requests.post(network.pds_url + ECHO, data=body(), auth=client.auth(session.did), timeout=60)
    assert response.status_code == 200
    assert response.json()["length"] == 10
    assert response.history == []
    assert network.rotations == int(expired)
    assert (network.requests(ECHO), network.requests(GET_SESSION)) == (1, 2 + expired)
    session.post(ECHO, data=body())
    assert network.requests(GET_SESSION) == 2 + expired, "one is known by now"


def test_no_nonce_is_fetched_for_what_is_not_sent(
    network: LocalNetwork, client: OAuthClient, session: OAuthSession
) -> None:
    client._nonces._nonces.clear()
    with pytest.raises(Exception, match="was not sent"):
        session.post("https://elsewhere.example.com/", data=iter([b"a"]))
    assert network.resource_requests == 0


class Broken(io.BytesIO):
    """Says that it can go back."""

    def seek(self, *args: int) -> int:
        raise OSError("a pipe") if self.tell() else io.UnsupportedOperation

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("why", ["nonce", "token", "proof"])
@pytest.mark.parametrize(
    "body", [lambda: iter([b"once"]), lambda: Pipe(b"once"), lambda: TellOnly(b"once"), lambda: Broken(b"once")]
)
def test_an_answer_says_why_its_request_was_not_repeated(
    body: Callable[[], Any], why: str, network: LocalNetwork, session: OAuthSession, caplog: pytest.LogCaptureFixture
) -> None:
    session.get(ECHO)
    if why == "nonce":
        network.fault("resource", "nonce_challenge")
    elif why == "token":
        network.expire_access_tokens(session.did)
    else:
        network.fault("resource", "oauth_error", error="invalid_dpop_proof", status=401)
    response = session.post(ECHO, data=body())
    assert response.status_code == 401
    assert "could be read only once" in caplog.text
    with pytest.raises(requests.HTTPError, match=r"401 .*read only once"):
        response.raise_for_status()
    assert network.rotations == 0


def test_a_signer_of_ones_own(network: LocalNetwork, client: OAuthClient, session: OAuthSession) -> None:
    """Without a bound of its own, it waits for a refresh as long as the deadline allows."""
    signer = _signer.Signer(client.sessions, session.did, NonceCache())
    request = requests.Request("GET", network.pds_url + ECHO).prepare()
    assert next(signer.flow(request, deadline=signer.monotonic() + 60)) is request
