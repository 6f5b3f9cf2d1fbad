"""What the library costs, against the least that such a request can cost: ``make bench``.

Both sides of a ratio are measured in turns, so that what else the machine does hits both, and the median of many turns
counts. No network is used: where a request would leave, a stub answers.

``python tests/bench.py --profile`` shows where the time of a request goes instead.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import random
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import requests
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from requests.adapters import BaseAdapter

from atproto_session import ClientAuthMethod, ClientMetadata, OAuthClient, Session, SessionGetter, SQLiteStore, TokenSet
from atproto_session.keys import generate_jwk
from atproto_session.locks import Hold, LockKind, Locks
from atproto_session.session import to_document

SESSIONS = 100_000
PDS = "https://pds.example.com"
PATH = "/xrpc/com.atproto.server.getSession"
#: How long the authorization server of this bench thinks, in seconds.
LATENCY = 0.1


# What stands for the rest of the world


class Stub(BaseAdapter):
    """Answers every request at once, after ``before``."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self._before = before

    def send(self, request: requests.PreparedRequest, *ignored: Any, **options: Any) -> requests.Response:
        self._before()
        response = requests.Response()
        response.status_code = 200
        response.headers["Content-Type"] = "application/json"
        response.url = request.url or ""
        response.request = request
        response._content = b'{"active": true}'
        return response

    def close(self) -> None:
        pass


class SlowAuthority:
    """Refreshes within ``LATENCY``."""

    def __init__(self) -> None:
        self.sent = 0

    def prepare(self, session: Session) -> Callable[[Session], Session]:
        def send(session: Session) -> Session:
            self.sent += 1
            time.sleep(LATENCY)
            return make_session(session.token_set.sub, session.dpop_key)

        return send

    def revoke(self, session: Session) -> None:
        raise AssertionError("nothing is revoked here")


class CountedLocks:
    def __init__(self, locks: Locks) -> None:
        self._locks = locks
        self.taken = 0

    @property
    def kind(self) -> LockKind:
        return self._locks.kind

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[Hold]:
        self.taken += 1
        with self._locks.hold(name, timeout=timeout, cancel=cancel) as hold:
            yield hold


def did_of(number: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    return "did:plc:" + "".join(letters[number >> 5 * place & 31] for place in range(24))


def make_session(did: str, key: Mapping[str, Any], *, lifetime: float = 3600.0) -> Session:
    tokens = TokenSet(
        iss=PDS,
        sub=did,
        aud=PDS,
        scope="atproto transition:generic",
        refresh_token=f"ref-{random.randbytes(32).hex()}",
        access_token=f"acc-{random.randbytes(200).hex()}",
        expires_at=datetime.now(UTC) + timedelta(seconds=lifetime),
    )
    return Session(key, ClientAuthMethod("none"), tokens, refreshed_at=time.time())


def filled_store(path: Path) -> SQLiteStore:
    store = SQLiteStore(path)
    records = (
        (did, json.dumps(to_document(did, make_session(did, generate_jwk()))).encode())
        for did in map(did_of, range(SESSIONS))
    )
    with sqlite3.connect(path) as database:
        database.executemany("INSERT INTO sessions VALUES (?, ?)", records)
    database.close()
    return store


# Measuring


def seconds(work: Callable[[], object], times: int) -> float:
    """How long one call of ``work`` takes."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


def compare(
    name: str, ours: Callable[[], float], bare: Callable[[], float], *, target: float | None, turns: int = 15
) -> None:
    """Measure both in turns, and print the median of the ratios."""
    ours(), bare()
    pairs = [(ours(), bare()) for _ in range(turns)]
    ratio = statistics.median(one / other for one, other in pairs)
    ours_median, bare_median = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
    verdict = "" if target is None else f" (target {target}: {'ok' if ratio <= target else 'TOO SLOW'})"
    print(f"{name}\n    {ratio:.2f}{verdict}, {ours_median:,.0f} us against {bare_median:,.0f} us")


def bench_requests(client: OAuthClient) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    signature = ec.ECDSA(hashes.SHA256())
    plain = requests.Session()
    plain.mount("https://", Stub(lambda: key.sign(b"x" * 300, signature)))
    did = did_of(SESSIONS // 2)
    kept = client.restore(did)

    def bare() -> float:
        return seconds(lambda: plain.get(PDS + PATH), 200)

    def restored(did_of_request: Callable[[], str]) -> Callable[[], float]:
        return lambda: seconds(lambda: client.restore(did_of_request()).get(PATH), 200)

    def with_kept() -> float:
        return seconds(lambda: kept.get(PATH), 200)

    def any_did() -> str:
        return did_of(random.randrange(SESSIONS))

    against = "one ES256 signature and a GET of a kept requests.Session"
    compare(f"restore one of {SESSIONS:,} sessions, and a GET / {against}", restored(lambda: did), bare, target=1.5)
    compare(f"GET of a kept OAuthSession / {against}", with_kept, bare, target=1.3)
    compare(f"restore any of {SESSIONS:,} sessions, and a GET / {against}", restored(any_did), bare, target=None)


def bench_waiting(store: SQLiteStore, threads: int = 32) -> None:
    authority, did, key = SlowAuthority(), did_of(SESSIONS), generate_jwk()
    getter = SessionGetter(store, authority)
    measured = 0

    def refreshed_by(count: int) -> float:
        nonlocal measured
        measured += 1
        getter.set_stored(did, make_session(did, key, lifetime=-60.0))
        ready = threading.Barrier(count + 1)
        done: list[float] = []

        def ask() -> None:
            ready.wait()
            getter.get_session(did)
            done.append(time.perf_counter())

        workers = [threading.Thread(target=ask) for _ in range(count)]
        for worker in workers:
            worker.start()
        ready.wait()
        began = time.perf_counter()
        for worker in workers:
            worker.join()
        return max(done) - began

    compare(
        f"the last of {threads} threads that wait for one refresh / one refresh alone",
        lambda: refreshed_by(threads),
        lambda: refreshed_by(1),
        target=1.5,
    )
    print(f"    {authority.sent / measured:g} refreshes each time")


def bench_get(store: SQLiteStore) -> None:
    authority, locks, did = SlowAuthority(), CountedLocks(store.locks), did_of(1)
    getter = SessionGetter(store, authority, locks=locks)
    took = statistics.median(seconds(lambda: getter.get_session(did), 1000) for _ in range(15))
    print(f"get_session of a fresh session\n    {took * 1e6:.0f} us, {locks.taken} locks, {authority.sent} requests")


def profile(client: OAuthClient) -> None:
    did = did_of(SESSIONS // 2)
    client.restore(did).get(PATH)
    profiler = cProfile.Profile()
    profiler.enable()
    seconds(lambda: client.restore(did).get(PATH), 5000)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="atproto-session-bench-") as directory:
        store = filled_store(Path(directory, "sessions.db"))
        with OAuthClient(ClientMetadata.loopback(), store=store) as client:
            client._pool = Stub()  # type: ignore[assignment]
            if "--profile" in sys.argv:
                profile(client)
            else:
                bench_requests(client)
                bench_waiting(store)
                bench_get(store)
        store.close()


if __name__ == "__main__":
    main()
