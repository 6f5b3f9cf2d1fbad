"""Tests of an application's own, with the fixtures that atproto_session brings: ``pytest own_tests.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_store import ItemStore

from atproto_session import OAuthClient, SessionError
from atproto_session.stores import FullStore, complete
from atproto_session.testing.contracts import StoreContract


def greeting(client: OAuthClient, did: str) -> str:
    """What is to be tested."""
    handle = client.restore(did).get("/xrpc/com.atproto.server.getSession").json()["handle"]
    return f"Hello {handle}"


def test_greeting(atproto_client, atproto_login):
    did = atproto_login("alice.test").did
    assert greeting(atproto_client, did) == "Hello alice.test"


def test_a_token_that_expires_is_no_matter(atproto_network, atproto_client, atproto_login):
    did = atproto_login("alice.test").did
    atproto_network.expire_access_tokens(did)
    assert greeting(atproto_client, did) == "Hello alice.test"
    assert atproto_network.rotations == 1


def test_a_server_that_is_down_for_a_moment(atproto_network, atproto_client, atproto_login):
    did = atproto_login("alice.test").did
    atproto_network.expire_access_tokens(did)
    atproto_network.fault("refresh", "status", status=503)
    with pytest.raises(SessionError) as caught:
        greeting(atproto_client, did)
    assert caught.value.retryable
    assert greeting(atproto_client, did) == "Hello alice.test"


def test_an_owner_who_ends_the_session_at_the_server(atproto_network, atproto_client, atproto_login):
    did = atproto_login("alice.test").did
    atproto_network.revoke_sessions(did)
    with pytest.raises(SessionError) as caught:
        greeting(atproto_client, did)
    assert caught.value.login_required


class TestItemStore(StoreContract):
    """The store in own_store.py does what stores do."""

    def make_store(self, tmp_path: Path) -> FullStore:
        self.items: dict[str, bytes] = {}
        return complete(ItemStore(self.items))

    def damage(self, store: FullStore, key: str) -> bool:
        self.items[key] = b"not a session"
        return True
