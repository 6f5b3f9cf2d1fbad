"""What the library costs: ``make bench``.

Each figure is a ratio to the least that the same can cost, measured in turns in one run, with its target and its limit.
What is worse than the limit is measured once more, and then is a failure.

``--quick`` leaves out what takes long. ``--docs DIRECTORY`` writes the figures down, as a table, as JSON and as a
picture. ``--profile`` shows where the time of a request goes instead.
"""

from __future__ import annotations

import argparse
import compileall
import cProfile
import json
import os
import platform
import pstats
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from atproto_session import ClientAuthMethod, ClientMetadata, OAuthClient, Session, TokenSet, open_store
from atproto_session.keys import generate_jwk

from . import bench_requests, bench_servers
from .bench_requests import Pairs

#: requests reads all variables of the environment for each request; so their number matters.
VARIABLES = 40
ROOT = Path(__file__).parent.parent
ACCOUNTS, SERVERS, PROCESSES, SECONDS = 1000, 100, 4, 60.0


@dataclass(frozen=True)
class Figure:
    """
    :ivar text: what is compared.
    :ivar limit: from where on it is a failure: what was reached, and what chance may add.
    :ivar measure: brings the value.
    :ivar is_quick: it takes seconds.
    """

    name: str
    text: str
    target: float
    limit: float
    measure: Callable[[], float]
    unit: str = ""
    is_quick: bool = True


def median_ratio(pairs: Pairs) -> float:
    """For CPU times of what one thread does in a moment."""
    return statistics.median(ours / bare for ours, bare in pairs)


def least_ratio(pairs: Pairs) -> float:
    """For times on the clock, and for CPU times of whole processes: other programs only ever make them longer."""
    return min(ours for ours, _ in pairs) / min(bare for _, bare in pairs)


def cpu_of(environment: dict[str, str], module: str, *arguments: str) -> float:
    """The CPU time of a whole process, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", f"tests.{module}", *arguments]
    subprocess.run(command, env={**os.environ, **environment}, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compiled() -> None:
    """Compile the package, as pip does when it installs one, and has done with the others."""
    compileall.compile_dir(ROOT / "atproto_session", quiet=2)
    compileall.compile_dir(ROOT / "tests", maxlevels=0, quiet=2)


def imports(turns: int) -> float:
    compiled()

    def cost(what: str) -> float:
        return cpu_of({}, "bench_start", what)

    rounds = [(cost("nothing"), cost("imports"), cost("dependencies")) for _ in range(turns)]
    nothing, ours, others = (min(column) for column in zip(*rounds, strict=True))
    return float((ours - nothing) / (others - nothing))


def first_call(turns: int) -> float:
    compiled()
    did, server = bench_servers.did_of(0), bench_servers.server_of(0, 1)
    with tempfile.TemporaryDirectory() as directory, bench_servers.running(Path(directory)) as environment:
        store = f"sqlite:///{directory}/sessions.db"
        keep_sessions(store, {did: server}, lifetime=3600.0)
        return least_ratio(
            bench_requests.in_turns(
                lambda: cpu_of(environment, "bench_start", "first", store, did),
                lambda: cpu_of(environment, "bench_start", "bare", f"{server}/xrpc/a.b.c"),
                turns,
            )
        )


def keep_sessions(store: str, accounts: dict[str, str], *, lifetime: float) -> None:
    """Sessions of ``accounts`` (DIDs and their servers) that expire one after the other within ``lifetime``."""
    with OAuthClient(ClientMetadata.loopback(), store=store) as client:
        now = datetime.now(UTC)
        for number, (did, server) in enumerate(accounts.items(), start=1):
            expires_at = now + timedelta(seconds=lifetime * number / len(accounts))
            tokens = TokenSet(server, did, server, "atproto", f"{did}~first", "first", expires_at=expires_at)
            client.sessions.set_stored(did, Session(generate_jwk(), ClientAuthMethod("none"), tokens))


def refresh(turns: int) -> float:
    with tempfile.TemporaryDirectory() as directory, bench_servers.running(Path(directory)) as environment:
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench_refresh", str(turns)],
            env={**os.environ, **environment},
            check=True,
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
    return least_ratio(json.loads(done.stdout))


def herd(store: str | None = None, *, processes: int = PROCESSES) -> float:
    """The longest that a request waited while ``ACCOUNTS`` tokens expired. Fails if a request did, or a token was spent
    twice.

    :param store: by default a new SQLite file.
    """
    accounts = {bench_servers.did_of(number): bench_servers.server_of(number, SERVERS) for number in range(ACCOUNTS)}
    with (
        tempfile.TemporaryDirectory() as directory,
        bench_servers.running(Path(directory), servers=SERVERS, latency=0.15) as environment,
    ):
        store = store or f"sqlite:///{directory}/sessions.db"
        keep_sessions(store, accounts, lifetime=SECONDS)
        job = json.dumps([store, ACCOUNTS, SECONDS])
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.bench_herd", job],
                env={**os.environ, **environment},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for _ in range(processes)
        ]
        said = []
        for process in workers:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RuntimeError("a worker did not start")
        for process in workers:
            print(time.time(), file=process.stdin, flush=True)
        for process in workers:
            said.append(json.loads(process.communicate()[0]))
        counts = bench_servers.statistics(environment)
    failures = [failure for each in said for failure in each["failures"]]
    if failures or counts["replays"] or counts["refreshes"] < ACCOUNTS:
        raise RuntimeError(f"{counts}, failed: {failures}")
    print(f"    {sum(each['requests'] for each in said):,} requests, {counts['refreshes']:,} refreshes, no replay")
    return float(max(each["longest"] for each in said))


@contextmanager
def client_of(sessions: int) -> Iterator[OAuthClient]:
    """A client with so many stored sessions, and without a network."""
    with tempfile.TemporaryDirectory(prefix="atproto-session-bench-") as directory:
        bench_requests.filled_store(Path(directory, "sessions.db"), sessions).close()
        store = open_store(f"sqlite:///{directory}/sessions.db")
        with OAuthClient(ClientMetadata.loopback(), store=store) as client:
            client._pool = bench_requests.Stub()  # type: ignore[assignment]
            yield client
        store.close()


def figures(client: OAuthClient, *, quick: bool) -> list[Figure]:
    turns = 9 if quick else 25

    def threads(count: int, accounts: int) -> Callable[[], float]:
        return lambda: least_ratio(bench_requests.threads(client, count, accounts, turns))

    bare = "a bare request that makes one signature"
    return [
        Figure(
            "restored",
            f"a session restored for each request / {bare}",
            0.9,
            0.95,
            lambda: median_ratio(bench_requests.restored(client, turns)),
        ),
        Figure(
            "kept",
            f"a session that is kept / {bare}",
            0.75,
            0.8,
            lambda: median_ratio(bench_requests.kept(client, turns)),
        ),
        Figure("refresh", "a refresh over https / the least that it can cost", 2.0, 2.6, lambda: refresh(turns)),
        Figure(
            "herd",
            f"the longest wait while {ACCOUNTS:,} accounts of {SERVERS} servers expire within {SECONDS:.0f} s, "
            f"in {PROCESSES} processes",
            2.0,
            2.5,
            herd,
            unit=" s",
            is_quick=False,
        ),
        *(
            Figure(
                f"threads_{count}_{'one' if accounts == 1 else 'many'}",
                f"{count} threads on {accounts} accounts / the same with bare requests",
                1.0,
                1.1,
                threads(count, accounts),
                is_quick=count == 8,
            )
            for count, accounts in ((1, 1), (8, 1), (8, 8), (32, 1), (32, 32))
        ),
        Figure(
            "waiters",
            "the last of 32 threads that wait for one refresh / one that waits alone",
            1.05,
            1.3,
            lambda: least_ratio(bench_requests.waiters(client.sessions._store, turns)),  # type: ignore[arg-type]
        ),
        Figure("imports", "import atproto_session / its dependencies' own imports", 1.2, 1.4, lambda: imports(turns)),
        Figure(
            "first_call",
            "a script's first signed call / the same with requests",
            1.5,
            2.0,
            lambda: first_call(turns),
        ),
    ]


def measure(figure: Figure) -> float:
    """Once more where it is worse than its limit: by chance, or not."""
    value = figure.measure()
    if value > figure.limit:
        value = min(value, figure.measure())
    verdict = "ok" if value <= figure.target else "above its target" if value <= figure.limit else "TOO MUCH"
    print(
        f"{value:6.2f}{figure.unit}  target {figure.target:g}{figure.unit}, limit {figure.limit:g}{figure.unit}"
        f"  {verdict:16}  {figure.text}",
        flush=True,
    )
    return value


def profile(client: OAuthClient) -> None:
    did = bench_servers.did_of(1)
    client.restore(did).get(bench_requests.PATH)
    with cProfile.Profile() as profiler:
        bench_requests.cpu(lambda: client.restore(did).get(bench_requests.PATH), 5000)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def draw(document: dict[str, Any], path: Path) -> None:
    """The figures as bars, each beside its target."""
    matplotlib = import_module("matplotlib")  # of the extra "docs"
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "atproto-session"
    pyplot = import_module("matplotlib.pyplot")
    shown = document["figures"][::-1]
    chart, axes = pyplot.subplots(figsize=(9, 0.45 * len(shown) + 1), layout="constrained")
    axes.barh([each["text"] for each in shown], [each["value"] / each["target"] for each in shown], color="#4477aa")
    axes.axvline(1.0, color="#cc3311", label="target")
    axes.set_xlabel("share of the target; less is better")
    for place, each in enumerate(shown):
        axes.text(0.02, place, f"{each['value']:.2f}{each['unit']} of {each['target']:g}", va="center", color="white")
    chart.savefig(path, metadata={"Date": None})
    pyplot.close(chart)


def table(document: dict[str, Any]) -> str:
    rows = [
        (each["text"], *(f"{each[name]:.2f}{each['unit']}" for name in ("value", "target", "limit")))
        for each in document["figures"]
    ]
    return table_of(("What", "Measured", "Target", "Limit"), rows)


def table_of(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table as the documents have them."""
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles))]
    line = " ".join("=" * width for width in widths)
    lines = [" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (titles, *rows)]
    return "\n".join([line, lines[0].rstrip(), line, *(text.rstrip() for text in lines[1:]), line])


def versions() -> str:
    return f"on {os.cpu_count()} processors with Python {platform.python_version()}"


def write(page: Path, table: str, versions: str, what: str = "") -> None:
    """Put a table into a page, between its two marks."""
    begin, end = f".. measured {what}".rstrip() + "\n", f".. end of what was measured {what}".rstrip() + "\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    measured = f"Measured on {datetime.now(UTC).date().isoformat()} {versions}:"
    page.write_text(f"{before}{begin}\n{measured}\n\n{table}\n\n{end}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="What the library costs.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--docs", type=Path, help="where performance.rst, bench.json and bench.svg are")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    while len(os.environ) < VARIABLES:
        os.environ[f"ATPROTO_SESSION_BENCH_{len(os.environ)}"] = "x"
    with client_of(2000 if options.quick else 100_000) as client:
        if options.profile:
            profile(client)
            return 0
        wanted = [
            figure
            for figure in figures(client, quick=options.quick)
            if (not options.only or figure.name in options.only) and (figure.is_quick or not options.quick)
        ]
        values = [(figure, measure(figure)) for figure in wanted]
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "variables": len(os.environ),
        "figures": [
            {
                "name": figure.name,
                "text": figure.text,
                "value": round(value, 3),
                "unit": figure.unit,
                "target": figure.target,
                "limit": figure.limit,
            }
            for figure, value in values
        ],
    }
    if options.docs is not None:
        (options.docs / "bench.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draw(document, options.docs / "bench.svg")
        write(options.docs / "performance.rst", table(document), versions())
    return int(any(value > figure.limit for figure, value in values))


if __name__ == "__main__":
    sys.exit(main())
