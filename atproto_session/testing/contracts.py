"""What every store and every set of locks has to do, as test suites for pytest.

A new store or kind of locks proves itself by a subclass::

    class TestMyStore(StoreContract):
        def make_store(self, tmp_path):
            return MyStore(tmp_path / "sessions")

What other processes can reach subclasses :class:`SharedStoreContract` and :class:`SharedLocksContract` instead, which
ask for an *opener*: a function without arguments that opens the same place each time, and that can be pickled
(``functools.partial(MyStore, path)``), since it is also called in other processes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ..errors import CancelledError, LockTimeoutError, StoreError
from ..locks import LockKind, Locks
from ..session import Attempt, ClientAuthMethod, Rest, Session, TokenSet
from ..stores import FullStore

T = TypeVar("T")

DID = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
#: For what has to happen and does, in seconds: generous, since it passes only when a test fails.
_SOON = 60.0
#: In the future for as long as anybody runs this, and in the past.
_LATER, _EARLIER = 4e9, 1e9

HOSTILE_KEYS = [
    "",
    DID,
    f"{DID}#work",
    "did:web:example.com",
    "did:web:Example.com",
    "did:web:localhost%3A8080",
    "../../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".hidden",
    "a/b\\c",
    "a:b*c?d|e<f>g",
    "con",
    "NUL.txt",
    "trailing. ",
    "with spaces\tand\r\nlines",
    "quote'; DROP TABLE sessions; --\"",
    "100%_",
    "%00",
    "\0",
    "zero\0inside",
    "zero",
    "ключ",
    "e\u0301",
    "\u00e9",
    "👩‍👩‍👧‍👦",
    "x" * 200,
    "x" * 201,
    "y" * 5000,
    "y" * 4999 + "z",
    "Ü" * 1000,
]


def make_session(name: str = "1", *, key: str = DID) -> Session:
    """A session whose tokens are told apart by ``name``."""
    return Session(
        dpop_key={"kty": "EC", "crv": "P-256", "x": "x" * 43, "y": "y" * 43, "d": "d" * 43},
        auth_method=ClientAuthMethod("private_key_jwt", "key-1"),
        token_set=TokenSet(
            iss="https://issuer.example.com",
            sub=key.partition("#")[0] or DID,
            aud="https://pds.example.com",
            scope="atproto transition:generic",
            refresh_token=f"refresh-{name}",
            access_token=f"access-{name}",
            expires_at=datetime(2035, 6, 7, 8, 9, 10, 123000, tzinfo=UTC),
        ),
    )


class StoreContract:
    """What a :class:`.FullStore` does. Anything less is put through :func:`.complete` first."""

    def make_store(self, tmp_path: Path) -> FullStore:
        """An empty store."""
        raise NotImplementedError

    def damage(self, store: FullStore, key: str) -> bool:
        """Make the record of ``key`` unreadable, behind the store's back; ``False`` where that cannot be done."""
        return False

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[FullStore]:
        store = self.make_store(tmp_path)
        yield store
        store.close()

    def test_what_is_not_there_is_none(self, store: FullStore) -> None:
        assert store.get(DID) is None
        store.delete(DID)
        assert list(store) == []

    @pytest.mark.parametrize(
        "session",
        [
            make_session(),
            replace(make_session(), auth_method=None),
            replace(make_session(), auth_method=ClientAuthMethod("none")),
            replace(make_session(), token_set=replace(make_session().token_set, refresh_token=None, expires_at=None)),
            replace(make_session(), attempt=Attempt("a1", "host:12", 1750000000.25, 1750000030.5, answers_lost=2)),
            replace(
                make_session(),
                rest=Rest(
                    1750000000.5, 2, "TransportError", "cannot reach it", {"sent": False, "status": 0, "code": None}
                ),
                client_id="https://app.example.com/client.json",
                began_at=1740000000.0,
                refreshed_at=1749999999.125,
                after_lost_answer=True,
            ),
        ],
        ids=["full", "legacy", "public", "no refresh token", "attempt", "times"],
    )
    def test_a_session_comes_back_as_it_was_stored(self, store: FullStore, session: Session) -> None:
        store.set(DID, session)
        assert store.get(DID) == session
        assert store.replace(DID, session, session.token_set)
        assert store.get(DID) == session

    def test_keys_are_any_text_and_never_mixed_up(self, store: FullStore) -> None:
        for number, key in enumerate(HOSTILE_KEYS):
            store.set(key, make_session(str(number)))
        assert [store.get(key) for key in HOSTILE_KEYS] == [
            make_session(str(number)) for number in range(len(HOSTILE_KEYS))
        ]
        assert sorted(store) == sorted(HOSTILE_KEYS)
        for key in HOSTILE_KEYS[::2]:
            store.delete(key)
        assert sorted(store) == sorted(HOSTILE_KEYS[1::2])
        assert all((store.get(key) is None) == (number % 2 == 0) for number, key in enumerate(HOSTILE_KEYS))

    def test_a_key_that_is_not_unicode_is_kept_or_refused(self, store: FullStore) -> None:
        try:
            store.set("lone \ud800", make_session())
        except StoreError:
            with pytest.raises(StoreError):
                store.get("lone \ud800")
        else:
            assert store.get("lone \ud800") == make_session()

    def test_set_overwrites(self, store: FullStore) -> None:
        store.set(DID, make_session("1"))
        store.set(DID, make_session("2"))
        assert store.get(DID) == make_session("2")
        assert list(store) == [DID]

    def test_replace_where_the_expected_tokens_are(self, store: FullStore) -> None:
        store.set(DID, make_session("1"))
        assert store.replace(DID, make_session("2"), make_session("1").token_set) is True
        assert store.get(DID) == make_session("2")

    def test_replace_compares_the_tokens_and_nothing_else(self, store: FullStore) -> None:
        stored = replace(make_session("1"), attempt=Attempt("a1", "host:12", 1.0, 2.0), refreshed_at=3.0)
        store.set(DID, stored)
        seen = replace(make_session("1").token_set, scope="atproto", expires_at=None)
        assert store.replace(DID, make_session("2"), seen) is True
        assert store.get(DID) == make_session("2")

    @pytest.mark.parametrize(
        "changes",
        [{"refresh_token": "another"}, {"access_token": "another"}, {"refresh_token": None}],
        ids=["refresh token", "access token", "no refresh token"],
    )
    def test_replace_leaves_other_tokens_alone(self, store: FullStore, changes: dict[str, Any]) -> None:
        store.set(DID, make_session("1"))
        expected = replace(make_session("1").token_set, **changes)
        assert store.replace(DID, make_session("2"), expected) is False
        assert store.replace(DID, None, expected) is False
        assert store.get(DID) == make_session("1")

    def test_replace_does_not_resurrect(self, store: FullStore) -> None:
        assert store.replace(DID, make_session("2"), make_session("1").token_set) is False
        assert store.get(DID) is None

    def test_replace_by_none_deletes(self, store: FullStore) -> None:
        store.set(DID, make_session("1"))
        assert store.replace(DID, None, make_session("1").token_set) is True
        assert store.get(DID) is None
        assert store.replace(DID, None, make_session("1").token_set) is False

    def test_replace_of_nothing_inserts(self, store: FullStore) -> None:
        assert store.replace(DID, None, None) is True
        assert store.get(DID) is None
        assert store.replace(DID, make_session("1"), None) is True
        assert store.replace(DID, make_session("2"), None) is False
        assert store.replace(DID, None, None) is False
        assert store.get(DID) == make_session("1")

    def test_of_many_threads_that_replace_the_same_tokens_one_does(self, store: FullStore) -> None:
        for lap in range(10):
            key = f"{DID}#{lap}"
            store.set(key, make_session("old"))
            expected = make_session("old").token_set

            def compete(name: str, key: str = key, expected: TokenSet = expected) -> str | None:
                return name if store.replace(key, make_session(name), expected) else None

            winners = [name for name in _at_once(compete, "abcdefgh") if name]
            assert len(winners) == 1
            assert store.get(key) == make_session(winners[0])

    def test_of_many_threads_that_insert_one_does(self, store: FullStore) -> None:
        outcomes = _at_once(lambda name: store.replace(DID, make_session(name), None), "abcdefgh")
        assert sorted(outcomes) == [False] * 7 + [True]

    def test_readers_see_whole_records_while_others_write(self, store: FullStore) -> None:
        sessions = [make_session(letter * 2000) for letter in "ab"]
        store.set(DID, sessions[0])
        done = threading.Event()

        def read() -> bool:
            whole = True
            while not done.is_set():
                whole = whole and store.get(DID) in sessions
            return whole

        with ThreadPoolExecutor(2) as threads:
            readers = [threads.submit(read) for _ in range(2)]
            try:
                for number in range(30):
                    store.set(DID, sessions[number % 2])
            finally:
                done.set()
            assert all(reader.result(_SOON) for reader in readers)

    def test_iterating_while_it_changes(self, store: FullStore) -> None:
        keys = {f"{DID}#{number}" for number in range(5)}
        for key in keys:
            store.set(key, make_session())
        for key in store:
            store.delete(key)
        assert list(store) == []

    def test_clear_deletes_the_sessions_and_not_the_logins(self, store: FullStore) -> None:
        store.set(DID, make_session())
        store.set(f"{DID}#work", make_session())
        store.logins.put("state", {"verifier": "v"}, _LATER)
        store.clear()
        assert list(store) == []
        assert store.get(DID) is None
        assert store.logins.take("state") == {"verifier": "v"}

    def test_a_login_is_taken_once(self, store: FullStore) -> None:
        login = {"verifier": "v", "nested": {"list": [1, None, True, "ü"]}}
        store.logins.put("state", login, _LATER)
        store.logins.put("other", {}, _LATER)
        assert store.logins.take("State") is None
        assert store.logins.take("state") == login
        assert store.logins.take("state") is None
        assert store.logins.take("other") == {}

    def test_an_expired_login_is_gone(self, store: FullStore) -> None:
        store.logins.put("old", {"verifier": "v"}, _EARLIER)
        assert store.logins.take("old") is None
        for number in range(200):
            store.logins.put(f"old-{number}", {"verifier": "v"}, _EARLIER)
        store.logins.put("new", {"verifier": "w"}, _LATER)
        assert store.logins.take("new") == {"verifier": "w"}
        assert store.logins.take("old-199") is None

    def test_of_many_threads_one_takes_a_login(self, store: FullStore) -> None:
        for lap in range(10):
            state = f"state-{lap}"
            store.logins.put(state, {"lap": lap}, _LATER)

            def take(name: str, state: str = state) -> dict[str, Any] | None:
                return store.logins.take(state)

            taken = _at_once(take, "abcdefgh")
            assert [login for login in taken if login is not None] == [{"lap": lap}]

    def test_an_unreadable_record_is_an_error_and_not_an_absence(self, store: FullStore) -> None:
        store.set(DID, make_session())
        store.set(f"{DID}#work", make_session("work"))
        if not self.damage(store, DID):
            pytest.skip("damage() cannot make a record of this store unreadable")
        with pytest.raises(StoreError, match=DID):
            store.get(DID)
        for session, expected in [
            (make_session("2"), make_session().token_set),
            (make_session("2"), None),
            (None, make_session().token_set),
        ]:
            with pytest.raises(StoreError, match=DID):
                store.replace(DID, session, expected)
        assert sorted(store) == [DID, f"{DID}#work"]
        assert store.get(f"{DID}#work") == make_session("work")
        store.set(DID, make_session("3"))
        assert store.get(DID) == make_session("3")

    def test_an_unreadable_record_can_be_deleted(self, store: FullStore) -> None:
        store.set(DID, make_session())
        if not self.damage(store, DID):
            pytest.skip("damage() cannot make a record of this store unreadable")
        store.delete(DID)
        assert store.get(DID) is None

    def test_the_locks_are_those_of_the_key(self, store: FullStore) -> None:
        assert isinstance(store.locks.kind, LockKind)
        with store.locks.hold(DID, timeout=_SOON):
            store.set(DID, make_session("1"))
            assert store.replace(DID, make_session("2"), make_session("1").token_set)


class SharedStoreContract(StoreContract):
    """What a store does that several processes share."""

    def opener(self, tmp_path: Path) -> Callable[[], FullStore]:
        """What opens the store, the same one at each call; it can be pickled."""
        raise NotImplementedError

    def make_store(self, tmp_path: Path) -> FullStore:
        return self.opener(tmp_path)()

    def test_two_objects_are_one_store(self, store: FullStore, tmp_path: Path) -> None:
        other = self.opener(tmp_path)()
        try:
            store.set(DID, make_session("1"))
            assert other.get(DID) == make_session("1")
            assert other.replace(DID, make_session("2"), make_session("1").token_set)
            assert store.get(DID) == make_session("2")
            assert list(other) == [DID]
            store.delete(DID)
            assert other.get(DID) is None
            store.logins.put("state", {"verifier": "v"}, _LATER)
            assert other.logins.take("state") == {"verifier": "v"}
            assert store.logins.take("state") is None
            with store.locks.hold(DID, timeout=_SOON), pytest.raises(LockTimeoutError):
                _take(other.locks, DID)
        finally:
            other.close()

    def test_many_threads_can_open_it_at_once(self, tmp_path: Path) -> None:
        stores = _at_once(lambda name: self.opener(tmp_path)(), "abcdef")
        try:
            stores[0].set(DID, make_session())
            assert [store.get(DID) for store in stores] == [make_session()] * len(stores)
        finally:
            for store in stores:
                store.close()

    def test_of_many_processes_that_replace_the_same_tokens_one_does(self, store: FullStore, tmp_path: Path) -> None:
        keys = [f"{DID}#{number}" for number in range(20)]
        for key in keys:
            store.set(key, make_session("old"))
            store.logins.put(key, {"key": key}, _LATER)
        with (
            _Process(_compete, self.opener(tmp_path), "first", keys) as first,
            _Process(_compete, self.opener(tmp_path), "second", keys) as second,
        ):
            for process in (first, second):
                assert process.receive() == "ready"
            for process in (first, second):
                process.send("go")
            (won_first, took_first), (won_second, took_second) = first.receive(), second.receive()
        assert sorted(won_first + won_second) == sorted(keys)
        assert sorted(took_first + took_second) == sorted(keys)
        for key in keys:
            assert store.get(key) == make_session("first" if key in won_first else "second")

    def test_a_killed_writer_leaves_a_whole_record_and_nothing_locked(self, tmp_path: Path) -> None:
        for _ in range(3):
            with _Process(_write_for_ever, self.opener(tmp_path)) as writer:
                assert writer.receive() == "writing"
                writer.kill()
            store = self.opener(tmp_path)()
            try:
                session = store.get(DID)
                assert session is not None
                assert store.replace(DID, make_session("next"), session.token_set)
                assert store.get(DID) == make_session("next")
            finally:
                store.close()


class LocksContract:
    """What :class:`.Locks` do."""

    def make_locks(self, tmp_path: Path) -> Locks:
        raise NotImplementedError

    @pytest.fixture
    def locks(self, tmp_path: Path) -> Locks:
        return self.make_locks(tmp_path)

    def test_the_kind_is_known(self, locks: Locks) -> None:
        assert isinstance(locks.kind, LockKind)

    def test_one_at_a_time(self, locks: Locks) -> None:
        inside: list[str] = []
        pause = threading.Event()
        most = 0

        def work(name: str) -> None:
            nonlocal most
            for _ in range(10):
                with locks.hold(DID, timeout=_SOON):
                    inside.append(name)
                    pause.wait(0.001)  # so that whoever can get in does
                    most = max(most, len(inside))
                    inside.remove(name)

        _at_once(work, "abcdefgh")
        assert most == 1

    def test_a_timeout_of_zero_tries_once(self, locks: Locks) -> None:
        with _held_elsewhere(locks, DID):
            with pytest.raises(LockTimeoutError) as caught:
                _take(locks, DID)
            assert caught.value.retryable
            assert isinstance(caught.value, TimeoutError)
        _take(locks, DID)

    def test_waiting_ends_with_the_timeout(self, locks: Locks) -> None:
        with _held_elsewhere(locks, DID), pytest.raises(LockTimeoutError):
            _take(locks, DID, timeout=0.1)

    def test_a_waiter_gets_it_when_it_is_released(self, locks: Locks) -> None:
        got = threading.Event()

        def wait() -> None:
            with locks.hold(DID, timeout=_SOON):
                got.set()

        with ThreadPoolExecutor(1) as threads:
            with locks.hold(DID, timeout=_SOON):
                waiter = threads.submit(wait)
                assert not got.wait(0.1)
            waiter.result(_SOON)
            assert got.is_set()

    def test_waiting_ends_when_it_is_cancelled(self, locks: Locks) -> None:
        cancel = threading.Event()
        with _held_elsewhere(locks, DID), ThreadPoolExecutor(1) as threads:
            waiter = threads.submit(_take, locks, DID, timeout=_SOON, cancel=cancel)
            cancel.set()
            with pytest.raises(CancelledError):
                waiter.result(_SOON)

    def test_a_cancel_that_is_not_set_does_nothing(self, locks: Locks) -> None:
        _take(locks, DID, cancel=threading.Event())
        with _held_elsewhere(locks, DID), pytest.raises(LockTimeoutError):
            _take(locks, DID, cancel=threading.Event())

    def test_an_infinite_timeout_is_one(self, locks: Locks) -> None:
        _take(locks, DID, timeout=float("inf"))

    def test_an_exception_releases_it(self, locks: Locks) -> None:
        with pytest.raises(ZeroDivisionError), locks.hold(DID, timeout=_SOON):
            raise ZeroDivisionError
        _take(locks, DID)

    def test_a_failed_attempt_leaves_it_with_its_holder(self, locks: Locks) -> None:
        with _held_elsewhere(locks, DID):
            for _ in range(2):
                with pytest.raises(LockTimeoutError):
                    _take(locks, DID)

    def test_other_names_are_free(self, locks: Locks) -> None:
        # Locks may share a bounded number of places by hash, so that one other name may not be free.
        with _held_elsewhere(locks, DID):
            free = 0
            for number in range(10):
                with suppress(LockTimeoutError):
                    _take(locks, f"{DID}#{number}")
                    free += 1
            assert free >= 9

    def test_names_are_any_text(self, locks: Locks) -> None:
        for name in HOSTILE_KEYS:
            with _held_elsewhere(locks, name), pytest.raises(LockTimeoutError) as caught:
                _take(locks, name)
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 500

    def test_it_is_held_until_the_end_of_the_block(self, locks: Locks) -> None:
        with locks.hold(DID, timeout=_SOON) as hold:
            assert hold.extend(1.0)
            assert hold.extend(30.0)
        assert not hold.extend(1.0)
        with locks.hold(DID, timeout=_SOON) as newer:
            assert not hold.extend(1.0)
            assert newer.extend(1.0)

    def test_whoever_holds_it_holds_the_same(self, locks: Locks) -> None:
        with locks.hold(DID, timeout=_SOON) as hold:
            first = hold.lock
        with locks.hold(DID, timeout=_SOON) as hold:
            assert hold.lock == first


class SharedLocksContract(LocksContract):
    """What locks do that exclude processes as well."""

    def opener(self, tmp_path: Path) -> Callable[[], Locks]:
        """What makes the locks, the same ones at each call; it can be pickled."""
        raise NotImplementedError

    def make_locks(self, tmp_path: Path) -> Locks:
        return self.opener(tmp_path)()

    def test_two_objects_exclude_each_other(self, locks: Locks, tmp_path: Path) -> None:
        other = self.opener(tmp_path)()
        with locks.hold(DID, timeout=_SOON), pytest.raises(LockTimeoutError):
            _take(other, DID)
        _take(other, DID)

    def test_another_process_is_excluded(self, locks: Locks, tmp_path: Path) -> None:
        with _Process(_hold_until_told, self.opener(tmp_path)) as holder:
            lock = holder.receive()
            with pytest.raises(LockTimeoutError):
                _take(locks, DID)
            holder.send("release")
            assert holder.receive() == "released"
            with locks.hold(DID, timeout=_SOON) as hold:
                assert hold.lock == lock, "it is known by another name here"

    def test_the_lock_of_a_killed_process_is_free(self, locks: Locks, tmp_path: Path) -> None:
        if locks.kind is not LockKind.HOLDER:
            return
        with _Process(_hold_until_told, self.opener(tmp_path)) as holder:
            holder.receive()
            holder.kill()
            _take(locks, DID, timeout=_SOON)


# What the suites share


def _take(locks: Locks, name: str, *, timeout: float = 0.0, cancel: threading.Event | None = None) -> None:
    with locks.hold(name, timeout=timeout, cancel=cancel):
        pass


def _at_once(work: Callable[[str], T], names: str) -> list[T]:
    """The results of ``work(name)``, all begun at the same instant, each in a thread of its own."""
    start = threading.Barrier(len(names))

    def run(name: str) -> T:
        start.wait(_SOON)
        return work(name)

    with ThreadPoolExecutor(len(names)) as threads:
        return list(threads.map(run, names))


@contextmanager
def _held_elsewhere(locks: Locks, name: str) -> Iterator[None]:
    """The lock ``name``, held by another thread."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with locks.hold(name, timeout=_SOON) as _hold:
            held.set()
            release.wait(_SOON)

    with ThreadPoolExecutor(1) as threads:
        holder = threads.submit(hold)
        try:
            assert held.wait(_SOON)
            yield
        finally:
            release.set()
            holder.result(_SOON)


class _Process:
    """``work(connection, *arguments)`` in a process of its own, at the other end of a connection."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs, *arguments))
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._process.join(_SOON)
        self.kill()

    def send(self, message: str) -> None:
        self._connection.send(message)

    def receive(self) -> Any:
        assert self._connection.poll(_SOON), "the other process does not answer"
        return self._connection.recv()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _compete(connection: Connection, opener: Callable[[], FullStore], name: str, keys: list[str]) -> None:
    store = opener()
    connection.send("ready")
    connection.recv()
    expected = make_session("old").token_set
    won, took = [], []
    for key in keys:
        if store.replace(key, make_session(name), expected):
            won.append(key)
        if store.logins.take(key) is not None:
            took.append(key)
    connection.send((won, took))
    store.close()


def _write_for_ever(connection: Connection, opener: Callable[[], FullStore]) -> None:
    store = opener()
    for number in itertools.count():
        store.set(DID, make_session(str(number) * 500))
        if number == 5:
            connection.send("writing")


def _hold_until_told(connection: Connection, opener: Callable[[], Locks]) -> None:
    with opener().hold(DID, timeout=_SOON) as hold:
        connection.send(hold.lock)
        connection.recv()
    connection.send("released")
