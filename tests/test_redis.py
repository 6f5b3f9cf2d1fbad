"""The store in Redis and its locks."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from cryptography.fernet import Fernet

from atproto_session._worker import at_work, this_worker
from atproto_session.errors import CancelledError, LockTimeoutError, StoreError
from atproto_session.locks import Locks
from atproto_session.locks.redis import RedisHold, RedisLocks
from atproto_session.stores import FullStore, open_store
from atproto_session.stores.redis import RedisStore
from atproto_session.testing.contracts import (
    DID,
    HOSTILE_KEYS,
    SharedLocksContract,
    SharedStoreContract,
    StoreContract,
    make_session,
)

from .core import SOON, Worker, wait_until
from .processes import forked, in_child
from .servers import PASSWORD, Redis, free_port
from .test_sql import cut, locks_of, take

KEY = Fernet.generate_key()


class OnRedis:
    @pytest.fixture(autouse=True)
    def place(self, redis_url: str) -> None:
        self.url = redis_url


class TestRedisStore(OnRedis, SharedStoreContract):
    keys = HOSTILE_KEYS

    def opener(self, tmp_path: Path) -> Callable[[], FullStore]:
        return partial(open_store, self.url)

    def damage(self, store: FullStore, key: str) -> bool:
        return cut(store, key)

    def open_connections(self, store: FullStore) -> int | None:
        return len(store._server.client.connection_pool._available_connections)  # type: ignore[attr-defined]


class TestEncryptedRedisStore(OnRedis, StoreContract):
    def make_store(self, tmp_path: Path) -> FullStore:
        return open_store(self.url, encryption_keys=[KEY])

    def damage(self, store: FullStore, key: str) -> bool:
        return cut(store, key)

    def stored_bytes(self, store: FullStore) -> bytes | None:
        server: Any = store._server  # type: ignore[attr-defined]
        return b"".join(server.client.get(name) for name in server.client.scan_iter(f"{server.prefix}*"))


class TestRedisLocks(OnRedis, SharedLocksContract):
    names = HOSTILE_KEYS

    def opener(self, tmp_path: Path) -> Callable[[], Locks]:
        return partial(locks_of, self.url)


LATER = 4e9


@pytest.fixture
def store(redis_url: str) -> Iterator[Any]:
    with closing(open_store(redis_url)) as store:
        yield store


# Locks


def test_the_lock_of_a_worker_of_this_machine_that_is_gone_is_taken_at_once(store: Any) -> None:
    gone = in_child(this_worker)
    hold = RedisHold(store._server.client, store.locks._key_of(DID), "one")
    assert hold._lock.acquire(blocking=False, token=f"{gone}/1")
    began = time.monotonic()
    take(store.locks, DID)
    assert time.monotonic() - began < 5.0, "the lease is longer"


def test_of_two_that_take_the_lock_of_one_that_is_gone_the_slower_takes_nobodys(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = RedisHold(store._server.client, store.locks._key_of(DID), "one")
    assert hold._lock.acquire(blocking=False, token=f"{in_child(this_worker)}/1")
    slow = RedisHold(store._server.client, store.locks._key_of(DID), "another")
    release = slow._lock.do_release

    def release_late(token: str) -> None:
        monkeypatch.setattr(slow._lock, "do_release", release)
        assert hold.take()
        release(token)

    monkeypatch.setattr(slow._lock, "do_release", release_late)
    assert not slow.take()
    assert hold.extend(1.0)


def test_the_lock_of_another_worker_is_left_to_it(store: Any) -> None:
    name = store.locks._key_of(DID)
    with at_work("1") as worker:
        for token in (f"{worker}/1", "elsewhere/another-boot/12/34/1", "no worker at all"):
            store._server.client.set(name, token)
            with pytest.raises(LockTimeoutError):
                store.locks.hold(DID, timeout=0).__enter__()
    store._server.client.pexpire(name, 50)
    take(store.locks, DID)


def test_a_lock_that_its_worker_could_not_release_is_taken_at_once(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, store.locks.hold(DID, timeout=0):
        patch.setattr(RedisHold, "end", lambda hold: None)
        began = time.monotonic()
    assert store._server.client.exists(store.locks._key_of(DID))
    take(store.locks, DID)
    assert time.monotonic() - began < 5.0, "the lease is longer"


def test_waiting_ends_with_a_release_and_not_with_a_slice(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks again and again."""
    monkeypatch.setattr("atproto_session.locks.redis._SLICE", SOON)
    other = RedisLocks(store._server.client, prefix=store._server.prefix)
    waiting = threading.Event()
    wait = RedisHold.wait

    def wait_and_say_so(hold: RedisHold, seconds: float) -> None:
        waiting.set()
        wait(hold, seconds)

    monkeypatch.setattr(RedisHold, "wait", wait_and_say_so)
    with store.locks.hold(DID, timeout=0):
        waiter = Worker(lambda: take(other, DID))
        assert waiting.wait(SOON)
        began = time.monotonic()
    waiter.outcome()
    assert time.monotonic() - began < SOON / 2


def test_waiting_for_another_worker_ends_when_it_is_cancelled(store: Any) -> None:
    other = RedisLocks(store._server.client, prefix=store._server.prefix)
    cancel = threading.Event()
    with store.locks.hold(DID, timeout=0):
        waiter = Worker(lambda: take(other, DID, cancel=cancel))
        wait_until(lambda: other._threads._lines)
        cancel.set()
        with pytest.raises(CancelledError):
            waiter.outcome()


def test_a_lease_that_ran_out_is_another_ones(store: Any) -> None:
    other = RedisLocks(store._server.client, prefix=store._server.prefix)
    with store.locks.hold(DID, timeout=0) as hold:
        assert hold.extend(1.0)
        assert store._server.client.pttl(hold.lock) > 10_000, "never shorter than it was"
        assert hold.extend(60.0)
        assert store._server.client.pttl(hold.lock) > 50_000
        store._server.client.delete(hold.lock)
        with other.hold(DID, timeout=0) as newer:
            assert not hold.extend(1.0)
            hold.end()
            assert newer.extend(1.0)


def test_a_child_does_not_hold_what_its_parent_holds(store: Any) -> None:
    with store.locks.hold(DID, timeout=0) as hold:

        def work(connection: object) -> bool:
            was_held: bool = hold.extend(1.0)
            hold.end()
            store.set(DID, make_session())
            return was_held

        with forked(work) as child:
            assert child.result() is False
        assert hold.extend(1.0)
    assert store.get(DID) == make_session()


# The server


def test_a_server_that_is_gone_is_an_error_of_the_store(redis_server: str) -> None:
    with Redis("--appendonly", "yes") as server:
        store = open_store(server.url)
        store.set(DID, make_session())
        with store.locks.hold(DID, timeout=0) as hold:
            server.stop()
            with pytest.raises(StoreError, match="cannot be used"):
                hold.extend(1.0)
            works: list[Callable[[], object]] = [lambda: store.get(DID), lambda: take(store.locks, "another")]
            for work in works:
                with pytest.raises(StoreError, match="cannot be used") as caught:
                    work()
                assert caught.value.retryable
        server.start()
        assert store.get(DID) == make_session()
        store.close()
        for work in works[:1]:
            with pytest.raises(StoreError, match="closed"):
                work()


def test_a_log_in_ends_by_itself(store: Any) -> None:
    store.logins.put("state", {"verifier": "v"}, time.time() + 0.05)
    store.logins.put("other", {"verifier": "v"}, time.time() + 600)
    names = list(store._server.client.scan_iter(f"{store._server.prefix}login:*"))
    assert all(store._server.client.pttl(name) < 610_000 for name in names)
    wait_until(lambda: store._server.client.exists(f"{store._server.prefix}login:state") == 0)
    assert store.logins.take("other") == {"verifier": "v"}
    store.logins.put("past", {"verifier": "v"}, time.time() - 1)
    store.logins._rows.sweep(LATER)
    assert store.logins.take("past") is None


def test_a_client_of_the_application_is_used_and_left_open(redis_server: str, redis_url: str) -> None:
    for decodes in (False, True):
        client = redis.Redis.from_url(redis_server, decode_responses=decodes)
        store = RedisStore(client, prefix=redis_url.partition("prefix=")[2])
        store.clear()
        store.set(DID, make_session("1"))
        assert store.replace(DID, make_session("2"), make_session("1"))
        assert list(store) == [DID]
        with store.locks.hold(DID, timeout=0), pytest.raises(LockTimeoutError):
            RedisLocks(client, prefix=store._server.prefix).hold(DID, timeout=0).__enter__()
        store.close()
        assert client.ping()
        client.close()


def test_a_prefix_is_taken_by_the_letter(redis_server: str, redis_url: str) -> None:
    prefix = redis_url.partition("prefix=")[2]
    with (
        closing(RedisStore(redis_server, prefix=f"{prefix}[ab]*:")) as store,
        closing(RedisStore(redis_server, prefix=f"{prefix}a:")) as other,
    ):
        other.set("theirs", make_session())
        assert list(store) == []
        store.set("ours", make_session())
        assert list(store) == ["ours"]
        store.clear()
        assert list(other) == ["theirs"]


def test_a_write_counts_when_replicas_have_it(redis_server: str) -> None:
    with Redis("--repl-diskless-sync-delay", "0") as server:
        with Redis("--replicaof", server.host, str(server.port), "--masterauth", PASSWORD) as replica:
            store = open_store(f"{server.url}?replicas=1")
            with redis.Redis.from_url(replica.url) as behind:
                wait_until(lambda: behind.info("replication")["master_link_status"] == "up")
                store.set(DID, make_session("1"))
                assert store.replace(DID, make_session("2"), make_session("1"))
                name = f"atproto:session:{DID}"
                assert behind.get(name) == store._rows.read(DID)  # type: ignore[attr-defined]
            with pytest.raises(StoreError, match="ReadOnlyError") as caught:
                RedisStore(replica.url).set(DID, make_session())
            assert caught.value.retryable
        with pytest.raises(StoreError, match="0 of 1 replicas of Redis have what was written"):
            store.set(DID, make_session("3"))
        store.close()


# URLs


def test_tls(redis_server: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    files = ("--tls-cert-file", tmp_path / "cert.pem", "--tls-key-file", tmp_path / "key.pem")
    port = free_port()
    with Redis(
        *("--tls-port", str(port), "--tls-ca-cert-file", str(tmp_path / "ca.pem"), "--tls-auth-clients", "no"),
        *map(str, files),
    ):
        url = f"rediss://:{PASSWORD}@127.0.0.1:{port}/0"
        with closing(open_store(f"{url}?ssl_ca_certs={tmp_path}/ca.pem")) as store:
            store.set(DID, make_session())
            assert store.get(DID) == make_session()
        with pytest.raises(StoreError, match="certificate verify failed"):
            open_store(url)


def test_a_unix_socket(redis_server: str) -> None:
    with Redis() as server:
        for scheme in ("unix", "redis+unix"):
            url = f"{scheme}://{server.directory}/socket?password={PASSWORD}&prefix=mine:"
            with closing(open_store(url)) as store:
                store.set(DID, make_session())
                assert store.get(DID) == make_session()
                assert repr(store) == "RedisStore(prefix='mine:')"


def test_valkey_s_schemes(redis_url: str) -> None:
    with closing(open_store(redis_url.replace("redis://", "valkey://"))) as store:
        store.set(DID, make_session())
        assert store.get(DID) == make_session()


def test_sentinels(redis_server: str, tmp_path: Path) -> None:
    with Redis() as server:
        config = tmp_path / "sentinel.conf"
        config.write_text(
            f"sentinel monitor main {server.host} {server.port} 1\nsentinel auth-pass main {PASSWORD}\n",
            encoding="ascii",
        )
        with Sentinel(config) as sentinel:
            hosts = f"127.0.0.1:1,{sentinel.host}:{sentinel.port}"
            url = f"redis+sentinel://:{PASSWORD}@{hosts}/main/0?sentinel_password={PASSWORD}&prefix=mine:"
            with closing(open_store(url)) as store:
                store.set(DID, make_session())
                assert store.get(DID) == make_session()
                take(store.locks, DID)
            with pytest.raises(StoreError, match="MasterNotFoundError"):
                open_store(url.replace("/main/", "/another/"))


class Sentinel(Redis):
    def __init__(self, config: Path) -> None:
        super().__init__()
        self._config = config

    def _command(self) -> list[str]:
        return [
            self.find(self.program),
            str(self._config),
            "--sentinel",
            *super()._command()[1:-5],
            *("--requirepass", PASSWORD),
        ]


def test_a_cluster(redis_server: str) -> None:
    with Redis("--cluster-enabled", "yes") as server:
        with redis.Redis.from_url(server.url) as node:
            node.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
            wait_until(lambda: node.cluster("INFO")["cluster_state"] == "ok")
        url = server.url.replace("redis://", "redis+cluster://")
        with closing(open_store(url)) as store:
            keys = {f"{DID}#{number}" for number in range(20)}
            for key in keys:
                store.set(key, make_session("1"))
                assert store.replace(key, make_session("2"), make_session("1"))
                take(store.locks, key)
            assert set(store) == keys
            store.logins.put("state", {"verifier": "v"}, LATER)
            assert store.logins.take("state") == {"verifier": "v"}
            store.clear()
            assert list(store) == []
        with pytest.raises(StoreError, match="ValueError"):
            open_store(f"{url}?replicas=1")
    with pytest.raises(StoreError, match="cannot be used"):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://:hunter2@127.0.0.1:1/0", "cannot be used"),
        ("redis://:hunter2@127.0.0.1:hunter2/0", "cannot be understood"),
        ("redis+other://:hunter2@127.0.0.1/0", "cannot be understood"),
        ("redis://:hunter2@127.0.0.1/0?socket_timeout=hunter2", "cannot be understood"),
        ("redis://:hunter2@127.0.0.1/0?replicas=hunter2", "cannot be understood"),
        ("redis://:hunter2@127.0.0.1/0?hunter2", "cannot be understood"),
        ("redis://:hunter2@127.0.0.1/0?nonsense=1", "option that redis-py does not know.*nonsense"),
        ("redis+sentinel://:hunter2@host:hunter2/main", "cannot be understood"),
        ("rediss+sentinel://:hunter2@127.0.0.1:1/main", "cannot be used"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused_and_not_shown(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        open_store(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_wrong_password_is_not_shown(redis_url: str) -> None:
    wrong = redis_url.replace(PASSWORD, "hunter2")
    with pytest.raises(StoreError, match="cannot be used") as caught:
        open_store(wrong)
    assert not caught.value.retryable
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme, package, extra in (("redis", "redis", "redis"), ("postgresql", "sqlalchemy", "sql")):
        for name in list(sys.modules):
            if name.startswith(("atproto_session.stores.redis", "atproto_session.stores.sql")):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(StoreError, match=rf"missing \({package}\): pip install 'atproto-session\[{extra}\]'"):
            open_store(f"{scheme}://localhost")
