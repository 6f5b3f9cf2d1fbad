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

from atproto_session.testing.network import Account
from tests.network.raw import LOOPBACK, SCOPE, LoggedIn, RawClient, error_of, tokens_of
from tests.pds import proxy
from tests.pds.harness import PATIENCE, NodeClient, NodeClientError, RealPDS
from tests.pds.proxy import Action, Refresh
from tests.scenes import GET_SESSION

TOKEN = "/oauth/token"
CALL = GET_SESSION


@pytest.fixture(scope="module")
def node(real_pds: RealPDS) -> Iterator[NodeClient]:
    with real_pds.node_client(LOOPBACK) as client:
        yield client


def call(alice: LoggedIn, token: str | None = None) -> requests.Response:
    return alice.client.call(alice.client.issuer, GET_SESSION, token or alice.tokens.access)


def test_everything_goes_through_the_proxy(real_pds: RealPDS, pds_account: Account) -> None:
    document = requests.get(f"{real_pds.plc_url}/{pds_account.did}", timeout=PATIENCE).json()
    metadata = requests.get(f"{real_pds.pds_url}/.well-known/oauth-authorization-server", timeout=PATIENCE).json()

    assert urlsplit(real_pds.pds_url).port == real_pds.proxy.port
    assert document["service"][0]["serviceEndpoint"] == real_pds.pds_url
    assert metadata["issuer"] == real_pds.pds_url
    assert metadata["token_endpoint"] == real_pds.pds_url + TOKEN
    assert real_pds.proxy.count("/.well-known/oauth-authorization-server") == 1


def test_refresh_rotates_and_replay_ends_the_session(real_pds: RealPDS, alice: LoggedIn) -> None:
    first = alice.tokens
    assert (first.response["sub"], first.response["scope"]) == (alice.account.did, SCOPE)
    assert call(alice).json()["did"] == alice.account.did

    second = tokens_of(alice.client.refresh(first.refresh))
    assert call(alice, first.access).status_code == 401
    assert call(alice, second.access).status_code == 200

    assert alice.client.refresh(first.refresh).status_code == 400
    assert call(alice, second.access).status_code == 401
    assert alice.client.refresh(second.refresh).status_code == 400

    spent = first.refresh
    assert real_pds.proxy.refreshes()[:2] == [Refresh(spent, 200), Refresh(spent, 400)]
    assert real_pds.proxy.count(TOKEN) == 3


def test_an_account_logs_in_again_and_again(real_pds: RealPDS, alice: LoggedIn) -> None:
    other = RawClient(real_pds.pds_url)
    again = LoggedIn(alice.account, other, other.log_in(real_pds, alice.account))

    assert call(again).status_code == 200
    assert call(alice).status_code == 200


def test_denied(real_pds: RealPDS, pds_account: Account) -> None:
    client = RawClient(real_pds.pds_url)
    url = real_pds.authorize(client.authorize_url(), pds_account, approve=False)

    parameters = parse_qs(urlsplit(url).query)
    assert parameters["error"] == ["access_denied"]
    assert parameters["state"] == [client.state]
    assert parameters["iss"] == [real_pds.pds_url]


def test_token_lifetime(real_pds: RealPDS, alice: LoggedIn) -> None:
    with real_pds.token_lifetime(20):
        tokens = tokens_of(alice.client.refresh(alice.tokens.refresh))
        assert tokens.response["expires_in"] <= 20
    assert tokens_of(alice.client.refresh(tokens.refresh)).response["expires_in"] > 3500


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
def test_faults(real_pds: RealPDS, alice: LoggedIn, action: Action, seen: int | None, answered: int | None) -> None:
    """What the client sees, and whether the token is spent."""
    client, token = alice.client, alice.tokens.refresh
    fault = real_pds.proxy.arm(TOKEN, action)

    if seen is None:
        with pytest.raises(requests.ConnectionError):
            client.refresh(token)
    else:
        answer = client.refresh(token)
        assert answer.status_code == seen
        assert "access_token" not in answer.text
        assert answer.headers.get("Retry-After") == ("7" if seen == 503 else None)
    assert fault.arrived.is_set()
    assert fault.fired.wait(PATIENCE)
    assert real_pds.proxy.refreshes() == [Refresh(token, answered)]

    assert client.refresh(token).status_code == (400 if answered else 200)


def test_late_answer(real_pds: RealPDS, alice: LoggedIn) -> None:
    fault = real_pds.proxy.arm(TOKEN, proxy.late())
    with ThreadPoolExecutor() as pool:
        refreshed = pool.submit(alice.client.refresh, alice.tokens.refresh)
        assert fault.arrived.wait(PATIENCE)
        # The server has rotated the token, and nobody knows it.
        assert [refresh.status for refresh in real_pds.proxy.refreshes()] == [200]
        assert not refreshed.done()
        assert not fault.fired.is_set()

        fault.release.set()
        tokens = tokens_of(refreshed.result(PATIENCE))
    assert fault.fired.wait(PATIENCE)
    assert call(alice, tokens.access).status_code == 200


def test_reset_lets_go_of_what_is_held(real_pds: RealPDS, alice: LoggedIn) -> None:
    fault = real_pds.proxy.arm(CALL, proxy.late())
    with ThreadPoolExecutor() as pool:
        called = pool.submit(call, alice)
        assert fault.arrived.wait(PATIENCE)
        real_pds.proxy.arm(CALL, proxy.cut_before())
        real_pds.proxy.reset()
        assert called.result(PATIENCE).status_code == 200

    assert call(alice).status_code == 200
    assert real_pds.proxy.count(CALL) == 1


def test_faults_act_in_turn(real_pds: RealPDS, alice: LoggedIn) -> None:
    real_pds.proxy.arm(CALL, proxy.status_before(500), times=2)
    real_pds.proxy.arm(CALL, proxy.status_after(502))

    assert [call(alice).status_code for _ in range(4)] == [500, 500, 502, 200]


def test_nonce_challenge_is_no_spend_and_sets_off_no_after_fault(real_pds: RealPDS, alice: LoggedIn) -> None:
    client, token = alice.client, alice.tokens.refresh
    client.nonces.clear()
    fault = real_pds.proxy.arm(TOKEN, proxy.status_after(502))

    form = {"grant_type": "refresh_token", "refresh_token": token}
    challenge = client.post(TOKEN, form, retry=False)
    assert (challenge.status_code, error_of(challenge)[0]) == (400, "use_dpop_nonce")
    assert not fault.arrived.is_set()
    assert real_pds.proxy.refresh_tokens() == []

    assert client.refresh(token).status_code == 502
    assert real_pds.proxy.refresh_tokens() == [token]
    assert real_pds.proxy.count(TOKEN) == 2


def test_node_client_logs_in_and_refreshes(real_pds: RealPDS, pds_account: Account, node: NodeClient) -> None:
    url = node.authorize(pds_account.handle, state="mine")
    (pending,) = node.states().values()
    assert pending["iss"] == real_pds.pds_url

    session = node.callback(real_pds.authorize(url, pds_account))
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
