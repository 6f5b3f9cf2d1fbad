"""The stores: the contract for every one, and what can happen to the place where each keeps its records."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cryptography.fernet import Fernet

from atproto_session.errors import LockTimeoutError, StoreError
from atproto_session.locks import FileLocks, LockKind, ThreadLocks
from atproto_session.session import Attempt, Session, TokenSet, to_document
from atproto_session.stores import (
    FullStore,
    JSONStore,
    MemoryStore,
    SQLiteStore,
    _completed,
    complete,
    is_safe_between_processes,
    jsonfile,
    memory,
    open_store,
    rotate_encryption,
    sqlite,
)
from atproto_session.stores.codec import Codec
from atproto_session.stores.memory import MemoryLogins
from atproto_session.testing.contracts import DID, HOSTILE_KEYS, SharedStoreContract, StoreContract, make_session

from .core import PlainStore, Worker
from .striking import Round, fail, give_away, strike_everywhere

KEY, NEW_KEY = Fernet.generate_key(), Fernet.generate_key()
LATER, EARLIER = 4e9, 1e9
ROOT = Path(__file__).parent.parent


def damage_json(directory: Path) -> None:
    (file,) = (directory / "sessions").glob("*ewvi7nxzyoun6zhxrhs64oiz.json")
    file.write_bytes(file.read_bytes()[:-20])


def damage_sqlite(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "UPDATE sessions SET document = substr(document, 1, length(document) - 20) WHERE key = ?", (DID,)
        )


def everything_in(directory: Path) -> bytes:
    """All that is on the disk."""
    return b"".join(file.read_bytes() for file in directory.rglob("*") if file.is_file())


class AnyKeys(StoreContract):
    """Keys that cannot occur do no harm here."""

    keys = HOSTILE_KEYS

    def test_a_key_that_is_not_unicode_is_kept_or_refused(self, store: FullStore) -> None:
        try:
            store.set("lone \ud800", make_session())
        except StoreError:
            with pytest.raises(StoreError):
                store.get("lone \ud800")
        else:
            assert store.get("lone \ud800") == make_session()


class TestMemoryStore(AnyKeys):
    def make_store(self, tmp_path: Path) -> FullStore:
        return MemoryStore[Session]()


class TestJSONStore(AnyKeys, SharedStoreContract):
    def opener(self, tmp_path: Path) -> Callable[[], FullStore]:
        return partial(JSONStore, tmp_path / "store")

    def damage(self, store: FullStore, key: str) -> bool:
        damage_json(store._directory)  # type: ignore[attr-defined]
        return True


class TestEncryptedJSONStore(TestJSONStore):
    def opener(self, tmp_path: Path) -> Callable[[], FullStore]:
        return partial(JSONStore, tmp_path / "store", encryption_keys=[KEY])

    def stored_bytes(self, store: FullStore) -> bytes | None:
        return everything_in(store._directory)  # type: ignore[attr-defined]


class TestSQLiteStore(AnyKeys, SharedStoreContract):
    def opener(self, tmp_path: Path) -> Callable[[], FullStore]:
        return partial(SQLiteStore, tmp_path / "sessions.db")

    def damage(self, store: FullStore, key: str) -> bool:
        damage_sqlite(store._database.path)  # type: ignore[attr-defined]
        return True

    def open_connections(self, store: FullStore) -> int | None:
        return len(store._database._connections._idle)  # type: ignore[attr-defined]


class TestEncryptedSQLiteStore(TestSQLiteStore):
    def opener(self, tmp_path: Path) -> Callable[[], FullStore]:
        return partial(SQLiteStore, tmp_path / "sessions.db", encryption_keys=[KEY])

    def stored_bytes(self, store: FullStore) -> bytes | None:
        return everything_in(Path(store._database.path).parent)  # type: ignore[attr-defined]


class TestCompletedDict(AnyKeys):
    def make_store(self, tmp_path: Path) -> FullStore:
        return complete({})


class OwnStoreWithKeys(PlainStore):
    closed = False

    def clear(self) -> None:
        self.sessions.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self.sessions)

    def close(self) -> None:
        self.closed = True


class TestCompletedStore(AnyKeys):
    def make_store(self, tmp_path: Path) -> FullStore:
        return complete(OwnStoreWithKeys())


# Completing


def test_a_full_store_is_left_as_it_is(tmp_path: Path) -> None:
    for store in (MemoryStore[Session](), JSONStore(tmp_path), completed := complete(PlainStore())):
        assert complete(store) is store
    assert completed.locks.kind is LockKind.PROCESS


def test_a_store_of_ones_own_that_has_everything_and_says_so_is_left_as_it_is() -> None:
    class Own:
        raises_only_session_errors = True
        locks = ThreadLocks()
        logins = MemoryLogins()

        def nothing(self, *arguments: object) -> None:
            """Is enough here."""

        get = set = delete = replace = clear = close = __iter__ = nothing

    own = Own()
    assert complete(own) is own  # type: ignore[comparison-overlap]
    for missing in ("locks", "logins", "replace", "raises_only_session_errors"):
        less: Any = type("Less", (Own,), {missing: None})()
        assert complete(less) is not less


@pytest.mark.parametrize("make", [PlainStore, dict])
def test_two_that_complete_one_store_share_what_is_filled_in_if_they_share_the_result(make: Callable[[], Any]) -> None:
    store = make()
    first, second = complete(store), complete(store)
    with first.locks.hold(DID, timeout=0), second.locks.hold(DID, timeout=0):
        pass  # what the documentation says is lost
    first.set(DID, make_session())
    assert second.get(DID) == make_session()
    with first.locks.hold(DID, timeout=0), pytest.raises(LockTimeoutError):
        complete(first).locks.hold(DID, timeout=0).__enter__()


def test_it_is_told_what_is_safe_between_processes(tmp_path: Path) -> None:
    class WithReplace(PlainStore):
        def replace(self, *arguments: object) -> bool: ...  # type: ignore[empty-body]

    class WithLocks(PlainStore):
        locks = FileLocks(tmp_path / "locks")

    files, threads = FileLocks(tmp_path / "locks"), ThreadLocks()
    owns: list[Any] = [{}, PlainStore()]
    for own in owns:
        assert not is_safe_between_processes(complete(own))
        assert not is_safe_between_processes(complete(own), threads)
        assert is_safe_between_processes(complete(own), files)
    assert is_safe_between_processes(complete(WithReplace()))
    assert is_safe_between_processes(complete(WithLocks()))
    assert not is_safe_between_processes(complete(WithLocks()), threads)
    assert is_safe_between_processes(MemoryStore[Session]()), "no other process can reach it"
    assert is_safe_between_processes(JSONStore(tmp_path / "store"), threads), "it has compare-and-set"


def test_a_full_store_of_ones_own_fails_like_any_other() -> None:
    class Remote(OwnStoreWithKeys):
        locks = ThreadLocks()
        logins: Any = None

        def get(self, key: str) -> Session | None:
            raise ConnectionError(DID)

        def replace(self, key: str, session: Session | None, expected: TokenSet | None) -> bool:
            raise TimeoutError

    class Logins:
        def put(self, *arguments: object) -> None:
            raise ConnectionError

        take = put

    Remote.logins = Logins()
    store = complete(Remote())
    with pytest.raises(StoreError, match="Remote cannot be read: ConnectionError"):
        store.get(DID)
    with pytest.raises(StoreError, match="Remote cannot be written: ConnectionError"):
        store.logins.put("state", {}, LATER)
    with pytest.raises(StoreError, match="Remote cannot be read: ConnectionError"):
        store.logins.take("state")
    with pytest.raises(StoreError, match="Remote cannot be written: TimeoutError"):
        store.replace(DID, None, None)


def test_what_is_neither_store_nor_mapping_is_refused() -> None:
    for thing in (None, [], object(), frozenset(), b"sqlite:///x", Path("x"), MemoryStore, PlainStore):
        with pytest.raises(
            TypeError, match=r"get\(key\), set\(key, session\) and delete\(key\), or is a mutable mapping"
        ):
            complete(thing)  # type: ignore[arg-type]


def test_listing_and_clearing_are_not_made_up() -> None:
    store = complete(PlainStore())
    with pytest.raises(StoreError, match=r"PlainStore has no __iter__\(\) method"):
        list(store)
    with pytest.raises(StoreError, match=r"PlainStore has no clear\(\) method"):
        store.clear()
    store.close()
    assert repr(store) == "<PlainStore, completed>"


def test_the_parts_that_a_store_has_are_used() -> None:
    class Own(OwnStoreWithKeys):
        def __init__(self) -> None:
            super().__init__()
            self.locks = ThreadLocks(LockKind.HOLDER)
            self.replaced: list[tuple[str, Session | None, TokenSet | None]] = []

        def replace(self, key: str, session: Session | None, expected: TokenSet | None) -> int:
            self.replaced.append((key, session, expected))
            return 1

    own = Own()
    store = complete(own)
    assert store.locks is own.locks
    assert store.replace(DID, None, None) is True
    assert own.replaced == [(DID, None, None)]
    store.close()
    assert own.closed


def test_what_a_store_of_the_users_own_raises_is_a_store_error() -> None:
    class Broken:
        def fail(self, *arguments: object) -> Any:
            raise ConnectionResetError("secret-token")

        get = set = delete = clear = close = __iter__ = fail

    store = complete(Broken())
    for failing in (
        lambda: store.get(DID),
        lambda: store.set(DID, make_session()),
        lambda: store.delete(DID),
        lambda: store.replace(DID, make_session(), None),
        store.clear,
        lambda: list(store),
        store.close,
    ):
        with pytest.raises(StoreError, match="Broken") as caught:
            failing()
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        assert "secret" not in str(caught.value)


class TimeLimit(Exception):
    """As Celery's, which strikes wherever the task is, and is no failure of the store."""


def strike(number: int, frame: object) -> None:
    raise TimeLimit


class Striking:
    def __call__(self, number: int, frame: object) -> None:
        raise TimeLimit

    def strike(self, number: int, frame: object) -> None:
        raise TimeLimit


@pytest.mark.parametrize(
    "handler",
    [strike, Striking(), Striking().strike, partial(partial(strike))],
    ids=["function", "object", "method", "partial"],
)
def test_what_the_handler_of_a_signal_raises_stays_itself(handler: Any) -> None:
    class Struck(PlainStore):
        def get(self, key: str) -> Session | None:
            signal.raise_signal(signal.SIGUSR1)
            raise AssertionError

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(TimeLimit):
            complete(Struck()).get(DID)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_looks_like_a_time_limit_and_comes_from_the_store_is_a_store_error() -> None:
    class SoftTimeLimitExceeded(Exception):
        """No exception is known by its name."""

    class Failing(PlainStore):
        def get(self, key: str) -> Session | None:
            raise SoftTimeLimitExceeded

    with pytest.raises(StoreError, match="SoftTimeLimitExceeded") as caught:
        complete(Failing()).get(DID)
    assert isinstance(caught.value.__cause__, SoftTimeLimitExceeded)


def test_what_is_no_ordinary_error_stays_itself() -> None:
    class Struck(PlainStore):
        def get(self, key: str) -> Session | None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(Struck()).get(DID)


def test_the_end_of_a_thread_and_the_wish_for_no_traces_reach_the_store() -> None:
    class Own(PlainStore):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[str] = []

        def thread_ended(self) -> None:
            self.told.append("thread_ended")

        def scrub(self) -> None:
            self.told.append("scrub")
            raise ConnectionError

    own = Own()
    store: Any = complete(own)
    store.thread_ended()
    with pytest.raises(StoreError, match="Own cannot be scrubbed: ConnectionError"):
        store.scrub()
    assert own.told == ["thread_ended", "scrub"]
    without: Any = complete(PlainStore())
    without.thread_ended()
    without.scrub()


def test_a_write_in_the_middle_of_a_write_of_the_same_record_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the handler of a signal."""
    monkeypatch.setattr(_completed, "_WRITE_TIMEOUT", 0.01)

    class Interrupted(PlainStore):
        def set(self, key: str, session: Session) -> None:
            with pytest.raises(StoreError, match="written in Interrupted all the time") as caught:
                store.delete(key)
            assert caught.value.retryable
            super().set(key, session)

    store = complete(Interrupted())
    store.set(DID, make_session())
    assert store.get(DID) == make_session()


def test_a_session_error_of_a_store_stays_itself() -> None:
    class Busy(PlainStore):
        def get(self, key: str) -> Session | None:
            raise StoreError("try again", retryable=True)

    with pytest.raises(StoreError, match="try again") as caught:
        complete(Busy()).get(DID)
    assert caught.value.retryable


def test_a_store_that_holds_something_else_than_sessions() -> None:
    with pytest.raises(StoreError, match=f"OrderedDict holds a dict for {DID} instead of a Session"):
        complete(OrderedDict({DID: {"tokenSet": {}}})).get(DID)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "store", [MemoryStore[Session](), complete({}), complete(PlainStore())], ids=["memory", "dict", "own"]
)
def test_nothing_comes_between_the_comparison_and_the_write(store: FullStore) -> None:
    together = threading.Barrier(2)

    class SlowTokens(TokenSet):
        """Comparing them takes until two do, or until it is clear that the second one has to wait."""

        def has_same_tokens(self, other: TokenSet) -> bool:
            with suppress(threading.BrokenBarrierError):
                together.wait(0.2)
            return super().has_same_tokens(other)

    tokens = make_session("old").token_set
    slow = SlowTokens(**{field.name: getattr(tokens, field.name) for field in fields(tokens)})
    store.set(DID, replace(make_session("old"), token_set=slow))
    with ThreadPoolExecutor(2) as threads:
        won = list(threads.map(lambda name: store.replace(DID, make_session(name), tokens), "ab"))
    assert sorted(won) == [False, True]


# Opening


def test_open_store_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_store("memory:"), MemoryStore)
    relative, absolute = open_store("json:///dir/sub"), open_store(f"json:///{tmp_path}/dir/sub")
    assert repr(relative) == repr(absolute) == f"JSONStore({str(tmp_path / 'dir' / 'sub')!r})"
    with (
        closing(open_store("sqlite:///a b%20#?.db", encryption_keys=KEY)) as relative,
        closing(open_store(f"SQLITE:///{tmp_path}/a b%20#?.db", encryption_keys=KEY)) as absolute,
    ):
        assert repr(relative) == repr(absolute) == f"SQLiteStore({str(tmp_path / 'a b%20#?.db')!r})"
        relative.set(DID, make_session())
        assert absolute.get(DID) == make_session()
    assert (tmp_path / "a b%20#?.db").is_file()


@pytest.mark.parametrize("url", ["ftp://user:hunter2@host", "nothing\n:x", "etcd://:hunter2@host"])
def test_an_unknown_scheme_lists_the_known_ones_and_no_password(url: str) -> None:
    with pytest.raises(
        StoreError, match=r"known are memory:, json:///directory, sqlite:///file.db, redis://, postg"
    ) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("url", ["", "sessions.db", "/var/db", "~/sessions.db", ":///x"])
def test_a_url_without_a_scheme(url: str) -> None:
    with pytest.raises(StoreError, match=r"begins with a scheme: sqlite:///sessions.db is a file"):
        open_store(url)


@pytest.mark.parametrize("url", ["json:", "json://", "json:///", "json://dir", "sqlite:file.db", "sqlite:///"])
def test_a_url_without_a_path(url: str) -> None:
    with pytest.raises(StoreError, match=r":///relative/path or (json|sqlite):////absolute/path"):
        open_store(url)


def test_memory_has_nothing_behind_it() -> None:
    with pytest.raises(StoreError, match="nothing behind it"):
        open_store("memory:///sessions")


@pytest.mark.parametrize("url", [None, b"sqlite:///x.db", Path("x.db"), ["sqlite:///x.db"], 7, MemoryStore])
def test_a_url_that_is_no_text_is_an_error_that_says_what_is(url: Any) -> None:
    with pytest.raises(
        StoreError, match=rf"text, such as sqlite:///sessions.db, not {type(url).__name__}; SQLiteStore"
    ):
        open_store(url)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (None, "not as NoneType"),
        (b"place", "not as bytes"),
        (["place"], "not as list"),
        ("~/place", r"begins with ~.*os\.path\.expanduser"),
        (Path("~/place"), r"begins with ~"),
        ("pla\0ce", "no character U"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("make", [JSONStore, SQLiteStore, FileLocks])
def test_a_path_that_is_none_is_an_error_that_says_what_is(
    make: Callable[[Any], object], path: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=rf"(JSON store|SQLite store|locks) .*{told}"):
        make(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["json", "sqlite"])
def test_a_home_directory_in_a_url_is_written_out(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="begins with ~"):
        open_store(f"{scheme}:///~/place")
    assert list(tmp_path.iterdir()) == []


def test_a_json_store_needs_a_path() -> None:
    with pytest.raises(StoreError, match="not empty"):
        JSONStore("")


@pytest.mark.parametrize("keys", [None, 7, object()])
def test_encryption_keys_that_are_no_list_are_an_error(keys: Any, tmp_path: Path) -> None:
    """Nor are they none: a setting that is missing must not switch encryption off."""
    for open_ in (JSONStore, SQLiteStore, lambda path, **options: open_store(f"json:///{path}", **options)):
        with pytest.raises(StoreError, match=f"encryption_keys is a list.*not {type(keys).__name__}"):
            open_(tmp_path / "place", encryption_keys=keys)
    assert list(tmp_path.iterdir()) == []


# Schemes of other packages


BACKEND = """
from atproto_session import MemoryStore

class Backend(MemoryStore):
    @classmethod
    def from_url(cls, url, **options):
        store = cls()
        store.opened = url, options
        return store
"""


def install(directory: Path, monkeypatch: pytest.MonkeyPatch, entry: str, module: str) -> None:
    """A package that brings a scheme, as pip would have left it."""
    (directory / "other_store.py").write_text(module)
    (directory / "other_store-1.0.dist-info").mkdir()
    (directory / "other_store-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other-store\n")
    (directory / "other_store-1.0.dist-info" / "entry_points.txt").write_text(f"[atproto_session.stores]\n{entry}\n")
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "other_store", raising=False)


def test_other_packages_bring_schemes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "other = other_store:Backend", BACKEND)
    url = "Other+tls://user:secret@host/x?y"
    store: Any = open_store(url, encryption_keys=[KEY])
    assert isinstance(store, MemoryStore)
    assert store.opened == (url, {"encryption_keys": [KEY], "allow_plaintext": False})  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="known are other, memory:"):
        open_store("another:x")


def test_a_package_that_is_missing_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "other = other_store:Backend [fast,tls]", "import no_such_package")
    with pytest.raises(StoreError, match=r"no_such_package.*: pip install 'other-store\[fast,tls\]'") as caught:
        open_store("other://user:hunter2@host")
    assert "hunter2" not in str(caught.value)


def test_a_package_that_does_not_have_what_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "other = other_store:Nothing", BACKEND)
    with pytest.raises(StoreError, match="install what other-store needs"):
        open_store("other:x")


def test_nobody_takes_over_a_scheme_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "sqlite = other_store:Backend", BACKEND)
    with closing(open_store(f"sqlite:///{tmp_path}/sessions.db")) as store:
        assert isinstance(store, SQLiteStore)


def test_an_unusable_place_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url in (f"json:///{tmp_path}/file", f"json:///{tmp_path}/file/dir", f"sqlite:///{tmp_path}/file/x.db"):
        with pytest.raises(StoreError, match="that this user may write to"):
            open_store(url)
    with pytest.raises(StoreError):
        open_store(f"sqlite:///{tmp_path}")


def test_a_place_without_permission_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not bind an administrator, as whom tests may run, so the refusal is made.
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(os, "fdopen", refuse)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    for url in (f"json:///{tmp_path}/dir", f"sqlite:///{tmp_path}/x.db"):
        with pytest.raises(StoreError, match=r"Permission denied.*that this user may write to"):
            open_store(url)


def test_importing_brings_nothing_heavy_along() -> None:
    # Without the package's own __init__, which needs more than its stores do.
    script = """
import importlib.util, sys, types
package = types.ModuleType("atproto_session")
package.__path__ = importlib.util.find_spec("atproto_session").submodule_search_locations
sys.modules["atproto_session"] = package
import atproto_session.stores
print([name for name in ("filelock", "cryptography", "redis", "sqlalchemy") if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "[]"


# Memory


def test_the_memory_store_forgets_what_was_not_used_for_longest() -> None:
    store = MemoryStore[int](max_entries=2)
    store.set("a", 1)
    store.set("b", 2)
    assert store.get("a") == 1
    store.set("c", 3)
    assert store.get("b") is None
    assert sorted(store) == ["a", "c"]
    store.set("a", 4)
    store.set("d", 5)
    assert sorted(store) == ["a", "d"]
    for useless in (0, -1):
        with pytest.raises(ValueError, match="max_entries"):
            MemoryStore[int](useless)


def test_a_sweep_is_rare_and_log_ins_in_memory_are_bounded() -> None:
    logins = MemoryLogins(most=1000)
    sweeps: list[int] = []
    sweep = logins._sweep

    def counted() -> None:
        sweeps.append(len(logins._pending))
        sweep()

    logins._sweep = counted  # type: ignore[method-assign]
    for number in range(5000):
        logins.put(f"old-{number}", {}, EARLIER)
        assert len(logins._pending) <= 64
    sweeps.clear()
    for number in range(5000):
        logins.put(f"new-{number}", {"number": number}, LATER)
    assert len(logins._pending) == 1000
    assert logins.take("new-3999") is None
    assert logins.take("new-4000") == {"number": 4000}
    assert len(sweeps) < 10


def test_log_ins_that_go_while_the_oldest_is_looked_for() -> None:
    class Pending(dict[str, Any]):
        """As if another thread had changed it between the two steps."""

        failures: ClassVar[list[type[Exception]]] = [RuntimeError, StopIteration]

        def __iter__(self) -> Iterator[str]:
            if self.failures:
                raise self.failures.pop()
            return super().__iter__()

    logins = MemoryLogins(most=1)
    logins._pending = Pending()
    logins.put("first", {}, LATER)
    logins.put("second", {}, LATER)
    assert (logins.take("first"), logins.take("second")) == (None, {})


OLD, NEW, OTHER = make_session("old"), make_session("new"), make_session("other")


def memory_store(max_entries: int | None) -> MemoryStore[Session]:
    store = MemoryStore[Session](max_entries)
    store.set("first", make_session("first"))
    store.set(DID, OLD)
    return store


@pytest.mark.parametrize("max_entries", [None, 2])
class TestReentry:
    """The handler of a signal, or a ``__del__``, uses the store in the middle of any of its steps."""

    def test_a_write_in_the_middle_of_a_comparison_is_not_lost(self, max_entries: int | None) -> None:
        outcomes = set()

        def begin() -> Round:
            store = memory_store(max_entries)

            def check() -> None:
                # It came before the comparison, which failed then, or after the write, which it has replaced.
                assert store.get(DID) == OTHER

            return (
                lambda: outcomes.add(store.replace(DID, NEW, OLD)),
                lambda: store.set(DID, OTHER),
                check,
            )

        assert strike_everywhere(begin, in_module=memory) > 50
        assert outcomes == {True, False}

    def test_of_two_comparisons_one_within_the_other_one_succeeds(self, max_entries: int | None) -> None:
        def begin() -> Round:
            store = memory_store(max_entries)
            won: dict[str, bool] = {}

            def replace_by(name: str, session: Session) -> None:
                won[name] = store.replace(DID, session, OLD)

            def check() -> None:
                assert sorted(won.values()) == [False, True]
                assert store.get(DID) == (NEW if won["new"] else OTHER)

            return partial(replace_by, "new", NEW), partial(replace_by, "other", OTHER), check

        strike_everywhere(begin, in_module=memory)

    @pytest.mark.parametrize("what", ["set", "delete", "clear", "get", "insert"])
    def test_a_handler_that_waits_for_another_thread_is_not_kept_waiting(
        self, max_entries: int | None, what: str
    ) -> None:
        """As one that closes the client, which waits for a flight that stores what it has fetched."""

        def begin() -> Round:
            store = memory_store(max_entries)
            acts: dict[str, Callable[[], object]] = {
                "set": partial(store.set, DID, NEW),
                "delete": partial(store.delete, DID),
                "clear": store.clear,
                "get": partial(store.get, DID),
                "insert": partial(store.set, "another", NEW),
            }

            def use() -> None:
                store.set("second", OTHER)
                store.get(DID)
                list(store)

            def elsewhere() -> None:
                Worker(use).outcome()

            def check() -> None:
                assert len(list(store)) <= (max_entries or 4)
                store.set(DID, NEW)
                assert store.get(DID) == NEW

            return acts[what], elsewhere, check

        strike_everywhere(begin, in_module=memory)

    def test_an_exception_at_any_step_leaves_the_old_or_the_new(self, max_entries: int | None) -> None:
        def begin() -> Round:
            store = memory_store(max_entries)

            def check() -> None:
                stored = store.get(DID)
                assert stored in (OLD, NEW)
                assert store.replace(DID, OTHER, stored)
                assert store.get(DID) == OTHER

            return partial(store.replace, DID, NEW, OLD), fail, check

        strike_everywhere(begin, in_module=memory)

    def test_a_log_in_is_taken_once(self, max_entries: int | None) -> None:
        def begin() -> Round:
            logins = MemoryStore[Session](max_entries).logins
            logins.put("state", {}, LATER)
            taken: list[object] = []

            def take() -> None:
                logins.put("another", {}, LATER)
                taken.append(logins.take("state"))

            def check() -> None:
                assert sorted(taken, key=repr) == [None, {}] or taken == [{}, None]

            return take, take, check

        strike_everywhere(begin, in_module=memory)


# Records


@pytest.fixture(params=["json", "sqlite"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., FullStore]]:
    """Opens the same store each time, with the encryption keys that are given."""
    stores = []

    def open_(*keys: str | bytes, **options: Any) -> FullStore:
        stores.append(open_store(f"{request.param}:///{tmp_path}/place", encryption_keys=keys, **options))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


def test_keys_rotate_without_downtime(opened: Callable[..., FullStore], tmp_path: Path) -> None:
    plain, old, both, new = opened(), opened(KEY.decode()), opened(NEW_KEY, KEY), opened(NEW_KEY)
    plain.set(DID, make_session("0"))
    old.set(DID, make_session("1"))
    assert old.get(DID) == make_session("1")
    assert old.replace(DID, make_session("2"), make_session("1").token_set)
    assert both.get(DID) == make_session("2")
    with pytest.raises(StoreError, match=rf"session of {DID} .*encrypted, and there are no encryption_keys"):
        plain.get(DID)
    with pytest.raises(StoreError, match=rf"session of {DID} .*none of the encryption_keys opens it"):
        new.get(DID)
    assert rotate_encryption(both) == 1
    assert new.get(DID) == make_session("2")
    with pytest.raises(StoreError):
        old.get(DID)


def test_what_is_not_encrypted_is_refused_beside_keys(opened: Callable[..., FullStore]) -> None:
    """Whoever may write to the place could have put it there."""
    plain, store = opened(), opened(KEY)
    plain.set(DID, make_session())
    plain.set("x" * 300, make_session())
    for state in ("state", "another"):
        plain.logins.put(state, {"verifier": "v"}, LATER)
    told = r"not encrypted, and there are encryption_keys.*allow_plaintext=True and call rotate_encryption\(store\)"
    for failing in (
        lambda: store.get(DID),
        lambda: store.replace(DID, make_session("2"), make_session()),
        lambda: store.replace(DID, make_session("2"), None),
        lambda: store.replace(DID, None, make_session().token_set),
        lambda: store.logins.take("state"),
        lambda: rotate_encryption(store),
    ):
        with pytest.raises(StoreError, match=told) as caught:
            failing()
        assert not caught.value.login_required
    migrating = opened(KEY, allow_plaintext=True)
    assert migrating.get(DID) == make_session()
    assert migrating.logins.take("state") == {"verifier": "v"}
    assert rotate_encryption(migrating) == 2
    assert store.get(DID) == make_session()
    with pytest.raises(StoreError, match="there are no encryption_keys"):
        plain.get(DID)
    with pytest.raises(StoreError, match=told):
        store.logins.take("another")  # log-ins end within the hour


def test_plaintext_can_be_replaced_and_deleted_whatever_it_is(opened: Callable[..., FullStore]) -> None:
    plain, store = opened(), opened(KEY)
    for key in (DID, "other"):
        plain.set(key, make_session())
    store.set(DID, make_session("2"))
    store.delete("other")
    assert store.get(DID) == make_session("2")
    assert store.get("other") is None


# Traces


def session_with(secret: str, key: str = DID) -> Session:
    session = make_session(f"{secret}-token", key=key)
    return replace(session, dpop_key={**session.dpop_key, "d": f"{secret}-key"})


@pytest.fixture
def careless_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of SQLite differ in whether they overwrite what is deleted if nobody asks."""
    connect = sqlite3.connect

    def careless(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **options)
        connection.execute("PRAGMA secure_delete = OFF")
        return connection

    monkeypatch.setattr(sqlite3, "connect", careless)


@pytest.mark.usefixtures("careless_sqlite")
@pytest.mark.parametrize("how", ["rotate", "delete", "replace", "clear"])
def test_nothing_is_left_of_what_is_gone(opened: Callable[..., FullStore], tmp_path: Path, how: str) -> None:
    """With a worker that has the store open, and so many records that they fill many pages."""
    keys = [f"{DID}#{number}" for number in range(200)]
    worker = opened()
    for key in keys:
        worker.set(key, session_with("first", key))
        worker.set(key, session_with("second", key))
    store = opened(KEY, allow_plaintext=True) if how == "rotate" else opened()
    assert worker.get(DID + "#0") is not None
    if how == "rotate":
        assert rotate_encryption(store) == len(keys)
    elif how == "clear":
        store.clear()
    else:
        for key in keys:
            if how == "delete":
                store.delete(key)
            else:
                assert store.replace(key, None, session_with("second", key))
    found = everything_in(tmp_path)
    assert [
        secret for secret in ("first-token", "first-key", "second-token", "second-key") if secret.encode() in found
    ] == []
    assert len(list(store)) == (len(keys) if how == "rotate" else 0)


@pytest.mark.usefixtures("careless_sqlite")
@pytest.mark.parametrize("kind", ["json", "sqlite"])
def test_nothing_is_left_of_a_writer_that_was_killed(tmp_path: Path, kind: str) -> None:
    """Neither what it had stored, once that is deleted, nor what it had begun to write."""
    url = f"{kind}:///{tmp_path}/store/place"
    with closing(open_store(url)) as survivor:
        survivor.set(DID, session_with("first"))
        writer = subprocess.Popen(
            [sys.executable, "-m", "tests.programs.killed_writer", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert writer.stdout is not None
        with writer:
            assert writer.stdout.readline() == "in the middle\n"
            writer.kill()
        assert b"begun-token" in everything_in(tmp_path), "there is something to find"
        with closing(open_store(url)) as store:
            assert survivor.get(DID) == store.get(DID) == session_with("second")
            found = everything_in(tmp_path)
            assert [secret for secret in (b"begun-token", b"begun-key") if secret in found] == []
            store.delete(DID)
            found = everything_in(tmp_path)
            secrets = (b"first-token", b"first-key", b"second-token", b"second-key")
            assert [secret for secret in secrets if secret in found] == []


def test_a_log_that_somebody_reads_keeps_no_record_from_being_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_LOG_WITHIN", 0.0)
    path = tmp_path / "sessions.db"
    with (
        closing(SQLiteStore(path, busy_timeout=0.0)) as store,
        closing(sqlite3.connect(path, isolation_level=None)) as reader,
    ):
        store.set(DID, make_session())
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM sessions").fetchall()
        store.delete(DID)
        assert store.get(DID) is None
        store.set(DID, make_session("2"))
        with pytest.raises(
            StoreError, match=r"1 sessions were encrypted again, but .*call rotate_encryption again"
        ) as caught:
            rotate_encryption(store)
        assert caught.value.retryable
        SQLiteStore(path).close()
        reader.execute("ROLLBACK")
        assert rotate_encryption(store) == 1
        assert (tmp_path / "sessions.db-wal").stat().st_size == 0


def test_a_directory_that_cannot_be_listed_keeps_no_record_from_being_deleted(tmp_path: Path) -> None:
    store = JSONStore(tmp_path)
    store.set(DID, make_session())
    (tmp_path / "writing").rmdir()
    store.delete(DID)
    assert store.get(DID) is None
    with pytest.raises(StoreError, match="cannot be read"):
        store.scrub()


# Whose places these are


@pytest.fixture(params=["json", "sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A URL and a directory that is made by its store."""
    path = tmp_path / "store" / "place"
    return f"{request.param}:///{path}", path


@pytest.mark.parametrize("inside", ["", "sessions", "logins", "writing", "locks", "locks/writing"])
@pytest.mark.parametrize("mode", [0o777, 0o755, 0o710])
def test_a_directory_that_is_open_to_others_is_refused(tmp_path: Path, inside: str, mode: int) -> None:
    JSONStore(tmp_path).set(DID, make_session())
    directory = tmp_path / inside if inside else tmp_path
    directory.chmod(mode)
    with pytest.raises(StoreError, match=rf"{directory} is open to other users.*chmod 700 {directory}$"):
        JSONStore(tmp_path)
    directory.chmod(0o700)
    assert JSONStore(tmp_path).get(DID) == make_session()


@pytest.mark.parametrize("side", ["", "-wal", "-shm", "-journal"])
@pytest.mark.parametrize("mode", [0o666, 0o644, 0o640])
def test_a_database_that_is_open_to_others_is_refused(tmp_path: Path, side: str, mode: int) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        store.set(DID, make_session())
        path = tmp_path / f"sessions.db{side}"
        path.touch()
        path.chmod(mode)
        with pytest.raises(StoreError, match=rf"{path} is open to other users.*chmod 600 {path}$"):
            SQLiteStore(tmp_path / "sessions.db")
        path.chmod(0o600)
        if side == "-journal":
            path.unlink()
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        assert store.get(DID) == make_session()


def test_what_another_user_has_planted_is_refused(place: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, path = place
    open_store(url).close()
    give_away(path, monkeypatch)
    with pytest.raises(StoreError, match=f"{path} belongs to another user"):
        open_store(url)


@pytest.mark.parametrize("name", ["sessions", "logins", "writing", "locks"])
def test_a_link_in_the_place_of_a_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    (tmp_path / "store").mkdir(mode=0o700)
    (tmp_path / "store" / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(StoreError, match=f"{name} is a link"):
        JSONStore(tmp_path / "store")
    assert list((tmp_path / "theirs").iterdir()) == []


@pytest.mark.parametrize("side", ["-wal", "-shm", "-journal", ".locks"])
def test_a_link_beside_a_database_is_refused(tmp_path: Path, side: str) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / f"sessions.db{side}").symlink_to(tmp_path / "theirs")
    with pytest.raises(StoreError, match=r"is a link|cannot be used"):
        SQLiteStore(tmp_path / "sessions.db")
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


def test_a_link_in_the_place_of_a_record_is_not_followed(tmp_path: Path) -> None:
    store = JSONStore(tmp_path / "store")
    store.set(DID, make_session())
    (file,) = (tmp_path / "store" / "sessions").iterdir()
    file.rename(tmp_path / "theirs")
    file.symlink_to(tmp_path / "theirs")
    with pytest.raises(StoreError, match="cannot be read"):
        store.get(DID)
    content = (tmp_path / "theirs").read_bytes()
    store.set(DID, make_session("2"))
    assert store.get(DID) == make_session("2")
    assert (tmp_path / "theirs").read_bytes() == content


def test_a_json_directory_behind_a_link_has_the_same_locks(tmp_path: Path) -> None:
    store = JSONStore(tmp_path / "store")
    (tmp_path / "release").symlink_to(tmp_path / "store")
    linked = JSONStore(tmp_path / "release")
    store.set(DID, make_session())
    assert linked.get(DID) == make_session()
    with store.locks.hold(DID, timeout=0), pytest.raises(LockTimeoutError):
        linked.locks.hold(DID, timeout=0).__enter__()


def test_a_database_where_everybody_may_replace_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "public").mkdir()
    (tmp_path / "public").chmod(0o777)
    with pytest.raises(StoreError, match=rf"every user may replace files.*chmod o-w {tmp_path}/public$"):
        SQLiteStore(tmp_path / "public" / "sessions.db")
    (tmp_path / "public").chmod(0o1777)  # as /tmp
    SQLiteStore(tmp_path / "public" / "sessions.db").close()


def test_a_login_outlives_a_worker_without_its_key(opened: Callable[..., FullStore]) -> None:
    opened(KEY).logins.put("state", {"verifier": "v"}, LATER)
    for other in (opened(), opened(NEW_KEY)):
        with pytest.raises(StoreError, match="log-in cannot be read"):
            other.logins.take("state")
    assert opened(NEW_KEY, KEY).logins.take("state") == {"verifier": "v"}


def test_rotation_goes_on_and_names_what_it_could_not_read(opened: Callable[..., FullStore], tmp_path: Path) -> None:
    opened(KEY).set(f"{DID}#lost", make_session("lost"))
    opened().set(DID, make_session("1"))
    rotating = opened(NEW_KEY, allow_plaintext=True)
    with pytest.raises(StoreError, match=rf"1 sessions were encrypted again, 1 were not: .*{DID}#lost") as caught:
        rotate_encryption(rotating)
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    with pytest.raises(StoreError):
        opened().get(DID)
    assert opened(NEW_KEY).get(DID) == make_session("1")


def test_rotation_waits_for_the_locks_of_the_clients(opened: Callable[..., FullStore]) -> None:
    opened().set(DID, make_session("1"))
    locks = ThreadLocks()
    with locks.hold(DID, timeout=0), pytest.raises(StoreError, match="0 sessions"):
        rotate_encryption(opened(), locks=locks, timeout=0)
    assert rotate_encryption(opened(), locks=locks, timeout=0) == 1


def test_rotation_waits_for_a_refresh_under_way(opened: Callable[..., FullStore]) -> None:
    opened().set(DID, make_session("1"))
    store = opened(KEY)
    with store.locks.hold(DID, timeout=0), pytest.raises(StoreError, match="0 sessions") as caught:
        rotate_encryption(store, timeout=0)
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert isinstance(caught.value.__cause__.exceptions[0], LockTimeoutError)


def test_rotation_keeps_what_comes_in_between() -> None:
    class Busy(MemoryStore[Session]):
        """Somebody logs in again just before the first write, and one account logs out."""

        busy = True

        def get(self, key: str) -> Session | None:
            session = super().get(key)
            if self.busy and key == DID:
                self.busy = False
                self.set(DID, make_session("newer"))
            if key == "gone":
                self.delete("gone")
                return None
            return session

    store = Busy()
    store.set(DID, make_session("1"))
    store.set("gone", make_session("2"))
    assert rotate_encryption(store) == 1
    assert store.get(DID) == make_session("newer")


def test_rotation_keeps_an_attempt_that_is_announced_meanwhile() -> None:
    """Without it, another worker would believe that nothing was sent."""
    announced = replace(make_session("1"), attempt=Attempt("a1", "host:12", 1.0, 2.0))

    class Busy(MemoryStore[Session]):
        reads = 0

        def get(self, key: str) -> Session | None:
            session = super().get(key)
            self.reads += 1
            if self.reads == 1:
                self.set(key, announced)
            return session

    store = Busy()
    store.set(DID, make_session("1"))
    assert rotate_encryption(store) == 1
    assert store.get(DID) == announced


def test_a_long_list_of_failures_is_cut(tmp_path: Path) -> None:
    for number in range(25):
        JSONStore(tmp_path, encryption_keys=KEY).set(f"{DID}#{number}", make_session())
    with pytest.raises(StoreError, match=r"25 were not: .*; \.\.\.$") as caught:
        rotate_encryption(JSONStore(tmp_path, encryption_keys=NEW_KEY))
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == 25


@pytest.mark.parametrize("keys", [["short"], [b"x" * 44], "hunter2", [None], [KEY, "hunter2"]])
def test_what_is_not_a_fernet_key_is_refused_and_not_shown(keys: Any) -> None:
    with pytest.raises(StoreError, match="not a Fernet key") as caught:
        Codec(keys)
    assert "hunter2" not in str(caught.value)


def document(**own: object) -> bytes:
    members = to_document(DID, make_session())
    members["atprotoSession"] |= own
    return json.dumps(members).encode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"\x00" * 200, "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"null", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"{}", "tokenSet is not a JSON object"),
        (document()[:-1], "damaged"),
        (document(version=2), "later release"),
        (document(version=10**400), "version is not a finite number"),
        (document(key="did:plc:other"), "another key"),
        (Fernet(NEW_KEY).encrypt(document()), "none of the encryption_keys"),
        (Fernet(KEY).encrypt(document())[:-1], "none of the encryption_keys"),
        (Fernet(KEY).encrypt(document(key="did:plc:other")), "another key"),
        (Fernet(KEY).encrypt(b"secret-garbage"), "damaged"),
    ],
)
def test_a_record_that_cannot_be_read_says_whose_and_why_and_nothing_else(data: bytes, why: str) -> None:
    with pytest.raises(StoreError, match=rf"the session of {DID} cannot be read: .*{why}") as caught:
        Codec([KEY], allow_plaintext=True).decode(DID, data)
    assert caught.value.__cause__ is None
    assert not {word for word in ("access-1", "refresh-1", "secret") if word in str(caught.value)}


def test_a_hostile_key_is_shown_short_and_printable() -> None:
    with pytest.raises(StoreError) as caught:
        Codec().decode("did:\n\x1b[31m" + "x" * 5000, b"")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "session",
    [
        replace(make_session(), token_set=replace(make_session().token_set, scope="")),
        replace(make_session(), dpop_key={"kty": object()}),
        replace(make_session(), refreshed_at=float("nan")),
        replace(make_session(), attempt=Attempt("", "host:1", 1.0, 2.0)),
    ],
    ids=["no scope", "not JSON", "not a number", "no attempt id"],
)
def test_what_could_not_be_read_back_is_not_written(session: Session, tmp_path: Path) -> None:
    for store in (JSONStore(tmp_path / "json"), SQLiteStore(tmp_path / "sessions.db")):
        store.set(DID, make_session("old"))
        with pytest.raises(StoreError, match=f"session of {DID} cannot be stored"):
            store.set(DID, session)
        with pytest.raises(StoreError):
            store.replace(DID, session, make_session("old").token_set)
        assert store.get(DID) == make_session("old")
        with pytest.raises(StoreError, match="log-in cannot be stored"):
            store.logins.put("state", {"not JSON": object()}, LATER)
        store.close()


def test_a_record_that_has_not_changed_is_decoded_once() -> None:
    codec = Codec()
    data = codec.encode(DID, make_session())
    first = codec.decode(DID, data)
    assert codec.decode(DID, bytes(bytearray(data))) is first
    changed = codec.encode(DID, make_session("2"))
    assert codec.decode(DID, changed) == make_session("2")


def test_the_oldest_decoded_records_make_room_for_others() -> None:
    codec = Codec()
    records = {f"did:{number}": codec.encode(f"did:{number}", make_session()) for number in range(3000)}
    first, used = codec.decode("did:0", records["did:0"]), codec.decode("did:1", records["did:1"])
    for number, (key, data) in enumerate(records.items()):
        codec.decode(key, data)
        if number > 1:
            assert codec.decode("did:1", records["did:1"]) is used, "it is used all the time"
    assert len(codec._young) + len(codec._old) <= 1024
    assert codec.decode("did:0", records["did:0"]) is not first


def test_what_strangers_make_long_takes_no_room() -> None:
    """A server may grant a scope of half a megabyte to each of its accounts."""
    codec = Codec()
    tokens = replace(make_session().token_set, scope="atproto " + "x" * 500_000)
    long = codec.encode(DID, replace(make_session(), token_set=tokens))
    assert codec.decode(DID, long) == codec.decode(DID, long)
    assert not codec._young
    for number in range(3000):
        tokens = replace(make_session().token_set, scope="atproto " + "x" * 15_000)
        key = f"did:{number}"
        codec.decode(key, codec.encode(key, replace(make_session(), token_set=tokens)))
    assert sum(len(data) for _, data in [*codec._young, *codec._old]) <= 17_000_000


@pytest.mark.parametrize(
    "record",
    [
        {"state": "other", "expiresAt": LATER, "login": {}},
        {"state": "s", "login": {}},
        {"state": "s", "expiresAt": LATER},
    ],
)
def test_a_login_record_of_something_else(record: dict[str, object]) -> None:
    with pytest.raises(StoreError, match="not the record of this log-in"):
        Codec().decode_login("s", json.dumps(record).encode(), 0.0)


# JSON files


def test_json_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = JSONStore(tmp_path / "store")
        store.set(DID, make_session())
        store.logins.put("state", {}, LATER)
    finally:
        os.umask(old)
    for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_json_file_names_work_on_every_file_system(tmp_path: Path) -> None:
    store = JSONStore(tmp_path)
    for key in HOSTILE_KEYS:
        store.set(key, make_session())
    names = [path.name for path in (tmp_path / "sessions").iterdir()]
    assert len({name.lower() for name in names}) == len(HOSTILE_KEYS)
    assert all(name.isascii() and len(name) <= 220 and not name.startswith(".") for name in names)
    assert not {name for name in names if name.partition(".")[0].lower() in ("con", "nul")}
    assert not {name for name in names if set(name) & set('/\\:*?"<>| ')}


def test_json_is_written_in_full_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    move = Path.replace

    def recorded_move(source: Path, target: Path) -> Path:
        calls.append("replace")
        return move(source, target)

    store = JSONStore(tmp_path)
    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "replace", recorded_move)
    store.set(DID, make_session())
    assert calls == ["file", "replace", "directory"]
    calls.clear()
    monkeypatch.delattr(os, "O_DIRECTORY")
    store.set(DID, make_session("2"))
    assert calls == ["file", "replace"]


def test_a_failed_write_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JSONStore(tmp_path)
    store.set(DID, make_session("1"))

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="No space left"):
        store.replace(DID, make_session("2"), make_session("1").token_set)
    monkeypatch.undo()
    assert store.get(DID) == make_session("1")


@pytest.mark.parametrize("how", ["open", "scrub", "clear", "delete", "replace"])
def test_what_killed_writers_left_is_removed_and_what_live_ones_write_is_not(tmp_path: Path, how: str) -> None:
    def act() -> None:
        if how == "open":
            JSONStore(tmp_path)
        elif how == "delete":
            store.delete("another")
        elif how == "replace":
            store.set("another", make_session())
            assert store.replace("another", None, make_session())
        else:
            getattr(store, how)()

    store = JSONStore(tmp_path)
    store.set(DID, make_session())
    (file,) = (tmp_path / "sessions").iterdir()
    dead = tmp_path / "writing" / f"{file.name}.0123abcd"
    dead_login = tmp_path / "writing" / f"{'0' * 64}.login.0123abcd"
    live = tmp_path / "writing" / "did%3Aplc%3Alive.json.0123abcd"
    for path in (dead, dead_login, live):
        path.write_bytes(b"{")
    with FileLocks(tmp_path / "locks" / "writing").hold("sessions/did%3Aplc%3Alive.json", timeout=0):
        act()
        assert sorted((tmp_path / "writing").iterdir()) == [live]
    act()
    assert list((tmp_path / "writing").iterdir()) == []
    assert store.get(DID) == (None if how == "clear" else make_session())


def test_an_account_that_is_being_written_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JSONStore(tmp_path)
    monkeypatch.setattr(jsonfile, "_WRITE_TIMEOUT", 0.0)
    with store._files.writing(jsonfile._path_of(DID)):
        for write in (
            lambda: store.set(DID, make_session()),
            lambda: store.delete(DID),
            lambda: store.replace(DID, make_session(), None),
        ):
            with pytest.raises(StoreError, match="being written all the time") as caught:
                write()
            assert caught.value.retryable


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_an_emptied_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    store = JSONStore(tmp_path)
    store.set(DID, make_session())
    (file,) = (tmp_path / "sessions").iterdir()
    file.write_bytes(content)
    with pytest.raises(StoreError, match=DID):
        store.get(DID)


def test_what_is_in_the_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    store = JSONStore(tmp_path)
    store.set(DID, make_session())
    (file,) = (tmp_path / "sessions").iterdir()
    file.unlink()
    file.mkdir()
    for failing in (
        lambda: store.get(DID),
        lambda: store.set(DID, make_session()),
        lambda: store.replace(DID, make_session(), None),
        lambda: store.delete(DID),
    ):
        with pytest.raises(StoreError):
            failing()


def test_a_vanished_json_directory_is_an_error(tmp_path: Path) -> None:
    store = JSONStore(tmp_path / "store")
    store.set(DID, make_session())
    shutil.rmtree(tmp_path / "store")
    for failing in (
        lambda: store.get(DID),
        lambda: store.set(DID, make_session()),
        lambda: store.delete(DID),
        lambda: list(store),
        store.clear,
        lambda: store.logins.take("state"),
        lambda: store.logins.put("state", {}, LATER),
    ):
        with pytest.raises(StoreError, match="that this user may write to"):
            failing()


def test_files_that_belong_to_nobody_are_named_after_the_others(tmp_path: Path) -> None:
    store = JSONStore(tmp_path)
    store.set(DID, make_session())
    store.set("x" * 300, make_session())
    store.set("y" * 300, make_session())
    hashed, other = sorted((tmp_path / "sessions").glob("%sha256*"))
    hashed.write_bytes(b"{}")
    (tmp_path / "sessions" / "Copy of it.json").write_bytes(b"{}")
    (tmp_path / "sessions" / "%FF.json").write_bytes(b"{}")
    with pytest.raises(StoreError, match="whose sessions these are") as caught:
        list(store)
    listing = iter(store)
    assert {next(listing), next(listing)} > {DID}
    assert all(name in str(caught.value) for name in ("Copy of it.json", "%FF.json", hashed.name))
    with pytest.raises(StoreError, match="2 sessions were encrypted again, 1 were not"):
        rotate_encryption(store)
    hashed.write_bytes(other.read_bytes())
    with pytest.raises(StoreError, match=hashed.name):
        list(store)


def test_a_file_that_goes_while_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JSONStore(tmp_path)
    store.set("x" * 300, make_session())
    monkeypatch.setattr(store._files, "read", lambda path: None)
    assert list(store) == []


def test_expired_logins_are_removed_from_the_disk(tmp_path: Path) -> None:
    store = JSONStore(tmp_path)
    for number in range(63):
        store.logins.put(f"old-{number}", {}, EARLIER)
    store.logins.put("live", {}, LATER)
    store.logins.put("new", {}, LATER)
    assert len(list((tmp_path / "logins").iterdir())) == 2
    assert store.logins.take("live") == {}


# SQLite


def test_sqlite_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with closing(SQLiteStore(tmp_path / "new" / "sessions.db")) as store:
            store.set(DID, make_session())
            files = [path for path in (tmp_path / "new").iterdir() if path.is_file()]
            assert {path.name for path in files} == {"sessions.db", "sessions.db-wal", "sessions.db-shm"}
            assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
            assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
            assert (tmp_path / "new" / "sessions.db.locks").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(old)


def test_sqlite_survives_a_power_failure(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store, store._database._connections.lent() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


@pytest.mark.parametrize("path", ["", ":memory:"])
def test_sqlite_needs_a_file(path: str) -> None:
    with pytest.raises(StoreError, match=r'open_store\("memory:"\)'):
        SQLiteStore(path)


@pytest.mark.parametrize(
    "content", [b"this is no database, but a text of some length" * 10, b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_what_is_not_a_database_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "file").chmod(0o600)
    with pytest.raises(StoreError, match=r"file of something else, or damaged|is damaged"):
        SQLiteStore(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


def test_a_damaged_database_is_an_error(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        for number in range(200):
            store.set(f"{DID}#{number}", make_session())
    data = (tmp_path / "sessions.db").read_bytes()
    (tmp_path / "sessions.db").write_bytes(data[:4096] + b"\x5a" * (len(data) - 4096))
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        for failing in (lambda: store.get(f"{DID}#1"), lambda: list(store), lambda: store.set(DID, make_session())):
            with pytest.raises(StoreError, match="damaged; restore it from a backup") as caught:
                failing()
            assert isinstance(caught.value.__cause__, sqlite3.Error)


def test_a_database_of_a_later_release_is_refused(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "sessions.db")
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(StoreError, match="version 2, not 1"):
        SQLiteStore(tmp_path / "sessions.db")
    with pytest.raises(StoreError, match="version 2, not 1"):
        store.get(DID)
    store.close()


def test_a_database_that_another_process_keeps_locked(tmp_path: Path) -> None:
    with (
        closing(SQLiteStore(tmp_path / "sessions.db", busy_timeout=0.0)) as store,
        closing(sqlite3.connect(tmp_path / "sessions.db", isolation_level=None)) as other,
    ):
        store.set(DID, make_session())
        other.execute("BEGIN IMMEDIATE")
        assert store.get(DID) == make_session()
        with pytest.raises(StoreError, match=r"locked\): another process keeps it locked; try again later") as caught:
            store.set(DID, make_session("2"))
        assert caught.value.retryable
        other.execute("ROLLBACK")
        store.set(DID, make_session("2"))


def test_two_processes_that_create_it_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    with FileLocks(f"{path}.locks").hold("schema", timeout=0):
        with pytest.raises(StoreError, match="being opened by other processes") as caught:
            SQLiteStore(path, busy_timeout=0.0)
        assert caught.value.retryable
    SQLiteStore(path).close()


def test_a_place_without_wal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            return super().execute("SELECT 'delete'" if "journal_mode" in sql else sql, *arguments)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=Connection, **kwargs))
    with pytest.raises(StoreError, match="WAL mode does not work"):
        SQLiteStore(tmp_path / "sessions.db")


def test_waiting_for_a_locked_database_keeps_its_connection_for_others(tmp_path: Path) -> None:
    """And holds up no fork: nothing is under way between two tries."""
    path = tmp_path / "sessions.db"
    with closing(SQLiteStore(path)) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        pool = store._database._connections
        store.set(DID, make_session())
        (connection,) = pool._idle
        other.execute("BEGIN IMMEDIATE")
        waiting = threading.Event()

        class Time:
            monotonic, time = time.monotonic, time.time

            @staticmethod
            def sleep(seconds: float) -> None:
                assert pool._idle == [connection]
                assert not pool._uses
                waiting.set()
                time.sleep(seconds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlite, "time", Time)
            writer = Worker(lambda: store.set(DID, make_session("2")))
            assert waiting.wait(60)
            other.execute("ROLLBACK")
            writer.outcome()
        assert store.get(DID) == make_session("2")
        assert pool._idle == [connection]


@pytest.mark.parametrize("what", ["deleted", "replaced"])
def test_a_database_file_that_goes_is_an_error(tmp_path: Path, what: str) -> None:
    path = tmp_path / "sessions.db"
    with closing(SQLiteStore(path)) as store:
        store.set(DID, make_session())
        path.rename(tmp_path / "moved.db")
        if what == "replaced":
            SQLiteStore(path).close()
        for failing in (
            lambda: store.get(DID),
            lambda: store.set(DID, make_session()),
            lambda: store.replace(DID, make_session("2"), make_session().token_set),
            lambda: list(store),
            lambda: store.logins.take("state"),
        ):
            with pytest.raises(StoreError, match=r"No such file|was replaced while it was in use"):
                failing()
        assert path.exists() == (what == "replaced")


def test_threads_that_read_at_the_same_time_share_a_look_at_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    identity_of = sqlite._identity_of

    def look(path: str) -> tuple[int, int]:
        looks.append(path)
        return identity_of(path)

    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        store.set(DID, make_session())
        monkeypatch.setattr(sqlite, "_identity_of", look)
        monkeypatch.setattr(sqlite, "_LOOK_COUNTS_FOR", 600.0)
        store.get(DID)
        assert len(looks) == 1, "alone, a reader looks"
        with store._database._connections.lent():
            store.get(DID)
            assert len(looks) == 1
            store.set(DID, make_session())
            assert len(looks) == 2, "a writer always looks"
            monkeypatch.setattr(sqlite, "_LOOK_COUNTS_FOR", 0.0)
            store.get(DID)
            assert len(looks) == 3


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "sessions.db")
    with store._database._connections.lent() as borrowed:
        store.close()
        store.close()
        with pytest.raises(StoreError, match="the store is closed"):
            store.get(DID)
        borrowed.execute("SELECT 1")
    with pytest.raises(sqlite3.ProgrammingError):
        borrowed.execute("SELECT 1")
    assert not (tmp_path / "sessions.db-wal").exists()


def test_a_store_that_is_dropped_closes_its_connections(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = SQLiteStore(tmp_path / "sessions.db")
        store.set(DID, make_session())
        assert (tmp_path / "sessions.db-wal").exists()
        del store
        gc.collect()
    assert not (tmp_path / "sessions.db-wal").exists()


def test_connections_are_shared_and_few_stay_open(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        connections = store._database._connections
        with ExitStack() as lent:
            borrowed = [lent.enter_context(connections.lent()) for _ in range(20)]
            assert len(set(borrowed)) == 20
        assert len(connections._idle) == 8
        with connections.lent() as again:
            assert again in borrowed


def test_an_interrupted_write_is_rolled_back(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        store.set(DID, make_session())

        def interrupted(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM sessions")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store._database.write(interrupted)
        assert store.get(DID) == make_session()
        store.set(DID, make_session("2"))


def test_listing_goes_page_by_page(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        data = store._codec.encode("", make_session())
        store._database.write(
            lambda connection: connection.executemany(
                "INSERT INTO sessions VALUES (?, ?)", ((f"key-{number:04}", data) for number in range(2500))
            )
        )
        assert list(store) == [f"key-{number:04}" for number in range(2500)]


def test_expired_logins_are_removed_from_the_database(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        store.logins.put("old", {}, EARLIER)
        store.logins.put("new", {}, LATER)
        assert store._database.read("SELECT state FROM logins", ()) == [("new",)]


def test_an_sqlite_database_behind_a_link_has_the_same_locks(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "sessions.db").symlink_to(tmp_path / "sessions.db")
    with (
        closing(SQLiteStore(tmp_path / "sessions.db")) as store,
        closing(SQLiteStore(tmp_path / "release" / "sessions.db")) as linked,
    ):
        store.set(DID, make_session())
        assert linked.get(DID) == make_session()
        with store.locks.hold(DID, timeout=0), pytest.raises(LockTimeoutError):
            linked.locks.hold(DID, timeout=0).__enter__()


def test_a_record_that_was_written_by_hand_into_sqlite_is_read(tmp_path: Path) -> None:
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        store.set(DID, make_session())
        with closing(sqlite3.connect(tmp_path / "sessions.db")) as connection, connection:
            connection.execute("UPDATE sessions SET document = CAST(document AS TEXT)")
        assert store.get(DID) == make_session()
        with closing(sqlite3.connect(tmp_path / "sessions.db")) as connection, connection:
            connection.execute("UPDATE sessions SET document = 'not a record'")
        with pytest.raises(StoreError, match="damaged"):
            store.get(DID)


def test_a_database_that_nobody_has_finished(tmp_path: Path) -> None:
    """Whoever began to make it was killed, or is doing so at this moment."""
    path = tmp_path / "sessions.db"
    path.touch(0o600)
    with closing(SQLiteStore(path)) as store:
        store.set(DID, make_session())
    sqlite._create(path)
    with closing(SQLiteStore(path)) as store:
        assert store.get(DID) == make_session()
