"""Stores that fail, in the ways that disks, administrators and clocks do. In each: nothing is spent that could not be
stored, the error says what is wrong and shows no secret, other accounts go on, and when the cause is gone the session
works again without a log-in."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import random
import shutil
import sqlite3
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from atproto_session import (
    ClientMetadata,
    Freshness,
    JSONStore,
    MemoryStore,
    OAuthClient,
    OAuthResponseError,
    Session,
    SessionGetter,
    SessionNotFoundError,
    SQLiteStore,
    StoreError,
    TokenRefreshError,
)
from atproto_session._terms import Times
from atproto_session.locks import ThreadLocks
from atproto_session.session import Attempt
from atproto_session.stores import FullStore
from atproto_session.testing.network import Account, LocalNetwork

from ..core import DID, QUICK, RESTLESS, SOON, FakeAuthority, Worker, expired_session
from ..processes import Program
from ..programs.store_scene import INSTANTS, Scene, Steps, WatchedStore, present, tokens_of
from ..scenes import GET_SESSION


class Place:
    """A store in a directory of its own, with two accounts that are logged in: something happens to the session of
    ``alice``, or to all; ``bob`` is somebody else."""

    def __init__(self, network: LocalNetwork, kind: str, directory: Path, clean_up: ExitStack) -> None:
        self.network = network
        self.kind = kind
        self.directory = directory
        self.url = f"json:///{directory}" if kind == "json" else f"sqlite:///{directory}/sessions.db"
        self._clean_up = clean_up
        self.client = self.open()
        self.alice, self.bob = self.log_in(), self.log_in()
        self._secrets: set[str] = set()
        self.note_secrets()

    def open(self, store: Any = None, **options: Any) -> OAuthClient:
        options = self.network.client_options() | {"times": RESTLESS} | options
        client = OAuthClient(ClientMetadata.loopback(), store=store or self.url, **options)
        return self._clean_up.enter_context(client)

    def open_store(self, **options: Any) -> FullStore:
        """Another store object over the same path."""
        path = self.directory / "sessions.db"
        store = JSONStore(self.directory) if self.kind == "json" else SQLiteStore(path, **options)
        return self._clean_up.enter_context(closing(store))

    def log_in(self, account: Account | None = None) -> Account:
        account = account or self.network.create_account()
        self.client.callback(self.network.authorize(self.client.authorize(account.did), account))
        return account

    def stored(self, account: Account) -> Session:
        return present(self.client.sessions.get_stored(account.did))

    def refresh(self, account: Account, client: OAuthClient | None = None) -> Session:
        return (client or self.client).sessions.get_session(account.did, True, timeout=SOON)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The authorization server asks the next one to come back later."""
        fault = self.network.fault("refresh", "status", status=429, headers={"Retry-After": "30"})
        try:
            yield
        finally:
            fault.disarm()

    # What must be true

    def note_secrets(self) -> None:
        for account in (self.alice, self.bob):
            session = self.stored(account)
            self._secrets |= {*filter(None, tokens_of(session)), session.dpop_key["d"]}

    def check_error(self, error: BaseException, *hints: str) -> None:
        """It says what is wrong, and nothing that is secret."""
        assert isinstance(error, StoreError)
        assert not error.login_required
        for hint in hints:
            assert hint in str(error)
        shown = "".join(traceback.format_exception(error)) + pickle.dumps(error, 0).decode("latin-1")
        assert not [secret for secret in self._secrets if secret in shown]

    @contextmanager
    def refused(self, *hints: str) -> Iterator[pytest.ExceptionInfo[StoreError]]:
        """What happens in the block is a StoreError, and spends nothing."""
        spent = self.network.refresh_token_uses
        with pytest.raises(StoreError) as caught:
            yield caught
        self.check_error(caught.value, *hints)
        assert self.network.refresh_token_uses == spent

    def check_works(self, *accounts: Account) -> None:
        """The sessions can be refreshed, which spends their tokens for the first time, and used."""
        for account in accounts or (self.alice, self.bob):
            before = self.stored(account)
            after = self.refresh(account)
            assert after.is_same_grant(before)
            assert self.network.refresh_token_uses[before.token_set.refresh_token or ""] == 1
            assert self.network.refresh_token_uses[after.token_set.refresh_token or ""] == 0
            assert self.client.restore(account.did).get(GET_SESSION).json()["did"] == account.did

    # The records, as they lie there

    def record(self, account: Account) -> bytes:
        if self.kind == "json":
            return self.file_of(account).read_bytes()
        with self.database() as connection:
            row = connection.execute("SELECT document FROM sessions WHERE key = ?", (account.did,)).fetchone()
            return bytes(row[0])

    def overwrite(self, account: Account, data: bytes) -> None:
        if self.kind == "json":
            self.file_of(account).write_bytes(data)
        else:
            with self.database() as connection:
                connection.execute("UPDATE sessions SET document = ? WHERE key = ?", (data, account.did))

    def file_of(self, account: Account) -> Path:
        (path,) = (self.directory / "sessions").glob(f"*{account.did.removeprefix('did:plc:')}.json")
        return path

    @contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.directory / "sessions.db", isolation_level=None)) as connection:
            yield connection


@pytest.fixture
def clean_up() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["json", "sqlite"])
def place(request: pytest.FixtureRequest, network: LocalNetwork, tmp_path: Path, clean_up: ExitStack) -> Place:
    return Place(network, request.param, tmp_path / "store", clean_up)


@pytest.fixture
def sqlite_place(network: LocalNetwork, tmp_path: Path, clean_up: ExitStack) -> Place:
    return Place(network, "sqlite", tmp_path / "store", clean_up)


# A full disk


class WorkerProcess(Program):
    """:mod:`tests.programs.store_worker`.

    :param patient: after a write that has failed, it goes on when there is room again.
    """

    def __init__(self, place: Place, *, store_for: float, patient: bool = False) -> None:
        super().__init__("programs.store_worker", is_measured=False)
        options = place.network.client_options()
        self.say({"store": place.url, "options": options, "store_for": store_for, "patient": patient})

    def do(self, *order: str) -> Any:
        self.say(order)
        return self.hear()


def test_on_a_full_disk_nothing_is_spent(place: Place) -> None:
    with WorkerProcess(place, store_for=0.0) as worker:
        worker.do("fill")
        for account in (place.alice, place.bob):
            assert worker.do("read", account.did) == place.stored(account).token_set.access_token
            worker.do("begin_refresh", account.did)
            outcome = worker.do("end_refresh")
            assert outcome["error"] == "StoreError"
            assert str(place.directory) in outcome["message"]
        assert place.network.refresh_token_uses.total() == 0
        assert list((place.directory / "writing").glob("*")) == [], "what was begun takes no room"
        worker.do("empty")
        for account in (place.alice, place.bob):
            worker.do("begin_refresh", account.did)
            assert worker.do("end_refresh") == {"access_token": place.stored(account).token_set.access_token}
    place.check_works()


def test_a_disk_that_is_full_for_a_moment_loses_no_answer(place: Place) -> None:
    before = place.stored(place.alice)
    with WorkerProcess(place, store_for=SOON, patient=True) as worker:
        answer = place.network.fault("refresh", "late")
        worker.do("begin_refresh", place.alice.did)
        assert answer.fired.wait(SOON)
        worker.do("fill")
        answer.release.set()
        worker.do("wait_for_failure")
        worker.do("empty")
        renewed = worker.do("end_refresh")
    assert renewed == {"access_token": place.stored(place.alice).token_set.access_token}
    assert renewed["access_token"] != before.token_set.access_token
    assert place.network.revocations == 0
    place.check_works()


def test_a_disk_that_stays_full_ends_the_session_at_the_server(place: Place) -> None:
    token = place.stored(place.alice).token_set.refresh_token or ""
    with WorkerProcess(place, store_for=0.0) as worker:
        answer = place.network.fault("refresh", "late")
        worker.do("begin_refresh", place.alice.did)
        assert answer.fired.wait(SOON)
        worker.do("fill")
        answer.release.set()
        outcome = worker.do("end_refresh")
        worker.do("empty")
    assert outcome["error"] == "StoreError"
    assert "could not be stored" in outcome["message"]
    assert "log in again" in outcome["message"]
    assert outcome["causes"]
    assert all(str(place.directory) in cause for cause in outcome["causes"])
    assert place.network.session_of(token) is not None
    assert place.network.session_of(token).revoked  # type: ignore[union-attr]
    # To delete a record takes room in a database, and none in a directory.
    with pytest.raises(SessionNotFoundError if place.kind == "json" else TokenRefreshError):
        place.refresh(place.alice)
    place.log_in(place.alice)
    place.check_works()


# Places that go, or may not be used


@contextmanager
def without_privileges() -> Iterator[None]:
    """Permissions mean nothing to root."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


def permit(directory: Path, directories: int, files: int) -> None:
    for path in [directory, *directory.rglob("*")]:
        path.chmod(directories if path.is_dir() else files)


@pytest.fixture(params=["json", "sqlite"])
def public_place(request: pytest.FixtureRequest, network: LocalNetwork, clean_up: ExitStack) -> Place:
    # Where pytest keeps its files, nobody else may look.
    directory = Path(clean_up.enter_context(tempfile.TemporaryDirectory()))
    directory.chmod(0o755)
    return Place(network, request.param, directory / "store", clean_up)


def test_a_read_only_place_spends_nothing(public_place: Place) -> None:
    place = public_place
    sessions = [place.stored(account) for account in (place.alice, place.bob)]
    permit(place.directory, 0o555, 0o444)
    with without_privileges():
        assert [place.client.sessions.get_session(one.did) for one in (place.alice, place.bob)] == sessions
        for account in (place.alice, place.bob):
            with place.refused("Permission denied", "that this user may write to", str(place.directory)):
                place.refresh(account)
        with place.refused("that this user may write to", str(place.directory)):
            place.open()
    permit(place.directory, 0o700, 0o600)
    place.check_works()


def test_an_unreadable_record_is_not_an_absent_one(network: LocalNetwork, clean_up: ExitStack) -> None:
    directory = Path(clean_up.enter_context(tempfile.TemporaryDirectory()))
    directory.chmod(0o755)
    place = Place(network, "json", directory / "store", clean_up)
    permit(place.directory, 0o777, 0o666)
    place.file_of(place.alice).chmod(0)
    with without_privileges():
        for refresh in ("auto", True, False):
            with place.refused("Permission denied", str(place.directory)):
                place.client.sessions.get_session(place.alice.did, refresh)
        place.check_works(place.bob)
    place.file_of(place.alice).chmod(0o600)
    place.check_works()


def take_away(directory: Path, how: str) -> Callable[[], object]:
    """Returns what brings it back."""
    away = directory.with_name("away")
    directory.rename(away)
    if how == "a file in its place":
        directory.write_text("")

    def bring_back() -> None:
        if directory.is_file():
            directory.unlink()
        away.rename(directory)

    return bring_back


@pytest.mark.parametrize("how", ["nothing in its place", "a file in its place"])
def test_a_directory_that_goes_spends_nothing(place: Place, how: str) -> None:
    bring_back = take_away(place.directory, how)
    for account in (place.alice, place.bob):
        for refresh in ("auto", True, False):
            with place.refused(str(place.directory), "that this user may write to"):
                place.client.sessions.get_session(account.did, refresh)
    bring_back()
    place.check_works()


def test_a_directory_that_goes_just_before_the_request_spends_nothing(place: Place) -> None:
    finding = place.network.fault("plc", "hold")
    refresh = Worker(lambda: place.refresh(place.alice))
    assert finding.fired.wait(SOON)
    bring_back = take_away(place.directory, "a file in its place")
    with place.refused(str(place.directory)):
        finding.release.set()
        refresh.outcome()
    bring_back()
    place.check_works()


def test_a_directory_that_is_away_for_a_moment_loses_no_answer(place: Place) -> None:
    steps = Steps()
    client = place.open(WatchedStore(place.open_store(), steps))
    answer = place.network.fault("refresh", "late")
    refresh = Worker(lambda: place.refresh(place.alice, client))
    assert answer.fired.wait(SOON)
    bring_back = take_away(place.directory, "a file in its place")
    second_try = steps.pause("store", after=1)
    answer.release.set()
    second_try.wait_until_reached()
    bring_back()
    second_try.release.set()
    renewed = present(refresh.outcome())
    client.sessions.close()
    assert tokens_of(renewed) == tokens_of(place.stored(place.alice))
    assert place.network.revocations == 0
    place.check_works()


def test_a_directory_that_goes_for_good_ends_the_session_at_the_server(place: Place) -> None:
    client = place.open(times=Times(store_for=0.0, first_rest=0.0, longest_rest=0.0))
    answer = place.network.fault("refresh", "late")
    refresh = Worker(lambda: place.refresh(place.alice, client))
    assert answer.fired.wait(SOON)
    bring_back = take_away(place.directory, "a file in its place")
    answer.release.set()
    with pytest.raises(StoreError) as caught:
        refresh.outcome()
    place.check_error(caught.value, "could not be stored", "log in again")
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == 2, "one try to store it, one to delete what it replaced"
    assert place.network.revocations == 1
    bring_back()
    with pytest.raises(TokenRefreshError) as over:
        place.refresh(place.alice)
    assert over.value.answer_lost
    place.log_in(place.alice)
    place.check_works()


# Locks


@pytest.mark.parametrize("kind", ["json", "sqlite"])
@pytest.mark.parametrize("instant", ["at rest", *INSTANTS])
def test_a_deleted_lock_directory_is_made_again(
    network: LocalNetwork,
    tmp_path: Path,
    clean_up: ExitStack,
    kind: str,
    instant: str,
) -> None:
    scene = Scene(network, f"{kind}:///{tmp_path}/sessions", clean_up)
    locks = tmp_path / ("sessions/locks" if kind == "json" else "sessions.locks")
    first = scene.log_in()
    assert locks.is_dir()
    if instant == "at rest":
        shutil.rmtree(locks)
        refresh = scene.refresh()
    else:
        pause, refresh = scene.stopped_refresh(instant)
        shutil.rmtree(locks)
        pause.release.set()
    scene.check_works(present(refresh.outcome()))
    assert scene.uses_of(first) == 1
    scene.check_works(present(scene.refresh().outcome()))
    assert list(locks.glob("*.lock"))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_spends_nothing(place: Place, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    session = place.stored(place.alice)
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", flock)
        assert place.client.sessions.get_session(place.alice.did) == session
        with place.refused("on a file system with file locks", str(place.directory)):
            place.refresh(place.alice)
        with place.refused("on a file system with file locks"):
            place.open(f"{place.url}-new")
    assert place.stored(place.alice) == session
    place.check_works()


# A locked database


def writing(store: FullStore) -> threading.Event:
    """Set when the store begins its next transaction, for which it may have to wait: for half a minute."""
    assert isinstance(store, SQLiteStore)
    begun = threading.Event()
    assert store._database._busy_timeout == 30.0
    with store._database._connections.lent() as connection:
        connection.set_trace_callback(lambda sql: begun.set() if sql.startswith("BEGIN") else None)
    return begun


@pytest.mark.parametrize("step", ["attempt", "store"])
def test_a_locked_database_is_waited_for(sqlite_place: Place, step: str) -> None:
    place, steps = sqlite_place, Steps()
    store = place.open_store()
    client = place.open(WatchedStore(store, steps))
    coming = steps.pause(step)
    refresh = Worker(lambda: place.refresh(place.alice, client))
    coming.wait_until_reached()
    waiting = writing(store)
    with place.database() as other:
        other.execute("BEGIN EXCLUSIVE")
        coming.release.set()
        assert waiting.wait(SOON)
        time.sleep(
            2.0 if step == "attempt" else 0.0
        )  # by no retry of the library's own: the database's patience counts
        assert place.client.restore(place.bob.did).get(GET_SESSION).status_code == 200, "readers do not wait"
        other.execute("ROLLBACK")
    assert tokens_of(present(refresh.outcome())) == tokens_of(place.stored(place.alice))
    place.check_works()


def test_a_database_that_stays_locked_spends_nothing(sqlite_place: Place) -> None:
    place = sqlite_place
    client = place.open(place.open_store(busy_timeout=0.05))
    with place.database() as other:
        other.execute("BEGIN EXCLUSIVE")
        with place.refused("another process keeps it locked; try again later", str(place.directory)) as caught:
            place.refresh(place.alice, client)
        assert caught.value.retryable
        other.execute("ROLLBACK")
    place.check_works()


def test_a_database_that_is_locked_for_too_long_a_moment_loses_no_answer(sqlite_place: Place) -> None:
    place, steps = sqlite_place, Steps()
    client = place.open(WatchedStore(place.open_store(busy_timeout=0.05), steps))
    first_try, second_try = steps.pause("store"), steps.pause("store", after=1)
    refresh = Worker(lambda: place.refresh(place.alice, client))
    first_try.wait_until_reached()
    with place.database() as other:
        other.execute("BEGIN EXCLUSIVE")
        first_try.release.set()
        second_try.wait_until_reached()
        other.execute("ROLLBACK")
    second_try.release.set()
    renewed = present(refresh.outcome())
    client.sessions.close()
    assert tokens_of(renewed) == tokens_of(place.stored(place.alice))
    assert place.network.revocations == 0
    place.check_works()


# Damaged records


def later_release(data: bytes) -> bytes:
    document = json.loads(data)
    document["atprotoSession"]["version"] += 1
    return json.dumps(document).encode()


def without(member: str) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({name: value for name, value in json.loads(data).items() if name != member}).encode()


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "emptied": (lambda data: b"", "empty"),
    "cut short": (lambda data: data[: len(data) // 2], "damaged"),
    "zeroed, as after a power failure": (lambda data: bytes(len(data)), "damaged"),
    "noise": (lambda data: random.Random(1).randbytes(500), "damaged"),
    "nested beyond measure": (lambda data: b"[" * 100_000, "damaged"),
    "not an object": (lambda data: b"[]", "not a JSON object"),
    "without tokens": (without("tokenSet"), "tokenSet"),
    "without a key": (without("dpopJwk"), "dpopJwk"),
    "of a later release": (later_release, "upgrade this worker"),
}


@pytest.mark.parametrize(("damage", "hint"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_an_error_for_its_account_alone(
    place: Place, damage: Callable[[bytes], bytes], hint: str
) -> None:
    whole = place.record(place.alice)
    rejected = place.stored(place.alice).token_set.access_token
    place.overwrite(place.alice, damage(whole))
    for client in (place.client, place.open()):
        get = partial(client.sessions.get_session, place.alice.did)
        for call in (
            get,
            partial(get, True),
            partial(get, False),
            partial(get, rejected=rejected),
            partial(client.restore, place.alice.did),
            partial(requests.get, place.network.pds_url + GET_SESSION, auth=client.auth(place.alice.did)),
        ):
            with place.refused(f"the session of {place.alice.did} cannot be read", hint):
                call()
    place.check_works(place.bob)
    place.overwrite(place.alice, whole)
    place.check_works()


def test_records_in_each_others_place_are_errors(place: Place) -> None:
    records = [place.record(account) for account in (place.alice, place.bob)]
    place.overwrite(place.alice, records[1])
    place.overwrite(place.bob, records[0])
    for account in (place.alice, place.bob):
        for refresh in ("auto", True, False):
            with place.refused(f"the session of {account.did} cannot be read", "another key"):
                place.client.sessions.get_session(account.did, refresh)
    place.overwrite(place.alice, records[0])
    place.overwrite(place.bob, records[1])
    place.check_works()


def test_a_record_that_is_damaged_just_before_the_request_spends_nothing(place: Place) -> None:
    whole = place.record(place.alice)
    finding = place.network.fault("plc", "hold")
    refresh = Worker(lambda: place.refresh(place.alice))
    assert finding.fired.wait(SOON)
    place.overwrite(place.alice, b"{")
    with place.refused("cannot be read", place.alice.did):
        finding.release.set()
        refresh.outcome()
    place.overwrite(place.alice, whole)
    place.check_works()


def test_a_damaged_record_can_be_signed_out_of_and_replaced_by_a_log_in(place: Place) -> None:
    place.overwrite(place.alice, b"{")
    place.client.revoke(place.alice.did)
    with pytest.raises(SessionNotFoundError):
        place.client.restore(place.alice.did)
    place.overwrite(place.bob, b"{")
    place.log_in(place.bob)
    place.log_in(place.alice)
    place.check_works()


@pytest.mark.parametrize("damage", ["header", "pages"])
def test_a_damaged_database_spends_nothing_and_works_when_it_is_restored(sqlite_place: Place, damage: str) -> None:
    place = sqlite_place
    accounts = [place.alice, place.bob]
    place.client.close()
    path = place.directory / "sessions.db"
    backup = path.read_bytes()
    whole = backup[:4096] if damage == "pages" else b""
    path.write_bytes(whole + b"\x5a" * (len(backup) - len(whole)))
    if damage == "header":
        with place.refused("this is the file of something else, or damaged", str(path)):
            place.open()
    else:
        damaged = place.open()
        for account in accounts:
            for refresh in ("auto", True, False):
                with place.refused("the file is damaged; restore it from a backup", str(path)):
                    damaged.sessions.get_session(account.did, refresh)
        damaged.close()
    path.write_bytes(backup)
    place.client = place.open()
    place.check_works()


# Clocks


class Clock:
    """Off by so many seconds."""

    off = 0.0

    def __call__(self) -> float:
        return time.time() + self.off


@pytest.mark.parametrize("seed", range(3))
def test_a_clock_that_jumps_loses_no_session(place: Place, seed: int) -> None:
    clock, chance = Clock(), random.Random(seed)
    client = place.open(freshness=Freshness(clock=clock))
    get = partial(client.sessions.get_session, place.alice.did, timeout=SOON)

    def ask() -> None:
        what = chance.randrange(5)
        if what == 0:
            get()
        elif what == 1:
            get(True)
        elif what == 2:
            get(rejected=place.stored(place.alice).token_set.access_token)
        elif what == 3:
            place.network.expire_access_tokens(place.alice.did)
            # By such a clock, the proof may be refused as too old, which says nothing about the token.
            assert client.restore(place.alice.did).get(GET_SESSION).status_code in (200, 401)
        else:
            with place.busy():
                get(True)

    kept_waiting: list[OAuthResponseError] = []
    for _ in range(25):
        clock.off += chance.choice((-1, 1)) * 10 ** chance.uniform(0, 8.5)
        try:
            ask()
        except OAuthResponseError as error:  # the server asked to be left alone, and by this clock, it is not yet time
            kept_waiting.append(error)
    assert {error.status for error in kept_waiting} == {429}
    assert all(0 < (error.retry_after or 0) <= 3600 for error in kept_waiting)
    clock.off += 2 * 3600
    get(True)
    clock.off = 0
    place.check_works()


def test_an_attempt_from_the_future_is_not_waited_for_without_end() -> None:
    authority, store = FakeAuthority(), MemoryStore[Session]()
    next_year = time.time() + 365 * 86400
    store.set(DID, expired_session(attempt=Attempt("id", "by", next_year, next_year)))
    # Such locks say nothing about other processes, so that the attempt may be of one that is alive.
    getter = SessionGetter(store, authority, locks=ThreadLocks(), times=replace(QUICK, longest=0.1))
    assert getter.get_session(DID, timeout=SOON).token_set.access_token == "access-2"
    assert authority.sends == 1
