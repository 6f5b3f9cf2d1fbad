"""The harness does what the tests that stand on it believe it does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from tests.pds import proxy
from tests.pds.harness import PATIENCE, Account, NodeClient, NodeClientError, RealPDS
from tests.pds.proxy import Action, Refresh
from tests.pds.raw_client import CLIENT_ID, GET_SESSION, SCOPE, TOKEN, RawClient


@pytest.fixture
def client(real_pds: RealPDS, pds_account: Account) -> RawClient:
    """Logged in, and the proxy has counted nothing since."""
    client = RawClient(real_pds)
    client.log_in(pds_account)
    real_pds.proxy.reset()
    return client


@pytest.fixture(scope="module")
def node(real_pds: RealPDS) -> Iterator[NodeClient]:
    with real_pds.node_client(CLIENT_ID) as client:
        yield client


def test_everything_goes_through_the_proxy(real_pds: RealPDS, pds_account: Account) -> None:
    document = requests.get(f"{real_pds.plc_url}/{pds_account.did}", timeout=PATIENCE).json()
    metadata = requests.get(f"{real_pds.pds_url}/.well-known/oauth-authorization-server", timeout=PATIENCE).json()

    assert urlsplit(real_pds.pds_url).port == real_pds.proxy.port
    assert document["service"][0]["serviceEndpoint"] == real_pds.pds_url
    assert metadata["issuer"] == real_pds.pds_url
    assert metadata["token_endpoint"] == real_pds.pds_url + TOKEN
    assert real_pds.proxy.count("/.well-known/oauth-authorization-server") == 1


def test_refresh_rotates_and_replay_ends_the_session(client: RawClient, pds_account: Account) -> None:
    first = client.tokens
    assert (first["sub"], first["scope"], first["token_type"]) == (pds_account.did, SCOPE, "DPoP")
    assert client.get_session().json()["did"] == pds_account.did

    assert client.refresh().status_code == 200
    refused = client.get_session(first["access_token"])
    assert (refused.status_code, refused.json()["error"]) == (401, "invalid_token")
    assert client.get_session().status_code == 200

    replayed = client.refresh(first["refresh_token"])
    assert (replayed.status_code, replayed.json()["error"]) == (400, "invalid_grant")
    assert replayed.json()["error_description"] == "Refresh token replayed"
    assert client.get_session().status_code == 401
    assert client.refresh().json()["error"] == "invalid_grant"

    spent = first["refresh_token"]
    assert client.pds.proxy.refreshes()[:2] == [Refresh(spent, 200), Refresh(spent, 400)]
    assert client.pds.proxy.count(TOKEN) == 3


def test_an_account_logs_in_again_and_again(client: RawClient, pds_account: Account) -> None:
    other = RawClient(client.pds)
    other.log_in(pds_account)

    assert other.get_session().status_code == 200
    assert client.get_session().status_code == 200


def test_denied(real_pds: RealPDS) -> None:
    url = real_pds.deny(RawClient(real_pds).authorization_url("v" * 43, state="mine"))

    parameters = parse_qs(urlsplit(url).query)
    assert parameters["error"] == ["access_denied"]
    assert parameters["state"] == ["mine"]
    assert parameters["iss"] == [real_pds.pds_url]


def test_token_lifetime(real_pds: RealPDS, client: RawClient) -> None:
    with real_pds.token_lifetime(20):
        assert client.refresh().json()["expires_in"] <= 20
    assert client.refresh().json()["expires_in"] > 3500


@pytest.mark.parametrize(
    ("action", "seen", "answered"),
    [
        (proxy.cut_before(), None, None),
        (proxy.cut_after(), None, 200),
        (proxy.status_before(503, {"Retry-After": "7"}), 503, None),
        (proxy.status_after(502), 502, 200),
        (proxy.html_after(), 200, 200),
    ],
    ids=["cut_before", "cut_after", "status_before", "status_after", "html_after"],
)
def test_faults(client: RawClient, action: Action, seen: int | None, answered: int | None) -> None:
    """What the client sees, and whether the token is spent."""
    token = client.tokens["refresh_token"]
    form = {"grant_type": "refresh_token", "refresh_token": token}
    fault = client.pds.proxy.arm(TOKEN, action)

    if seen is None:
        with pytest.raises(requests.ConnectionError):
            client.post(TOKEN, **form)
    else:
        answer = client.post(TOKEN, **form)
        assert answer.status_code == seen
        assert "access_token" not in answer.text
        assert answer.headers.get("Retry-After") == ("7" if seen == 503 else None)
    assert fault.arrived.is_set()
    assert fault.fired.wait(PATIENCE)
    assert client.pds.proxy.refreshes() == [Refresh(token, answered)]

    assert client.refresh(token).status_code == (400 if answered else 200)


def test_late_answer(client: RawClient) -> None:
    fault = client.pds.proxy.arm(TOKEN, proxy.late())
    with ThreadPoolExecutor() as pool:
        refreshed = pool.submit(client.refresh)
        assert fault.arrived.wait(PATIENCE)
        # The server has rotated the token, and nobody knows it.
        assert [refresh.status for refresh in client.pds.proxy.refreshes()] == [200]
        assert not refreshed.done()
        assert not fault.fired.is_set()

        fault.release.set()
        assert refreshed.result(PATIENCE).status_code == 200
    assert fault.fired.wait(PATIENCE)
    assert client.get_session().status_code == 200


def test_reset_lets_go_of_what_is_held(client: RawClient) -> None:
    fault = client.pds.proxy.arm(GET_SESSION, proxy.late())
    with ThreadPoolExecutor() as pool:
        called = pool.submit(client.get_session)
        assert fault.arrived.wait(PATIENCE)
        client.pds.proxy.arm(GET_SESSION, proxy.cut_before())
        client.pds.proxy.reset()
        assert called.result(PATIENCE).status_code == 200

    assert client.get_session().status_code == 200
    assert client.pds.proxy.count(GET_SESSION) == 1


def test_faults_act_in_turn(client: RawClient) -> None:
    client.pds.proxy.arm(GET_SESSION, proxy.status_before(500), times=2)
    client.pds.proxy.arm(GET_SESSION, proxy.status_after(502))

    assert [client.get_session().status_code for _ in range(4)] == [500, 500, 502, 200]


def test_nonce_challenge_is_no_spend_and_sets_off_no_after_fault(client: RawClient) -> None:
    token, client.nonce = client.tokens["refresh_token"], None
    fault = client.pds.proxy.arm(TOKEN, proxy.status_after(502))

    challenge = client.send(
        "POST", TOKEN, {"client_id": CLIENT_ID, "grant_type": "refresh_token", "refresh_token": token}
    )
    assert (challenge.status_code, challenge.json()["error"]) == (400, "use_dpop_nonce")
    assert not fault.arrived.is_set()
    assert client.pds.proxy.refresh_tokens() == []

    assert client.refresh().status_code == 502
    assert client.pds.proxy.refresh_tokens() == [token]
    assert client.pds.proxy.count(TOKEN) == 2


def test_node_client_logs_in_and_refreshes(real_pds: RealPDS, pds_account: Account, node: NodeClient) -> None:
    url = node.authorize(pds_account.handle, state="mine")
    (pending,) = node.states().values()
    assert pending["iss"] == real_pds.pds_url

    session = node.callback(real_pds.authorize(url, pds_account.handle, pds_account.password))
    assert (session.did, session.state, session.token_info["expired"]) == (pds_account.did, "mine", False)
    assert session.document == node.sessions()[pds_account.did]
    assert set(session.document) == {"dpopJwk", "authMethod", "tokenSet"}

    refreshed = node.restore(pds_account.did, refresh=True)
    assert refreshed.document["tokenSet"]["refresh_token"] != session.document["tokenSet"]["refresh_token"]
    assert real_pds.proxy.refresh_tokens() == [session.document["tokenSet"]["refresh_token"]]

    node.revoke(pds_account.did)
    assert pds_account.did not in node.sessions()
    with pytest.raises(NodeClientError) as caught:
        node.restore(pds_account.did)
    assert caught.value.name == "TokenRefreshError"


def test_node_client_takes_over_a_stored_session(client: RawClient, pds_account: Account, node: NodeClient) -> None:
    tokens = {name: client.tokens[name] for name in ("sub", "scope", "refresh_token", "access_token", "token_type")}
    document = {
        "dpopJwk": client.private_jwk,
        "authMethod": {"method": "none"},
        "tokenSet": {**tokens, "iss": client.pds.pds_url, "aud": client.pds.pds_url},
    }
    node.put(pds_account.did, document)

    status, body = node.call(pds_account.did)

    assert status == 200
    assert pds_account.handle in body
    assert client.pds.proxy.refresh_tokens() == []


def test_the_servers_do_not_outlive_a_killed_test_run(real_pds: RealPDS) -> None:
    program = (
        "import os, signal; from tests.pds.harness import RealPDS; pds = RealPDS();"
        "print(pds.plc_url, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True)
    plc_url = killed.communicate(timeout=PATIENCE)[0].strip()
    assert plc_url.startswith("http://localhost:")
    assert killed.returncode == -signal.SIGKILL

    # No event tells of the end of somebody else's child.
    deadline = time.monotonic() + PATIENCE
    while _answers(plc_url) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _answers(plc_url)


def _answers(url: str) -> bool:
    try:
        requests.get(url, timeout=PATIENCE)
    except requests.ConnectionError:
        return False
    return True
