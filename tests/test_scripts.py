"""A client for scripts: the same accounts as the command line's, from the environment."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from cryptography.fernet import Fernet

from atproto_session import (
    ClientMetadata,
    ClientMetadataError,
    OAuthClient,
    SessionNotFoundError,
    StoreError,
    TokenRefreshError,
    _scripts,
)
from atproto_session.testing.network import Account, LocalNetwork

from .command_line import variables
from .scenes import GET_SESSION, log_in, stored

WRITES = "atproto repo:com.example.note"


@pytest.fixture(autouse=True)
def environment(network: LocalNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (_scripts.STORE, _scripts.ENCRYPTION_KEYS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables(network, tmp_path).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def scripts() -> Iterator[OAuthClient]:
    with OAuthClient.for_scripts() as client:
        yield client


def test_all_is_in_the_environment(
    network: LocalNetwork, account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OAuthClient.for_scripts() as client:
        log_in(network, client, account)
    assert (tmp_path / "atproto-session" / "sessions.db").is_file()
    monkeypatch.chdir("/")
    with OAuthClient.for_scripts() as client:
        assert [each.did for each in client.accounts()] == [account.did]
        assert client.restore(account.did).get(GET_SESSION).json()["did"] == account.did

    monkeypatch.setenv(_scripts.STORE, f"json:///{tmp_path}/sessions")
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    monkeypatch.setenv(_scripts.ENCRYPTION_KEYS, old)
    with OAuthClient.for_scripts() as client:
        assert list(client.accounts()) == []
        log_in(network, client, account)
    for keys, is_open in ((f"{new} , {old}", True), (f" {new}\n{old}", True), (new, False), ("", False)):
        monkeypatch.setenv(_scripts.ENCRYPTION_KEYS, keys)
        with OAuthClient.for_scripts() as client:
            assert [each.error is None for each in client.accounts()] == [is_open], keys


def test_arguments_count_more(network: LocalNetwork, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (_scripts.PLC_DIRECTORY, _scripts.HANDLE_RESOLVER):
        monkeypatch.setenv(name, "https://nothing.example.com")
    monkeypatch.setenv(_scripts.ALLOW_HTTP, "0")
    monkeypatch.setenv(_scripts.ENCRYPTION_KEYS, "nonsense")
    store: dict[str, object] = {}
    with OAuthClient.for_scripts(store=store, **network.client_options()) as client:
        log_in(network, client, account)
    assert [*store] == [account.did]
    options = {"encryption_keys": [Fernet.generate_key()], "allow_plaintext": True, **network.client_options()}
    with OAuthClient.for_scripts(store="memory:", **options) as client:
        log_in(network, client, account)


def test_it_is_the_client_of_the_quickstart() -> None:
    ours = _scripts.metadata_of("transition:generic atproto")
    assert ours == ClientMetadata.loopback(scope="atproto transition:generic")
    assert {*ours.redirect_uris} == {"http://127.0.0.1/", "http://[::1]/"}
    assert _scripts.metadata_of("b:x atproto a:x a:x") == _scripts.metadata_of("atproto a:x b:x")
    for scope in ("transition:generic", "atproto  transition:generic", ""):
        with pytest.raises(ClientMetadataError, match="scope"):
            _scripts.metadata_of(scope)


def test_it_is_one_with_the_clients_of_all_scopes(network: LocalNetwork, scripts: OAuthClient) -> None:
    """A session stays with the ``client_id`` that got it: the servers see that of each account."""
    accounts = [network.create_account() for _ in range(3)]
    with OAuthClient.for_scripts(scope=WRITES) as other:
        log_in(network, other, accounts[0])
        log_in(network, other, accounts[0], session_id="two")
    log_in(network, scripts, accounts[1])
    alone = ClientMetadata.loopback("atproto", ["http://127.0.0.1:5000/callback"])
    with OAuthClient(alone, store=scripts._store, **network.client_options()) as other:
        log_in(network, other, accounts[2])
        with pytest.raises(TokenRefreshError, match="was given to the client"):
            other.restore(accounts[1].did)

    for account in accounts:
        assert scripts.restore(account.did, refresh=True).get(GET_SESSION).json()["did"] == account.did
        url = network.pds_url + GET_SESSION
        assert requests.get(url, auth=scripts.auth(account.did), timeout=30).json()["did"] == account.did
        token = stored(scripts, account.did) if account is accounts[1] else scripts.sessions.get_stored(account.did)
        assert token is not None
        info = network.session_of(token.token_set.access_token)
        assert info is not None
        assert info.client_id == token.client_id
    assert len({each.client_id for each in scripts.accounts()}) == 3
    assert [result.outcome for result in scripts.keep_alive(idle=0, pace=0)] == ["refreshed"] * 4
    assert set(network.refresh_token_uses.values()) == {1}
    scripts.revoke(accounts[0].did, session_id="two")
    for account in accounts:
        scripts.revoke(account.did)
    assert network.revocations == 4
    assert list(scripts.accounts()) == []
    with pytest.raises(SessionNotFoundError):
        scripts.restore(accounts[0].did)


def test_a_log_in_with_other_scopes_ends_the_grant_that_it_replaces(
    network: LocalNetwork, account: Account, scripts: OAuthClient
) -> None:
    log_in(network, scripts, account)
    with OAuthClient.for_scripts(scope=WRITES) as other:
        before = scripts.sessions.get_stored(account.did)
        log_in(network, other, account)
        assert before is not None
        info = network.session_of(before.token_set.access_token)
        assert (network.revocations, info and info.revoked) == (1, True)
        log_in(network, other, account)
    assert network.revocations == 2
    assert scripts.restore(account.did).get(GET_SESSION).status_code == 200


def test_it_is_no_client_of_the_web(network: LocalNetwork, account: Account, scripts: OAuthClient) -> None:
    client_id = "https://app.example.com/client.json"
    metadata = ClientMetadata(client_id, ["https://app.example.com/callback"], "atproto")
    network.publish(client_id, metadata.document())
    with OAuthClient(metadata, store=scripts._store, **network.client_options()) as other:
        session = log_in(network, other, account)
        for use in (scripts.restore, scripts.revoke):
            with pytest.raises(TokenRefreshError, match="was given to the client"):
                use(account.did)
        assert scripts.keep_alive(idle=0, pace=0) == []
        assert session.get(GET_SESSION).status_code == 200
    assert scripts._other("http://localhost?nonsense=1") is None


def test_a_record_that_cannot_be_read_is_an_error(
    network: LocalNetwork, account: Account, scripts: OAuthClient
) -> None:
    log_in(network, scripts, account)
    scripts._store._database.write(  # type: ignore[attr-defined]
        lambda connection: connection.execute("UPDATE sessions SET document = ?", (b"nonsense",))
    )
    with pytest.raises(StoreError):
        scripts.restore(account.did)
    scripts.revoke(account.did)
    assert list(scripts.accounts()) == []


def test_without_the_extra_a_store_has_to_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(StoreError, match=r"atproto-session\[cli\]"):
        OAuthClient.for_scripts()
    monkeypatch.setenv(_scripts.STORE, f"sqlite:///{tmp_path}/s.db")
    OAuthClient.for_scripts().close()
