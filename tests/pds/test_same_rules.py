"""The local network keeps the rules of the real PDS: one suite, driven by hand, for both."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Barrier
from typing import Any
from urllib.parse import urlencode

import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import ec

from atproto_session.testing.network import Account, LocalNetwork
from tests.core import wait_until
from tests.network.raw import (
    REDIRECT_URI,
    SCOPE,
    LoggedIn,
    Network,
    RawClient,
    b64,
    error_of,
    new_key,
    public_jwk,
    query_of,
    tokens_of,
)
from tests.pds.harness import PATIENCE, Browser, RealPDS
from tests.scenes import GET_SESSION

UNKNOWN_REFRESH_TOKEN = "ref-" + "0" * 64
NONCE_WANTED = "Authorization server requires nonce in DPoP proof"
NONCE_STALE = 'DPoP "nonce" mismatch'
EXPIRED = '"exp" claim timestamp check failed'


@dataclass(frozen=True)
class Server:
    """A PDS that is its own authorization server.

    :ivar log_in_briefly: logs in for an access token that expires at once.
    """

    url: str
    network: Network
    create_account: Callable[[], Account]
    account: Account
    log_in_briefly: Callable[[], LoggedIn]

    def client(self) -> RawClient:
        return RawClient(self.url)

    def log_in(self) -> LoggedIn:
        client = self.client()
        return LoggedIn(self.account, client, client.log_in(self.network, self.account))


@pytest.fixture(scope="module", params=["local", "real"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    if request.param == "local":
        with LocalNetwork() as network:
            yield local_server(network)
    else:
        yield real_server(request.getfixturevalue("real_pds"))


def local_server(network: LocalNetwork) -> Server:
    def log_in_briefly() -> LoggedIn:
        alice = local.log_in()
        network.expire_access_tokens(alice.account.did)
        return alice

    local = Server(network.pds_url, network, network.create_account, network.create_account(), log_in_briefly)
    return local


def real_server(pds: RealPDS) -> Server:
    def log_in_briefly() -> LoggedIn:
        with pds.token_lifetime(0.3):  # anything shorter counts as the end of the session
            return real.log_in()

    real = Server(pds.pds_url, Browser(pds.pds_url), pds.create_account, pds.create_account(), log_in_briefly)
    return real


@pytest.fixture
def alice(server: Server) -> LoggedIn:
    return server.log_in()


def call(alice: LoggedIn, token: str | None = None, **options: Any) -> requests.Response:
    return alice.client.call(alice.client.issuer, GET_SESSION, token or alice.tokens.access, **options)


def challenge_of(response: requests.Response) -> dict[str, str]:
    """The parameters of the DPoP challenge, algorithms apart."""
    header = response.headers["WWW-Authenticate"]
    parameters = dict(re.findall(r'(\w+)="([^"]*)"', header))
    assert header.startswith("DPoP algs=")
    assert {"ES256", "ES256K"} <= {*parameters.pop("algs").split()}
    return parameters


def challenge(error: str, description: str) -> dict[str, str]:
    # What would have to be escaped is left out.
    return {"error": error} if '"' in description else {"error": error, "error_description": description}


def assert_refused_at_token_endpoint(response: requests.Response, error: str, description: str | None) -> None:
    """:param description: ``None`` where each server has its own words."""
    status = 401 if error == "invalid_dpop_proof" else 400
    description = error_of(response)[1] if description is None else description
    assert (response.status_code, *error_of(response)) == (status, error, description)
    assert response.headers["DPoP-Nonce"]
    assert response.headers["Cache-Control"] == "no-store"
    if status == 401:
        assert challenge_of(response) == challenge(error, description)
    else:
        assert "WWW-Authenticate" not in response.headers


def assert_refused_at_resource(response: requests.Response, error: str, description: str | None) -> None:
    description = error_of(response)[1] if description is None else description
    assert (response.status_code, response.json()) == (401, {"error": error, "message": description})
    assert challenge_of(response) == challenge(error, description)
    assert response.headers["DPoP-Nonce"]


def assert_session_is_gone(alice: LoggedIn) -> None:
    assert_refused_at_resource(call(alice), "invalid_token", "Invalid token")
    assert_refused_at_token_endpoint(
        alice.client.refresh(alice.tokens.refresh), "invalid_grant", "Invalid refresh token"
    )


def assert_session_lives(alice: LoggedIn) -> None:
    assert call(alice).status_code == 200
    assert alice.client.refresh(alice.tokens.refresh).status_code == 200


# Discovery


@pytest.mark.duty(14)
def test_the_protected_resource_names_its_authorization_server(server: Server) -> None:
    response = requests.get(f"{server.url}/.well-known/oauth-protected-resource", timeout=PATIENCE)
    assert response.history == []
    assert response.headers["Content-Type"].startswith("application/json")
    assert response.json() == {
        "resource": server.url,
        "authorization_servers": [server.url],
        "scopes_supported": [],
        "bearer_methods_supported": ["header"],
        "resource_documentation": "https://atproto.com",
    }


@pytest.mark.duty(15, 16)
def test_the_metadata_hold_what_a_client_demands(server: Server) -> None:
    response = requests.get(f"{server.url}/.well-known/oauth-authorization-server", timeout=PATIENCE)
    assert response.history == []
    assert response.headers["Content-Type"].startswith("application/json")
    metadata = response.json()
    assert metadata["issuer"] == server.url
    for name, path in (
        ("authorization_endpoint", "/oauth/authorize"),
        ("token_endpoint", "/oauth/token"),
        ("pushed_authorization_request_endpoint", "/oauth/par"),
        ("revocation_endpoint", "/oauth/revoke"),
        ("jwks_uri", "/oauth/jwks"),
    ):
        assert metadata[name] == server.url + path
    for name, values in (
        ("response_types_supported", {"code"}),
        ("grant_types_supported", {"authorization_code", "refresh_token"}),
        ("code_challenge_methods_supported", {"S256"}),
        ("token_endpoint_auth_methods_supported", {"none", "private_key_jwt"}),
        ("token_endpoint_auth_signing_alg_values_supported", {"ES256"}),
        ("scopes_supported", {"atproto", "transition:generic", "transition:email", "transition:chat.bsky"}),
        ("dpop_signing_alg_values_supported", {"ES256", "ES256K"}),
    ):
        assert values <= set(metadata[name])
    assert "none" not in metadata["token_endpoint_auth_signing_alg_values_supported"]
    for name in (
        "authorization_response_iss_parameter_supported",
        "require_pushed_authorization_requests",
        "client_id_metadata_document_supported",
        "require_request_uri_registration",
    ):
        assert metadata[name] is True


def test_handles_resolve(server: Server) -> None:
    def resolve(handle: str) -> requests.Response:
        url = f"{server.url}/xrpc/com.atproto.identity.resolveHandle"
        return requests.get(url, params={"handle": handle}, timeout=PATIENCE)

    assert resolve(server.account.handle).json() == {"did": server.account.did}
    unknown = resolve("nobody.test")
    assert (unknown.status_code, unknown.json()["error"]) == (400, "HandleNotFound")


# Logging in


def test_a_pushed_request_lasts_five_minutes(server: Server) -> None:
    response = server.client().push()
    assert response.status_code == 201
    assert response.json().keys() == {"request_uri", "expires_in"}
    assert response.json()["request_uri"].startswith("urn:ietf:params:oauth:request_uri:req-")
    assert response.json()["expires_in"] in (299, 300)
    assert response.headers["DPoP-Nonce"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"code_challenge": None}, "invalid_request"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"redirect_uri": "http://127.0.0.1:8001/callback"}, "invalid_request"),
        ({"redirect_uri": "http://127.0.0.1:8000/other"}, "invalid_request"),
        ({"redirect_uri": "http://localhost:8000/callback"}, "invalid_request"),
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"scope": "transition:generic"}, "invalid_scope"),
        ({"scope": "atproto transition:email"}, "invalid_scope"),
        ({"login_hint": "not a handle"}, "invalid_request"),
        ({"prompt": "none"}, "invalid_request"),
        ({"prompt": "dance"}, "invalid_request"),
        ({"client_id": None}, "invalid_client"),
        ({"client_id": "http://localhost?scope=transition:generic"}, "invalid_client_metadata"),
        ({"client_id": "http://localhost?redirect_uri=http://localhost/"}, "invalid_client_metadata"),
        ({"client_id": "http://localhost?colour=red"}, "invalid_client_metadata"),
        ({"client_id": "http://localhost?scope=atproto&scope=atproto"}, "invalid_client_metadata"),
        ({"client_id": "http://localhost/path"}, "invalid_client_metadata"),
        ({"client_id": "ftp://app.example/"}, "invalid_client_metadata"),
    ],
)
def test_a_wrong_request_is_refused(server: Server, changes: dict[str, str | None], error: str) -> None:
    response = server.client().push(**changes)
    assert (response.status_code, error_of(response)[0]) == (400, error)
    assert response.headers["DPoP-Nonce"]


@pytest.mark.parametrize(
    ("registered", "requested", "accepted"),
    [
        ("http://127.0.0.1/", "http://127.0.0.1:4711/", True),
        ("http://[::1]/", "http://[::1]:4711/", True),
        ("http://127.0.0.1/a", "http://127.0.0.1:4711/b", False),
        ("http://127.0.0.1/", "http://[::1]:4711/", False),
        ("http://127.0.0.1/", "https://127.0.0.1:4711/", False),
        ("http://127.0.0.1/", "http://127.0.0.1:99999/", False),
        ("http://127.0.0.1/", "http://user@127.0.0.1:4711/", False),
        (None, "http://127.0.0.1:4711/", True),
        (None, "http://[::1]/", True),
        (None, "http://127.0.0.1:4711/callback", False),
    ],
)
def test_the_port_is_ignored_where_none_is_registered(
    server: Server, registered: str | None, requested: str, accepted: bool
) -> None:
    client_id = "http://localhost" + ("" if registered is None else "?" + urlencode({"redirect_uri": registered}))
    response = RawClient(server.url, client_id=client_id).push(redirect_uri=requested, scope="atproto")
    assert response.status_code == (201 if accepted else 400), response.text


def test_the_callback_names_the_issuer_whether_approved_or_not(server: Server) -> None:
    client = server.client()
    callback = server.network.authorize(client.authorize_url(), server.account)
    assert callback.startswith(REDIRECT_URI + "?")
    approved = query_of(callback)
    assert approved.keys() == {"iss", "state", "code"}
    assert (approved["iss"], approved["state"]) == (server.url, client.state)
    assert approved["code"].startswith("cod-")

    assert query_of(server.network.authorize(client.authorize_url(), server.account, approve=False)) == {
        "iss": server.url,
        "state": client.state,
        "error": "access_denied",
        "error_description": "The user rejected the request",
    }


@pytest.mark.duty(32)
def test_a_token_response_has_these_members(server: Server) -> None:
    client = server.client()
    exchanged = client.exchange(client.code(server.network, server.account))
    refreshed = client.refresh(tokens_of(exchanged).refresh)
    for response in (exchanged, refreshed):
        members = response.json()
        assert members.pop("access_token") != members["refresh_token"]
        assert members.pop("refresh_token").startswith("ref-")
        assert members.pop("expires_in") in (3599, 3600)
        assert members == {"token_type": "DPoP", "scope": SCOPE, "sub": server.account.did}
        assert response.headers["DPoP-Nonce"]
        assert response.headers["Cache-Control"] == "no-store"


def test_a_code_used_twice_ends_its_session(server: Server) -> None:
    client, account = server.client(), server.create_account()  # the real PDS also signs it out of the browser
    code = client.code(server.network, account)
    alice = LoggedIn(account, client, tokens_of(client.exchange(code)))
    assert_refused_at_token_endpoint(client.exchange(code), "invalid_grant", "Invalid code")
    assert_session_is_gone(alice)


@pytest.mark.parametrize(
    ("changes", "description"),
    [
        ({"code_verifier": b64(b"x" * 48)}, "Invalid code_verifier"),
        ({"code_verifier": None}, "code_verifier is required"),
        (
            {"redirect_uri": "http://127.0.0.1:8000/"},
            "The redirect_uri parameter must match the one used in the authorization request",
        ),
        ({"client_id": "http://localhost"}, "Token was not issued to this client"),
    ],
)
def test_a_wrong_exchange_uses_up_the_code(server: Server, changes: dict[str, str | None], description: str) -> None:
    client = server.client()
    code = client.code(server.network, server.account)
    assert_refused_at_token_endpoint(client.exchange(code, **changes), "invalid_grant", description)
    assert_refused_at_token_endpoint(client.exchange(code), "invalid_grant", "Invalid code")


def test_a_code_is_bound_to_the_key_of_its_request(server: Server) -> None:
    client, thief = server.client(), server.client()
    code, thief.verifier = client.code(server.network, server.account), client.verifier
    refused = thief.exchange(code)
    assert_refused_at_token_endpoint(refused, "invalid_grant", "DPoP proof does not match the expected JKT")
    assert_refused_at_token_endpoint(client.exchange(code), "invalid_grant", "Invalid code")


def test_a_verifier_that_cannot_be_one_leaves_the_code_good(server: Server) -> None:
    client = server.client()
    code = client.code(server.network, server.account)
    refused = client.exchange(code, code_verifier="short")
    assert (refused.status_code, error_of(refused)[0]) == (400, "invalid_grant")
    assert "code_verifier" in error_of(refused)[1]
    tokens_of(client.exchange(code))


@pytest.mark.parametrize(
    ("path", "error"), [("token", "invalid_grant"), ("par", "invalid_client"), ("revoke", "invalid_request")]
)
def test_a_request_of_nobody_is_refused(server: Server, path: str, error: str) -> None:
    for body, kind in (
        (b"\xff=1", "application/x-www-form-urlencoded"),
        (b"grant_type=refresh_token&grant_type=x", "application/x-www-form-urlencoded"),
        (b'{"grant_type": "refresh_token"}', "application/json"),
    ):
        headers = {"Content-Type": kind}
        response = requests.post(f"{server.url}/oauth/{path}", data=body, headers=headers, timeout=PATIENCE)
        assert (response.status_code, error_of(response)[0]) == (400, error)


@pytest.mark.parametrize(
    ("path", "form", "error"),
    [
        ("token", {"client_id": None, "grant_type": "x"}, "invalid_grant"),
        ("token", {"grant_type": "password"}, "invalid_grant"),
        ("token", {"grant_type": "refresh_token"}, "invalid_grant"),
        ("revoke", {}, "invalid_request"),
    ],
)
def test_a_request_without_what_it_is_about_is_refused(
    server: Server, path: str, form: dict[str, str | None], error: str
) -> None:
    response = server.client().post(f"/oauth/{path}", form)
    assert (response.status_code, error_of(response)[0]) == (400, error)


# Proofs


@pytest.mark.duty(27)
@pytest.mark.parametrize(("nonce", "description"), [(None, NONCE_WANTED), ("made-up", NONCE_STALE)])
def test_a_nonce_is_demanded_in_each_endpoints_own_way(
    server: Server, alice: LoggedIn, nonce: str | None, description: str
) -> None:
    client = alice.client

    def forget() -> None:
        client.nonces = {} if nonce is None else {server.url: nonce}

    forget()
    form = {"grant_type": "refresh_token", "refresh_token": alice.tokens.refresh}
    refused = client.post("/oauth/token", form, retry=False)
    assert_refused_at_token_endpoint(refused, "use_dpop_nonce", description)

    forget()
    refused = client.post("/oauth/revoke", {"token": alice.tokens.refresh}, retry=False)
    assert_refused_at_token_endpoint(refused, "use_dpop_nonce", description)

    forget()
    proof = client.proof("GET", f"{server.url}{GET_SESSION}", token=alice.tokens.access)
    assert_refused_at_resource(call(alice, proof=proof), "use_dpop_nonce", description)
    assert_session_lives(alice)


BAD_PROOFS: list[tuple[dict[str, Any], str | None]] = [
    ({"header": {"typ": "JWT"}}, 'Failed to verify DPoP proof: unexpected "typ" JWT header value'),
    ({"header": {"typ": None}}, 'Failed to verify DPoP proof: unexpected "typ" JWT header value'),
    ({"header": {"jwk": None}}, None),
    ({"header": {"jwk": {"kty": "EC", "crv": "P-384", "x": "", "y": ""}}}, None),
    ({"header": {"jwk": {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}}}, None),
    ({"header": {"jwk": {"kty": "EC", "crv": "P-256", "x": 1}}}, None),
    ({"header": {"jwk": public_jwk(new_key(), d="AA")}}, None),
    ({"header": {"jwk": public_jwk(new_key())}}, "Failed to verify DPoP proof: signature verification failed"),
    ({"jti": None}, 'DPoP "jti" missing'),
    ({"jti": 7}, 'DPoP "jti" missing'),
    ({"htm": "PUT"}, 'DPoP "htm" mismatch'),
    ({"htm": None}, 'DPoP "htm" mismatch'),
    ({"htu": "http://localhost:1/"}, 'DPoP "htu" mismatch'),
    ({"htu": None}, None),
    ({"iat": None}, None),
    ({"iat": True}, 'Failed to verify DPoP proof: "iat" claim must be a number'),
    ({"iat": "now"}, 'Failed to verify DPoP proof: "iat" claim must be a number'),
    ({"nonce": 7}, 'Invalid DPoP "nonce" type'),
]


@pytest.mark.parametrize(("changes", "description"), BAD_PROOFS)
def test_a_bad_proof_is_refused_and_costs_nothing(
    server: Server, alice: LoggedIn, changes: dict[str, Any], description: str | None
) -> None:
    client = alice.client
    form = {"grant_type": "refresh_token", "refresh_token": alice.tokens.refresh}
    refused = client.post("/oauth/token", form, proof=client.proof("POST", f"{server.url}/oauth/token", **changes))
    assert_refused_at_token_endpoint(refused, "invalid_dpop_proof", description)
    proof = client.proof("GET", f"{server.url}{GET_SESSION}", **{"token": alice.tokens.access, **changes})
    assert_refused_at_resource(call(alice, proof=proof), "invalid_dpop_proof", description)
    assert_session_lives(alice)


def test_a_proof_names_the_token_that_it_goes_with_and_no_other(server: Server, alice: LoggedIn) -> None:
    client, access = alice.client, alice.tokens.access
    for ath in (None, "AAAA"):
        proof = client.proof("GET", f"{server.url}{GET_SESSION}", token=access, ath=ath)
        assert_refused_at_resource(call(alice, proof=proof), "invalid_dpop_proof", 'DPoP "ath" mismatch')
    form = {"grant_type": "refresh_token", "refresh_token": alice.tokens.refresh}
    refused = client.post("/oauth/token", form, proof=client.proof("POST", f"{server.url}/oauth/token", token=access))
    assert_refused_at_token_endpoint(refused, "invalid_dpop_proof", 'DPoP "ath" claim not allowed')
    assert_session_lives(alice)


def test_a_proof_is_required(server: Server, alice: LoggedIn) -> None:
    form = {
        "grant_type": "refresh_token",
        "refresh_token": alice.tokens.refresh,
        "client_id": alice.client.client_id,
    }
    refused = requests.post(f"{server.url}/oauth/token", data=form, timeout=PATIENCE)
    assert_refused_at_token_endpoint(refused, "invalid_dpop_proof", "DPoP proof required")
    headers = {"Authorization": f"DPoP {alice.tokens.access}"}
    refused = requests.get(f"{server.url}{GET_SESSION}", headers=headers, timeout=PATIENCE)
    assert_refused_at_resource(refused, "invalid_dpop_proof", "DPoP proof required")
    assert_session_lives(alice)


@pytest.mark.parametrize(("offset", "problem"), [(-200, "(too far in the past)"), (185, "(it should be in the past)")])
def test_a_proof_from_another_time_is_refused(server: Server, alice: LoggedIn, offset: int, problem: str) -> None:
    proof = alice.client.proof("POST", f"{server.url}/oauth/token", iat=int(time.time()) + offset)
    form = {"grant_type": "refresh_token", "refresh_token": alice.tokens.refresh}
    assert_refused_at_token_endpoint(
        alice.client.post("/oauth/token", form, proof=proof),
        "invalid_dpop_proof",
        f'Failed to verify DPoP proof: "iat" claim timestamp check failed {problem}',
    )
    assert_session_lives(alice)


@pytest.mark.parametrize("offset", [-185, 170])
def test_a_clock_may_be_off_by_three_minutes(server: Server, alice: LoggedIn, offset: int) -> None:
    proof = alice.client.proof("POST", f"{server.url}/oauth/token", iat=int(time.time()) + offset)
    form = {"grant_type": "refresh_token", "refresh_token": alice.tokens.refresh}
    tokens_of(alice.client.post("/oauth/token", form, proof=proof))


def test_a_proof_works_once(server: Server, alice: LoggedIn) -> None:
    client, url = alice.client, f"{server.url}/oauth/token"
    form, proof = {"grant_type": "refresh_token", "refresh_token": UNKNOWN_REFRESH_TOKEN}, client.proof("POST", url)
    assert_refused_at_token_endpoint(
        client.post("/oauth/token", form, proof=proof), "invalid_grant", "Invalid refresh token"
    )
    form["refresh_token"] = alice.tokens.refresh
    assert_refused_at_token_endpoint(
        client.post("/oauth/token", form, proof=proof), "invalid_dpop_proof", "DPoP proof replayed"
    )
    proof = client.proof("GET", f"{server.url}{GET_SESSION}", token=alice.tokens.access)
    assert call(alice, proof=proof).status_code == 200
    assert_refused_at_resource(call(alice, proof=proof), "invalid_dpop_proof", "DPoP proof replayed")
    assert_session_lives(alice)


def test_keys_may_be_of_either_kind(server: Server) -> None:
    client = server.client()
    client.key = new_key(ec.SECP256K1)
    assert_session_lives(LoggedIn(server.account, client, client.log_in(server.network, server.account)))


# Access tokens


def test_what_is_no_dpop_request_gets_no_challenge(server: Server, alice: LoggedIn) -> None:
    for authorization, status, error, message in (
        (None, 401, "AuthMissing", "Authentication Required"),
        ("DPoP", 400, "InvalidToken", "Malformed authorization header"),
        (f"Bearer {alice.tokens.access}", 400, "InvalidToken", "Malformed token"),
    ):
        proof = alice.client.proof("GET", f"{server.url}{GET_SESSION}", token=alice.tokens.access)
        headers = {"Authorization": authorization, "DPoP": proof}
        refused = requests.get(f"{server.url}{GET_SESSION}", headers=headers, timeout=PATIENCE)
        assert (refused.status_code, refused.json()) == (status, {"error": error, "message": message})
        assert not {"WWW-Authenticate", "DPoP-Nonce"} & {*refused.headers}


def test_an_access_token_is_known_and_bound_to_its_key(server: Server, alice: LoggedIn) -> None:
    assert_refused_at_resource(call(alice, "unknown"), "invalid_token", "Malformed token")
    alice.client.key = new_key()
    assert_refused_at_resource(call(alice), "invalid_token", "Invalid DPoP key binding")


def test_an_access_token_expires_and_its_session_does_not(server: Server) -> None:
    alice = server.log_in_briefly()
    wait_until(lambda: call(alice).status_code != 200)
    refused = call(alice)
    assert_refused_at_resource(refused, "invalid_token", EXPIRED)
    assert challenge_of(refused) == {"error": "invalid_token"}
    assert_session_lives(replace(alice, tokens=tokens_of(alice.client.refresh(alice.tokens.refresh))))


# Refresh tokens


@pytest.mark.duty(35)
def test_a_refresh_replaces_both_tokens(server: Server, alice: LoggedIn) -> None:
    renewed = replace(alice, tokens=tokens_of(alice.client.refresh(alice.tokens.refresh)))
    assert renewed.tokens.refresh != alice.tokens.refresh
    assert_refused_at_resource(call(alice), "invalid_token", "Invalid token")
    assert_session_lives(renewed)


@pytest.mark.duty(35)
def test_a_replay_ends_the_session(server: Server, alice: LoggedIn) -> None:
    renewed = replace(alice, tokens=tokens_of(alice.client.refresh(alice.tokens.refresh)))
    replayed = alice.client.refresh(alice.tokens.refresh)
    assert_refused_at_token_endpoint(replayed, "invalid_grant", "Refresh token replayed")
    assert_session_is_gone(renewed)
    assert_session_is_gone(alice)


def test_a_refresh_token_is_known(server: Server, alice: LoggedIn) -> None:
    refused = alice.client.refresh(UNKNOWN_REFRESH_TOKEN)
    assert_refused_at_token_endpoint(refused, "invalid_grant", "Invalid refresh token")
    assert error_of(alice.client.refresh("unknown"))[0] == "invalid_grant"
    assert_session_lives(alice)


def test_a_refresh_with_another_key_ends_the_session(server: Server, alice: LoggedIn) -> None:
    key, alice.client.key = alice.client.key, new_key()
    refused = alice.client.refresh(alice.tokens.refresh)
    assert_refused_at_token_endpoint(refused, "invalid_grant", "DPoP proof does not match the expected JKT")
    alice.client.key = key
    assert_session_is_gone(alice)


def test_a_refresh_by_another_client_ends_the_session(server: Server, alice: LoggedIn) -> None:
    refused = alice.client.refresh(alice.tokens.refresh, client_id="http://localhost")
    assert_refused_at_token_endpoint(refused, "invalid_grant", "Token was not issued to this client")
    assert_session_is_gone(alice)


def test_two_refreshes_at_one_instant_leave_one_session_at_most(server: Server, alice: LoggedIn) -> None:
    """Whether the second one is taken for a replay, fails, or even succeeds, is a matter of milliseconds at the real
    PDS. But two sessions never come of it."""
    barrier = Barrier(2)

    def refresh(_: int) -> requests.Response:
        client = server.client()
        client.key, client.nonces = alice.client.key, dict(alice.client.nonces)
        barrier.wait(PATIENCE)
        return client.refresh(alice.tokens.refresh)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(refresh, range(2)))
    issued = [tokens_of(answer) for answer in answers if answer.status_code == 200]
    assert issued
    for answer in answers:
        assert answer.status_code == 200 or error_of(answer)[0] in ("invalid_grant", "server_error")
    assert sum(alice.client.refresh(tokens.refresh).status_code == 200 for tokens in issued) <= 1


# Revocation


def revoke(alice: LoggedIn, token: str, **changes: str | None) -> None:
    response = alice.client.post("/oauth/revoke", {"token": token, **changes})
    assert (response.status_code, response.json()) == (200, {})


@pytest.mark.duty(38)
@pytest.mark.parametrize("kind", ["refresh", "access"])
def test_either_token_ends_the_session(server: Server, alice: LoggedIn, kind: str) -> None:
    for _ in range(2):
        revoke(alice, getattr(alice.tokens, kind))
        assert_session_is_gone(alice)


def test_a_spent_refresh_token_ends_its_session_too(server: Server, alice: LoggedIn) -> None:
    renewed = replace(alice, tokens=tokens_of(alice.client.refresh(alice.tokens.refresh)))
    revoke(alice, alice.tokens.refresh)
    assert_session_is_gone(renewed)


@pytest.mark.duty(38)
def test_what_ends_nothing_says_so_to_nobody(server: Server, alice: LoggedIn) -> None:
    renewed = replace(alice, tokens=tokens_of(alice.client.refresh(alice.tokens.refresh)))
    revoke(alice, alice.tokens.access)
    revoke(alice, "unknown")
    revoke(alice, UNKNOWN_REFRESH_TOKEN)
    revoke(alice, renewed.tokens.refresh, client_id="http://localhost")
    revoke(replace(alice, client=server.client()), renewed.tokens.refresh)
    form = {"token": renewed.tokens.refresh, "client_id": alice.client.client_id}
    without_proof = requests.post(f"{server.url}/oauth/revoke", data=form, timeout=PATIENCE)
    assert (without_proof.status_code, without_proof.json()) == (200, {})
    assert_session_lives(renewed)


# Records


NOTES = "com.example.note"
NOTE = {"text": "häuser", "n": [0, 23, 24, -70000, 2**40], "more": [True, None, {"bb": "c", "a": "b", "aa": 1}]}
NO_BLOB = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"


def repo(alice: LoggedIn, method: str, **body: Any) -> requests.Response:
    """A procedure of ``com.atproto.repo``."""
    path = f"/xrpc/com.atproto.repo.{method}"
    body = {"repo": alice.account.did, "collection": NOTES, **body}
    return alice.client.call(alice.client.issuer, path, alice.tokens.access, method="POST", json=body)


def ask(server: Server, method: str, **params: Any) -> requests.Response:
    """A query that needs no token."""
    return requests.get(f"{server.url}/xrpc/com.atproto.{method}", params=params, timeout=PATIENCE)


def test_records_are_written_and_read(server: Server, alice: LoggedIn) -> None:
    place = {"repo": alice.account.handle, "collection": NOTES}
    written = repo(alice, "createRecord", rkey="one", record={**NOTE, "b": {"$bytes": "aGk"}}).json()
    uri = f"at://{alice.account.did}/{NOTES}/one"
    # The CID is that of the same record on any PDS.
    cid = "bafyreihbrasnxldzsanlkdsvuvraaheaitcblg5pgfqcoekh5dsp5zmuk4"
    assert (written["uri"], written["cid"], written["validationStatus"]) == (uri, cid, "unknown")
    assert {*written["commit"]} == {"cid", "rev"}
    found = ask(server, "repo.getRecord", **place, rkey="one").json()
    assert found == {"uri": uri, "cid": cid, "value": {"$type": NOTES, **NOTE, "b": {"$bytes": "aGk"}}}
    assert ask(server, "repo.getRecord", **place, rkey="one", cid=NO_BLOB).status_code == 400

    changed = repo(alice, "putRecord", rkey="one", record={"text": "2"}, swapRecord=cid).json()
    assert ask(server, "repo.getRecord", **place, rkey="one").json()["cid"] == changed["cid"]
    refused = repo(alice, "putRecord", rkey="one", record={"text": "3"}, swapRecord=cid)
    assert (refused.status_code, error_of(refused)) == (400, ("InvalidSwap", f"Record was at {changed['cid']}"))

    later = repo(alice, "createRecord", record={"text": "3"}).json()["uri"]
    latest = repo(alice, "createRecord", record={"text": "4"}).json()["uri"]
    assert re.fullmatch("[2-7a-z]{13}", latest.rpartition("/")[2])
    assert later < latest

    def listed(**params: Any) -> list[str]:
        page = ask(server, "repo.listRecords", **place, **params).json()
        return [record["uri"].rpartition("/")[2] for record in page["records"]] + [page.get("cursor")]

    first, second = later.rpartition("/")[2], latest.rpartition("/")[2]
    assert listed() == ["one", second, first, first]
    assert listed(limit=1) == ["one", "one"]
    assert listed(limit=1, cursor="one") == [second, second]
    assert listed(reverse="true", cursor=first) == [second, "one", "one"]
    for rkey in ("one", first, second):
        assert {*repo(alice, "deleteRecord", rkey=rkey).json()} == {"commit"}
        assert repo(alice, "deleteRecord", rkey=rkey).json() == {}
    assert listed() == [None]
    gone = ask(server, "repo.getRecord", **place, rkey="one")
    assert (gone.status_code, error_of(gone)) == (400, ("RecordNotFound", f"Could not locate record: {uri}"))


def test_blobs_are_kept(server: Server, alice: LoggedIn) -> None:
    path, headers = "/xrpc/com.atproto.repo.uploadBlob", {"Content-Type": "image/png"}
    answer = alice.client.call(
        alice.client.issuer, path, alice.tokens.access, method="POST", data=b"\x89PNG\r\n", headers=headers
    )
    blob = answer.json()["blob"]
    cid = blob["ref"]["$link"]
    assert blob == {"$type": "blob", "ref": {"$link": cid}, "mimeType": "image/png", "size": 6}
    assert cid == "bafkreiechtvzt7hpkjjdgpw6dmraena4hmuhw3khk4mwhzvq3xzzhispqi"
    assert repo(alice, "createRecord", rkey="blob", record={"image": blob}).status_code == 200
    found = ask(server, "sync.getBlob", did=alice.account.did, cid=cid)
    assert (found.content, found.headers["Content-Type"]) == (b"\x89PNG\r\n", "image/png")
    missing = ask(server, "sync.getBlob", did=alice.account.did, cid=NO_BLOB)
    assert (missing.status_code, error_of(missing)) == (400, ("InvalidRequest", "Blob not found"))
    repo(alice, "deleteRecord", rkey="blob")


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"repo": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"}, 403, "AccountNotFound"),
        ({"repo": None}, 400, "InvalidRequest"),
        ({"collection": "nonsense"}, 400, "InvalidRequest"),
        ({"rkey": "a/b"}, 400, "InvalidRequest"),
        ({"record": "text"}, 400, "InvalidRequest"),
        ({"record": {"$type": "com.example.other"}}, 400, "InvalidRequest"),
        ({"record": {"number": 1.5}}, 400, "InvalidRequest"),
    ],
)
def test_records_that_cannot_be_are_refused(
    server: Server, alice: LoggedIn, body: dict[str, Any], status: int, error: str
) -> None:
    answer = repo(alice, "createRecord", **{"record": {}, **body})
    assert (answer.status_code, error_of(answer)[0]) == (status, error)


def test_others_keep_their_records(server: Server, alice: LoggedIn) -> None:
    answer = repo(alice, "createRecord", repo=server.create_account().did, record={})
    assert (answer.status_code, error_of(answer)[0]) == (401, "AuthenticationRequired")


def test_what_is_asked_in_a_wrong_way_is_refused(server: Server, alice: LoggedIn) -> None:
    place = {"repo": alice.account.did, "collection": NOTES}
    for answer in (
        ask(server, "repo.getRecord", collection=NOTES, rkey="one"),
        ask(server, "repo.getRecord", repo="nobody.test", collection=NOTES, rkey="one"),
        ask(server, "repo.listRecords", **place, limit=0),
        ask(server, "repo.listRecords", **place, limit="many"),
        call_path(alice, "/xrpc/com.atproto.repo.createRecord"),
    ):
        assert (answer.status_code, error_of(answer)[0]) == (400, "InvalidRequest"), answer.url


def call_path(alice: LoggedIn, path: str) -> requests.Response:
    return alice.client.call(alice.client.issuer, path, alice.tokens.access)


@pytest.mark.parametrize(
    ("granted", "works"),
    [
        ("atproto", False),
        ("atproto repo:com.example.note", True),
        ("atproto repo:*?action=create&action=update", True),
        ("atproto repo?collection=com.example.other&collection=com.example.note", True),
        ("atproto repo:com.example.note?action=delete", False),
        ("atproto repo:com.example.other blob:*/*", False),
    ],
)
def test_a_scope_lets_write(server: Server, granted: str, works: bool) -> None:
    query = urlencode({"redirect_uri": REDIRECT_URI, "scope": granted})
    client = RawClient(server.url, client_id=f"http://localhost?{query}")
    callback = server.network.authorize(client.authorize_url(scope=granted), server.account)
    tokens = tokens_of(client.exchange(query_of(callback)["code"]))
    answer = repo(LoggedIn(server.account, client, tokens), "createRecord", record={"text": "mine"})
    assert answer.status_code == (200 if works else 403)
    if not works:
        scope = f"repo:{NOTES}?action=create"
        assert error_of(answer) == ("ScopeMissingError", f'Missing required scope "{scope}"')
