"""Everything at once, for a while: ``python -m tests.soak --seconds 600``.

Processes and threads use many accounts over one store. Requests and answers get lost, servers fail, tokens expire and
are refused early, owners log out and in, sessions are ended at the server, and processes are killed. Some sessions are
lost by that: whoever loses the answer to a refresh has lost the tokens in it. None may be lost by anything else, no
refresh token may be sent again while an answer to it may still come, and whoever comes after a process that was killed
must find its lock free and the record in order. The exit code is 0 if so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atproto_session import OAuthClient, SessionError, SessionUpdatedEvent, StoreError
from atproto_session.testing.network import Account, LocalNetwork

from .processes import ROOT, UNMEASURED
from .programs.soak_watch import Watch
from .programs.soak_worker import ANSWER_WITHIN, make_client

#: What lives so long, in seconds, is not new any more; a server that refuses new tokens ends the session.
_SETTLED = 2.0

#: What happens to requests, how often in relation to the others, and its options. Of what happens to refreshes, the
#: first lines lose nothing, the last may.
FAULTS: tuple[tuple[int, str, str, dict[str, Any]], ...] = (
    (3, "plc", "status", {"status": 503}),
    (3, "protected-resource", "cut_before", {}),
    (3, "as-metadata", "html", {}),
    (6, "resource", "cut_after", {}),
    (6, "resource", "status", {"status": 502}),
    (6, "resource", "nonce_challenge", {}),
    (6, "refresh", "nonce_challenge", {}),
    (6, "refresh", "cut_before", {}),
    (6, "refresh", "status", {"status": 503}),
    (3, "refresh", "status", {"status": 429, "headers": {"Retry-After": "1"}}),
    (3, "refresh", "oauth_error", {"error": "temporarily_unavailable", "status": 400}),
    (6, "refresh", "hold", {"seconds": 0.5}),
    (6, "refresh", "late", {"seconds": 0.5}),
    (3, "refresh", "no_nonce", {}),
    (2, "refresh", "no_refresh_token", {}),
    (2, "refresh", "cut_after", {}),
    (2, "refresh", "status", {"status": 502, "processed": True}),
    (1, "refresh", "html", {"processed": True}),
    (1, "refresh", "late", {"seconds": ANSWER_WITHIN + 1.0}),
    (1, "refresh", "wrong_sub", {}),
)


@dataclass(frozen=True)
class Options:
    """How much of it."""

    seconds: float = 60.0
    processes: int = 4
    threads: int = 8
    accounts: int = 20
    seed: int = 0
    store: str = "sqlite"


@dataclass
class Totals:
    """What came of it.

    :ivar counts: how often what was done in the workers ended how.
    :ivar lost: sessions that came to an end without their owner having logged out, by reason.
    :ivar suspect: accounts whose sessions came to an end for no reason that is known yet.
    :ivar refused: accounts of which a worker had a new token refused: one that stood still for so long that the token
        was not new any more to whoever makes the mischief.
    :ivar broken: what must not happen and did.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    suspect: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)
    refreshes: int = 0
    kills: int = 0
    log_ins: int = 0
    log_outs: int = 0

    def conclude(self) -> None:
        """When everything is known: what ended for no reason."""
        for did in self.suspect:
            reason = "its new token was refused" if did in self.refused else "our own fault"
            self.lost[reason] += 1
            if reason == "our own fault":
                self.broken.append(f"{did}: its session was lost, though nothing had happened to it")

    def __str__(self) -> str:
        def listed(counts: Counter[str]) -> str:
            return ", ".join(f"{what} {count}" for what, count in sorted(counts.items())) or "none"

        return "\n".join(
            (
                f"requests served   {self.counts['served']}",
                f"refreshes         {self.refreshes}",
                f"kills             {self.kills}",
                f"log-ins, log-outs {self.log_ins}, {self.log_outs}",
                f"faults            {self.faults.total()}: {listed(self.faults)}",
                f"calls that ended  {listed(self.counts)}",
                f"sessions lost     {self.lost.total()}: {listed(self.lost)}",
                f"broken promises   {len(self.broken)}",
                *self.broken[:20],
            )
        )


class Owner:
    """The owner of all accounts, who logs in and out, and notices when a session has ended."""

    def __init__(self, client: OAuthClient, network: LocalNetwork, watch: Watch, totals: Totals) -> None:
        self._client = client
        self._network = network
        self._watch = watch
        self._totals = totals
        self._keys: dict[str, Mapping[str, Any] | None] = {}
        self._since: dict[str, float] = {}
        client.sessions.on_updated(self._remember)
        self.ended_at_the_server: set[str] = set()

    def log_in(self, account: Account) -> None:
        """A new session in the place of the one that there is or was. Faults may strike here as well."""
        did = account.did
        began = time.monotonic()
        for _ in range(20):
            try:
                url = self._client.authorize(did, timeout=30.0)
                self._client.callback(self._network.authorize(url, account), timeout=30.0)
            except SessionError:
                continue
            self._totals.log_ins += 1
            self._since[did] = began
            self.ended_at_the_server.discard(did)
            return
        self._totals.broken.append(f"{did}: no log-in succeeds")

    def _remember(self, event: SessionUpdatedEvent) -> None:
        self._keys[event.sub] = event.dpop_key

    def log_out(self, account: Account) -> None:
        self._client.revoke(account.did)
        self._totals.log_outs += 1
        self._keys[account.did] = None

    def end_at_the_server(self, account: Account) -> None:
        self.ended_at_the_server.add(account.did)
        self._network.revoke_sessions(account.did)

    def look(self, account: Account) -> bool:
        """Whether the account has a session; it must be the one of the last log-in."""
        did, key = account.did, self._keys.get(account.did)
        try:
            stored = self._client.sessions.get_stored(did)
        except StoreError as error:
            self._totals.broken.append(f"{did}: the record cannot be read: {error}")
            return False
        if stored is not None and (key is None or stored.dpop_key["x"] != key["x"]):
            self._totals.broken.append(f"{did}: a session came back after it had ended")
        if stored is None and key is not None:
            self._lost(did)
        return stored is not None

    def _lost(self, did: str) -> None:
        self._keys[did] = None
        reason: str | None = "ended at the server"
        if did not in self.ended_at_the_server:
            reason = self._watch.why_it_ended(did, self._since[did])
        if reason is None:
            self._totals.suspect.append(did)
        else:
            self._totals.lost[reason] += 1


class Workers:
    """The worker processes: started, killed, started again."""

    def __init__(self, job: dict[str, Any], totals: Totals, watch: Watch) -> None:
        self._totals = totals
        self._watch = watch
        self._alive: list[int] = []
        self._seeds = itertools.count()
        self._changed = threading.Condition()
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.programs.soak_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=UNMEASURED,
        )
        self._say(json.dumps(job))
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def start(self) -> None:
        self._say(str(next(self._seeds)))

    def kill_one(self, chance: random.Random) -> None:
        """Kill a worker, if there is one, and start another."""
        with self._changed:
            if not self._alive:
                return
            pid = self._alive.pop(chance.randrange(len(self._alive)))
        # Noted before: whoever finds its lock free has to find this as well.
        self._watch.killed[pid] = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self._totals.kills += 1
        self.start()

    def stop(self) -> None:
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        try:
            ended_well = self._nursery.wait(120) == 0
        except subprocess.TimeoutExpired:
            ended_well = False
            self._nursery.kill()
        if not ended_well:
            self._totals.broken.append("the worker processes did not end")
        self._reader.join()

    def _say(self, line: str) -> None:
        assert self._nursery.stdin is not None
        print(line, file=self._nursery.stdin, flush=True)

    def _read(self) -> None:
        assert self._nursery.stdout is not None
        with self._nursery.stdout as lines:
            for line in lines:
                message = json.loads(line)
                if "pid" in message:
                    with self._changed:
                        self._alive.append(message["pid"])
                else:
                    self._totals.counts.update(message["counts"])
                    self._totals.broken.extend(message["broken"])
                    self._totals.refused.update(message["refused"])


def soak(options: Options) -> Totals:
    """Let it happen, and say what came of it."""
    chance, totals = random.Random(options.seed), Totals()
    with (
        tempfile.TemporaryDirectory(prefix="atproto-session-soak-") as directory,
        LocalNetwork(access_token_lifetime=_SETTLED + 2.0, nonce_lifetime=5.0) as network,
    ):
        store = f"{options.store}:///{Path(directory) / 'sessions'}"
        watch = Watch(network, totals.broken)
        accounts = [network.create_account() for _ in range(options.accounts)]
        # An impatient one: most log-outs and log-ins do not wait for the refresh that is under way.
        with make_client(store, network.client_options(), timeout=0.05) as client:
            owner = Owner(client, network, watch, totals)
            for account in accounts:
                owner.log_in(account)
            job = {
                "store": store,
                "network": network.client_options(),
                "threads": options.threads,
                "dids": [account.did for account in accounts],
            }
            workers = Workers(job, totals, watch)
            try:
                for _ in range(options.processes):
                    workers.start()
                _make_mischief(options.seconds, chance, network, accounts, owner, workers, totals)
                network.clear_faults()
            finally:
                workers.stop()
            for account in accounts:
                _take_stock(client, account, owner, totals)
        totals.refreshes = network.rotations
    totals.conclude()
    return totals


def _make_mischief(
    seconds: float,
    chance: random.Random,
    network: LocalNetwork,
    accounts: list[Account],
    owner: Owner,
    workers: Workers,
    totals: Totals,
) -> None:
    stop = threading.Event()

    def own() -> None:
        for account in itertools.cycle(accounts):
            if stop.wait(0.02):
                return
            if not owner.look(account):
                owner.log_in(account)
                continue
            match chance.randrange(15):
                case 0:
                    owner.log_out(account)
                case 1:
                    owner.log_in(account)
                case 2:
                    owner.end_at_the_server(account)

    weights = [weight for weight, *_ in FAULTS]
    owning = threading.Thread(target=own)
    owning.start()
    try:
        end = time.monotonic() + seconds
        next_kill = time.monotonic() + 1.0
        while (now := time.monotonic()) < end:
            _, endpoint, action, fault_options = chance.choices(FAULTS, weights)[0]
            fault = network.fault(endpoint, action, **fault_options)
            _expire(network, chance.choice(accounts))
            if now >= next_kill:
                workers.kill_one(chance)
                next_kill = now + chance.uniform(0.2, 2.0)
            fault.arrived.wait(chance.uniform(0.02, 0.2))
            totals.faults[f"{endpoint} {action}"] += fault.count
            if fault.count == 0:
                fault.disarm()
    finally:
        stop.set()
        owning.join()


def _expire(network: LocalNetwork, account: Account) -> None:
    """End the time of the account's access token early, unless it was just issued. Workers learn that from the PDS."""
    for server in network._servers():
        with server.ledger._lock:
            for access in server.ledger._access.values():
                age = _SETTLED + 2.0 - (access.expires_at - time.time())
                if access.grant.did == account.did and age > _SETTLED:
                    access.expires_at = 0.0


def _take_stock(client: OAuthClient, account: Account, owner: Owner, totals: Totals) -> None:
    """When all is quiet: the lock is free, the record in order, and the session good, or lost for a reason."""
    for patience in (True, True, False):
        try:
            client.sessions.get_session(account.did, True, timeout=60.0)
        except SessionError as error:
            if patience and error.retry_after is not None:
                time.sleep(error.retry_after)  # the server has asked for that
                continue
            if not error.login_required:
                totals.broken.append(f"{account.did}: {type(error).__name__} when all is quiet: {error}")
        break
    owner.look(account)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=Options.seconds)
    parser.add_argument("--processes", type=int, default=Options.processes)
    parser.add_argument("--threads", type=int, default=Options.threads, help="of each process")
    parser.add_argument("--accounts", type=int, default=Options.accounts)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the mischief, not of its timing")
    parser.add_argument("--store", choices=("sqlite", "json"), default=Options.store)
    options = Options(**vars(parser.parse_args(argv)))
    logging.getLogger("atproto_session").addHandler(logging.NullHandler())
    print(options, flush=True)
    totals = soak(options)
    print(totals)
    return 1 if totals.broken else 0


if __name__ == "__main__":
    sys.exit(main())
