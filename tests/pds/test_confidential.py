"""A confidential client against the real PDS, which fetches what the client publishes.

It does so by https alone, from port 443, and not from hosts that are nobody's or that documentation uses (``.test``,
``example.com``). So the tests bring a web site on the loopback, under a name that exists nowhere else (``.internal``),
with a certificate from an authority of their own that the PDS's process trusts; that process's connections to the site
are led to whatever port it has, since port 443 and the hosts file are root's (``serve.mjs``). The address is the one
thing that is not checked: like everything else here it is on the loopback, which the PDS allows in ``devMode``.

The PDS remembers what it fetched for ten minutes. Every test is a client of its own, and lets the PDS forget it where
those ten minutes are to have passed.
"""

from __future__ import annotations

import json
import secrets
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from atproto_session import (
    AuthMethodUnsatisfiableError,
    ClientAuthMethod,
    ClientMetadata,
    Keyset,
    OAuthClient,
    OAuthResponseError,
    OAuthSession,
    SessionDeletedEvent,
    TokenRefreshError,
    TokenRevokedError,
)
from atproto_session.keys import generate_jwk
from atproto_session.testing.network import Account
from tests.crew import Crew
from tests.loopback import ScriptedServer, Web, answer
from tests.network.raw import SCOPE
from tests.pds.by_hand import take_over
from tests.pds.harness import RealPDS
from tests.pds.proxy import Refresh
from tests.scenes import GET_SESSION, store_tokens, stored

from ..core import RESTLESS

HOST = "app.atproto-session.internal"
PROCESSES, THREADS, ROUNDS = 4, 8, 3

ONE = generate_jwk() | {"kid": "one"}
TWO = generate_jwk() | {"kid": "two"}
OTHER_ONE = generate_jwk() | {"kid": "one"}


@contextmanager
def web_site(pds: RealPDS, host: str, web: Web, certificate: trustme.LeafCert) -> Iterator[ScriptedServer]:
    """Have the PDS find ``web`` at ``https://host``."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(tls)
    with ScriptedServer(web.script, tls) as server:
        pds.route(host, server.port)
        yield server


@pytest.fixture(scope="module")
def web(real_pds: RealPDS) -> Iterator[Web]:
    web = Web()
    with web_site(real_pds, HOST, web, real_pds.ca.issue_cert(HOST)):
        yield web


class Application:
    """A web application, deployed again and again with other keys over one store."""

    def __init__(self, pds: RealPDS, web: Web, store: str, *, host: str = HOST, by_uri: bool = False) -> None:
        home = f"https://{host}/{secrets.token_hex(8)}"
        self.pds = pds
        self.store = store
        self.metadata = ClientMetadata(
            client_id=f"{home}/client-metadata.json",
            client_name="Library tests",
            client_uri=home,
            logo_uri=f"{home}/logo.png",
            tos_uri=f"{home}/terms",
            policy_uri=f"{home}/policy",
            redirect_uris=(f"{home}/callback",),
            scope=SCOPE,
            token_endpoint_auth_method="private_key_jwt",
            jwks_uri=f"{home}/jwks.json" if by_uri else None,
        )
        self.urls = [url for url in (self.metadata.client_id, self.metadata.jwks_uri) if url]
        self._web = web

    def deploy(self, *keys: dict[str, str]) -> OAuthClient:
        """The application with these keys, and its documents where they belong."""
        options = {"times": RESTLESS, **self.pds.client_options()}
        client = OAuthClient(self.metadata, store=self.store, keyset=Keyset(keys), **options)
        self.serve(client.metadata_document(), client.jwks())
        return client

    def publish(self, *keys: dict[str, str]) -> None:
        """The documents of an application with these keys, whatever it really has."""
        keyset = Keyset(keys)
        self.serve(self.metadata.document(keyset), keyset.jwks())

    def serve(self, *documents: dict[str, Any]) -> None:
        for url, document in zip(self.urls, documents, strict=False):
            body = json.dumps(document).encode()
            self._answer(url, answer(200, body, content_type="application/json", connection="close"))

    def go_away(self) -> None:
        for url in self.urls:
            self._answer(url, answer(503, connection="close"))

    def let_ten_minutes_pass(self) -> None:
        self.pds.forget(*self.urls)

    def fetched(self) -> list[str]:
        """What the PDS has fetched of it so far."""
        return [f"https://{key}" for key in self._web.asked if f"https://{key}" in self.urls]

    def _answer(self, url: str, whole: bytes) -> None:
        self._web.answers[url.removeprefix("https://")] = whole


@pytest.fixture
def application(real_pds: RealPDS, web: Web, tmp_path: Path) -> Application:
    return Application(real_pds, web, f"sqlite:///{tmp_path}/sessions.db")


@pytest.fixture(params=[False, True], ids=["jwks", "jwks_uri"])
def either_way(request: pytest.FixtureRequest, real_pds: RealPDS, web: Web, tmp_path: Path) -> Application:
    """An application that publishes its keys in its metadata, or at a URL of their own."""
    return Application(real_pds, web, f"sqlite:///{tmp_path}/sessions.db", by_uri=request.param)


def log_in(pds: RealPDS, client: OAuthClient, account: Account) -> OAuthSession:
    session = client.callback(pds.authorize(client.authorize(account.handle), account)).session
    pds.proxy.reset()
    return session


# A session's life


@pytest.mark.duty(18, 20, 29)
def test_an_account_logs_in_and_stays_logged_in(
    either_way: Application, real_pds: RealPDS, pds_account: Account
) -> None:
    did = pds_account.did
    with either_way.deploy(ONE) as client:
        assert either_way.fetched() == []
        session = log_in(real_pds, client, pds_account)
        first = stored(client, did)
        assert first.auth_method == ClientAuthMethod("private_key_jwt", "one")
        assert session.get(GET_SESSION).json()["handle"] == pds_account.handle
        assert set(session.token_info().scope.split()) == set(SCOPE.split())

        client.restore(did, refresh=True)
        # Dead since that refresh, and taken for good by a worker that has not heard of it.
        store_tokens(client, did, access_token=first.token_set.access_token)
        assert session.get(GET_SESSION).status_code == 200
        assert [refresh.status for refresh in real_pds.proxy.refreshes()] == [200, 200]
        assert len(set(real_pds.proxy.refresh_tokens())) == 2
        assert stored(client, did).auth_method == first.auth_method
    assert either_way.fetched() == either_way.urls, "each once"


@pytest.mark.duty(29, 38)
@pytest.mark.parametrize("way", ["revoke", "sign_out"])
def test_signing_out_ends_the_session_here_and_there(
    application: Application, real_pds: RealPDS, pds_account: Account, way: str
) -> None:
    deletions: list[SessionDeletedEvent] = []
    with application.deploy(ONE) as client:
        session = log_in(real_pds, client, pds_account)
        client.sessions.on_deleted(deletions.append)
        by_hand = take_over(client, pds_account)
        if way == "revoke":
            client.revoke(session.did)
        else:
            session.sign_out()
        assert client.sessions.get_stored(session.did) is None
    assert [type(event.cause) for event in deletions] == [TokenRevokedError]
    assert by_hand.client.call(real_pds.pds_url, GET_SESSION, by_hand.tokens.access).status_code == 401


@pytest.mark.duty(36)
def test_sessions_outlive_those_of_public_clients(
    application: Application, real_pds: RealPDS, client: OAuthClient, session: OAuthSession, pds_account: Account
) -> None:
    """Two weeks are the end of a public client's session, however busy it is. This one lives on for years, and after
    three months of silence."""
    day = timedelta(days=1)
    did = session.did
    real_pds.age(pds_account, begun=15 * day, refreshed=0 * day)
    with pytest.raises(TokenRefreshError) as caught:
        client.restore(did, refresh=True)
    assert "Session expired" in str(caught.value.__cause__)

    with application.deploy(ONE) as client:
        log_in(real_pds, client, pds_account)
        for begun, idle in [(15, 15), (700, 90)]:
            real_pds.age(pds_account, begun=begun * day, refreshed=idle * day)
            client.restore(did, refresh=True)
        real_pds.age(pds_account, begun=700 * day, refreshed=92 * day)
        with pytest.raises(TokenRefreshError) as caught:
            client.restore(did, refresh=True)
        assert "Refresh token expired" in str(caught.value.__cause__)
        assert client.sessions.get_stored(did) is None


@pytest.mark.duty(36)
def test_a_session_that_is_kept_alive_outlives_its_refresh_token(
    application: Application, real_pds: RealPDS, pds_account: Account
) -> None:
    day = timedelta(days=1)
    with application.deploy(ONE) as client:
        log_in(real_pds, client, pds_account)

        def idle_for(days: int) -> None:
            real_pds.age(pds_account, begun=500 * day, refreshed=days * day)
            session = client.sessions.get_stored(pds_account.did)
            assert session is not None
            aged = replace(session, refreshed_at=time.time() - days * day.total_seconds())
            assert client._store.replace(pds_account.did, aged, session)

        for _ in range(2):  # half a year without anybody who uses it
            idle_for(89)
            (result,) = client.keep_alive()
            assert (result.outcome, result.error) == ("refreshed", None)
            assert client.keep_alive() == []
        idle_for(92)
        (result,) = client.keep_alive()
        assert result.outcome == "ended"
        assert "Refresh token expired" in str(result.error)
        assert list(client.accounts()) == []


@pytest.mark.duty(29, 35)
def test_a_herd_of_threads_and_processes_refreshes_once(
    application: Application, real_pds: RealPDS, pds_account: Account
) -> None:
    did, options = pds_account.did, real_pds.client_options()
    with application.deploy(TWO, ONE) as client:
        log_in(real_pds, client, pds_account)
        setup: dict[str, Any] = {"metadata": client.metadata_document(), "jwks": {"keys": [TWO, ONE]}}
        with Crew(application.store, did, options, processes=PROCESSES, **setup) as crew:
            for round_ in range(ROUNDS):
                store_tokens(client, did, expires_at=datetime.fromtimestamp(1, UTC))
                assert set(crew.do("request", threads=THREADS)) == {did}
                assert len(real_pds.proxy.refreshes()) == round_ + 1
    assert {refresh.status for refresh in real_pds.proxy.refreshes()} == {200}
    assert len(set(real_pds.proxy.refresh_tokens())) == ROUNDS


# Keys come and go


@pytest.mark.duty(30)
def test_keys_rotate(application: Application, real_pds: RealPDS, pds_account: Account) -> None:
    alice, bob = pds_account, real_pds.create_account()
    with application.deploy(ONE) as client:
        log_in(real_pds, client, alice)
    # Published first, and used only when every server has heard of it.
    with application.deploy(ONE, TWO):
        application.let_ten_minutes_pass()
    with application.deploy(TWO, ONE) as client:
        log_in(real_pds, client, bob)
        for account, kid in [(alice, "one"), (bob, "two")]:
            client.restore(account.did, refresh=True)
            assert stored(client, account.did).auth_method == ClientAuthMethod("private_key_jwt", kid)
    assert [refresh.status for refresh in real_pds.proxy.refreshes()] == [200, 200]


@pytest.mark.duty(30)
def test_a_key_that_signs_before_it_is_known_lets_nobody_log_in(
    either_way: Application, real_pds: RealPDS, pds_account: Account
) -> None:
    """For ten minutes: the server does not look again when it sees a key that it does not know."""
    with either_way.deploy(ONE) as client:
        log_in(real_pds, client, pds_account)
    with either_way.deploy(TWO, ONE) as client:
        with pytest.raises(OAuthResponseError) as caught:
            client.authorize(pds_account.handle)
        assert (caught.value.status, caught.value.error) == (400, "invalid_client")
        client.restore(pds_account.did, refresh=True)

        either_way.let_ten_minutes_pass()
        log_in(real_pds, client, pds_account)
        assert stored(client, pds_account.did).auth_method == ClientAuthMethod("private_key_jwt", "two")


@pytest.mark.duty(30)
def test_a_lost_key_keeps_the_session(application: Application, real_pds: RealPDS, pds_account: Account) -> None:
    did = pds_account.did
    with application.deploy(ONE) as client:
        log_in(real_pds, client, pds_account)
        before = stored(client, did)
    with application.deploy(TWO) as client:
        application.let_ten_minutes_pass()
        with pytest.raises(AuthMethodUnsatisfiableError, match="one") as caught:
            client.restore(did, refresh=True)
        assert not caught.value.login_required
        assert stored(client, did).token_set == before.token_set
        assert client.restore(did).get(GET_SESSION).status_code == 200, "its access token is still good"
    assert real_pds.proxy.refreshes() == []
    with application.deploy(TWO, ONE) as client:
        application.let_ten_minutes_pass()
        client.restore(did, refresh=True)
    assert real_pds.proxy.refreshes() == [Refresh(before.token_set.refresh_token or "", 200)]


@pytest.mark.duty(30)
def test_a_key_that_is_not_published_keeps_the_session(
    application: Application, real_pds: RealPDS, pds_account: Account
) -> None:
    did = pds_account.did
    with application.deploy(ONE) as client:
        log_in(real_pds, client, pds_account)
        before = stored(client, did)
        application.publish(TWO)
        application.let_ten_minutes_pass()
        with pytest.raises(OAuthResponseError) as caught:
            client.restore(did, refresh=True)
        assert (caught.value.status, caught.value.error) == (400, "invalid_client")
        assert "no applicable key found" in (caught.value.error_description or "")
        assert not caught.value.login_required
        assert stored(client, did).token_set == before.token_set
        assert stored(client, did).attempt is None, "nothing is in doubt"

        application.publish(ONE)
        application.let_ten_minutes_pass()
        client.restore(did, refresh=True)
    token = before.token_set.refresh_token or ""
    assert real_pds.proxy.refreshes() == [Refresh(token, 400), Refresh(token, 200)]


@pytest.mark.duty(20)
def test_a_kid_that_gets_another_key_ends_its_sessions(
    application: Application, real_pds: RealPDS, pds_account: Account
) -> None:
    """That is the server's doing, and the reason why a ``kid`` is never used again."""
    did = pds_account.did
    with application.deploy(ONE) as client:
        log_in(real_pds, client, pds_account)
        by_hand = take_over(client, pds_account)
    with application.deploy(OTHER_ONE) as client:
        application.let_ten_minutes_pass()
        with pytest.raises(TokenRefreshError) as caught:
            client.restore(did, refresh=True)
        assert "a different key" in str(caught.value.__cause__)
        assert client.sessions.get_stored(did) is None
    assert by_hand.client.call(real_pds.pds_url, GET_SESSION, by_hand.tokens.access).status_code == 401


# The PDS fetches for itself


def test_a_site_that_is_away_keeps_the_session(
    application: Application, real_pds: RealPDS, pds_account: Account
) -> None:
    did = pds_account.did
    with application.deploy(ONE) as client:
        log_in(real_pds, client, pds_account)
        application.go_away()
        client.restore(did, refresh=True)
        before = stored(client, did)

        application.let_ten_minutes_pass()
        with pytest.raises(OAuthResponseError) as caught:
            client.restore(did, refresh=True)
        assert (caught.value.status, caught.value.error) == (400, "invalid_client_metadata")
        assert stored(client, did).token_set == before.token_set
        assert client.restore(did).get(GET_SESSION).status_code == 200, "the PDS needs no metadata for that"

        application.publish(ONE)
        client.restore(did, refresh=True)


@pytest.mark.parametrize("fault", ["authority", "name", "host"])
def test_the_pds_makes_sure_whom_it_fetches_from(
    real_pds: RealPDS, pds_account: Account, tmp_path: Path, fault: str
) -> None:
    """So that what the other tests show counts outside of them too."""
    host = "www.example.com" if fault == "host" else f"{fault}.atproto-session.internal"
    ca = trustme.CA() if fault == "authority" else real_pds.ca
    certificate = ca.issue_cert(HOST if fault == "name" else host)
    web = Web()
    application = Application(real_pds, web, f"sqlite:///{tmp_path}/sessions.db", host=host)
    with web_site(real_pds, host, web, certificate) as server, application.deploy(ONE) as client:
        with pytest.raises(OAuthResponseError) as caught:
            client.authorize(pds_account.handle)
        assert (caught.value.status, caught.value.error) == (400, "invalid_client_metadata")
        assert bool(server.accepted) == (fault != "host")
        assert web.asked == []
