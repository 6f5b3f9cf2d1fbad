"""Everything that can be made to go wrong."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from atproto_session.testing.network import ConnectionCut, LocalNetwork, Request, Response

from ..scenes import ECHO
from .raw import LoggedIn, RawClient, error_of, tokens_of

BOUND = 10.0


class Background(threading.Thread):
    """Runs something in a thread and keeps its result."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._call()
        except Exception as error:
            self._outcome = error

    def result(self) -> Any:
        self.join(BOUND)
        assert not self.is_alive()
        return self._outcome


def spent(network: LocalNetwork, alice: LoggedIn) -> bool:
    return network.refresh_token_uses[alice.tokens.refresh] > 0


def test_cut_before(network: LocalNetwork, alice: LoggedIn) -> None:
    fault = network.fault("refresh", "cut_before")
    with pytest.raises(requests.ConnectionError):
        alice.client.refresh(alice.tokens.refresh)
    assert fault.arrived.is_set()
    assert (fault.fired.is_set(), fault.count, spent(network, alice)) == (True, 1, False)
    tokens_of(alice.client.refresh(alice.tokens.refresh))


def test_cut_after(network: LocalNetwork, alice: LoggedIn) -> None:
    fault = network.fault("refresh", "cut_after")
    with pytest.raises(requests.ConnectionError):
        alice.client.refresh(alice.tokens.refresh)
    assert (fault.fired.is_set(), fault.count, spent(network, alice)) == (True, 1, True)
    assert error_of(alice.client.refresh(alice.tokens.refresh))[1] == "Refresh token replayed"


def test_a_demand_for_a_nonce_does_not_use_up_a_fault(network: LocalNetwork, alice: LoggedIn) -> None:
    fault = network.fault("refresh", "cut_after")
    network.rotate_nonces()
    with pytest.raises(requests.ConnectionError):
        alice.client.refresh(alice.tokens.refresh)
    assert network.requests("/oauth/token") == network.token_requests == 3  # the exchange, the demand, the refresh
    assert (fault.count, spent(network, alice)) == (1, True)


def test_late(network: LocalNetwork, alice: LoggedIn) -> None:
    fault = network.fault("refresh", "late")
    refresh = Background(lambda: alice.client.refresh(alice.tokens.refresh))
    assert fault.fired.wait(BOUND)
    assert spent(network, alice)
    assert refresh.is_alive()
    fault.release.set()
    tokens_of(refresh.result())


def test_hold(network: LocalNetwork, alice: LoggedIn) -> None:
    fault = network.fault("refresh", "hold")
    refresh = Background(lambda: alice.client.refresh(alice.tokens.refresh))
    assert fault.arrived.wait(BOUND)
    assert fault.fired.wait(BOUND)
    assert not spent(network, alice)
    fault.release.set()
    tokens_of(refresh.result())


@pytest.mark.parametrize("action", ["hold", "late"])
def test_holding_may_have_an_end(network: LocalNetwork, alice: LoggedIn, action: str) -> None:
    network.fault("refresh", action, seconds=0.01)
    tokens_of(alice.client.refresh(alice.tokens.refresh))


@pytest.mark.parametrize("processed", [False, True])
def test_status(network: LocalNetwork, alice: LoggedIn, processed: bool) -> None:
    fault = network.fault(
        "token", "status", status=429, headers={"Retry-After": "7"}, body="slow down", processed=processed
    )
    response = alice.client.refresh(alice.tokens.refresh)
    assert (response.status_code, response.headers["Retry-After"], response.text) == (429, "7", "slow down")
    assert spent(network, alice) is processed
    assert fault.fired.is_set()


def test_any_status_is_possible(network: LocalNetwork) -> None:
    network.fault("plc", "status", status=599)
    assert requests.get(f"{network.plc_url}/did:plc:x", timeout=10).status_code == 599


@pytest.mark.parametrize("processed", [False, True])
def test_html(network: LocalNetwork, alice: LoggedIn, processed: bool) -> None:
    network.fault("refresh", "html", processed=processed)
    response = alice.client.refresh(alice.tokens.refresh)
    assert (response.status_code, response.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert spent(network, alice) is processed


@pytest.mark.parametrize(
    ("action", "options", "member", "value"),
    [
        ("wrong_sub", {}, "sub", "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"),
        ("wrong_sub", {"sub": "not a DID"}, "sub", "not a DID"),
        ("scope_without_atproto", {}, "scope", "transition:generic"),
        ("wrong_token_type", {}, "token_type", "Bearer"),
        ("no_expires_in", {}, "expires_in", None),
        ("no_refresh_token", {}, "refresh_token", None),
    ],
)
def test_token_responses_that_break_a_rule(
    network: LocalNetwork, alice: LoggedIn, action: str, options: dict[str, Any], member: str, value: str | None
) -> None:
    fault = network.fault("refresh", action, **options)
    network.rotate_nonces()
    response = alice.client.refresh(alice.tokens.refresh)
    assert response.status_code == 200
    assert response.json().get(member) == value
    assert response.json()["access_token"] != alice.tokens.access
    assert (fault.count, fault.fired.is_set()) == (1, True)


def test_without_a_successor_a_refresh_token_stays_good(network: LocalNetwork, alice: LoggedIn) -> None:
    network.fault("refresh", "no_refresh_token", times=2)
    for _ in range(2):
        access = alice.client.refresh(alice.tokens.refresh).json()["access_token"]
        assert alice.client.call(network.pds_url, ECHO, access).status_code == 200
    assert (network.rotations, network.replays) == (0, 0)
    tokens_of(alice.client.refresh(alice.tokens.refresh))


def test_a_log_in_may_bring_no_refresh_token(network: LocalNetwork) -> None:
    network.fault("token", "no_refresh_token")
    client = RawClient(network.issuer)
    response = client.exchange(client.code(network, network.create_account()))
    assert "refresh_token" not in response.json()
    assert client.call(network.pds_url, ECHO, response.json()["access_token"]).status_code == 200


def test_drip(network: LocalNetwork, alice: LoggedIn) -> None:
    for body_only in (False, True):
        fault = network.fault("resource", "drip", interval=0.001, body_only=body_only)
        call = Background(lambda: alice.client.call(network.pds_url, ECHO, alice.tokens.access))
        assert fault.fired.wait(BOUND)
        fault.release.set()
        assert call.result().json()["did"] == alice.account.did


def test_a_drip_may_come_to_its_end(network: LocalNetwork) -> None:
    fault = network.fault("plc", "drip", interval=0.0001)
    assert requests.get(f"{network.plc_url}/did:plc:x", timeout=10).json() == {
        "message": "DID not registered: did:plc:x"
    }
    assert not fault.release.is_set()


def test_a_drip_comes_byte_by_byte(network: LocalNetwork) -> None:
    fault = network.fault("plc", "drip", interval=0.001)
    with socket.create_connection(("127.0.0.1", urlsplit(network.plc_url).port or 0), timeout=BOUND) as connection:
        connection.sendall(b"GET /did:plc:x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        first = connection.recv(4096)
        assert b"\r\n\r\n" not in first
        fault.release.set()
        rest = b""
        while b"not registered" not in rest:
            rest += connection.recv(4096)
    assert (first + rest).startswith(b"HTTP/1.1 404 Not Found\r\n")


def test_nonce_challenge(network: LocalNetwork, alice: LoggedIn) -> None:
    fault = network.fault("refresh", "nonce_challenge", times=None)
    nonces = set()
    for _ in range(3):
        response = alice.client.refresh(alice.tokens.refresh)
        assert (response.status_code, error_of(response)[0]) == (400, "use_dpop_nonce")
        nonces.add(response.headers["DPoP-Nonce"])
    assert len(nonces) == 3
    assert (fault.count, spent(network, alice)) == (6, False)
    fault.disarm()
    tokens_of(alice.client.refresh(alice.tokens.refresh))

    network.fault("resource", "nonce_challenge")
    proof = alice.client.proof("GET", f"{network.pds_url}{ECHO}", token=alice.tokens.access)
    response = alice.client.call(network.pds_url, ECHO, alice.tokens.access, proof=proof)
    assert response.status_code == 401
    assert 'error="use_dpop_nonce"' in response.headers["WWW-Authenticate"]


@pytest.mark.parametrize("processed", [False, True])
def test_oauth_error(network: LocalNetwork, alice: LoggedIn, processed: bool) -> None:
    network.fault(
        "refresh", "oauth_error", error="invalid_grant", description="Because", status=400, processed=processed
    )
    response = alice.client.refresh(alice.tokens.refresh)
    assert (response.status_code, *error_of(response)) == (400, "invalid_grant", "Because")
    assert response.headers["DPoP-Nonce"]
    assert spent(network, alice) is processed


def test_no_nonce(network: LocalNetwork) -> None:
    client = RawClient(network.issuer)
    network.fault("par", "no_nonce")
    response = client.push()
    assert response.status_code == 201
    assert "DPoP-Nonce" not in response.headers
    assert network.par_requests == 2


@pytest.mark.parametrize("chunked", [False, True])
def test_oversize(network: LocalNetwork, chunked: bool) -> None:
    network.fault("as-metadata", "oversize", size=200_000, chunked=chunked)
    response = requests.get(f"{network.issuer}/.well-known/oauth-authorization-server", timeout=10)
    assert len(response.content) == 200_000
    assert response.json()["padding"].isspace()
    assert ("Content-Length" in response.headers) is not chunked


@pytest.mark.parametrize(
    ("endpoint", "path"),
    [
        ("protected-resource", "/.well-known/oauth-protected-resource"),
        ("as-metadata", "/.well-known/oauth-authorization-server"),
        ("resolve-handle", "/xrpc/com.atproto.identity.resolveHandle"),
        ("authorize", "/oauth/authorize"),
    ],
)
def test_redirect(network: LocalNetwork, endpoint: str, path: str) -> None:
    network.fault(endpoint, "redirect", to="http://169.254.169.254/")
    response = requests.get(network.pds_url + path, timeout=10, allow_redirects=False)
    assert (response.status_code, response.headers["Location"]) == (302, "http://169.254.169.254/")


def test_custom(network: LocalNetwork, caplog: pytest.LogCaptureFixture) -> None:
    url = f"{network.plc_url}/did:plc:x?a=b"

    def respond(request: Request) -> Response:
        return Response.of_json({"seen": [request.method, request.path, request.query]})

    network.fault("plc", "custom", respond=respond)
    assert requests.get(url, timeout=10).json() == {"seen": ["GET", "/did:plc:x", "a=b"]}

    def cut(request: Request) -> Response:
        raise ConnectionCut

    network.fault("plc", "custom", respond=cut)
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=10)

    def fail(request: Request) -> Response:
        raise LookupError("a mistake of the test's own")

    network.fault("plc", "custom", respond=fail)
    assert requests.get(url, timeout=10).status_code == 500
    assert "failed to answer GET /did:plc:x" in caplog.text


def test_a_fault_lets_others_pass_and_ends(network: LocalNetwork) -> None:
    fault = network.fault("plc", "status", times=2, after=1)
    statuses = [requests.get(f"{network.plc_url}/did:plc:x", timeout=10).status_code for _ in range(4)]
    assert statuses == [404, 503, 503, 404]
    assert repr(fault) == "<Fault status at plc, 2 times so far>"


def test_faults_are_applied_in_the_order_they_were_set(network: LocalNetwork) -> None:
    network.fault("plc", "status", status=500)
    network.fault("plc", "status", status=501)
    assert [requests.get(f"{network.plc_url}/did:plc:x", timeout=10).status_code for _ in range(2)] == [500, 501]


def test_clearing_lets_go(network: LocalNetwork, alice: LoggedIn) -> None:
    fault = network.fault("refresh", "late", times=None)
    refresh = Background(lambda: alice.client.refresh(alice.tokens.refresh))
    assert fault.fired.wait(BOUND)
    network.clear_faults()
    second = tokens_of(refresh.result())
    tokens_of(alice.client.refresh(second.refresh))
    assert fault.count == 1


def test_a_fault_that_cannot_be_is_an_error(network: LocalNetwork) -> None:
    with pytest.raises(ValueError, match="no endpoint 'nowhere'"):
        network.fault("nowhere", "status")
    with pytest.raises(ValueError, match="no action 'explode'"):
        network.fault("token", "explode")
    with pytest.raises(ValueError, match="makes no sense at plc"):
        network.fault("plc", "nonce_challenge")
    with pytest.raises(TypeError, match="colour"):
        network.fault("token", "status", colour="red")


@pytest.mark.parametrize("action", ["hold", "late", "drip"])
def test_stopping_waits_for_nothing(action: str) -> None:
    with LocalNetwork() as network:
        options: dict[str, Any] = {"interval": 60.0} if action == "drip" else {}
        fault = network.fault("plc", action, **options)
        Background(lambda: requests.get(f"{network.plc_url}/did:plc:x", timeout=10))
        assert fault.fired.wait(BOUND)
        before = time.monotonic()
    assert time.monotonic() - before < 30
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{network.plc_url}/did:plc:x", timeout=10)
