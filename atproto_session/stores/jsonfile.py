"""Sessions in a directory: a file for each account."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from .._checks import check_texts, refuse_to_pickle
from ..errors import LockTimeoutError, StoreError, printable
from ..locks import FileLocks
from ..locks._places import make_private, path_of
from ..session import Session, TokenSet
from ._urls import path_in
from .codec import Codec, EncryptionKeys
from .memory import holds

#: How long a write waits for another one to the same account, in seconds.
_WRITE_TIMEOUT = 30.0
#: Expired log-ins are looked for on every so many-th new one.
_PURGE_EVERY = 64
#: Longer names would not fit on some file systems.
_LONGEST_NAME = 200
_HASHED = "%sha256-"
_RESERVED_ON_WINDOWS = r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)"


class JSONStore:
    """Sessions as JSON files, for one machine and up to some thousand accounts.

    ``sessions/`` holds one file for each key, ``logins/`` the pending log-ins, ``locks/`` the lock files. Every write
    goes to a file in ``writing/`` first, reaches the disk, and then takes the place of the old one, so that a reader
    finds the one or the other, whole. Reading takes no lock.

    On Windows a file that is being read cannot be replaced; prefer :class:`.SQLiteStore` there.

    :param directory: made when missing, for its owner alone.
    :param encryption_keys: see :func:`.open_store`.
    :param allow_plaintext: see :func:`.open_store`.
    :raises StoreError: the directory cannot be used, or is open to other users.
    """

    raises_only_session_errors = True
    __reduce__ = refuse_to_pickle("a JSONStore", "open it in each process, by the same path or URL")

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        encryption_keys: EncryptionKeys = (),
        allow_plaintext: bool = False,
    ) -> None:
        self._codec = Codec(encryption_keys, allow_plaintext=allow_plaintext)
        # A process that opens the directory through a link finds the same locks in it. Links in it are not followed.
        self._directory = Path(os.path.realpath(path_of("the directory of a JSON store", directory)))
        self._files = _Files(self._directory)
        self.locks = FileLocks(self._directory / "locks")
        self.logins = JSONLogins(self._files, self._codec)

    @classmethod
    def from_url(cls, url: str, *, encryption_keys: EncryptionKeys = (), allow_plaintext: bool = False) -> JSONStore:
        """The store that ``json:///directory`` names."""
        return cls(path_in(url), encryption_keys=encryption_keys, allow_plaintext=allow_plaintext)

    def __repr__(self) -> str:
        return f"JSONStore({str(self._directory)!r})"

    def get(self, key: str) -> Session | None:
        data = self._files.read(_path_of(key))
        return None if data is None else self._codec.decode(key, data)

    def set(self, key: str, session: Session) -> None:
        data = self._codec.encode(key, session)
        path = _path_of(key)
        with self._files.writing(path):
            self._files.write(path, data)

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        """Compare-and-set; see :meth:`.FullStore.replace`."""
        data = None if session is None else self._codec.encode(key, session)
        path = _path_of(key)
        with self._files.writing(path):
            if not holds(self.get(key), expected):
                return False
            if data is not None:
                self._files.write(path, data)
            elif expected is not None:
                self._files.remove(path)
        if session is None:
            self._scrub_if_possible()
        return True

    def delete(self, key: str) -> None:
        path = _path_of(key)
        with self._files.writing(path):
            self._files.remove(path)
        self._scrub_if_possible()

    def clear(self) -> None:
        """Delete every session. Pending log-ins stay, and expire."""
        for path in self._files.list("sessions", ".json"):
            with self._files.writing(path):
                self._files.remove(path)
        self._scrub_if_possible()

    def scrub(self) -> None:
        """Leave nothing of what writers that were killed had begun to write.

        :raises StoreError: it cannot be deleted.
        """
        self._files.remove_leftovers()

    def __iter__(self) -> Iterator[str]:
        """The keys.

        :raises StoreError: at the end, if there are files whose key cannot be told.
        """
        unreadable = []
        for path in self._files.list("sessions", ".json"):
            try:
                key = self._key_of(path)
            except ValueError:
                unreadable.append(path)
                continue
            if key is not None:
                yield key
        if unreadable:
            names = ", ".join(map(printable, unreadable))
            raise StoreError(f"in {self._directory}, it cannot be told whose sessions these are: {names}")

    def close(self) -> None:
        """Nothing to close: no file stays open."""

    def _scrub_if_possible(self) -> None:
        # The record itself has been deleted by now.
        with suppress(StoreError):
            self.scrub()

    def _key_of(self, path: str) -> str | None:
        name = path.removeprefix("sessions/").removesuffix(".json")
        if name.startswith(_HASHED):
            data = self._files.read(path)
            if data is None:
                return None
            key = self._codec.key_of(data)
        else:
            key = "" if name == "%" else unquote_to_bytes(name).decode("utf-8", "surrogatepass")
        if _path_of(key) != path:
            raise ValueError("the file is not named as this key's would be")
        return key


class JSONLogins:
    """Pending log-ins, each in a file that carries the time of its end as its time of modification."""

    def __init__(self, files: _Files, codec: Codec) -> None:
        self._files = files
        self._codec = codec
        self._puts = itertools.count()

    def put(self, state: str, document: dict[str, Any], expires_at: float) -> None:
        if next(self._puts) % _PURGE_EVERY == 0:
            self.purge()
        path = _login_path_of(state)
        with self._files.writing(path):
            self._files.write(path, self._codec.encode_login(state, document, expires_at), modified=expires_at)

    def purge(self) -> int:
        """Delete those that have expired. Returns how many."""
        return self._files.remove_older("logins", ".login", time.time())

    def take(self, state: str) -> dict[str, Any] | None:
        path = _login_path_of(state)
        data = self._files.read(path)
        if data is None:
            return None
        # Read before it is removed: a worker without the right encryption key does not end the log-in.
        document = self._codec.decode_login(state, data, time.time())
        return document if self._files.remove(path) else None


class _Files:
    """The files below one directory, by their path relative to it. Every failure is a StoreError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._locks = FileLocks(directory / "locks" / "writing")
        with self._failures("made"):
            for name in ("", "locks", "sessions", "logins", "writing"):
                make_private(directory / name)
        probe = f"sessions/.{secrets.token_hex(8)}.probe"
        with self.writing(probe):
            self.write(probe, b"")
            self.remove(probe)
        self.remove_leftovers()

    @contextmanager
    def writing(self, path: str) -> Iterator[None]:
        """Keep everybody else from writing ``path``."""
        try:
            with self._locks.hold(path, timeout=_WRITE_TIMEOUT):
                yield
        except LockTimeoutError as error:
            raise StoreError(f"{self._directory / path} is being written all the time", retryable=True) from error

    def read(self, path: str) -> bytes | None:
        with self._failures("read"):
            try:
                with FileIO(self._directory / path, opener=_without_links) as file:
                    return file.readall()
            except FileNotFoundError:
                if not (self._directory / path).parent.is_dir():
                    raise
                return None

    def write(self, path: str, data: bytes, *, modified: float | None = None) -> None:
        temporary = self._directory / "writing" / f"{Path(path).name}.{secrets.token_hex(4)}"
        with self._failures("written"):
            try:
                with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if modified is not None:
                    os.utime(temporary, (modified, modified))
                temporary.replace(self._directory / path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()  # on a full disk it would take the room that is left
                raise
            self._sync((self._directory / path).parent)

    def remove(self, path: str) -> bool:
        """Whether it was this call that removed it."""
        with self._failures("deleted"):
            try:
                (self._directory / path).unlink()
            except FileNotFoundError:
                if not (self._directory / path).parent.is_dir():
                    raise
                return False
            self._sync((self._directory / path).parent)
            return True

    def list(self, directory: str, suffix: str) -> list[str]:
        with self._failures("read"):
            names = [path.name for path in (self._directory / directory).iterdir()]
        return [f"{directory}/{name}" for name in names if name.endswith(suffix)]

    def remove_older(self, directory: str, suffix: str, than: float) -> int:
        removed = 0
        for path in self.list(directory, suffix):
            with self._failures("deleted"), suppress(FileNotFoundError):
                if (self._directory / path).stat().st_mtime < than:
                    (self._directory / path).unlink()
                    removed += 1
        return removed

    def remove_leftovers(self) -> None:
        # Of killed writers: one that lives holds the lock of what it writes.
        for path in self.list("writing", ""):
            target = path.removeprefix("writing/").rpartition(".")[0]
            directory = "logins" if target.endswith(".login") else "sessions"
            with suppress(LockTimeoutError), self._locks.hold(f"{directory}/{target}", timeout=0):
                self.remove(path)

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"the session store in {self._directory} cannot be {what} ({error}); it needs a directory that this "
                "user may write to"
            ) from error

    def _sync(self, directory: Path) -> None:
        # What a directory holds is on the disk only when the directory is. Windows has no such call, and needs none.
        if hasattr(os, "O_DIRECTORY"):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _path_of(key: str) -> str:
    """Percent-encoded more thoroughly than a URL: a file system may ignore case, hide names that begin with a dot, or
    keep names for devices."""
    check_texts(key=key)
    name = re.sub(rb"[^a-z0-9_.-]", lambda match: b"%%%02X" % match[0][0], key.encode("utf-8", "surrogatepass")).decode(
        "ascii"
    )
    if name.startswith(".") or re.match(_RESERVED_ON_WINDOWS, name):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) > _LONGEST_NAME:
        name = _HASHED + hashlib.sha256(name.encode("ascii")).hexdigest()
    return f"sessions/{name or '%'}.json"


def _login_path_of(state: str) -> str:
    return f"logins/{hashlib.sha256(state.encode('utf-8', 'surrogatepass')).hexdigest()}.login"
