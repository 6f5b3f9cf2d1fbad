"""The store in the project's database."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from atproto_session.locks import Locks
from atproto_session.stores import FullStore
from atproto_session.testing.contracts import HOSTILE_KEYS, SharedLocksContract, SharedStoreContract, StoreContract

from . import project

KEY = Fernet.generate_key().decode()


class OnEachDatabase:
    @pytest.fixture(autouse=True)
    def place(self, own_database: dict[str, Any]) -> None:
        self.database = own_database


def cut(store: Any, key: str) -> bool:
    data = store._rows.read(key)
    return bool(store._rows.update(key, data[:-20], data))


@pytest.mark.parametrize("own_database", ["sqlite", "postgresql"], indirect=True)
class TestDjangoStore(OnEachDatabase, SharedStoreContract):
    keys = HOSTILE_KEYS

    def opener(self, tmp_path: Path) -> Callable[[], FullStore]:
        return partial(project.open_django_store, self.database)

    def damage(self, store: FullStore, key: str) -> bool:
        return cut(store, key)

    def open_connections(self, store: Any) -> int | None:
        return len(store.connections._idle)


@pytest.mark.parametrize("own_database", ["mysql"], indirect=True)
class TestEncryptedDjangoStore(OnEachDatabase, StoreContract):
    def make_store(self, tmp_path: Path) -> FullStore:
        return project.open_django_store(self.database, encryption_keys=[KEY])  # type: ignore[no-any-return]

    def damage(self, store: FullStore, key: str) -> bool:
        return cut(store, key)

    def open_connections(self, store: Any) -> int | None:
        return len(store.connections._idle)

    def stored_bytes(self, store: Any) -> bytes | None:
        tables = [store._rows._table, store.logins._rows._table]
        return b"".join(repr(store.connections.fetch(f"SELECT * FROM {table}")).encode() for table in tables)


@pytest.mark.parametrize("own_database", ["postgresql"], indirect=True)
class TestDjangoLocks(OnEachDatabase, SharedLocksContract):
    """Those of PostgreSQL; in full they are tested with the store in a database of one's own."""

    def opener(self, tmp_path: Path) -> Callable[[], Locks]:
        return partial(project.locks_in, self.database)
