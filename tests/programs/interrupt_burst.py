"""A program whose threads use one session while exceptions keep striking them at random instants.

``python -m tests.programs.interrupt_burst``; the first line of its standard input is its setup. SIGALRM raises in the
main thread, a watchdog in two others. When they have been struck often enough, it says how that went in one line of
JSON, and ends at the next line of input.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
from collections import Counter
from types import FrameType
from typing import Any, NoReturn

from atproto_session import ClientMetadata, LockTimeoutError, OAuthClient

from .interrupt_refresh import GET_SESSION, TimeLimit, raise_in

VICTIMS = 2
#: Exceptions strike within this time, in seconds. A refresh takes about as long.
WITHIN = 0.02


class Burst:
    def __init__(self, client: OAuthClient, did: str, seed: str) -> None:
        self.client = client
        self.did = did
        self.random = random.Random(seed)
        self.struck: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.over = threading.Event()

    def act(self) -> None:
        """Use the session in one of the ways there are."""
        sessions = self.client.sessions
        way = self.random.randrange(5)
        try:
            if way == 0:
                sessions.get_session(self.did)
            elif way == 1:
                sessions.get_session(self.did, True)
            elif way == 2:
                sessions.get_session(self.did, True, timeout=self.random.uniform(0.0, WITHIN))
            elif way == 3:
                token = sessions.get_session(self.did, False).token_set.access_token
                sessions.get_session(self.did, rejected=token)
            else:
                status = self.client.restore(self.did).get(GET_SESSION).status_code
                if status != 200:
                    self.errors[f"answered {status}"] += 1
        except LockTimeoutError:
            pass
        except TimeLimit:
            raise
        except Exception as error:
            self.errors[f"{type(error).__name__}: {error}"] += 1

    def strike_main_thread(self, times: int) -> None:
        def exceeded(number: int, frame: FrameType | None) -> NoReturn:
            raise TimeLimit

        signal.signal(signal.SIGALRM, exceeded)
        while self.struck["main"] < times:
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, self.random.uniform(0.0001, WITHIN))
                    self.act()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except TimeLimit:
                self.struck["main"] += 1

    def live(self) -> None:
        while not self.over.is_set():
            try:
                while not self.over.is_set():
                    self.act()
            except TimeLimit:
                self.struck["threads"] += 1

    def strike_threads(self) -> None:
        """Until it is over. An exception that strikes outside of everything ends its thread; another takes its place."""
        threads = [threading.Thread(target=self.live) for _ in range(VICTIMS)]
        for thread in threads:
            thread.start()
        while not self.over.wait(self.random.uniform(0.0001, WITHIN)):
            number = self.random.randrange(VICTIMS)
            if threads[number].is_alive():
                raise_in(threads[number], TimeLimit)
            else:
                threads[number] = threading.Thread(target=self.live)
                threads[number].start()
        for thread in threads:
            thread.join()


def main() -> None:
    setup: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.excepthook = lambda arguments: None  # threads that die of it are expected
    client = OAuthClient(ClientMetadata.loopback(), store=setup["store"], **setup["options"])
    burst = Burst(client, setup["did"], setup["seed"])
    watchdog = threading.Thread(target=burst.strike_threads)
    watchdog.start()
    try:
        burst.strike_main_thread(setup["times"])
    finally:
        burst.over.set()
    watchdog.join()
    client.sessions.close()
    alive = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    client.sessions.get_session(burst.did, True, timeout=20.0)
    print(json.dumps({"struck": burst.struck, "errors": burst.errors, "alive": alive}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
