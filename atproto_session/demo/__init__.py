"""Many processes and threads share one account whose tokens live three seconds. What this library is for, shown twice:
with its locks, and without."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..client import OAuthClient
from ..metadata import ClientMetadata
from ..testing.network import LocalNetwork
from .display import display, milliseconds, table
from .figures import Figures, Tokens, percentile
from .load import Crew
from .worker import FRESHNESS, Job

#: How long an access token lives, in seconds.
TOKEN_LIFETIME = 3.0
#: How long the part without locks may take, in seconds: some lives of a token.
_NAIVE_SECONDS = 12.0
_NOTE = "  (A request waits if it asks for the session before a refresh has ended, and gets the refreshed one.)"


@dataclass(frozen=True)
class Load:
    """How much of it: each of ``processes`` has so many ``threads``; ``seconds`` is the length of the first part."""

    processes: int = 4
    threads: int = 8
    seconds: float = 30.0
    store: Literal["sqlite", "json"] = "sqlite"


@dataclass(frozen=True)
class Outcome:
    """What came out of one part."""

    figures: Figures
    tokens: Tokens


def run(load: Load) -> int:
    """Show both parts. Returns the exit code: 0 if every promise was kept, 1 if not, 130 after Ctrl-C."""
    print(
        f"{load.processes} processes of {load.threads} threads use one account. Its access token lives "
        f"{TOKEN_LIFETIME:.0f} seconds, its refresh token works once.\n"
    )
    try:
        print(f"With atproto_session, {load.seconds:g} seconds:", flush=True)
        outcome = play(load)
        print(f"\n{table(_rows(outcome))}\n\n{_NOTE}")
        broken = broken_promises(outcome)
        for promise in broken:
            print(f"\nBROKEN: {promise}")
        print("\nThe same load, and nothing that keeps two workers from refreshing at once:", flush=True)
        print(f"\n{_obituary(play(replace(load, seconds=_NAIVE_SECONDS), naive=True))}")
    except KeyboardInterrupt:
        print("\nStopped.")
        return 130
    return 1 if broken else 0


def play(load: Load, *, naive: bool = False) -> Outcome:
    """Put an account of its own under ``load``, and say what came out."""
    with (
        tempfile.TemporaryDirectory(prefix="atproto-session-demo-") as directory,
        LocalNetwork(access_token_lifetime=TOKEN_LIFETIME) as network,
    ):
        place = Path(directory)
        store = f"sqlite:///{place / 'sessions.db'}" if load.store == "sqlite" else f"json:///{place / 'sessions'}"
        did = _log_in(network, store)
        job = Job(did, store, network.client_options(), load.threads, naive)
        crew = Crew(job, load.processes)
        with crew, display(load.seconds) as show:

            def tick(passed: float) -> bool:
                show(passed, crew.figures, _tokens_seen_by(network))
                return not (naive and crew.figures.failures)

            crew.run(load.seconds, tick)
        return Outcome(crew.figures, _tokens_seen_by(network))


def broken_promises(outcome: Outcome) -> list[str]:
    """What must never happen and did."""
    figures, tokens = outcome.figures, outcome.tokens
    broken = []
    if (failure := figures.first_failure) is not None:
        broken.append(f"{len(figures.failures)} failures, the first: {failure.message}")
    if not figures.served:
        broken.append("no request was served")
    if tokens.spent_twice:
        broken.append(f"{tokens.spent_twice} refresh tokens were spent more than once")
    if tokens.spends != tokens.rotations:
        broken.append(f"{tokens.spends} refreshes were sent for {tokens.rotations} rotations")
    return broken


def _log_in(network: LocalNetwork, store: str) -> str:
    account = network.create_account()
    metadata = ClientMetadata.loopback()
    with OAuthClient(metadata, store=store, freshness=FRESHNESS, **network.client_options()) as client:
        client.callback(network.authorize(client.authorize(account.handle), account))
    return account.did


def _tokens_seen_by(network: LocalNetwork) -> Tokens:
    uses = network.refresh_token_uses
    return Tokens(uses.total(), network.rotations, sum(count > 1 for count in uses.values()))


def _rows(outcome: Outcome) -> list[tuple[str, str]]:
    figures, tokens = outcome.figures, outcome.tokens
    per_rotation = tokens.spends / tokens.rotations if tokens.rotations else 0.0
    return [
        ("requests served", f"{figures.served:,}"),
        ("requests failed", f"{len(figures.failures)}"),
        ("latency, p50", milliseconds(percentile(figures.latencies, 0.5))),
        ("latency, p99", milliseconds(percentile(figures.latencies, 0.99))),
        ("token rotations", f"{tokens.rotations}"),
        ("refreshes for each rotation", f"{per_rotation:g}"),
        ("refresh tokens spent twice", f"{tokens.spent_twice}"),
        ("requests that waited for a refresh", f"{len(figures.waits):,}"),
        ("their wait, p50", milliseconds(percentile(figures.waits, 0.5))),
        ("their wait, longest", milliseconds(max(figures.waits, default=0.0))),
    ]


def _obituary(outcome: Outcome) -> str:
    failure, served = outcome.figures.first_failure, outcome.figures.served
    if failure is None:
        return "  It survived by luck. Run it again."
    spent = "a refresh token was spent twice" if outcome.tokens.spent_twice else "no refresh token was spent twice"
    return (
        f"  The session died after {failure.at:.1f} seconds under load and {served:,} requests: {spent}.\n"
        f"  What users see: {failure.message}"
    )
