"""How stores grow: ``python tests/bench_scale.py --accounts 1000 100000 --chart growth.svg``.

For each store and number of accounts: what a read costs, how long it takes to walk over all keys, and how much memory
that takes. The records are written to the server directly, since to log in so many accounts would take hours.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from atproto_session.stores import open_store
from atproto_session.stores.codec import Codec
from atproto_session.testing.contracts import make_session
from tests.servers import SERVERS

READS = 2000
BATCH = 1000


def key_of(number: int) -> str:
    return f"did:plc:{number:024d}"


def records(start: int, end: int) -> Iterator[tuple[str, bytes]]:
    codec = Codec()
    for number in range(start, end):
        key = key_of(number)
        yield key, codec.encode(key, make_session("x" * 500, key=key))


def fill(store: Any, start: int, end: int) -> None:
    for begin in range(start, end, BATCH):
        batch = list(records(begin, min(end, begin + BATCH)))
        kind = type(store).__name__
        if kind == "SQLiteStore":
            with closing(sqlite3.connect(store._database.path)) as connection, connection:
                connection.executemany("INSERT INTO sessions VALUES (?, ?)", batch)
        elif kind == "RedisStore":
            with store._server.client.pipeline(transaction=False) as pipeline:
                for key, data in batch:
                    pipeline.set(store._server.name_of("session", key), data)
                pipeline.execute()
        else:
            from atproto_session.stores.sql import _id_of

            rows = [{"id": _id_of(key), "account": key, "document": data} for key, data in batch]
            insert = store._rows._table.insert()
            store._database.ask(lambda connection, insert=insert, rows=rows: connection.execute(insert, rows))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(store: Any, accounts: int) -> dict[str, float]:
    draw = random.Random(accounts)
    keys = [key_of(draw.randrange(accounts)) for _ in range(READS)]

    def read_from_server(key: str) -> float:
        store._codec._young.clear()  # what was decoded before would be known
        store._codec._old.clear()
        return timed(lambda: store.get(key))

    for key in keys[:200]:
        read_from_server(key)
    read = statistics.median(map(read_from_server, keys))
    walk = timed(lambda: sum(1 for _ in store))
    tracemalloc.start()
    for _ in store:
        pass
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"read": read * 1e6, "walk": walk, "memory": memory / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--accounts", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--stores", nargs="+", default=["sqlite", *SERVERS])
    parser.add_argument("--chart", help="a file for a picture of the growth (needs matplotlib)")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    print(f"{'store':12}{'accounts':>10}{'a read':>12}{'a walk':>10}{'its memory':>12}")
    for kind in options.stores:
        with ExitStack() as clean_up:
            if kind == "sqlite":
                url = f"sqlite:///{clean_up.enter_context(tempfile.TemporaryDirectory())}/sessions.db"
            else:
                url = clean_up.enter_context(SERVERS[kind]()).url
            store = clean_up.enter_context(closing(open_store(url)))
            filled = 0
            for accounts in sorted(options.accounts):
                fill(store, filled, accounts)
                filled = accounts
                result = measure(store, accounts)
                found.setdefault(kind, []).append(result)
                costs = f"{result['read']:>9.0f} us{result['walk']:>8.1f} s{result['memory']:>9.1f} MB"
                print(f"{kind:12}{accounts:>10}{costs}", flush=True)
    for kind, results in found.items():
        print(f"{kind}: a read among the most accounts takes {results[-1]['read'] / results[0]['read']:.2f} times one")
    if options.chart:
        draw_chart(options.chart, sorted(options.accounts), found)


def draw_chart(path: str, accounts: list[int], found: dict[str, list[dict[str, float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for kind, results in found.items():
        axes.plot(accounts, [result["read"] for result in results], marker="o", label=kind)
    axes.set(xscale="log", xlabel="accounts", ylabel="a read, in microseconds", ylim=(0, None))
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
