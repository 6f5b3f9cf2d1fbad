"""How the stores grow: ``make bench-scale``.

For each store and number of accounts: what a read costs, what the two writes of a refresh cost, how long it takes to
walk over all keys, and how much memory that takes. And for each store: how long requests wait while 1,000 accounts
expire within a minute under 8 processes, and how long a worker waits after another was killed in the middle of a
refresh.

The records are written to the places directly, since to log in so many accounts would take hours.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote

from atproto_session.session import Attempt
from atproto_session.stores import open_store
from atproto_session.stores.codec import Codec
from atproto_session.testing.contracts import make_session

from . import bench, bench_servers
from .servers import SERVERS, Missing

READS = 2000
WRITES = 100
BATCH = 1000
PARTS = 5
#: How many times longer a read among the most accounts may take than one among the fewest.
READ_LIMIT = 1.5
#: How long a worker may wait after another was killed on its machine, in seconds, and how often it is tried.
KILL_LIMIT = 1.0
KILLS = 10
#: How long the authorization server thinks about a refresh meanwhile, in seconds.
LATENCY = 0.3
HERD_LIMIT = 2.5
STORES = ["json", "sqlite", *SERVERS]


def key_of(number: int) -> str:
    return f"did:plc:{number:024d}"


class Records:
    """Records of as many accounts as are wanted, alike but for the account."""

    def __init__(self) -> None:
        self._like = key_of(0)
        self._data = Codec().encode(self._like, make_session("x" * 500, key=self._like))

    def between(self, start: int, end: int) -> Iterator[tuple[str, bytes]]:
        for number in range(start, end):
            key = key_of(number)
            yield key, self._data.replace(self._like.encode(), key.encode())


def fill(store: Any, start: int, end: int) -> None:
    records = Records()
    for begin in range(start, end, BATCH):
        batch = list(records.between(begin, min(end, begin + BATCH)))
        kind = type(store).__name__
        if kind == "SQLiteStore":
            with closing(sqlite3.connect(store._database.path)) as connection, connection:
                connection.executemany("INSERT INTO sessions VALUES (?, ?)", batch)
        elif kind == "JSONStore":
            directory = Path(store._directory, "sessions")
            directory.mkdir(mode=0o700, exist_ok=True)
            for key, data in batch:
                Path(directory, f"{quote(key, safe='')}.json").write_bytes(data)
        elif kind == "RedisStore":
            with store._server.client.pipeline(transaction=False) as pipeline:
                for key, data in batch:
                    pipeline.set(store._server.name_of("session", key), data)
                pipeline.execute()
        else:
            id_of = import_module("atproto_session.stores.sql")._id_of
            rows = [{"id": id_of(key), "account": key, "document": data} for key, data in batch]
            insert = store._rows._table.insert()
            store._database.ask(lambda connection, insert=insert, rows=rows: connection.execute(insert, rows))


def steady(measured: Callable[[str], float], keys: list[str]) -> float:
    """The median of the part in which other programs disturbed least."""
    return min(statistics.median(map(measured, keys[part::PARTS])) for part in range(PARTS))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(store: Any, accounts: int) -> dict[str, float]:
    draw = random.Random(accounts)

    def drawn(count: int) -> list[str]:
        return [key_of(draw.randrange(accounts)) for _ in range(count)]

    def forget() -> None:
        store._codec._young.clear()  # what was decoded before would be known
        store._codec._old.clear()

    def read(key: str) -> float:
        forget()
        return timed(lambda: store.get(key))

    def write(key: str) -> float:
        """What a refresh writes: the attempt, and then the successor."""
        session = store.get(key)
        now = time.time()
        attempted = replace(session, attempt=Attempt("an-id", "a worker", now, now + 10))
        successor = replace(session, refreshed_at=now)
        forget()
        return timed(
            lambda: store.replace(key, attempted, session) and store.replace(key, successor, attempted.token_set)
        )

    for key in drawn(200):
        read(key)
    result = {
        "read": steady(read, drawn(READS)),
        "refresh": steady(write, drawn(WRITES)),
        "walk": timed(lambda: sum(1 for _ in store)),
    }
    tracemalloc.start()
    for _ in store:
        pass
    result["memory"] = float(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    return result


@contextmanager
def place_of(kind: str) -> Iterator[str]:
    """The URL of a new place for sessions.

    :raises Missing: its server is not installed.
    """
    if kind in SERVERS:
        with SERVERS[kind]() as server:
            yield server.url
    else:
        with tempfile.TemporaryDirectory() as directory:
            yield f"json:///{directory}/sessions" if kind == "json" else f"sqlite:///{directory}/sessions.db"


def growth(kind: str, counts: list[int]) -> list[dict[str, float]]:
    results = []
    with place_of(kind) as url, closing(open_store(url)) as store:
        filled = 0
        for accounts in counts:
            fill(store, filled, accounts)
            filled = accounts
            result = measure(store, accounts)
            results.append(result)
            print(
                f"{kind:12}{accounts:>10,}{result['read'] * 1e6:>9.0f} us{result['refresh'] * 1e3:>9.2f} ms"
                f"{result['walk']:>8.1f} s{result['memory'] / 1e6:>9.1f} MB",
                flush=True,
            )
    return results


def herd(kind: str) -> float:
    """The longest wait of a request, in seconds."""
    with place_of(kind) as url:
        return bench.herd(url, processes=8)


def kills(kind: str) -> list[float]:
    """How long a worker waits for the session that another was refreshing when it was killed, beside what a refresh
    takes; in seconds."""
    did, server = bench_servers.did_of(0), bench_servers.server_of(0, 1)
    waits = []
    with (
        place_of(kind) as url,
        tempfile.TemporaryDirectory() as directory,
        bench_servers.running(Path(directory), latency=LATENCY) as environment,
        closing(open_store(url)) as store,
    ):
        bench.keep_sessions(url, {did: server}, lifetime=3600.0)
        for _ in range(KILLS):
            first, second = (
                subprocess.Popen(
                    [sys.executable, "-m", "tests.bench_killed", url, did],
                    env={**os.environ, **environment},
                    cwd=bench.ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                for _ in range(2)
            )
            for worker in (first, second):
                if worker.stdout is None or worker.stdout.readline() != "ready\n":
                    raise RuntimeError("a worker did not start")
            print("go", file=first.stdin, flush=True)
            while (session := store.get(did)) is None or session.attempt is None:
                time.sleep(0.001)
            first.kill()
            waits.append(float(second.communicate("go\n")[0]) - LATENCY)
            first.communicate()
    return waits


def in_order(by_store: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(by_store.items(), key=lambda entry: STORES.index(entry[0]))


def draw(document: dict[str, Any], path: Path) -> None:
    matplotlib = import_module("matplotlib")  # of the extra "docs"
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "atproto-session"
    pyplot = import_module("matplotlib.pyplot")
    chart, (reads, walks) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for kind, results in in_order(document["growth"]):
        counts = document["accounts"][: len(results)]
        reads.plot(counts, [result["read"] * 1e6 for result in results], marker="o", label=kind)
        walks.plot(counts, [result["memory"] / 1e6 for result in results], marker="o", label=kind)
    reads.set(xscale="log", xlabel="accounts", ylabel="a read, in microseconds", ylim=(0, None))
    walks.set(xscale="log", xlabel="accounts", ylabel="memory of a walk over all, in MB", ylim=(0, None))
    reads.legend()
    chart.savefig(path, metadata={"Date": None})
    pyplot.close(chart)


def tables(document: dict[str, Any]) -> str:
    growing: list[tuple[str, ...]] = [
        (
            kind,
            f"{accounts:,}",
            f"{result['read'] * 1e6:.0f} us",
            f"{result['refresh'] * 1e3:.1f} ms",
            f"{result['walk']:.1f} s",
            f"{result['memory'] / 1e6:.1f} MB",
        )
        for kind, results in in_order(document["growth"])
        for accounts, result in zip(document["accounts"], results, strict=False)
    ]
    others: list[tuple[str, ...]] = [
        (
            kind,
            f"{document['herd'][kind]:.2f} s",
            f"{statistics.median(waits):.2f} s",
            f"{max(waits):.2f} s",
        )
        for kind, waits in in_order(document["kills"])
    ]
    first = bench.table_of(("Store", "Accounts", "A read", "Two writes", "A walk", "Its memory"), growing)
    second = bench.table_of(("Store", "Longest wait of a herd", "Wait after a kill", "At most"), others)
    return f"{first}\n\n{second}"


def main() -> int:
    parser = argparse.ArgumentParser(description="How the stores grow.")
    parser.add_argument("--accounts", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--stores", nargs="+", default=STORES, help="only these; of the others, --docs keeps what it has"
    )
    parser.add_argument("--no-herds", action="store_true", help="leave out what takes a minute for each store")
    parser.add_argument("--docs", type=Path, help="where performance.rst, growth.json and growth.svg are")
    options = parser.parse_args()
    counts = sorted(options.accounts)
    document: dict[str, Any] = {"accounts": counts, "growth": {}, "herd": {}, "kills": {}}
    if options.docs is not None and options.stores != STORES:
        document = json.loads((options.docs / "growth.json").read_text(encoding="utf-8"))
    faults = []
    print(f"{'store':12}{'accounts':>10}{'a read':>12}{'two writes':>12}{'a walk':>10}{'its memory':>12}")
    for kind in options.stores:
        try:
            results = document["growth"][kind] = growth(kind, counts)
        except Missing as missing:
            print(f"{kind}: {missing}")
            continue
        ratio = results[-1]["read"] / results[0]["read"]
        print(f"{kind}: a read among the most accounts takes {ratio:.2f} times one among the fewest")
        if ratio > READ_LIMIT:
            faults.append(f"{kind}: a read takes {ratio:.2f} times as long")
        waits = document["kills"][kind] = kills(kind)
        print(f"{kind}: {len(waits)} kills, wait {statistics.median(waits):.2f} s, at most {max(waits):.2f} s")
        if max(waits) > KILL_LIMIT:
            faults.append(f"{kind}: {max(waits):.2f} s after a kill")
        if not options.no_herds:
            longest = document["herd"][kind] = herd(kind)
            print(f"{kind}: the longest wait of a herd is {longest:.2f} s", flush=True)
            if longest > HERD_LIMIT:
                faults.append(f"{kind}: a request waited {longest:.2f} s")
    if options.docs is not None:
        (options.docs / "growth.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draw(document, options.docs / "growth.svg")
        bench.write(options.docs / "performance.rst", tables(document), bench.versions(), "growth")
    print(*faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
