"""Stores over a server that keeps rows of bytes: a table, or a key-value server.

Such a server does one thing in one step, on one row. That is enough: a record is compared by the bytes that were read,
in the same statement that writes. Where another write has come in between, the statement does nothing, and what is
stored by then is read and compared anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Protocol

from ..locks import Locks
from ..session import Session, TokenSet
from .codec import Codec
from .memory import holds

#: How often log-ins that have expired are looked for, in seconds.
_SWEEP_EVERY = 60.0


class Rows(Protocol):
    """The rows of sessions. Each method but ``keys`` is one step for all who share them, durable when it returns, and
    no part of a transaction of the application's.

    :raises StoreError: the server cannot be used. What was to be written may have been written.
    """

    def read(self, key: str, /) -> bytes | None: ...

    def put(self, key: str, data: bytes, /) -> None:
        """Write ``data``, whatever is there."""
        ...

    def insert(self, key: str, data: bytes, /) -> bool:
        """Whether there was no row, and now is this one."""
        ...

    def update(self, key: str, data: bytes, expected: bytes, /) -> bool:
        """Whether the row held exactly what was ``expected``, and now holds ``data``."""
        ...

    def delete(self, key: str, expected: bytes | None = None, /) -> bool:
        """Whether there was a row, which held exactly what was ``expected`` if that is given, and now is none."""
        ...

    def clear(self) -> None: ...

    def keys(self) -> Iterator[str]: ...

    def close(self) -> None: ...


class LoginRows(Protocol):
    """The rows of log-ins that have begun; as :class:`Rows`."""

    def read(self, state: str, /) -> bytes | None: ...

    def put(self, state: str, data: bytes, expires_at: float, /) -> None: ...

    def delete(self, state: str, expected: bytes, /) -> bool: ...

    def sweep(self, now: float, /) -> None:
        """Delete what has expired, where the server does not do so by itself."""
        ...


class RowStore:
    """What a store over rows does: a :class:`.FullStore`.

    :ivar locks: between all that share the rows.
    """

    raises_only_session_errors = True

    def __init__(self, rows: Rows, logins: LoginRows, locks: Locks, codec: Codec) -> None:
        self._rows = rows
        self._codec = codec
        self.locks: Locks = locks
        self.logins = RowLogins(logins, codec)

    def get(self, key: str) -> Session | None:
        data = self._rows.read(key)
        return None if data is None else self._codec.decode(key, data)

    def set(self, key: str, session: Session) -> None:
        self._rows.put(key, self._codec.encode(key, session))

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        """Compare-and-set; see :meth:`.FullStore.replace`."""
        data = None if session is None else self._codec.encode(key, session)
        was_tried = False
        while True:
            stored = self._rows.read(key)
            if was_tried and stored is not None and stored == data:
                return True  # the driver lost the answer, and tried again by itself
            if not holds(None if stored is None else self._codec.decode(key, stored), expected):
                return False
            if self._exchange(key, data, stored):
                return True
            was_tried = True

    def _exchange(self, key: str, data: bytes | None, stored: bytes | None) -> bool:
        if stored is None:
            return data is None or self._rows.insert(key, data)
        return self._rows.delete(key, stored) if data is None else self._rows.update(key, data, stored)

    def delete(self, key: str) -> None:
        self._rows.delete(key)

    def clear(self) -> None:
        """Delete every session. Pending log-ins stay, and expire."""
        self._rows.clear()

    def __iter__(self) -> Iterator[str]:
        return self._rows.keys()

    def close(self) -> None:
        """Close the connections. The store cannot be used afterwards."""
        self._rows.close()


class RowLogins:
    """Pending log-ins over rows."""

    def __init__(self, rows: LoginRows, codec: Codec) -> None:
        self._rows = rows
        self._codec = codec
        self._swept_at = -_SWEEP_EVERY

    def put(self, state: str, document: dict[str, Any], expires_at: float) -> None:
        data = self._codec.encode_login(state, document, expires_at)
        if time.monotonic() - self._swept_at >= _SWEEP_EVERY:
            self._swept_at = time.monotonic()
            self._rows.sweep(time.time())
        self._rows.put(state, data, expires_at)

    def take(self, state: str) -> dict[str, Any] | None:
        data = self._rows.read(state)
        if data is None:
            return None
        # Read before it is removed: a worker without the right encryption key does not end the log-in.
        document = self._codec.decode_login(state, data, time.time())
        return document if self._rows.delete(state, data) else None
