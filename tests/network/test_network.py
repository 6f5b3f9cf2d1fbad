"""The network as a whole: its life, its handles, its strength."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from atproto_session.testing.network import LocalNetwork

from ..scenes import GET_SESSION
from .raw import LoggedIn, RawClient, tokens_of


def test_it_tells_a_client_where_to_turn(network: LocalNetwork) -> None:
    assert network.client_options() == {
        **{"plc_directory": network.plc_url, "handle_resolver": network.pds_url, "allow_http": True},
    }
    assert network.issuer == network.pds_url != network.plc_url
    for url in (network.plc_url, network.pds_url):
        assert url.startswith("http://localhost:")


def test_secrets_stay_out_of_sight(network: LocalNetwork, alice: LoggedIn) -> None:
    shown = repr(alice.account) + repr(network.session_of(alice.tokens.refresh))
    for secret in (alice.account.password, alice.tokens.refresh, alice.tokens.access):
        assert secret not in shown


def test_it_may_be_stopped_without_having_started() -> None:
    LocalNetwork().stop()


def test_many_accounts_live_side_by_side(network: LocalNetwork) -> None:
    accounts = [network.create_account() for _ in range(4)]

    def live(number: int) -> int:
        client = RawClient(network.issuer)
        tokens = client.log_in(network, accounts[number % len(accounts)])
        for _ in range(5):
            assert client.call(network.pds_url, GET_SESSION, tokens.access).status_code == 200
            tokens = tokens_of(client.refresh(tokens.refresh))
        return client.revoke(tokens.refresh).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(live, range(8))) == {200}
    assert (network.rotations, network.replays, network.revocations) == (40, 0, 8)
    assert set(network.refresh_token_uses.values()) == {1}
