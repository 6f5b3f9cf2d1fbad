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
from typing import Any, Protocol, cast

from ..errors import LockTimeoutError, StoreError
from ..locks import LockKind, Locks
from ..session import Session, TokenSet
from ._completed import CompletedStore, MappingStore
from ._opening import Backend, open_store
from .codec import Codec, EncryptionKeys
from .jsonfile import JSONStore
from .memory import MemoryStore, holds
from .sqlite import SQLiteStore

__all__ = [
    "Backend",
    "Codec",
    "EncryptionKeys",
    "FullStore",
    "JSONStore",
    "Logins",
    "MemoryStore",
    "SQLiteStore",
    "SessionStore",
    "complete",
    "holds",
    "is_safe_between_processes",
    "open_store",
    "rotate_encryption",
]


class SessionStore(Protocol):
    """What a store has to have. What cannot be read or written is a :exc:`.StoreError`, never an absent session.

    A key is a DID, or ``did#session_id``: text of up to 2,305 characters (a DID has up to 2,048, the other 256). Upper
    and lower case differ, and a ``session_id`` may have any printable character.

    ``get`` is called in the threads of the application, everything else in threads of the library. A store that keeps
    something for each thread, such as a connection, may have a method ``thread_ended()``, without arguments: it is
    called at the end of each thread of the library, in that thread.
    """

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
    """Log-ins that have begun, for the time until the browser comes back.

    Where they do not expire by themselves, there may be a method ``purge()``, without arguments, that deletes those
    that have, and returns how many: :meth:`.OAuthClient.clean` calls it.
    """

    def put(self, state: str, document: dict[str, Any], expires_at: float, /) -> None:
        """Keep ``document``, a JSON object, until ``expires_at`` (seconds since the epoch)."""
        ...

    def take(self, state: str, /) -> dict[str, Any] | None:
        """Take the document of ``state`` out. Of all who ask for it, in whatever process, one gets it; ``None`` for
        the others, and when it has expired."""
        ...


class FullStore(SessionStore, Protocol):
    """What a store has when nothing is left to fill in.

    One that writes more to a disk than its records (a log, temporary files) may have a method ``scrub()``, without
    arguments: :func:`rotate_encryption` calls it at the end, to leave nothing there that was overwritten.
    """

    @property
    def locks(self) -> Locks:
        """Locks between all that share the store, by key."""
        ...

    @property
    def logins(self) -> Logins: ...

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None, /) -> bool:
        """Compare-and-set: store ``session`` if the record is still the ``expected`` one, in one step that no other
        write can come between. That no refresh token is sent twice rests on this; :func:`holds` is the comparison.

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


#: What a store has that is used as it is.
_ALL = ("get", "set", "delete", "replace", "clear", "__iter__", "close")
_LEAST = _ALL[:3]


def complete(store: SessionStore | MutableMapping[str, Session]) -> FullStore:
    """A store that has everything as it is; any other with what is missing filled in: ``replace`` under a lock of this
    object, ``locks`` of this process, ``logins`` in its memory. Iterating and clearing are not made up. Whatever else
    than a :exc:`.SessionError` it raises becomes a :exc:`.StoreError`, unless it comes from the handler of a signal.

    Every call makes another object, with other locks. Two clients over one store of your own are given one
    ``complete(store)``, or one of them does not see what the other one locks.

    A store has everything if it has all of :class:`FullStore` and says that nothing is to be done about its errors:
    ``raises_only_session_errors = True``.

    :raises TypeError: ``store`` is neither a store nor a mutable mapping.
    """
    if (
        getattr(store, "raises_only_session_errors", False)
        and _has(store, _ALL)
        and all(getattr(store, name, None) is not None for name in ("locks", "logins"))
    ):
        return cast(FullStore, store)
    if _has(store, _LEAST):
        return CompletedStore(store, type(store).__name__)
    if isinstance(store, MutableMapping):
        return CompletedStore(MappingStore(store), type(store).__name__)
    raise TypeError(
        f"a session store has the methods get(key), set(key, session) and delete(key), or is a mutable mapping; "
        f"{type(store).__name__} is neither. open_store() opens one from a URL such as sqlite:///sessions.db"
    )


def _has(store: object, methods: tuple[str, ...]) -> bool:
    # A class has the methods, too, but is no store yet.
    return not isinstance(store, type) and all(callable(getattr(store, name, None)) for name in methods)


def is_safe_between_processes(store: FullStore, locks: Locks | None = None) -> bool:
    """Whether two processes that share ``store`` keep from sending one refresh token twice: it has a ``replace`` of its
    own, or there are locks that reach further than this process.

    :param locks: those that are used instead of the store's own.
    """
    kind = getattr(store.locks if locks is None else locks, "kind", None)
    return kind is not LockKind.PROCESS or getattr(store, "has_own_replace", True)


#: How many failures a message lists; all are in its cause.
_MOST_NAMED = 20


def rotate_encryption(store: FullStore, *, locks: Locks | None = None, timeout: float = 60.0) -> int:
    """Write every session of ``store`` again, encrypted with the first of its keys, and leave no copy of what it was
    before in the files of the store. Workers may go on using it.

    Each account's lock is held meanwhile, and the session is stored by compare-and-set, so that neither a refresh nor
    the trace of one is lost.

    :param locks: those that the clients were given, if they were given any; by default the store's own.
    :param timeout: how long to wait for a refresh under way, in seconds for each account.
    :returns: how many sessions were written.
    :raises StoreError: at the end, with the keys of all records that could not be read or written; the others have
        been written. Or the log of the database could not be emptied.
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
    try:
        getattr(store, "scrub", _nothing)()
    except StoreError as error:
        raise StoreError(
            f"{written} sessions were encrypted again, but there may be copies of what they were before: {error}; call "
            "rotate_encryption again",
            retryable=True,
        ) from error
    return written


def _nothing() -> None:
    """For a store that leaves no copies."""


def _rewrite(store: FullStore, key: str) -> bool:
    # A log-in or log-out need not wait for the lock, so it may come in between.
    while (session := store.get(key)) is not None:
        if store.replace(key, session, session):
            return True
    return False
