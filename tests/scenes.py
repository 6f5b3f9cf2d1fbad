"""What many tests begin with: an account on the local network that is logged in, and clients over its store."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from atproto_session import ClientMetadata, OAuthClient, OAuthSession, Session

from .core import RESTLESS

if TYPE_CHECKING:  # the programs of the tests that import this need no network of their own
    from atproto_session.testing.network import Account, LocalNetwork

#: Methods of a PDS that every account may call. The second one is the local network's own: it tells what was sent.
GET_SESSION = "/xrpc/com.atproto.server.getSession"
ECHO = "/xrpc/app.test.echo"


def log_in(network: LocalNetwork, client: OAuthClient, account: Account, **options: Any) -> OAuthSession:
    """:param options: those of ``callback``."""
    return client.callback(network.authorize(client.authorize(account.did), account), **options).session


def stored(client: OAuthClient, key: str) -> Session:
    """The session as it is stored, be it expired."""
    return client.sessions.get_session(key, False)


def store_tokens(client: OAuthClient, key: str, **members: Any) -> None:
    """Change what is recorded of the tokens, and nothing at the server."""
    session = stored(client, key)
    changed = replace(session, token_set=replace(session.token_set, **members))
    assert client._store.replace(key, changed, session.token_set)


class Scene:
    """An account that is logged in, and a store that processes share.

    :ivar client: a client over that store, which has been there from the beginning.
    """

    def __init__(self, network: LocalNetwork, store: str) -> None:
        self.network = network
        self.store = store
        self.account = network.create_account()
        self.did = self.account.did
        self.client = self.open_client()
        self.log_in()

    @property
    def setup(self) -> dict[str, Any]:
        """What a program has to know to use the account."""
        return {"store": self.store, "options": self.network.client_options(), "did": self.did}

    def open_client(self, **options: Any) -> OAuthClient:
        """Another client over the store."""
        options = self.network.client_options() | {"times": RESTLESS} | options
        return OAuthClient(ClientMetadata.loopback(), store=self.store, **options)

    def log_in(self) -> Session:
        log_in(self.network, self.client, self.account)
        return self.stored()

    def stored(self) -> Session:
        return stored(self.client, self.did)

    def refresh_token(self) -> str:
        token = self.stored().token_set.refresh_token
        assert token is not None
        return token

    def close(self) -> None:
        self.client.close()
