"""A confidential client on the local network: keys, their rotation, and what happens without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jwt
import pytest

from atproto_session import (
    AuthMethodUnsatisfiableError,
    ClientAuthMethod,
    ClientMetadata,
    ClientMetadataError,
    Keyset,
    OAuthClient,
    OAuthResponseError,
)
from atproto_session.keys import generate_jwk
from atproto_session.testing.network import Account, LocalNetwork

from ..core import RESTLESS
from ..scenes import GET_SESSION, log_in

CLIENT_ID = "https://app.example.com/client-metadata.json"
JWKS_URI = "https://app.example.com/jwks.json"

ONE = generate_jwk() | {"kid": "one"}
TWO = generate_jwk() | {"kid": "two"}


class Application:
    """A web application, deployed again and again with other keys over one store."""

    def __init__(self, network: LocalNetwork, store: str, *, by_uri: bool = False) -> None:
        self.network = network
        self.store = store
        self.by_uri = by_uri

    def deploy(self, *keys: dict[str, str], published: Keyset | None = None) -> OAuthClient:
        keyset = Keyset(keys)
        metadata = ClientMetadata(
            client_id=CLIENT_ID,
            redirect_uris=("https://app.example.com/callback",),
            scope="atproto transition:generic",
            token_endpoint_auth_method="private_key_jwt",
            token_endpoint_auth_signing_alg="ES256",
            jwks_uri=JWKS_URI if self.by_uri else None,
            jwks=None if self.by_uri else (published or keyset).jwks(),
        )
        options = {"times": RESTLESS, **self.network.client_options()}
        client = OAuthClient(metadata, store=self.store, keyset=keyset, **options)
        self.network.publish(CLIENT_ID, client.metadata_document())
        self.network.publish(JWKS_URI, client.jwks())
        return client


@pytest.fixture(params=[False, True], ids=["jwks", "jwks_uri"])
def application(request: pytest.FixtureRequest, network: LocalNetwork, tmp_path: Path) -> Application:
    return Application(network, f"sqlite:///{tmp_path}/sessions.db", by_uri=request.param)


@pytest.mark.duty(18, 20, 23, 29)
def test_a_whole_life(application: Application, network: LocalNetwork, account: Account) -> None:
    with application.deploy(ONE) as client:
        log_in(network, client, account)
        session = client.restore(account.did, refresh=True)
        assert session.get(GET_SESSION).status_code == 200
        stored = client.sessions.get_session(account.did)
        assert stored.auth_method == ClientAuthMethod("private_key_jwt", "one")
        session.sign_out()
        assert network.revocations == 1


@pytest.mark.duty(20)
def test_what_is_served_is_public(application: Application) -> None:
    with application.deploy(ONE, TWO) as client:
        served = str(client.metadata_document()) + str(client.jwks())
        assert [key["kid"] for key in client.jwks()["keys"]] == ["one", "two"]
    for key in (ONE, TWO):
        assert key["x"] in served
        assert key["d"] not in served


@pytest.mark.duty(27, 29)
def test_every_try_has_an_assertion_and_a_proof_of_its_own(
    application: Application, network: LocalNetwork, account: Account
) -> None:
    seen: list[tuple[str, str]] = []
    with application.deploy(ONE) as client:
        send = client._transport.request

        def spy(method: str, url: str, **options: Any) -> Any:
            if method == "POST":
                seen.append((options["data"]["client_assertion"], options["headers"]["DPoP"]))
            return send(method, url, **options)

        client._transport.request = spy  # type: ignore[method-assign]
        url = client.authorize(account.did)
        network.fault("token", "nonce_challenge")
        client.callback(network.authorize(url, account))
        network.fault("refresh", "nonce_challenge")
        client.restore(account.did, refresh=True)
        network.fault("revoke", "nonce_challenge")
        client.revoke(account.did)
    assert len(seen) == 8, "four requests, each tried twice"
    assert len({proof for _, proof in seen}) == 8
    claims = [jwt.decode(assertion, options={"verify_signature": False}) for assertion, _ in seen]
    assert len({claim["jti"] for claim in claims}) == len(claims)
    for claim in claims:
        assert claim["iss"] == claim["sub"] == CLIENT_ID
        assert claim["aud"] == network.issuer


@pytest.mark.duty(30)
def test_keys_rotate(application: Application, network: LocalNetwork, account: Account) -> None:
    bob = network.create_account()
    with application.deploy(ONE) as client:
        log_in(network, client, account)
    with application.deploy(TWO, ONE) as client:
        log_in(network, client, bob)
        client.restore(account.did, refresh=True)
        client.restore(bob.did, refresh=True)
        kids = {did: client.sessions.get_session(did).auth_method for did in (account.did, bob.did)}
    assert kids[account.did] == ClientAuthMethod("private_key_jwt", "one"), "the key that it began with"
    assert kids[bob.did] == ClientAuthMethod("private_key_jwt", "two"), "the first"


@pytest.mark.duty(30)
def test_a_lost_key_keeps_the_session(application: Application, network: LocalNetwork, account: Account) -> None:
    with application.deploy(ONE) as client:
        log_in(network, client, account)
    with application.deploy(TWO) as client:
        with pytest.raises(AuthMethodUnsatisfiableError, match="one") as caught:
            client.restore(account.did, refresh=True)
        assert not caught.value.login_required
        assert client.restore(account.did).get(GET_SESSION).status_code == 200, "its access token is still good"
    assert network.token_requests == 1, "only the log-in"
    with application.deploy(TWO, ONE) as client:
        client.restore(account.did, refresh=True)


def test_a_key_that_is_not_published_keeps_the_session(network: LocalNetwork, account: Account, tmp_path: Path) -> None:
    application = Application(network, f"sqlite:///{tmp_path}/sessions.db", by_uri=True)
    with application.deploy(ONE) as client:
        log_in(network, client, account)
    with application.deploy(ONE) as client:
        network.publish(JWKS_URI, Keyset([TWO]).jwks())
        with pytest.raises(OAuthResponseError) as caught:
            client.restore(account.did, refresh=True)
        assert caught.value.error == "invalid_client"
        network.publish(JWKS_URI, client.jwks())
        client.restore(account.did, refresh=True)
    assert network.rotations == 1


@pytest.mark.parametrize(
    ("keys", "method"), [((), "private_key_jwt"), ((ONE,), "none")], ids=["no key", "a key for nothing"]
)
def test_metadata_and_keys_that_do_not_fit(keys: tuple[dict[str, str], ...], method: Any) -> None:
    options: dict[str, Any] = (
        {} if method == "none" else {"token_endpoint_auth_signing_alg": "ES256", "jwks_uri": JWKS_URI}
    )
    metadata = ClientMetadata(
        client_id=CLIENT_ID,
        redirect_uris=("https://app.example.com/callback",),
        token_endpoint_auth_method=method,
        **options,
    )
    with pytest.raises(ClientMetadataError):
        OAuthClient(metadata, store="memory:", keyset=Keyset(keys) if keys else None)
