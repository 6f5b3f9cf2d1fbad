"""What the children of :mod:`tests.topics.test_forks` do, however they were made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from atproto_session import ClientMetadata, OAuthClient


def refresh(client: OAuthClient, did: str, say: Callable[[str], object]) -> str:
    """Get a good session and return its access token. Says ``"at the lock"`` when it has to wait for somebody."""
    hold = client._store.locks.hold

    @contextmanager
    def announced(name: str, **options: Any) -> Iterator[Any]:
        say("at the lock")
        with hold(name, **options) as held:
            yield held

    vars(client._store.locks)["hold"] = announced
    return client.sessions.get_session(did).token_set.access_token


def refresh_inherited(client: OAuthClient, did: str, connection: Connection) -> None:
    """With a client that was there before the fork."""
    connection.send(refresh(client, did, connection.send))


def refresh_anew(store: str, options: dict[str, Any], did: str, connection: Connection) -> None:
    """With a client of this process."""
    with OAuthClient(ClientMetadata.loopback(), store=store, **options) as client:
        refresh_inherited(client, did, connection)
