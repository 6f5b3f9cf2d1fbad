"""What stores have to do."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ...errors import LockTimeoutError, StoreError
from ...locks import LockKind
from ...session import Attempt, ClientAuthMethod, Rest, Session, TokenSet
from ...stores import FullStore, Logins
from ._common import DID, KEYS, LATER, SOON, Process, at_once, make_session, take
from .logins import LoginsContract

_ATTEMPTS = [
    Attempt("a1", "host:12", 1750000000.0, 1750000030.0),
    Attempt("a2", "host:13", 1750000001.0, 1750000031.0),
    Attempt("a1", "host:12", 1750000000.0, 1750000060.0),  # the first one, whose answer is waited for longer
]


def _with_attempt_of(name: str, session: Session) -> Session:
    return replace(session, attempt=Attempt(name, f"host:{name}", 1750000000.0, 1750000030.0))


def _nothing() -> None:
    """For a store that keeps nothing for each thread."""


class StoreContract(LoginsContract):
    """What a :class:`.FullStore` does. Anything less is put through :func:`.complete` first.

    :cvar keys: what is stored under.
    """

    keys: ClassVar[list[str]] = KEYS

    def make_store(self, tmp_path: Path) -> FullStore:
        """An empty store."""
        raise NotImplementedError

    def damage(self, store: FullStore, key: str) -> bool:
        """Make the record of ``key`` unreadable, behind the store's back; ``False`` where that cannot be done."""
        return False

    def stored_bytes(self, store: FullStore) -> bytes | None:
        """All that is on the disk, of a store with encryption keys; ``None`` of any other."""
        return None

    def open_connections(self, store: FullStore) -> int | None:
        """How many connections the store has open; ``None`` where that cannot be told."""
        return None

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[FullStore]:
        store = self.make_store(tmp_path)
        yield store
        store.close()

    @pytest.fixture
    def logins(self, store: FullStore) -> Logins:
        return store.logins

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
                rest=Rest(1750000000.5, 2, "TransportError", "cannot reach it", {"sent": False, "code": None}),
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

    def test_keys_are_never_mixed_up(self, store: FullStore) -> None:
        for number, key in enumerate(self.keys):
            store.set(key, make_session(str(number)))
        assert [store.get(key) for key in self.keys] == [make_session(str(number)) for number in range(len(self.keys))]
        assert sorted(store) == sorted(self.keys)
        for key in self.keys[::2]:
            store.delete(key)
        assert sorted(store) == sorted(self.keys[1::2])
        assert all((store.get(key) is None) == (number % 2 == 0) for number, key in enumerate(self.keys))

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

    @pytest.mark.parametrize("stored", [None, *_ATTEMPTS[:2]], ids=["no attempt", "first", "second"])
    @pytest.mark.parametrize("expected", [None, *_ATTEMPTS], ids=["none", "first", "second", "first, later"])
    def test_replace_of_a_session_compares_its_attempt(
        self, store: FullStore, stored: Attempt | None, expected: Attempt | None
    ) -> None:
        session = replace(make_session("1"), attempt=stored)
        store.set(DID, session)
        # Whatever else has changed in the record.
        seen = replace(make_session("1"), attempt=expected, refreshed_at=3.0, auth_method=None)
        assert store.replace(DID, make_session("2"), seen) is (stored == expected)
        assert store.get(DID) == (make_session("2") if stored == expected else session)

    def test_replace_of_a_session_compares_its_tokens(self, store: FullStore) -> None:
        session = replace(make_session("1"), attempt=_ATTEMPTS[0])
        store.set(DID, session)
        assert store.replace(DID, None, replace(make_session("2"), attempt=_ATTEMPTS[0])) is False
        assert store.get(DID) == session
        assert store.replace(DID, None, session) is True
        assert store.replace(DID, make_session("2"), session) is False
        assert store.get(DID) is None

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

            winners = [name for name in at_once(compete, "abcdefgh") if name]
            assert len(winners) == 1
            assert store.get(key) == make_session(winners[0])

    def test_of_many_threads_that_announce_an_attempt_one_does(self, store: FullStore) -> None:
        """All have read the same record, whose tokens stay the same."""
        read = make_session()
        for lap in range(10):
            key = f"{DID}#{lap}"
            store.set(key, read)

            def announce(name: str, key: str = key) -> str | None:
                return name if store.replace(key, _with_attempt_of(name, read), read) else None

            winners = [name for name in at_once(announce, "abcdefgh") if name]
            assert len(winners) == 1
            assert store.get(key) == _with_attempt_of(winners[0], read)

    def test_of_many_threads_that_insert_one_does(self, store: FullStore) -> None:
        outcomes = at_once(lambda name: store.replace(DID, make_session(name), None), "abcdefgh")
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
            assert all(reader.result(SOON) for reader in readers)

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
        store.logins.put("state", {"verifier": "v"}, LATER)
        store.clear()
        assert list(store) == []
        assert store.get(DID) is None
        assert store.logins.take("state") == {"verifier": "v"}

    def test_an_unreadable_record_is_an_error_and_not_an_absence(self, store: FullStore) -> None:
        store.set(DID, make_session())
        store.set(f"{DID}#work", make_session("work"))
        if not self.damage(store, DID):
            pytest.skip("damage() makes no record unreadable")
        with pytest.raises(StoreError, match=DID):
            store.get(DID)
        refused: list[tuple[Session | None, Session | TokenSet | None]] = [
            (make_session("2"), make_session().token_set),
            (make_session("2"), make_session()),
            (make_session("2"), None),
            (None, make_session().token_set),
        ]
        for session, expected in refused:
            with pytest.raises(StoreError, match=DID):
                store.replace(DID, session, expected)
        assert sorted(store) == [DID, f"{DID}#work"]
        assert store.get(f"{DID}#work") == make_session("work")
        store.set(DID, make_session("3"))
        assert store.get(DID) == make_session("3")

    def test_an_unreadable_record_can_be_deleted(self, store: FullStore) -> None:
        store.set(DID, make_session())
        if not self.damage(store, DID):
            pytest.skip("damage() makes no record unreadable")
        store.delete(DID)
        assert store.get(DID) is None

    def test_what_is_encrypted_shows_nothing(self, store: FullStore) -> None:
        session = make_session()
        store.set(DID, session)
        store.logins.put("state", {"verifier": "the-verifier", "dpopJwk": {"d": "the-key"}}, LATER)
        written = self.stored_bytes(store)
        if written is None:
            pytest.skip("stored_bytes() shows nothing that is encrypted")
        assert written
        secrets = ["access-1", "refresh-1", session.dpop_key["d"], "the-verifier", "the-key"]
        assert [secret for secret in secrets if secret.encode() in written] == []

    def test_threads_come_and_go_and_leave_no_connection(self, store: FullStore) -> None:
        store.set(DID, make_session("-1"))

        def work(number: int) -> None:
            expected = make_session(str(number - 1))
            assert store.replace(DID, make_session(str(number)), expected)
            getattr(store, "thread_ended", _nothing)()

        open_before = self.open_connections(store)
        for number in range(20):
            with ThreadPoolExecutor(1) as thread:
                thread.submit(work, number).result(SOON)
        assert store.get(DID) == make_session("19")
        if open_before is None:
            pytest.skip("open_connections() does not tell")
        # One more for what was not used before.
        assert (self.open_connections(store) or 0) <= open_before + 1

    def test_the_locks_are_those_of_the_key(self, store: FullStore) -> None:
        assert isinstance(store.locks.kind, LockKind)
        with store.locks.hold(DID, timeout=SOON):
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
            store.logins.put("state", {"verifier": "v"}, LATER)
            assert other.logins.take("state") == {"verifier": "v"}
            assert store.logins.take("state") is None
            with store.locks.hold(DID, timeout=SOON), pytest.raises(LockTimeoutError):
                take(other.locks, DID)
        finally:
            other.close()

    def test_many_threads_can_open_itat_once(self, tmp_path: Path) -> None:
        stores = at_once(lambda name: self.opener(tmp_path)(), "abcdef")
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
            store.logins.put(key, {"key": key}, LATER)
        with (
            Process(_compete, self.opener(tmp_path), "first", keys) as first,
            Process(_compete, self.opener(tmp_path), "second", keys) as second,
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

    def test_of_many_processes_that_announce_an_attempt_one_does(self, store: FullStore, tmp_path: Path) -> None:
        """This is what keeps a refresh token from being sent twice, without any lock."""
        keys = [f"{DID}#{number}" for number in range(20)]
        for key in keys:
            store.set(key, make_session())
        with (
            Process(_announce, self.opener(tmp_path), "first", keys) as first,
            Process(_announce, self.opener(tmp_path), "second", keys) as second,
        ):
            for process in (first, second):
                assert process.receive() == "ready"
            for process in (first, second):
                process.send("go")
            won_first, won_second = first.receive(), second.receive()
        assert sorted(won_first + won_second) == sorted(keys)
        for key in keys:
            assert store.get(key) == _with_attempt_of("first" if key in won_first else "second", make_session())

    def test_a_killed_writer_leaves_a_whole_record_and_nothing_locked(self, tmp_path: Path) -> None:
        for _ in range(3):
            with Process(_write_for_ever, self.opener(tmp_path)) as writer:
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


def _announce(connection: Connection, opener: Callable[[], FullStore], name: str, keys: list[str]) -> None:
    store = opener()
    read = {key: store.get(key) for key in keys}
    connection.send("ready")
    connection.recv()
    won = []
    for key, session in read.items():
        if session is not None and store.replace(key, _with_attempt_of(name, session), session):
            won.append(key)
    connection.send(won)
    store.close()
