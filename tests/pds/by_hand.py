"""What may happen to a session behind the library's back."""

from __future__ import annotations

from atproto_session import OAuthClient
from atproto_session.testing.network import Account
from tests.network.raw import LoggedIn, RawClient, Tokens


def take_over(client: OAuthClient, account: Account) -> LoggedIn:
    """The key and the tokens of an account's session, as they are stored now, in other hands."""
    session = client.sessions.get_session(account.did, False)
    tokens = session.token_set
    raw = RawClient(tokens.iss, client_id=client.metadata.client_id)
    raw.take_key(session.dpop_key)
    return LoggedIn(account, raw, Tokens(tokens.access_token, tokens.refresh_token or "", {}))
