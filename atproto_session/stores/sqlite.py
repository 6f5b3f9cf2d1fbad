"""Sessions in an SQLite database, for any number of processes on one machine."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from .._checks import check_seconds, check_texts, refuse_to_pickle
from .._fork import close_at_end
from ..errors import LockTimeoutError, StoreError
from ..locks import FileLocks
from ..locks._places import check_parent, check_private, make_missing, path_of
from ..session import Session, TokenSet
from ._connections import Connection, Connections, is_busy
from ._urls import path_in
from .codec import Codec, EncryptionKeys
from .memory import holds

T = TypeVar("T")

_SCHEMA_VERSION = 1
# With a row id: documents are longer than a quarter of a page, so that in a table WITHOUT ROWID each would need a page
# of its own besides (measured with 100,000 sessions: 27 instead of 7 microseconds a look-up, twice the size).
_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS sessions (key TEXT PRIMARY KEY NOT NULL, document BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS logins (state TEXT PRIMARY KEY NOT NULL, document BLOB NOT NULL, expires_at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS logins_by_expiry ON logins (expires_at);
PRAGMA user_version = 1;
COMMIT;
"""
_HINTS = {
    sqlite3.SQLITE_BUSY: "another process keeps it locked; try again later",
    sqlite3.SQLITE_LOCKED: "another thread keeps it locked; try again later",
    sqlite3.SQLITE_NOTADB: "this is the file of something else, or damaged",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore it from a backup",
    sqlite3.SQLITE_FULL: "the disk is full",
}
#: The pauses of what waits for a locked database, in seconds; the last one again and again. They are made here and not
#: in SQLite, so that nothing is under way meanwhile: a fork need not wait, and gevent can do something else.
_PAUSES = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05)
#: How long a deletion waits for those who read, to empty the log, in seconds. The next deletion empties it, too.
_LOG_WITHIN = 0.5
#: For how many seconds a look at whether the file is still there counts for other threads that read at the same time.
#: With each look of its own, a thread would let all others go first.
_LOOK_COUNTS_FOR = 0.01
_SIDES = ("", "-wal", "-shm", "-journal")


class SQLiteStore:
    """Sessions in one SQLite file, in WAL mode: readers and the writer do not wait for each other, and what was
    written survives a power failure.

    What is deleted or replaced is overwritten in the file (``PRAGMA secure_delete``). The log, where copies of it may
    be left, is emptied after a deletion, and by :meth:`scrub`.

    :param path: the database file, made when missing, for its owner alone. Not on a network file system, where WAL
        does not work. The lock files are beside it, in ``<path>.locks``.
    :param encryption_keys: see :func:`.open_store`.
    :param allow_plaintext: see :func:`.open_store`.
    :param busy_timeout: how long a write waits for the write of another process, in seconds.
    :raises StoreError: the file cannot be used, was written by a later release, or is open to other users.
    """

    raises_only_session_errors = True
    __reduce__ = refuse_to_pickle("an SQLiteStore", "open it in each process, by the same path or URL")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        encryption_keys: EncryptionKeys = (),
        allow_plaintext: bool = False,
        busy_timeout: float = 30.0,
    ) -> None:
        if path in ("", ":memory:"):
            raise StoreError('an SQLite store needs a file; open_store("memory:") keeps sessions in memory')
        path = path_of("the path of an SQLite store", path)
        check_seconds(busy_timeout=busy_timeout)
        self._codec = Codec(encryption_keys, allow_plaintext=allow_plaintext)
        # A process that opens the file through a link has to find the same locks, and the same log, beside it.
        self._database = _Database(Path(os.path.realpath(path)), busy_timeout)
        self.locks = self._database.locks
        self.logins = SQLiteLogins(self._database, self._codec)

    @classmethod
    def from_url(cls, url: str, *, encryption_keys: EncryptionKeys = (), allow_plaintext: bool = False) -> SQLiteStore:
        """The store that ``sqlite:///file.db`` names."""
        return cls(path_in(url), encryption_keys=encryption_keys, allow_plaintext=allow_plaintext)

    def __repr__(self) -> str:
        return f"SQLiteStore({self._database.path!r})"

    def get(self, key: str) -> Session | None:
        check_texts(key=key)
        rows = self._database.read("SELECT document FROM sessions WHERE key = ?", (key,))
        return self._codec.decode(key, rows[0][0]) if rows else None

    def set(self, key: str, session: Session) -> None:
        data = self._codec.encode(key, session)
        self._database.write(lambda connection: _put(connection, key, data))

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        """Compare-and-set; see :meth:`.FullStore.replace`."""
        check_texts(key=key)
        data = None if session is None else self._codec.encode(key, session)

        def work(connection: sqlite3.Connection) -> bool:
            row = connection.execute("SELECT document FROM sessions WHERE key = ?", (key,)).fetchone()
            if not holds(None if row is None else self._codec.decode(key, row[0]), expected):
                return False
            if data is None:
                connection.execute("DELETE FROM sessions WHERE key = ?", (key,))
            else:
                _put(connection, key, data)
            return True

        replaced = self._database.write(work)
        if replaced and session is None:
            self._database.empty_log_soon()
        return replaced

    def delete(self, key: str) -> None:
        check_texts(key=key)
        self._database.write(lambda connection: connection.execute("DELETE FROM sessions WHERE key = ?", (key,)))
        self._database.empty_log_soon()

    def clear(self) -> None:
        """Delete every session. Pending log-ins stay, and expire."""
        self._database.write(lambda connection: connection.execute("DELETE FROM sessions"))
        self._database.empty_log_soon()

    def scrub(self) -> None:
        """Leave nothing in the log of what was overwritten.

        :raises StoreError: another process reads or writes all the time.
        """
        self._database.empty_log()

    def __iter__(self) -> Iterator[str]:
        # A page at a time: a read transaction that stays open keeps the log from being reset.
        last, comparison = "", ">="
        while rows := self._database.read(
            f"SELECT key FROM sessions WHERE key {comparison} ? ORDER BY key LIMIT 1000",  # noqa: S608 - no input
            (last,),
        ):
            yield from (key for (key,) in rows)
            (last,), comparison = rows[-1], ">"

    def close(self) -> None:
        """Close the database. The store cannot be used afterwards."""
        self._database.close()


class SQLiteLogins:
    """Pending log-ins in a table of their own."""

    def __init__(self, database: _Database, codec: Codec) -> None:
        self._database = database
        self._codec = codec

    def put(self, state: str, document: dict[str, Any], expires_at: float) -> None:
        data = self._codec.encode_login(state, document, expires_at)

        def work(connection: sqlite3.Connection) -> None:
            _purge_logins(connection)
            connection.execute("INSERT OR REPLACE INTO logins VALUES (?, ?, ?)", (state, data, expires_at))

        self._database.write(work)

    def purge(self) -> int:
        """Delete those that have expired. Returns how many."""
        return self._database.write(_purge_logins)

    def take(self, state: str) -> dict[str, Any] | None:
        def work(connection: sqlite3.Connection) -> dict[str, Any] | None:
            row = connection.execute("SELECT document FROM logins WHERE state = ?", (state,)).fetchone()
            if row is None:
                return None
            # Read before it is removed: a worker without the right encryption key does not end the log-in.
            document = self._codec.decode_login(state, row[0], time.time())
            connection.execute("DELETE FROM logins WHERE state = ?", (state,))
            return document

        return self._database.write(work)


class _LogInUse(sqlite3.OperationalError):
    """Somebody else reads from the log, or writes to it."""

    sqlite_errorcode = sqlite3.SQLITE_BUSY


class _Database:
    """One file and the connections to it. Every failure is a StoreError."""

    def __init__(self, path: Path, busy_timeout: float) -> None:
        self.path = str(path)
        self.locks = FileLocks(f"{path}.locks")
        self._busy_timeout = busy_timeout
        self._connections = Connections(self.path, partial(_connect, path.as_uri()))

        def create() -> None:
            with self._connections.turn():
                _create(path)

        def is_set_up() -> bool:
            with self._connections.turn():
                return _is_set_up(path)

        try:
            make_missing(path.parent)
            check_parent(path.parent)
            for side in _SIDES:
                with suppress(FileNotFoundError):
                    check_private(Path(f"{path}{side}"))
            self.locks.check()
            if not (path.exists() and _patiently(is_set_up, busy_timeout)):
                # Two processes that switch the same new file to WAL are not made to wait for each other by SQLite.
                with self.locks.hold("schema", timeout=busy_timeout):
                    _patiently(create, busy_timeout)
            self._identity = _identity_of(self.path)
            self._looked_at = time.monotonic()
        except LockTimeoutError as error:
            raise StoreError(f"{self.path} is being opened by other processes all the time", retryable=True) from error
        except (sqlite3.Error, OSError) as error:
            raise self._failure(error) from error
        self.close = weakref.finalize(self, self._connections.close)
        self.close.atexit = False
        close_at_end(self._connections)  # when what is under way at the end of the program is stored

    def read(self, sql: str, parameters: tuple[str, ...]) -> list[Any]:
        def work(connection: sqlite3.Connection) -> list[Any]:
            return connection.execute(sql, parameters).fetchall()

        return self._use(work, is_read=True)

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def transaction(connection: sqlite3.Connection) -> T:
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            connection.execute("COMMIT")
            return result

        return self._use(transaction)

    def empty_log(self, within: float | None = None) -> None:
        """
        :param within: how long to wait for others, in seconds.
        """
        self._use(_empty_log, within)

    def empty_log_soon(self) -> None:
        """Now, if nobody keeps it from being done for long. What was to be deleted is deleted in any case."""
        with suppress(StoreError):
            self.empty_log(_LOG_WITHIN)

    def _use(self, work: Callable[[sqlite3.Connection], T], within: float | None = None, *, is_read: bool = False) -> T:
        try:
            return _patiently(partial(self._try, work, is_read), self._busy_timeout if within is None else within)
        except (sqlite3.Error, OSError, UnicodeError) as error:
            raise self._failure(error) from error

    def _try(self, work: Callable[[sqlite3.Connection], T], is_read: bool) -> T:
        # SQLite itself would go on with the file that was deleted, and lose what it writes.
        now = time.monotonic()
        if not (is_read and self._connections.are_in_use and now - self._looked_at < _LOOK_COUNTS_FOR):
            if _identity_of(self.path) != self._identity:
                raise StoreError(f"{self.path} was replaced while it was in use; restart the processes that use it")
            self._looked_at = now
        with self._connections.lent() as connection:
            return work(connection)

    def _failure(self, error: Exception) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        hint = _HINTS.get(code, "it needs a file and a directory that this user may write to")
        return StoreError(f"the session store {self.path} cannot be used ({error}): {hint}", retryable=is_busy(error))


def _patiently(work: Callable[[], T], patience: float) -> T:
    """``work()``, again and again for ``patience`` seconds as long as somebody else keeps the database locked."""
    deadline = time.monotonic() + patience
    pauses = chain(_PAUSES, repeat(_PAUSES[-1]))
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            left = deadline - time.monotonic()
            if left <= 0 or not is_busy(error):
                raise
        time.sleep(min(left, next(pauses)))


def _create(path: Path) -> None:
    # The permissions are right from the first moment: SQLite takes them from the file that modeof names. The database
    # must not be opened here in any other way: on POSIX, to close it would drop the locks of this process on it.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".") as like:
        uri = f"{path.as_uri()}?mode=rwc&modeof={quote(like.name)}"
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=0.0)) as connection:
            connection.execute("PRAGMA secure_delete = ON")
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise StoreError(f"{path} is on a file system that SQLite's WAL mode does not work on")
            if _version_of(connection) == 0:
                connection.executescript(_SCHEMA)
            _check(connection)


def _is_set_up(path: Path) -> bool:
    """Whether the database is one that was made before. Then it is checked, without the lock that would be needed to
    make it."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=0.0)) as database:
        database.execute("PRAGMA secure_delete = ON")
        (mode,) = database.execute("PRAGMA journal_mode").fetchone()
        is_there = mode == "wal" and _version_of(database) != 0
        if is_there:
            _check(database)
        return is_there


def _check(connection: sqlite3.Connection) -> None:
    _check_version(connection)
    with suppress(_LogInUse):
        _empty_log(connection)  # of what a writer that was killed has left there
    connection.execute("BEGIN IMMEDIATE")  # fails at once where nothing can be written


def _connect(uri: str) -> Connection:
    connection = sqlite3.connect(
        f"{uri}?mode=rw",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=0.0,
        factory=Connection,
    )
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")  # not every build of SQLite does so by itself
        _check_version(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _empty_log(connection: sqlite3.Connection) -> None:
    (is_in_use, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if is_in_use:
        raise _LogInUse("the log is in use")


def _version_of(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _check_version(connection: sqlite3.Connection) -> None:
    if (version := _version_of(connection)) != _SCHEMA_VERSION:
        raise StoreError(
            f"the database has version {version}, not {_SCHEMA_VERSION}: it was written by a later release of this "
            "library, which this worker has to be upgraded to, or by another program"
        )


def _purge_logins(connection: sqlite3.Connection) -> int:
    return connection.execute("DELETE FROM logins WHERE expires_at <= ?", (time.time(),)).rowcount


def _put(connection: sqlite3.Connection, key: str, data: bytes) -> None:
    connection.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?)", (key, data))


def _identity_of(path: str) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116 - on every read, and a Path costs as much again
    return status.st_dev, status.st_ino
