"""Where tokens are stored.

A session store keeps one :class:`.Session` for each key, which is an account's DID, or ``did#session_id``:

* :class:`MemoryStore` in this process,
* :class:`JSONStore` in a directory, a file for each account,
* :class:`SQLiteStore` in a database file,

all opened by :func:`open_store` from a URL. Login state lives in the same place, under ``logins``, and the locks that
fit the place are its ``locks``.

A store of one's own is an object with ``get``, ``set`` and ``delete`` (or a mutable mapping); :func:`complete` fills in
the rest. The more of :class:`FullStore` it has itself, the more it guarantees: without ``replace`` and ``locks``,
sessions are safe between the threads of one process only. It proves itself by subclassing
``atproto_session.testing.contracts.StoreContract``.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, Protocol

from ..errors import LockTimeoutError, StoreError, printable
from ..locks import Locks
from ..session import Session, TokenSet
from ._completed import CompletedStore, MappingStore, filled_in_for
from .codec import Codec, EncryptionKeys
from .jsonfile import JSONStore
from .memory import MemoryStore
from .sqlite import SQLiteStore

__all__ = [
    "Codec",
    "EncryptionKeys",
    "FullStore",
    "JSONStore",
    "Logins",
    "MemoryStore",
    "SQLiteStore",
    "SessionStore",
    "complete",
    "open_store",
    "rotate_encryption",
]


class SessionStore(Protocol):
    """What a store has to have. What cannot be read or written is a :exc:`.StoreError`, never an absent session."""

    def get(self, key: str, /) -> Session | None:
        """The session stored under ``key``, or ``None`` when there is none. Takes no lock."""
        ...

    def set(self, key: str, session: Session, /) -> None:
        """Store ``session`` under ``key``, whatever is there. It is safe on the disk when this returns."""
        ...

    def delete(self, key: str, /) -> None:
        """Delete what is stored under ``key``, if anything is."""
        ...


class Logins(Protocol):
    """Log-ins that have begun, for the time until the browser comes back."""

    def put(self, state: str, document: dict[str, Any], expires_at: float, /) -> None:
        """Keep ``document``, a JSON object, until ``expires_at`` (seconds since the epoch)."""
        ...

    def take(self, state: str, /) -> dict[str, Any] | None:
        """Take the document of ``state`` out. Of all who ask for it, in whatever process, one gets it; ``None`` for
        the others, and when it has expired."""
        ...


class FullStore(SessionStore, Protocol):
    """What a store has when nothing is left to fill in."""

    @property
    def locks(self) -> Locks:
        """Locks between all that share the store, by key."""
        ...

    @property
    def logins(self) -> Logins: ...

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None, /) -> bool:
        """Compare-and-set: store ``session`` if the record is still the ``expected`` one, in one step that no other
        write can come between.

        :param session: ``None`` deletes.
        :param expected: a :class:`.TokenSet`: the record holds these tokens (:meth:`.TokenSet.has_same_tokens`),
            whatever else is recorded beside them. A :class:`.Session`: it also holds this attempt, or none if this has
            none. ``None``: there is no record.
        :returns: whether it was done.
        :raises StoreError: the store, or the record that is stored, cannot be read or written.
        """
        ...

    def clear(self) -> None:
        """Delete every session. Pending log-ins stay."""
        ...

    def __iter__(self) -> Iterator[str]:
        """The keys, in no order."""
        ...

    def close(self) -> None:
        """Give back what the store holds open."""
        ...


def complete(store: SessionStore | MutableMapping[str, Session]) -> FullStore:
    """A store of this library as it is; any other with what is missing filled in: ``replace`` under a lock of this
    process, ``locks`` of this process, ``logins`` in its memory, the same however often ``store`` is completed (a
    ``dict``, as long as a client uses it). Iterating and clearing are not made up. Whatever else than a
    :exc:`.SessionError` it raises becomes a :exc:`.StoreError`.

    :raises TypeError: ``store`` is neither a store nor a mutable mapping.
    """
    if isinstance(store, CompletedStore | JSONStore | MemoryStore | SQLiteStore):
        return store
    if all(callable(getattr(store, name, None)) for name in ("get", "set", "delete")):
        return CompletedStore(store, type(store).__name__, filled_in_for(store))
    if isinstance(store, MutableMapping):
        return CompletedStore(MappingStore(store), type(store).__name__, filled_in_for(store))
    raise TypeError(
        f"a session store has the methods get(key), set(key, session) and delete(key), or is a mutable mapping; "
        f"{type(store).__name__} is neither"
    )


def open_store(url: str, *, encryption_keys: EncryptionKeys = ()) -> FullStore:
    """The store that ``url`` names.

    ``memory:``, ``json:///directory`` or ``sqlite:///file.db``. Paths are written as SQLAlchemy writes them: three
    slashes and a relative path, or four in all for an absolute one.

    :param encryption_keys: Fernet keys: records are encrypted with the first and can be read with any of them. To
        rotate, put the new key first, restart every worker, call :func:`rotate_encryption`, and take the old key out an
        hour later, when no log-in that it encrypted is pending. Where workers are restarted one by one, add the new key
        at the end before, in another round, so that all of them can read what the first to use it write.
        ``memory:`` needs none.
    :raises StoreError: the URL cannot be understood, what it needs is not installed, or the place cannot be used.
    """
    scheme, colon, rest = url.partition(":")
    scheme = scheme.partition("+")[0].lower() if colon else ""
    if scheme == "memory":
        return MemoryStore[Session]()
    if scheme in ("json", "sqlite"):
        path = rest.removeprefix("///")
        if path == rest or not path:
            raise StoreError(f"{scheme}:///relative/path or {scheme}:////absolute/path names a store of this kind")
        if scheme == "json":
            return JSONStore(path, encryption_keys=encryption_keys)
        return SQLiteStore(path, encryption_keys=encryption_keys)
    # The scheme alone: a URL may hold a password.
    raise StoreError(
        f"no session store is known for {printable(scheme, 20) or 'a URL without a scheme'!r}; known are memory:, "
        "json:///directory and sqlite:///file.db"
    )


#: How many failures a message lists; all are in its cause.
_MOST_NAMED = 20


def rotate_encryption(store: FullStore, *, locks: Locks | None = None, timeout: float = 60.0) -> int:
    """Write every session of ``store`` again, encrypted with the first of its keys. Workers may go on using it.

    Each account's lock is held meanwhile, and the session is stored by compare-and-set, so that neither a refresh nor
    the trace of one is lost.

    :param locks: those that the clients were given, if they were given any; by default the store's own.
    :param timeout: how long to wait for a refresh under way, in seconds for each account.
    :returns: how many sessions were written.
    :raises StoreError: at the end, with the keys of all records that could not be read or written; the others have
        been written.
    """
    written = 0
    failures: list[Exception] = []
    keys = iter(store)
    while True:
        try:
            key = next(keys)
        except StopIteration:
            break
        except StoreError as error:
            failures.append(error)
            break
        try:
            with (store.locks if locks is None else locks).hold(key, timeout=timeout):
                written += _rewrite(store, key)
        except (StoreError, LockTimeoutError) as error:
            failures.append(error)
    if failures:
        reasons = "; ".join(map(str, failures[:_MOST_NAMED])) + ("; ..." if len(failures) > _MOST_NAMED else "")
        raise StoreError(
            f"{written} sessions were encrypted again, {len(failures)} were not: {reasons}"
        ) from ExceptionGroup("rotate_encryption", failures)
    return written


def _rewrite(store: FullStore, key: str) -> bool:
    # A log-in or log-out need not wait for the lock, so it may come in between.
    while (session := store.get(key)) is not None:
        if store.replace(key, session, session.token_set):
            return True
    return False
