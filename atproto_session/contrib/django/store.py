"""Sessions in the project's own database."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from django.db import connections, router
from django.db.backends.base.base import BaseDatabaseWrapper

from ...locks import FileLocks, Hold, LockKind, Locks, ThreadLocks
from ...locks.sql import SQLLocks
from ...session import subject_of
from ...stores import Codec, EncryptionKeys
from ...stores._rows import RowStore
from ._connections import Connections, failure_of

#: So many keys are read at a time.
_PAGE = 1000


class DjangoStore(RowStore):
    """Sessions in the tables of this app: a :class:`.FullStore`, safe between any number of machines.

    Nothing of it is part of a transaction of the application's: it has connections of its own. A row that a transaction
    of the application's has locked is waited for two seconds, and is then a :exc:`.StoreError`, which is ``retryable``.

    Locks are advisory locks of PostgreSQL and MySQL, and files beside an SQLite database.

    :param using: the alias of the database; by default the one that the project's routers name.
    :param encryption_keys: see :func:`.open_store`.
    :param allow_plaintext: see :func:`.open_store`.
    :raises StoreError: one of the keys is not a Fernet key.
    """

    def __init__(
        self, using: str | None = None, *, encryption_keys: EncryptionKeys = (), allow_plaintext: bool = False
    ) -> None:
        from .models import PendingLogin, StoredSession  # which there are when all apps are loaded

        self.connections = Connections(using or router.db_for_write(StoredSession))
        super().__init__(
            DjangoRows(self.connections, StoredSession._meta.db_table),
            DjangoLoginRows(self.connections, PendingLogin._meta.db_table),
            DjangoLocks(self.connections, StoredSession._meta.db_table),
            Codec(encryption_keys, allow_plaintext=allow_plaintext),
        )

    def __repr__(self) -> str:
        return f"DjangoStore({self.connections.alias!r})"

    def keys_of(self, did: str) -> list[str]:
        """The keys of all sessions of an account."""
        rows: DjangoRows = self._rows  # type: ignore[assignment]
        return rows.keys_of(did)

    def thread_ended(self) -> None:
        """Close what a listener may have opened in a thread of the library."""
        connections.close_all()


class DjangoRows:
    """See :class:`atproto_session.stores._rows.Rows`."""

    def __init__(self, connections: Connections, table: str) -> None:
        self._connections = connections
        self._table = table

    def read(self, key: str) -> bytes | None:
        return _first(
            self._connections.fetch(
                f"SELECT {{document}} FROM {{{self._table}}} WHERE {{key_hash}} = %s",  # noqa: S608 - a name of ours
                [_hash(key)],
            )
        )

    def put(self, key: str, data: bytes) -> None:
        while not self._connections.execute(
            f"UPDATE {{{self._table}}} SET {{document}} = %s WHERE {{key_hash}} = %s",  # noqa: S608
            [data, _hash(key)],
        ):
            if self.insert(key, data):
                return

    def insert(self, key: str, data: bytes) -> bool:
        row = {"key_hash": _hash(key), "did_hash": _hash(subject_of(key)), "key": _escaped(key), "document": data}
        return self._connections.insert(self._table, row)

    def update(self, key: str, data: bytes, expected: bytes) -> bool:
        return bool(
            self._connections.execute(
                f"UPDATE {{{self._table}}} SET {{document}} = %s WHERE {{key_hash}} = %s AND {{document}} = %s",  # noqa: S608
                [data, _hash(key), expected],
            )
        )

    def delete(self, key: str, expected: bytes | None = None) -> bool:
        sql = f"DELETE FROM {{{self._table}}} WHERE {{key_hash}} = %s"  # noqa: S608
        if expected is None:
            return bool(self._connections.execute(sql, [_hash(key)]))
        return bool(self._connections.execute(f"{sql} AND {{document}} = %s", [_hash(key), expected]))

    def clear(self) -> None:
        self._connections.execute(f"DELETE FROM {{{self._table}}}")  # noqa: S608

    def keys(self) -> Iterator[str]:
        last = ""
        while rows := self._connections.fetch(
            f"SELECT {{key_hash}}, {{key}} FROM {{{self._table}}} WHERE {{key_hash}} > %s"  # noqa: S608
            f" ORDER BY {{key_hash}} LIMIT {_PAGE}",
            [last],
        ):
            yield from (_unescaped(key) for _, key in rows)
            last = rows[-1][0]

    def keys_of(self, did: str) -> list[str]:
        sql = f"SELECT {{key}} FROM {{{self._table}}} WHERE {{did_hash}} = %s"  # noqa: S608
        return [_unescaped(key) for (key,) in self._connections.fetch(sql, [_hash(did)])]

    def close(self) -> None:
        self._connections.close_idle()


class DjangoLoginRows:
    """See :class:`atproto_session.stores._rows.LoginRows`."""

    def __init__(self, connections: Connections, table: str) -> None:
        self._connections = connections
        self._table = table

    def read(self, state: str) -> bytes | None:
        sql = f"SELECT {{document}} FROM {{{self._table}}} WHERE {{state_hash}} = %s"  # noqa: S608
        return _first(self._connections.fetch(sql, [_hash(state)]))

    def put(self, state: str, data: bytes, expires_at: float) -> None:
        row = {"state_hash": _hash(state), "document": data, "expires_at": expires_at}
        while not self._connections.insert(self._table, row):
            self._connections.execute(f"DELETE FROM {{{self._table}}} WHERE {{state_hash}} = %s", [_hash(state)])  # noqa: S608

    def delete(self, state: str, expected: bytes) -> bool:
        sql = f"DELETE FROM {{{self._table}}} WHERE {{state_hash}} = %s AND {{document}} = %s"  # noqa: S608
        return bool(self._connections.execute(sql, [_hash(state), expected]))

    def sweep(self, now: float) -> None:
        self._connections.execute(f"DELETE FROM {{{self._table}}} WHERE {{expires_at}} <= %s", [now])  # noqa: S608


class DjangoLocks:
    """The locks that fit the database. Which those are is known when one is needed, and not before."""

    def __init__(self, connections: Connections, table: str) -> None:
        self._connections = connections
        self._table = table
        self._threads = ThreadLocks(LockKind.HOLDER)
        self._made: dict[str, Locks] = {}

    @property
    def kind(self) -> LockKind:
        return self._locks().kind

    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> AbstractContextManager[Hold]:
        return self._locks().hold(name, timeout=timeout, cancel=cancel)

    def _locks(self) -> Locks:
        # A transaction of a test, or a database in memory, is this process's own.
        if self._connections.test_connection() is not None:
            return self._threads
        vendor = self._connections.vendor
        if vendor != "sqlite":
            name = self._connections.name()
            return self._made.get(name) or self._made.setdefault(name, self._in_database(vendor))
        if file := self._connections.file():
            return self._made.get(file) or self._made.setdefault(file, FileLocks(f"{file}.locks"))
        return self._threads

    def _in_database(self, vendor: str) -> Locks:
        # Locks of MySQL are those of the whole server, and those of PostgreSQL of a database with several schemas.
        sql = "SELECT current_schema()" if vendor == "postgresql" else "SELECT database()"
        ((schema,),) = self._connections.fetch(sql)
        return SQLLocks(self._connect, vendor, scope=f"{schema}.{self._table}")

    def _connect(self) -> BaseDatabaseWrapper:
        connection = self._connections.open()
        try:
            connection.ensure_connection()
        except Exception as error:
            raise failure_of(self._connections.alias, error) from error
        return connection


def _first(rows: list[Any]) -> bytes | None:
    return bytes(rows[0][0]) if rows else None


def _escaped(key: str) -> str:
    """It may have characters that a column does not take."""
    return key.encode("unicode_escape").decode("ascii")


def _unescaped(key: str) -> str:
    return key.encode("ascii").decode("unicode_escape")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
