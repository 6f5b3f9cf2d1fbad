"""The worker processes of :mod:`tests.soak`.

This process reads its job, then one line for each worker to start, and forks it: much faster than to start it anew.
Each worker uses the accounts with many threads until it is killed, or told to stop because the input is at its end,
and reports every now and then, one JSON object a line.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import dns.resolver  # noqa: F401 - loaded before the fork, as is what follows
import filelock  # noqa: F401
import requests

from atproto_session import (
    ClientMetadata,
    Freshness,
    OAuthClient,
    SessionError,
    SessionNotFoundError,
    StoreError,
    TokenInvalidError,
)
from atproto_session.dpop import challenge_errors

#: A method that every PDS has.
PATH = "/xrpc/com.atproto.server.getSession"
#: Which worker sends a request.
HEADER = "X-Soak-Worker"
#: When tokens of a few seconds count as stale.
FRESHNESS = Freshness(margin=0.5, jitter=1.0)
#: The bound on a token request, in seconds. Answers do get lost by it, but not because the machine is busy.
ANSWER_WITHIN = 15.0
_REPORT_EVERY = 0.2


def main() -> None:
    logging.getLogger("atproto_session").addHandler(logging.NullHandler())  # what goes wrong here is no news
    job = json.loads(sys.stdin.readline())
    workers = []
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            try:
                Worker(job, int(line)).work()
            finally:
                os._exit(0)
        workers.append(pid)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)  # those that were killed have not been waited for, so it is their number still
    for pid in workers:
        os.waitpid(pid, 0)


def make_client(store: str, network: dict[str, Any], *, timeout: float = 30.0) -> OAuthClient:
    """A client whose requests say which process they are of."""
    client = OAuthClient(ClientMetadata.loopback(), store=store, freshness=FRESHNESS, timeout=timeout, **network)
    client._authority.answer_within = ANSWER_WITHIN
    request: Callable[..., Any] = client._transport.request

    def signed(method: str, url: str, *, headers: dict[str, str] | None = None, **options: Any) -> Any:
        return request(method, url, headers={**(headers or {}), HEADER: str(os.getpid())}, **options)

    client._transport.request = signed  # type: ignore[method-assign, assignment]
    return client


class Worker:
    """One worker process."""

    def __init__(self, job: dict[str, Any], seed: int) -> None:
        self._job = job
        self._seed = seed
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._broken: list[str] = []
        self._refused: list[str] = []

    def work(self) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: self._stop.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        say({"pid": os.getpid()})
        with make_client(self._job["store"], self._job["network"]) as client:
            threads = [
                threading.Thread(target=self._use, args=(client, random.Random(f"{self._seed} {number}")))
                for number in range(self._job["threads"])
            ]
            for thread in threads:
                thread.start()
            while not self._stop.wait(_REPORT_EVERY):
                self._report()
            for thread in threads:
                thread.join()
        self._report()

    def _report(self) -> None:
        with self._lock:
            counts, self._counts = self._counts, Counter()
            broken, self._broken = self._broken, []
            refused, self._refused = self._refused, []
        say({"counts": counts, "broken": broken, "refused": refused})

    def _use(self, client: OAuthClient, chance: random.Random) -> None:
        while not self._stop.is_set():
            did = chance.choice(self._job["dids"])
            try:
                result = act(client, did, chance)
            except TokenInvalidError as error:
                result = type(error).__name__
                with self._lock:
                    self._refused.append(did)
            except (StoreError, AssertionError) as error:
                result = type(error).__name__
                self._broken.append(f"{did}: {result}: {error}")
            except (SessionError, requests.RequestException) as error:
                result = type(error).__name__
            except Exception as error:
                result = type(error).__name__
                self._broken.append(f"{did}: unexpected {error!r}")
            with self._lock:
                self._counts[result] += 1


def act(client: OAuthClient, did: str, chance: random.Random) -> str:
    """Do one of the things that programs do, and say how it ended."""
    kind = chance.random()
    if kind < 0.85:
        response = client.restore(did).get(PATH)
        if response.status_code != 200:
            return f"answered {response.status_code} {' '.join(challenge_errors(response.headers))}"
        assert response.json()["did"] == did, "the session of another account"
        return "served"
    if kind < 0.92:
        client.restore(did, True)
        return "refreshed"
    stored = client.sessions.get_stored(did)
    if stored is None:
        raise SessionNotFoundError("logged out")
    client.sessions.get_session(did, rejected=stored.token_set.access_token, timeout=chance.choice([0.05, 30.0]))
    return "renewed"


def say(message: dict[str, Any]) -> None:
    # In one piece: a message is shorter than what a pipe takes at once.
    os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
