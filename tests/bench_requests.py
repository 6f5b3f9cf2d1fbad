"""What a signed request costs, alone and among threads, against a bare one; and what waiting for a refresh costs.

The bare request is one of a kept ``requests.Session`` whose adapter makes one bare ES256 signature. No network is used:
where a request would leave, a stub answers. Times are CPU seconds where one thread works, which other programs of the
machine disturb least.
"""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import requests
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from requests.adapters import BaseAdapter

from atproto_session import ClientAuthMethod, OAuthClient, Session, SessionGetter, SQLiteStore, TokenSet
from atproto_session.keys import generate_jwk
from atproto_session.session import to_document

from .bench_servers import did_of

PDS = "https://pds.example.com"
PATH = "/xrpc/com.atproto.server.getSession"
#: How long the authorization server thinks, in seconds.
LATENCY = 0.1

Work = Callable[[], object]
#: What ours took and what the bare one took, in turns.
Pairs = list[tuple[float, float]]


class Stub(BaseAdapter):
    """Answers every request at once, after ``before``."""

    def __init__(self, before: Work = lambda: None) -> None:
        super().__init__()
        self._before = before

    def send(self, request: requests.PreparedRequest, *ignored: Any, **options: Any) -> requests.Response:
        self._before()
        response = requests.Response()
        response.status_code = 200
        response.headers["Content-Type"] = "application/json"
        response.headers["DPoP-Nonce"] = "nonce"
        response.url = request.url or ""
        response.request = request
        response._content = b'{"active": true}'
        return response

    def close(self) -> None:
        pass


class SlowAuthority:
    """Refreshes within ``LATENCY``."""

    def prepare(self, session: Session) -> Callable[[Session], Session]:
        def send(session: Session) -> Session:
            time.sleep(LATENCY)
            return make_session(session.token_set.sub, session.dpop_key)

        return send

    def revoke(self, session: Session) -> None:
        raise RuntimeError("nothing is revoked here")


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


def filled_store(path: Path, sessions: int) -> SQLiteStore:
    store = SQLiteStore(path)
    records = (
        (did, json.dumps(to_document(did, make_session(did, generate_jwk()))).encode())
        for did in map(did_of, range(sessions))
    )
    with sqlite3.connect(path) as database:
        database.executemany("INSERT INTO sessions VALUES (?, ?)", records)
    database.close()
    return store


def cpu(work: Work, times: int = 200) -> float:
    """How much CPU time one call of ``work`` takes, in seconds."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times


def in_turns(ours: Callable[[], float], bare: Callable[[], float], turns: int) -> Pairs:
    """Both measured in turns, so that what else the machine does hits both."""
    ours(), bare()
    return [(ours(), bare()) for _ in range(turns)]


def bare_session() -> requests.Session:
    key, signature = ec.generate_private_key(ec.SECP256R1()), ec.ECDSA(hashes.SHA256())
    plain = requests.Session()
    plain.mount("https://", Stub(lambda: key.sign(b"x" * 300, signature)))
    return plain


def restored(client: OAuthClient, turns: int) -> Pairs:
    plain, did = bare_session(), did_of(1)
    return in_turns(
        lambda: cpu(lambda: client.restore(did).get(PATH)), lambda: cpu(lambda: plain.get(PDS + PATH)), turns
    )


def kept(client: OAuthClient, turns: int) -> Pairs:
    plain, session = bare_session(), client.restore(did_of(1))
    return in_turns(lambda: cpu(lambda: session.get(PATH)), lambda: cpu(lambda: plain.get(PDS + PATH)), turns)


def together(works: list[Work], each: int) -> float:
    """How many seconds it takes until all ``works`` have been done so many times, each in a thread of its own."""
    ready = threading.Barrier(len(works))
    began: list[float] = []

    def run(work: Work) -> None:
        work()
        ready.wait()
        began.append(time.perf_counter())
        for _ in range(each):
            work()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - min(began)


def threads(client: OAuthClient, count: int, accounts: int, turns: int, *, requests_in_all: int = 640) -> Pairs:
    """So many threads, each with a session of one of the accounts."""
    each = requests_in_all // count
    sessions = [client.restore(did_of(number % accounts)) for number in range(count)]
    plain = [bare_session() for _ in range(count)]
    return in_turns(
        lambda: together([lambda one=one: one.get(PATH) for one in sessions], each),  # type: ignore[misc]
        lambda: together([lambda one=one: one.get(PDS + PATH) for one in plain], each),  # type: ignore[misc]
        turns,
    )


def waiters(store: SQLiteStore, turns: int, count: int = 32) -> Pairs:
    """The last of so many threads that wait for one refresh, against one that waits for it alone."""
    did, key = did_of(10**6), generate_jwk()
    getter = SessionGetter(store, SlowAuthority())

    def refreshed_by(threads: int) -> float:
        getter.set_stored(did, make_session(did, key, lifetime=-60.0))
        ready = threading.Barrier(threads)
        began: list[float] = []
        done: list[float] = []

        def ask() -> None:
            ready.wait()
            began.append(time.perf_counter())
            getter.get_session(did)
            done.append(time.perf_counter())

        workers = [threading.Thread(target=ask) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return max(done) - min(began)

    return in_turns(lambda: refreshed_by(count), lambda: refreshed_by(1), turns)
