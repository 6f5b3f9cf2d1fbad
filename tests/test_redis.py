"""The store in Redis and its locks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from atproto_session.locks import Locks
from atproto_session.stores import FullStore, open_store
from atproto_session.testing.contracts import HOSTILE_KEYS, SharedLocksContract, SharedStoreContract, StoreContract

from .test_sql import cut, locks_of

KEY = Fernet.generate_key()


class OnRedis:
    @pytest.fixture(autouse=True)
    def place(self, redis_url: str) -> None:
        self.url = redis_url


class TestRedisStore(OnRedis, SharedStoreContract):
    keys = HOSTILE_KEYS

    def opener(self, tmp_path: Path) -> Callable[[], FullStore]:
        return partial(open_store, self.url)

    def damage(self, store: FullStore, key: str) -> bool:
        return cut(store, key)

    def open_connections(self, store: FullStore) -> int | None:
        return len(store._server.client.connection_pool._available_connections)  # type: ignore[attr-defined]


class TestEncryptedRedisStore(OnRedis, StoreContract):
    def make_store(self, tmp_path: Path) -> FullStore:
        return open_store(self.url, encryption_keys=[KEY])

    def damage(self, store: FullStore, key: str) -> bool:
        return cut(store, key)

    def stored_bytes(self, store: FullStore) -> bytes | None:
        server: Any = store._server  # type: ignore[attr-defined]
        return b"".join(server.client.get(name) for name in server.client.scan_iter(f"{server.prefix}*"))


class TestRedisLocks(OnRedis, SharedLocksContract):
    names = HOSTILE_KEYS

    def opener(self, tmp_path: Path) -> Callable[[], Locks]:
        return partial(locks_of, self.url)
