"""Finding the store that a URL names."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import StoreError, printable
from .codec import EncryptionKeys
from .jsonfile import JSONStore
from .memory import MemoryStore
from .sqlite import SQLiteStore

if TYPE_CHECKING:
    from . import FullStore

#: Other packages add schemes of their own in this group of entry points; one names a :class:`Backend`.
GROUP = "atproto_session.stores"

_EXAMPLES = "memory:, json:///directory, sqlite:///file.db, redis://, postgresql:// and mysql://"


class Backend(Protocol):
    """A class of stores that :func:`open_store` can open."""

    def from_url(self, url: str, *, encryption_keys: EncryptionKeys = (), allow_plaintext: bool = False) -> FullStore:
        """The store that ``url`` names, its scheme included.

        :raises StoreError: the URL cannot be understood, or the place cannot be used. The message does not hold the
            URL, which may hold a password.
        """
        ...


#: They need no look at what is installed, which a program that was frozen may not even know, and nobody replaces them.
_OWN: dict[str, Backend] = {"json": JSONStore, "memory": MemoryStore, "sqlite": SQLiteStore}
#: Those that are imported when they are asked for, since they need an extra: the module here, its class, and the extra.
_WITH_EXTRA = dict.fromkeys(("redis", "rediss", "unix", "valkey", "valkeys"), ("redis", "RedisStore", "redis"))
_WITH_EXTRA |= dict.fromkeys(("postgresql", "postgres", "mysql", "mariadb"), ("sql", "SQLStore", "sql"))


def open_store(url: str, *, encryption_keys: EncryptionKeys = (), allow_plaintext: bool = False) -> FullStore:
    """The store that ``url`` names.

    ``memory:``, ``json:///directory`` or ``sqlite:///file.db``. Paths are written as SQLAlchemy writes them: three
    slashes and a relative path, or four in all for an absolute one. ``redis://host:6379/0``, with the extra ``redis``;
    ``postgresql://user:password@host/database`` or ``mysql://...``, with the extra ``sql``. Other packages add schemes
    by an entry point in the group ``atproto_session.stores``, which has the scheme as its name and leads to a
    :class:`.Backend`.

    :param encryption_keys: Fernet keys: records are encrypted with the first and can be read with any of them. To
        rotate, put the new key first, restart every worker, call :func:`.rotate_encryption`, and take the old key out
        an hour later, when no log-in that it encrypted is pending. Where workers are restarted one by one, add the new
        key at the end before, in another round, so that all of them can read what the first to use it write.
        ``memory:`` needs none.
    :param allow_plaintext: with ``encryption_keys``, read what is not encrypted as well: for the time between switching
        encryption on and :func:`.rotate_encryption`. Otherwise that is a StoreError.
    :raises StoreError: the URL cannot be understood, what it needs is not installed, or the place cannot be used.
    """
    return backend_of(url).from_url(url, encryption_keys=encryption_keys, allow_plaintext=allow_plaintext)


def backend_of(url: str) -> Backend:
    """The kind of store that ``url`` names. Nothing is opened.

    :raises StoreError: there is none, or what it needs is not installed.
    """
    if not isinstance(url, str):
        raise StoreError(
            f"the URL of a store is text, such as sqlite:///sessions.db, not {type(url).__name__}; SQLiteStore and "
            "JSONStore take paths"
        )
    scheme, colon, _ = url.partition(":")
    if not colon or not scheme:
        raise StoreError(
            "the URL of a store begins with a scheme: sqlite:///sessions.db is a file in the current directory; known "
            f"are {_EXAMPLES}"
        )
    scheme = scheme.partition("+")[0].lower()
    found: Backend = _OWN.get(scheme) or (_with_extra(scheme) if scheme in _WITH_EXTRA else _installed(scheme))
    return found


def _with_extra(scheme: str) -> Any:
    module, name, extra = _WITH_EXTRA[scheme]
    try:
        return getattr(import_module(f".{module}", __package__), name)
    except ImportError as error:
        raise StoreError(
            f"stores of the kind {scheme} need a package that is missing ({error.name}): "
            f"pip install 'atproto-session[{extra}]'"
        ) from error


def _installed(scheme: str) -> Any:
    for entry in entry_points(group=GROUP, name=scheme):
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            raise StoreError(
                f"stores of the kind {scheme} need a package that is missing ({error}): {_remedy(entry)}"
            ) from error
    # The scheme alone: a URL may hold a password.
    others = sorted(entry_points(group=GROUP).names)
    raise StoreError(
        f"no session store is known for {printable(scheme, 20)!r}; known are {', '.join([*others, _EXAMPLES])}"
    )


def _remedy(entry: EntryPoint) -> str:
    name = entry.dist.name if entry.dist is not None else "the package that brings it"
    return f"pip install '{name}[{','.join(entry.extras)}]'" if entry.extras else f"install what {name} needs"
