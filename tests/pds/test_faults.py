"""How a refresh may end: what the real PDS can show of it, with faults in front of its token endpoint. Each test looks
at what is stored afterwards, and at what the server makes of it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from atproto_session import (
    Freshness,
    LockTimeoutError,
    OAuthClient,
    OAuthResponseError,
    OAuthSession,
    RefreshInterruptedError,
    Session,
    SessionError,
    SessionNotFoundError,
    SQLiteStore,
    StoreError,
    TokenRefreshError,
    TokenRevokedError,
    TransportError,
)
from atproto_session._terms import Times
from atproto_session.server import AuthorizationServer
from atproto_session.session import TokenSet
from atproto_session.testing.network import Account
from tests.core import SOON, Worker, an_answer_within
from tests.loopback import closed_port
from tests.network.raw import LoggedIn, error_of
from tests.pds import proxy
from tests.pds.harness import Browser, RealPDS
from tests.pds.proxy import Action, Refresh
from tests.scenes import GET_SESSION, stored

from ..core import RESTLESS

TOKEN = "/oauth/token"


class Clock:
    """The library's idea of the time, which a test may change."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@contextmanager
def another_worker(pds: RealPDS, client: OAuthClient, store: Any, **options: Any) -> Iterator[OAuthClient]:
    """A second client of the same application."""
    options = {"times": RESTLESS, **pds.client_options(), **options}
    with OAuthClient(client.metadata, store=store, **options) as worker:
        yield worker


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The store of ``client``."""
    return f"sqlite:///{tmp_path}/sessions.db"


def refresh(client: OAuthClient, did: str, **options: Any) -> Session:
    return client.sessions.get_session(did, True, **options)


def spends(pds: RealPDS) -> list[int | None]:
    """What the server answered to each refresh, whatever arrived of it."""
    return [refresh.status for refresh in pds.proxy.refreshes()]


def assert_kept(client: OAuthClient, before: Session, *, in_doubt: bool) -> None:
    """The session is stored as it was, but for the trace of an attempt that may have spent its token."""
    now = stored(client, before.token_set.sub)
    assert now.token_set.has_same_tokens(before.token_set)
    assert (now.attempt is not None) is in_doubt


def assert_works(client: OAuthClient, did: str) -> None:
    """It is stored with no doubt left, and the server agrees."""
    session = stored(client, did)
    assert session.attempt is None
    assert client.restore(did).get(GET_SESSION).json()["did"] == did


def assert_lost(client: OAuthClient, pds: RealPDS, by_hand: LoggedIn) -> None:
    """The next refresh finds out that an answer was lost, says so, and ends the session."""
    did = by_hand.account.did
    with pytest.raises(TokenRefreshError) as caught:
        client.restore(did, refresh=True)
    assert caught.value.answer_lost
    assert caught.value.login_required
    assert client.sessions.get_stored(did) is None
    assert pds.proxy.refreshes() == [Refresh(by_hand.tokens.refresh, 200), Refresh(by_hand.tokens.refresh, 400)]
    with pytest.raises(SessionNotFoundError):
        client.restore(did)


# Nothing was sent


@pytest.mark.parametrize("path", ["/.well-known/oauth-protected-resource", "/.well-known/oauth-authorization-server"])
@pytest.mark.parametrize(
    ("action", "times"), [(proxy.cut_before(), 1), (proxy.status_before(503), 2)], ids=["cut", "503 twice"]
)
def test_a_server_that_cannot_be_found_costs_nothing(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, store: str, path: str, action: Action, times: int
) -> None:
    before = stored(client, session.did)
    real_pds.proxy.arm(path, action, times)
    with another_worker(real_pds, client, store) as worker:  # has no metadata of before
        with pytest.raises(SessionError) as caught:
            refresh(worker, session.did)
        assert caught.value.retryable
        assert not caught.value.login_required
        assert_kept(worker, before, in_doubt=False)
        assert real_pds.proxy.count(TOKEN) == 0

        refresh(worker, session.did)
        assert spends(real_pds) == [200]
        assert_works(worker, session.did)


def test_a_request_that_was_never_sent_costs_nothing(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, store: str
) -> None:
    """A token endpoint where nobody listens."""
    before = stored(client, session.did)
    with closed_port() as port, another_worker(real_pds, client, store) as worker:
        elsewhere = proxy.changed_after(token_endpoint=f"http://localhost:{port}{TOKEN}")
        real_pds.proxy.arm("/.well-known/oauth-authorization-server", elsewhere)
        with pytest.raises(TransportError) as caught:
            refresh(worker, session.did)
    assert caught.value.retryable
    assert not caught.value.sent
    assert_kept(client, before, in_doubt=False)
    assert real_pds.proxy.count(TOKEN) == 0

    refresh(client, session.did)
    assert spends(real_pds) == [200]
    assert_works(client, session.did)


# The server has not seen it


def test_a_request_that_was_cut_off_may_have_been_processed_but_was_not(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession
) -> None:
    before = stored(client, session.did)
    real_pds.proxy.arm(TOKEN, proxy.cut_before())
    with pytest.raises(RefreshInterruptedError) as caught:
        refresh(client, session.did)
    assert caught.value.retryable
    assert_kept(client, before, in_doubt=True)
    assert_that_it_answers(session)

    refresh(client, session.did)
    assert spends(real_pds) == [None, 200]
    assert_works(client, session.did)


def assert_that_it_answers(session: OAuthSession) -> None:
    """Doubt about a refresh token keeps nobody from using a good access token."""
    assert session.get(GET_SESSION).status_code == 200


def test_a_gateway_error_leaves_a_doubt(real_pds: RealPDS, client: OAuthClient, session: OAuthSession) -> None:
    before = stored(client, session.did)
    real_pds.proxy.arm(TOKEN, proxy.status_before(503))
    with pytest.raises(OAuthResponseError) as caught:
        refresh(client, session.did)
    assert (caught.value.status, caught.value.retryable) == (503, True)
    assert_kept(client, before, in_doubt=True)
    assert_that_it_answers(session)

    refresh(client, session.did)
    assert spends(real_pds) == [None, 200]
    assert_works(client, session.did)


@pytest.mark.duty(40)
def test_a_server_that_asks_for_patience_gets_it(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, store: str
) -> None:
    before = stored(client, session.did)
    clock = Clock(time.time())
    with another_worker(real_pds, client, store, freshness=Freshness(clock=clock)) as worker:
        real_pds.proxy.arm(TOKEN, proxy.status_before(429, {"Retry-After": "7"}))
        with pytest.raises(OAuthResponseError) as caught:
            refresh(worker, session.did)
        assert (caught.value.status, caught.value.retryable, caught.value.retry_after) == (429, True, 7)
        assert_kept(worker, before, in_doubt=False)
        assert stored(worker, session.did).rest.until == clock.now + 7  # type: ignore[union-attr]

        clock.now += 6
        with pytest.raises(OAuthResponseError) as caught:
            refresh(worker, session.did)
        assert caught.value.retry_after == pytest.approx(1)
        assert real_pds.proxy.count(TOKEN) == 1

        clock.now += 2
        refresh(worker, session.did)
        assert spends(real_pds) == [None, 200]
        assert stored(worker, session.did).rest is None
        assert_works(worker, session.did)


def test_another_oauth_error_spends_nothing(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose clock is an hour ahead: the server refuses its proofs."""
    before = stored(client, session.did)
    ahead = Clock(time.time() + 3600)
    with monkeypatch.context() as patch:
        patch.setattr("atproto_session.server.AuthorizationServer", partial(AuthorizationServer, clock=ahead))
        with another_worker(real_pds, client, store) as worker, pytest.raises(OAuthResponseError) as caught:
            refresh(worker, session.did)
    assert (caught.value.status, caught.value.error) == (401, "invalid_dpop_proof")
    assert re.search(r"the clock of this machine is 3[56]\d\d s ahead of the server's", str(caught.value))
    assert not caught.value.login_required
    assert_kept(client, before, in_doubt=False)

    refresh(client, session.did)
    assert spends(real_pds) == [401, 200]
    assert_works(client, session.did)


@pytest.mark.duty(27)
@pytest.mark.parametrize("nonce", [None, "made-up"])
def test_a_demand_for_a_nonce_is_no_spend(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, store: str, nonce: str | None
) -> None:
    with another_worker(real_pds, client, store) as worker:
        if nonce is not None:
            worker._nonces.set(real_pds.pds_url, nonce)
        refresh(worker, session.did)
        assert real_pds.proxy.count(TOKEN) == 2
        assert spends(real_pds) == [200]
        assert_works(worker, session.did)


def test_a_demand_for_a_nonce_each_time_spends_nothing(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession
) -> None:
    """A second one is not met any more."""
    before = stored(client, session.did)
    real_pds.proxy.arm(TOKEN, proxy.nonce_before(), times=2)
    with pytest.raises(OAuthResponseError) as caught:
        refresh(client, session.did)
    assert (caught.value.status, caught.value.error) == (400, "use_dpop_nonce")
    assert not caught.value.login_required
    assert_kept(client, before, in_doubt=False)
    assert spends(real_pds) == [None, None]

    refresh(client, session.did)
    assert spends(real_pds) == [None, None, 200]
    assert_works(client, session.did)


# The server has spent the token


LOST_ANSWERS = {
    "cut": (proxy.cut_after(), RefreshInterruptedError),
    "html": (proxy.html_after(), RefreshInterruptedError),
    "502": (proxy.status_after(502), OAuthResponseError),
    "html 503": (proxy.html_after(503), OAuthResponseError),
}


@pytest.mark.parametrize(("action", "error"), LOST_ANSWERS.values(), ids=LOST_ANSWERS)
def test_an_answer_that_was_lost_ends_the_session_at_the_next_try(
    real_pds: RealPDS,
    client: OAuthClient,
    session: OAuthSession,
    by_hand: LoggedIn,
    action: Action,
    error: type[SessionError],
) -> None:
    before = stored(client, session.did)
    real_pds.proxy.arm(TOKEN, action)
    with pytest.raises(error) as caught:
        refresh(client, session.did)
    assert caught.value.retryable
    assert not caught.value.login_required
    assert_kept(client, before, in_doubt=True)

    assert_lost(client, real_pds, by_hand)


def test_a_lost_answer_is_not_asked_for_again_if_so_configured(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, store: str
) -> None:
    real_pds.proxy.arm(TOKEN, proxy.cut_before())
    with another_worker(real_pds, client, store, on_interrupted="fail") as worker:
        with pytest.raises(RefreshInterruptedError):
            refresh(worker, session.did)
        with pytest.raises(TokenRefreshError) as caught:
            refresh(worker, session.did)
    assert caught.value.answer_lost
    assert spends(real_pds) == [None]


def test_an_answer_that_comes_late_is_stored_nevertheless(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession
) -> None:
    before = stored(client, session.did)
    fault = real_pds.proxy.arm(TOKEN, proxy.late())
    patience = 0.2
    while not fault.arrived.is_set():
        with pytest.raises(LockTimeoutError) as caught:
            refresh(client, session.did, timeout=patience)
        assert caught.value.retryable
        patience *= 2
    assert not fault.fired.is_set()
    assert_kept(client, before, in_doubt=True)

    fault.release.set()
    client.sessions.close()
    assert not stored(client, session.did).token_set.has_same_tokens(before.token_set)
    assert_works(client, session.did)
    assert spends(real_pds) == [200]


@pytest.mark.parametrize("action", [proxy.late(), proxy.drip_after()], ids=["late", "dripping"])
def test_an_answer_that_does_not_come_within_its_bound_is_lost(
    real_pds: RealPDS,
    client: OAuthClient,
    session: OAuthSession,
    by_hand: LoggedIn,
    action: Action,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Released, either would have been an answer."""
    before = stored(client, session.did)
    assert_that_it_answers(session)  # which brings a nonce, so that the first request is the one
    fault = real_pds.proxy.arm(TOKEN, action)
    with an_answer_within(2.0, monkeypatch), pytest.raises(RefreshInterruptedError) as caught:
        refresh(client, session.did)
    assert caught.value.retryable
    assert fault.arrived.wait(SOON)
    assert_kept(client, before, in_doubt=True)

    fault.release.set()
    assert_lost(client, real_pds, by_hand)


@pytest.mark.parametrize(
    "members",
    [{"sub": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"}, {"scope": "transition:generic"}, {"token_type": "Bearer"}],
    ids=["another account", "no atproto", "not bound"],
)
def test_tokens_that_must_not_be_used_are_given_back(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, by_hand: LoggedIn, members: dict[str, str]
) -> None:
    real_pds.proxy.arm(TOKEN, proxy.changed_after(**members))
    with pytest.raises(TokenRefreshError, match="the server issued") as caught:
        refresh(client, session.did)
    assert caught.value.login_required
    assert not caught.value.answer_lost
    assert client.sessions.get_stored(session.did) is None
    assert spends(real_pds) == [200]
    assert real_pds.proxy.count("/oauth/revoke") > 0
    refused = by_hand.client.refresh(by_hand.tokens.refresh)
    assert error_of(refused) == ("invalid_grant", "Invalid refresh token")


def test_without_a_new_refresh_token_the_old_one_is_kept(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, by_hand: LoggedIn
) -> None:
    """Which a server may mean; the next refresh shows that this one does not."""
    real_pds.proxy.arm(TOKEN, proxy.changed_after(refresh_token=None))
    renewed = refresh(client, session.did)
    assert renewed.token_set.refresh_token == by_hand.tokens.refresh
    assert renewed.token_set.access_token != by_hand.tokens.access
    assert_works(client, session.did)

    with pytest.raises(TokenRefreshError) as caught:
        refresh(client, session.did)
    assert caught.value.login_required
    assert not caught.value.answer_lost
    assert client.sessions.get_stored(session.did) is None
    assert spends(real_pds) == [200, 400]


# Meanwhile


@contextmanager
def refresh_under_way(pds: RealPDS, client: OAuthClient, did: str) -> Iterator[Worker]:
    """Inside, the server has issued new tokens, and the answer is on its way."""
    fault = pds.proxy.arm(TOKEN, proxy.late())
    work = Worker(lambda: refresh(client, did))
    assert fault.arrived.wait(SOON)
    yield work
    fault.release.set()


def test_a_log_out_during_a_refresh_is_final(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, by_hand: LoggedIn, store: str
) -> None:
    with (
        another_worker(real_pds, client, store, timeout=0.2) as impatient,
        refresh_under_way(real_pds, client, session.did) as work,
    ):
        impatient.revoke(session.did)
        assert client.sessions.get_stored(session.did) is None
    with pytest.raises(TokenRevokedError):
        work.outcome()
    assert client.sessions.get_stored(session.did) is None
    refused = by_hand.client.refresh(by_hand.tokens.refresh)
    assert error_of(refused) == ("invalid_grant", "Invalid refresh token")


def test_a_log_in_during_a_refresh_is_not_replaced_by_it(
    real_pds: RealPDS,
    client: OAuthClient,
    session: OAuthSession,
    by_hand: LoggedIn,
    browser: Browser,
    pds_account: Account,
    store: str,
) -> None:
    did = session.did
    with another_worker(real_pds, client, store, timeout=0.2) as impatient:
        url = browser.authorize(impatient.authorize(did, timeout=SOON), pds_account)
        # The log-in has a token request of its own, which is not the one that is to come late.
        with refresh_under_way(real_pds, client, did) as work:
            impatient.callback(url, timeout=SOON)
            newer = stored(client, did)
    assert work.outcome() == newer
    assert stored(client, did) == newer
    assert_works(client, did)
    refused = by_hand.client.refresh(by_hand.tokens.refresh)
    assert error_of(refused) == ("invalid_grant", "Invalid refresh token")  # the orphan was revoked


def test_a_refusal_that_comes_after_a_log_in_does_not_end_it(
    real_pds: RealPDS,
    client: OAuthClient,
    session: OAuthSession,
    by_hand: LoggedIn,
    browser: Browser,
    pds_account: Account,
    store: str,
) -> None:
    did = session.did
    by_hand.client.refresh(by_hand.tokens.refresh)  # by a thief, say
    real_pds.proxy.reset()
    with another_worker(real_pds, client, store, timeout=0.2) as impatient:
        url = browser.authorize(impatient.authorize(did, timeout=SOON), pds_account)
        with refresh_under_way(real_pds, client, did) as work:
            assert spends(real_pds) == [400]
            impatient.callback(url, timeout=SOON)
            newer = stored(client, did)
    assert work.outcome() == newer
    assert stored(client, did) == newer
    assert_works(client, did)


def brings_new_tokens(session: Session | None, expected: Session | TokenSet | None) -> bool:
    return session is not None and isinstance(expected, TokenSet) and not session.token_set.has_same_tokens(expected)


class SlowStarter(SQLiteStore):
    """Fails to store new tokens the first time, or so it says.

    :ivar failures: how often it has failed.
    """

    def __init__(self, path: Path, *, stores_nevertheless: bool) -> None:
        super().__init__(path)
        self.failures = 0
        self._stores_nevertheless = stores_nevertheless

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        if not brings_new_tokens(session, expected) or self.failures:
            return super().replace(key, session, expected)
        self.failures += 1
        if self._stores_nevertheless:
            super().replace(key, session, expected)
        raise StoreError("the connection was lost")


@pytest.mark.parametrize("stores_nevertheless", [False, True])
def test_a_store_that_fails_once_is_asked_again(
    real_pds: RealPDS, client: OAuthClient, session: OAuthSession, tmp_path: Path, *, stores_nevertheless: bool
) -> None:
    store = SlowStarter(tmp_path / "sessions.db", stores_nevertheless=stores_nevertheless)
    with closing(store), another_worker(real_pds, client, store) as worker:
        renewed = refresh(worker, session.did)
    assert store.failures == 1
    assert stored(client, session.did) == renewed
    assert spends(real_pds) == [200]
    assert real_pds.proxy.count("/oauth/revoke") == 0
    assert_works(client, session.did)


class FullDisk(SQLiteStore):
    """Takes attempts, and nothing with new tokens in it."""

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        if brings_new_tokens(session, expected):
            raise StoreError("the disk is full")
        return super().replace(key, session, expected)


def test_tokens_that_cannot_be_stored_are_ended_at_the_server(
    real_pds: RealPDS,
    client: OAuthClient,
    session: OAuthSession,
    by_hand: LoggedIn,
    tmp_path: Path,
) -> None:
    store = FullDisk(tmp_path / "sessions.db")
    with (
        another_worker(real_pds, client, store, times=Times(store_for=0.0)) as worker,
        pytest.raises(StoreError, match="could not be stored") as caught,
    ):
        refresh(worker, session.did)
    store.close()
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert [str(error) for error in caught.value.__cause__.exceptions] == ["the disk is full"]
    assert client.sessions.get_stored(session.did) is None
    assert spends(real_pds) == [200]
    refused = by_hand.client.refresh(by_hand.tokens.refresh)
    assert error_of(refused) == ("invalid_grant", "Invalid refresh token")
