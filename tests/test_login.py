"""Log-ins: bound to their browser, checked before their code is spent, within a bound. The rest of a log-in is in
``test_client.py`` and ``topics/test_duty_flow.py``."""

from __future__ import annotations

import time
from urllib.parse import parse_qs, urlsplit

import pytest

from atproto_session import IdentityError, LockTimeoutError, OAuthCallbackError, OAuthClient, StoreError, TransportError
from atproto_session.testing.network import Account, LocalNetwork

from .core import wait_until
from .scenes import GET_SESSION, log_in


def test_a_log_in_ends_in_the_browser_that_began_it(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    def begun(bound_to: str | None) -> str:
        return network.authorize(client.authorize(account.did, bound_to=bound_to), account)

    assert client.callback(begun("cookie"), bound_to="cookie").session.did == account.did
    stored = client.sessions.get_stored(account.did)
    for began, ended in (("cookie", "another"), ("cookie", None), (None, "cookie")):
        with pytest.raises(OAuthCallbackError, match="another browser"):
            client.callback(begun(began), bound_to=ended)
    assert client.sessions.get_stored(account.did) == stored, "nobody was logged out"
    assert network.requests("/oauth/token") <= 2, "and nothing was exchanged"


def test_each_log_in_of_a_browser_may_have_a_secret_of_its_own(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    def begun(bound_to: str) -> str:
        return network.authorize(client.authorize(account.did, bound_to=bound_to), account)

    first, second = begun("one"), begun("two")
    assert client.callback(second, bound_to=["one", "two"]).session.did == account.did
    assert client.callback(first, bound_to=("one",)).session.did == account.did
    for secrets in (["two"], [], {"On", "e"}):
        with pytest.raises(OAuthCallbackError, match="another browser"):
            client.callback(begun("one"), bound_to=secrets)
    with pytest.raises(TypeError, match="bound_to is a string, not int"):
        client.callback(first, bound_to=[1])  # type: ignore[list-item]


def test_a_log_in_tells_the_verified_handle(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    result = client.callback(network.authorize(client.authorize(account.handle, state="mine"), account))
    assert (result.handle, result.state) == (account.handle, "mine")
    for start in (account.did, network.pds_url):
        assert client.callback(network.authorize(client.authorize(start), account)).handle == account.handle


def test_a_handle_that_cannot_be_verified_is_not_told(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    network.change_handle(account.did, "eve.test", resolves=False)
    for start in (account.did, network.pds_url):
        assert client.callback(network.authorize(client.authorize(start), account)).handle is None
    url = network.authorize(client.authorize(network.pds_url), account)
    network.fault("plc", "status", status=404, times=None, after=1)  # once the account is known to be of this server
    assert client.callback(url).handle is None
    assert client.sessions.get_stored(account.did) is not None


@pytest.mark.parametrize(
    "pasted",
    [
        "@{handle}",
        "at://{handle}/",
        "https://bsky.app/profile/{handle}",
        "\u201c{handle}\u201d",
        "https://x.app/profile/{did}",
    ],
)
def test_an_account_is_what_people_paste(
    network: LocalNetwork, client: OAuthClient, account: Account, pasted: str
) -> None:
    url = client.authorize(f" {pasted.format(handle=account.handle, did=account.did)}\n")
    assert client.callback(network.authorize(url, account)).session.did == account.did


def test_what_is_no_account_is_told_to_people(network: LocalNetwork, client: OAuthClient) -> None:
    with pytest.raises(IdentityError, match=r"^no account has the handle nobody\.test; check its spelling") as caught:
        client.authorize("nobody.test")
    assert not caught.value.retryable
    with pytest.raises(IdentityError, match=r"^the account did:plc:a+ does not exist; check its spelling$") as caught:
        client.authorize(f"did:plc:{'a' * 24}")
    assert not caught.value.retryable
    with pytest.raises(IdentityError, match=r"^'nobody' is not a handle such as alice\.example\.com$"):
        client.authorize("nobody")
    assert network.requests("/oauth/par") == 0


def test_a_log_in_keeps_to_its_bound(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    held = network.fault("par", "hold")
    with pytest.raises(LockTimeoutError):
        client.authorize(account.did, timeout=0.05)
    held.release.set()
    callback = network.authorize(client.authorize(account.did), account)
    held = network.fault("token", "late")
    with pytest.raises(LockTimeoutError):
        client.callback(callback, timeout=0.05)
    held.release.set()
    wait_until(lambda: client.sessions.get_stored(account.did))  # what was sent goes on, and is stored


def test_a_second_log_in_ends_the_grant_of_the_first(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    first = log_in(network, client, account)
    tokens = client.sessions.get_session(first.did).token_set
    log_in(network, client, account)
    assert network.revocations == 1
    info = network.session_of(tokens.access_token)
    assert info is not None
    assert info.revoked
    assert client.restore(account.did).get(GET_SESSION).status_code == 200


def test_a_refusal_without_state_or_issuer_is_told_as_what_it_is(
    network: LocalNetwork, client: OAuthClient, account: Account
) -> None:
    with pytest.raises(OAuthCallbackError, match=r"access_denied \(no\)"):
        client.callback({"error": "access_denied", "error_description": "no"})
    ticket = parse_qs(urlsplit(network.authorize(client.authorize(account.did), account)).query)["state"][0]
    with pytest.raises(OAuthCallbackError, match="access_denied"):
        client.callback({"error": "access_denied", "state": ticket})


def test_a_log_in_that_cannot_be_read(network: LocalNetwork, client: OAuthClient) -> None:
    client._store.logins.put("ticket", {"issuer": 1}, time.time() + 60.0)
    with pytest.raises(StoreError, match="begin the log-in again"):
        client.callback({"state": "ticket", "code": "c"})


def test_a_code_that_was_never_sent_may_come_again(
    network: LocalNetwork, client: OAuthClient, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = network.authorize(client.authorize(account.did), account)
    with monkeypatch.context() as patch:
        patch.setattr("atproto_session.server.AuthorizationServer.exchange_code", unsent)
        with pytest.raises(TransportError) as caught:
            client.callback(callback)
        assert caught.value.retryable
    assert client.callback(callback).session.did == account.did


def unsent(*arguments: object) -> None:
    raise TransportError("refused", sent=False)


def test_a_query_string_is_as_good_as_a_url(network: LocalNetwork, client: OAuthClient, account: Account) -> None:
    callback = network.authorize(client.authorize(account.did), account)
    assert client.callback(f"?{urlsplit(callback).query}").session.did == account.did
