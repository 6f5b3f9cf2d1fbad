"""The store in a database and its locks, on PostgreSQL and MariaDB."""

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

KEY = Fernet.generate_key()
SERVERS = ["postgresql", "mysql"]


class OnEachServer:
    @pytest.fixture(autouse=True, params=SERVERS)
    def place(self, request: pytest.FixtureRequest) -> None:
        self.url: str = request.getfixturevalue(f"{request.param}_url")


def locks_of(url: str) -> Locks:
    return open_store(url).locks


class TestSQLStore(OnEachServer, SharedStoreContract):
    keys = HOSTILE_KEYS

    def opener(self, tmp_path: Path) -> Callable[[], FullStore]:
        return partial(open_store, self.url)

    def damage(self, store: FullStore, key: str) -> bool:
        return cut(store, key)

    def open_connections(self, store: FullStore) -> int | None:
        return store._database.engine.pool.checkedin()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("place", ["postgresql"], indirect=True)
class TestEncryptedSQLStore(OnEachServer, StoreContract):
    def make_store(self, tmp_path: Path) -> FullStore:
        return open_store(self.url, encryption_keys=[KEY])

    def damage(self, store: FullStore, key: str) -> bool:
        return cut(store, key)

    def stored_bytes(self, store: FullStore) -> bytes | None:
        tables: list[Any] = [store._rows._table, store.logins._rows._table]  # type: ignore[attr-defined]
        return b"".join(
            repr(store._database.ask(lambda connection, table=table: connection.execute(table.select()).all())).encode()  # type: ignore[attr-defined]
            for table in tables
        )


class TestSQLLocks(OnEachServer, SharedLocksContract):
    names = HOSTILE_KEYS

    def opener(self, tmp_path: Path) -> Callable[[], Locks]:
        return partial(locks_of, self.url)


def cut(store: Any, key: str) -> bool:
    rows = store._rows
    data = rows.read(key)
    return bool(rows.update(key, data[:-20], data))
