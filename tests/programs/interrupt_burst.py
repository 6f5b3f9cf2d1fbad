"""A program whose threads use one session while exceptions keep striking them at random instants.

``python -m tests.programs.interrupt_burst``; the first line of its standard input is its setup. SIGALRM raises in the
main thread, a watchdog in two others. When they have been struck often enough, and have refreshed often enough all the
same, it says how that went in one line of JSON, and ends at the next line of input.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any, NoReturn

from atproto_session import ClientMetadata, LockTimeoutError, OAuthClient, SessionUpdatedEvent
from atproto_session._threads import _IDLE

from ..scenes import GET_SESSION
from .interrupt_refresh import TimeLimit, raise_in

VICTIMS = 2


class Burst:
    """
    :ivar within: exceptions strike within this time, in seconds: twice that of a refresh from which nobody is called
        away, on this machine, which may be busy. Callers that always left sooner would keep every request from leaving.
    """

    def __init__(self, client: OAuthClient, did: str, seed: str) -> None:
        self.client = client
        self.did = did
        self.refreshes = 0
        self.within = 2 * self.time_of_a_refresh()
        client.sessions.on_updated(self.count)
        self.random = random.Random(seed)
        self.struck = Counter(main=0, threads=0)
        self.errors: Counter[str] = Counter()
        self.over = threading.Event()
        self.exposed: set[threading.Thread] = set()
        self.striking = threading.Lock()

    def time_of_a_refresh(self) -> float:
        self.client.sessions.get_session(self.did, True)  # which finds everything out that is kept
        began = time.monotonic()
        self.client.sessions.get_session(self.did, True)
        return time.monotonic() - began

    def count(self, event: SessionUpdatedEvent) -> None:
        self.refreshes += 1  # one at a time, as the listeners of one account are told

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
                sessions.get_session(self.did, True, timeout=self.random.uniform(0.0, self.within))
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

    def strike_main_thread(self, times: int, refreshes: int) -> None:
        """Until it was struck often enough, and the threads were as well, and so many refreshes came to their end."""

        def exceeded(number: int, frame: FrameType | None) -> NoReturn:
            raise TimeLimit

        signal.signal(signal.SIGALRM, exceeded)
        while min(self.struck["main"], self.struck["threads"]) < times or self.refreshes < refreshes:
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, self.random.uniform(0.0001, self.within))
                    self.act()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except TimeLimit:
                self.struck["main"] += 1

    def live(self) -> None:
        """In a thread, until it is over. A strike ends the exposure to it, so that none can come when it is too late to
        handle it, or for a thread that is gone: another might have its identifier by then."""
        thread = threading.current_thread()
        while not self.over.is_set():
            try:
                self.exposed.add(thread)
                try:
                    self.act()
                finally:
                    with self.striking:
                        self.exposed.discard(thread)
            except TimeLimit:
                self.struck["threads"] += 1

    def strike_threads(self) -> None:
        """Until it is over."""
        threads = [threading.Thread(target=self.live) for _ in range(VICTIMS)]
        for thread in threads:
            thread.start()
        while not self.over.wait(self.random.uniform(0.0001, self.within)):
            thread = self.random.choice(threads)
            with self.striking:
                if thread in self.exposed:
                    self.exposed.discard(thread)
                    raise_in(thread, TimeLimit)
        for thread in threads:
            thread.join()


def main() -> None:
    setup: dict[str, Any] = json.loads(sys.stdin.readline())
    client = OAuthClient(ClientMetadata.loopback(), store=setup["store"], **setup["options"])
    burst = Burst(client, setup["did"], setup["seed"])
    watchdog = threading.Thread(target=burst.strike_threads)
    watchdog.start()
    try:
        burst.strike_main_thread(setup["times"], setup["refreshes"])
    finally:
        burst.over.set()
    watchdog.join()
    client.sessions.get_session(burst.did, True, timeout=20.0)  # no lock of the process is left taken
    client.sessions.close()
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    deadline = time.monotonic() + 20.0  # some may be about to end, or to wait for more work
    while (alive := [each.name for each in others if each.is_alive() and each.name != _IDLE]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.01)
    print(json.dumps({"struck": burst.struck, "errors": burst.errors, "alive": alive}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
