"""What strikes a caller while its refresh is under way: signals, time limits, the end of the program, listeners.

Each happens in a real process, once the request is out. Whatever it is, the new tokens reach the store, and the next
process goes on with them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from atproto_session.testing.network import LocalNetwork

from ..core import SOON, Worker
from ..processes import Program
from ..scenes import GET_SESSION, Scene

#: How long a process is watched for ending before it may, in seconds. A library that lets it passes no test by luck:
#: its process needs a few milliseconds to end.
WATCHED = 0.25
#: Time between two signals, in seconds: enough for a program to come from where one strikes it to where it waits.
BETWEEN = 0.05


class InterruptScene(Scene):
    """:ivar before: the tokens of the log-in."""

    def __init__(self, network: LocalNetwork, store: str) -> None:
        super().__init__(network, store)
        self.before = self.stored().token_set

    def check_that_it_was_refreshed_once(self) -> None:
        """And that the next process goes on with what is stored: this one, which had no part in the refresh."""
        assert self.network.refresh_token_uses == {self.before.refresh_token: 1}
        with self.open_client() as client:
            stored = client.sessions.get_session(self.did, False)
            assert stored.attempt is None
            assert stored.token_set.refresh_token != self.before.refresh_token
            session = client.restore(self.did)
            assert session.get(GET_SESSION).status_code == 200
            assert self.network.rotations == 1, "what is stored is good as it is"
            assert client.restore(self.did, refresh=True).get(GET_SESSION).status_code == 200
        assert set(self.network.refresh_token_uses.values()) == {1}
        assert (self.network.replays, self.network.revocations) == (0, 0)


class Interrupted(Program):
    """A process of :mod:`tests.programs`, ended at the end of the block or after ``bound`` seconds, if need be."""

    def __init__(
        self, scene: Scene, name: str, *arguments: str, is_measured: bool = True, bound: float = 2 * SOON, **setup: Any
    ) -> None:
        super().__init__(f"programs.{name}", *arguments, is_measured=is_measured, stderr=subprocess.PIPE)
        self.say(scene.setup | setup)
        self._bound = threading.Timer(bound, self.process.kill)
        self._bound.start()

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._bound.cancel()

    def strike(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def strike_until_it_says(self, number: signal.Signals, line: str) -> None:
        """Again and again, until it says so."""
        heard = Worker(self.hear_line)
        while heard.is_alive():
            self.strike(number)
            heard.join(BETWEEN)
        assert heard.outcome() == line

    def check_that_it_waits(self) -> None:
        with pytest.raises(subprocess.TimeoutExpired):
            self.process.wait(WATCHED)

    def end(self) -> tuple[int, str]:
        """Wait until it has ended by itself. Its return code, and what it wrote to standard error."""
        errors = self.process.communicate(timeout=SOON)[1]
        return self.process.returncode, errors


@pytest.fixture(params=["sqlite", "json"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}:///{tmp_path}/sessions"


@pytest.fixture
def scene(network: LocalNetwork, store: str) -> Iterator[InterruptScene]:
    with closing(InterruptScene(network, store)) as scene:
        yield scene


@pytest.fixture
def quick_network() -> Iterator[LocalNetwork]:
    """Tokens of which hardly one is used twice."""
    with LocalNetwork(access_token_lifetime=1.0) as network:
        yield network


# The end of the program


BY_A_SIGNAL = pytest.mark.parametrize(
    ("number", "error", "returned"),
    [(signal.SIGINT, "KeyboardInterrupt", -signal.SIGINT), (signal.SIGTERM, "SystemExit", 128 + signal.SIGTERM)],
)


TAKES_A_NEW_THREAD = pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="Python 3.12 starts no thread at the end of the program"
)


# After the request that was held, another has to be sent, with the server's nonce: that may take a connection, and that
# a thread to look the name up in.
@pytest.mark.parametrize("action", ["late", pytest.param("hold", marks=TAKES_A_NEW_THREAD)])
@BY_A_SIGNAL
def test_a_signal_that_ends_the_program(
    number: signal.Signals, error: str, returned: int, action: str, scene: InterruptScene
) -> None:
    fault = scene.network.fault("refresh", action)
    with Interrupted(scene, "interrupt_refresh", "stopped_by_a_signal") as program:
        assert fault.fired.wait(SOON)
        program.strike(number)
        assert program.hear_line() == error, "the caller is gone"
        program.check_that_it_waits()
        fault.release.set()
        assert program.end()[0] == returned
    scene.check_that_it_was_refreshed_once()


@BY_A_SIGNAL
def test_signals_while_the_program_waits_for_its_end(
    number: signal.Signals, error: str, returned: int, scene: InterruptScene
) -> None:
    """Control-C, and again since nothing seems to happen. The first signal after the end of the main thread makes the
    interpreter wait for threads no longer, but call its exit handlers; from then on nothing but the library waits for
    the refresh."""
    fault = scene.network.fault("refresh", "late")
    with Interrupted(scene, "interrupt_refresh", "stopped_by_a_signal") as program:
        assert fault.fired.wait(SOON)
        program.strike(number)
        assert program.hear_line() == error
        program.strike_until_it_says(number, "at its end")
        for _ in range(3):
            program.check_that_it_waits()
            program.strike(number)
        program.check_that_it_waits()
        fault.release.set()
        assert program.end()[0] == returned
    scene.check_that_it_was_refreshed_once()


def test_a_signal_before_the_request_has_left(scene: InterruptScene) -> None:
    """A program that ends as long as nothing is spent ends at once, and nothing is spent."""
    fault = scene.network.fault("plc", "hold")
    with Interrupted(scene, "interrupt_refresh", "stopped_by_a_signal") as program:
        assert fault.fired.wait(SOON)
        program.strike(signal.SIGINT)
        assert program.hear_line() == "KeyboardInterrupt"
        assert program.end()[0] == -signal.SIGINT, "though the directory has not answered"
    fault.release.set()
    assert scene.network.refresh_token_uses == {}
    with scene.open_client() as client:
        stored = client.sessions.get_session(scene.did, False)
        assert (stored.token_set, stored.attempt) == (scene.before, None)
        assert client.restore(scene.did, refresh=True).get(GET_SESSION).status_code == 200


@pytest.mark.parametrize(
    ("way", "returned"), [("exits_with_a_daemon_thread_waiting", 0), ("exits_with_a_thread_waiting", 3)]
)
def test_the_end_of_the_program(way: str, returned: int, scene: InterruptScene) -> None:
    fault = scene.network.fault("refresh", "late")
    with Interrupted(scene, "interrupt_refresh", way) as program:
        assert fault.fired.wait(SOON)
        program.say()
        assert program.hear_line() == "leaving"
        program.check_that_it_waits()
        fault.release.set()
        assert program.end()[0] == returned
    scene.check_that_it_was_refreshed_once()


@TAKES_A_NEW_THREAD
@pytest.mark.parametrize("when", ["before", "struck"])
def test_a_refresh_that_begins_when_the_program_is_ending(scene: InterruptScene, when: str) -> None:
    """In a daemon thread, which goes on while exit handlers are called: before the library's own it may begin, and is
    waited for, even if the library's own is struck by a signal at once."""
    fault = scene.network.fault("refresh", "late")
    with Interrupted(scene, "late_exit", when) as program:
        assert fault.fired.wait(SOON)
        program.say()
        program.check_that_it_waits()
        fault.release.set()
        returned, errors = program.end()
        assert returned == 0
        assert ("KeyboardInterrupt" in errors) == (when == "struck"), errors
    scene.check_that_it_was_refreshed_once()


def test_a_refresh_that_would_begin_when_nobody_waits_for_it_any_more(scene: InterruptScene) -> None:
    scene.network.fault("refresh", "late")
    with Interrupted(scene, "late_exit", "after") as program:
        assert program.hear_line().endswith("the program is ending")
        assert program.end() == (0, "")
    scene.network.clear_faults()
    assert scene.network.refresh_token_uses == {}
    with scene.open_client() as client:
        stored = client.sessions.get_session(scene.did, False)
        assert (stored.token_set, stored.attempt) == (scene.before, None)
        assert client.restore(scene.did, refresh=True).get(GET_SESSION).status_code == 200


def test_a_thread_that_dies(scene: InterruptScene) -> None:
    fault = scene.network.fault("refresh", "late")
    with Interrupted(scene, "interrupt_refresh", "thread_dies") as program:
        assert fault.fired.wait(SOON)
        program.say()
        assert [program.hear_line(), program.hear_line()] == ["SystemExit", "dead"]
        program.check_that_it_waits()
        fault.release.set()
        assert program.end() == (0, "")
    scene.check_that_it_was_refreshed_once()


# The program goes on


@pytest.mark.parametrize(
    ("way", "error"),
    [("at_its_time_limit", "TimeLimit"), ("raised_in_a_thread", "TimeLimit"), ("cancelled", "CancelledError")],
)
def test_a_caller_that_is_called_away(way: str, error: str, scene: InterruptScene) -> None:
    fault = scene.network.fault("refresh", "late")
    with Interrupted(scene, "interrupt_refresh", way) as program:
        assert fault.fired.wait(SOON)
        program.say()
        assert program.hear_line() == error
        fault.release.set()
        assert program.hear_line() == "used: 200"
        assert program.end() == (0, "")
    scene.check_that_it_was_refreshed_once()


def test_a_caller_whose_time_is_over(scene: InterruptScene) -> None:
    fault = scene.network.fault("refresh", "late")
    with Interrupted(scene, "interrupt_refresh", "out_of_time") as program:
        while program.hear_line() == "LockTimeoutError" and not fault.fired.is_set():
            program.say("again")
        program.say("enough")
        program.check_that_it_waits()
        fault.release.set()
        assert program.end() == (0, "")
    scene.check_that_it_was_refreshed_once()


@pytest.mark.parametrize(
    ("way", "logged"), [("listener_fails", "a bug of the application's own"), ("listener_exits", "SystemExit: 1")]
)
def test_a_listener_that_raises(way: str, logged: str, scene: InterruptScene) -> None:
    with Interrupted(scene, "interrupt_refresh", way) as program:
        assert [program.hear_line() for _ in range(4)] == ["told", "told as well", "refreshed", "used: 200"]
        returned, errors = program.end()
    assert returned == 0
    assert logged in errors
    scene.check_that_it_was_refreshed_once()


# At random


STRIKES = 60
REFRESHES = 10


def test_a_burst_of_exceptions(quick_network: LocalNetwork, store: str) -> None:
    scene = InterruptScene(quick_network, store)
    # The exceptions would strike what measures coverage as well, which has locks of its own.
    setup = {"seed": "burst", "times": STRIKES, "refreshes": REFRESHES}
    with Interrupted(scene, "interrupt_burst", is_measured=False, bound=5 * SOON, **setup) as program:
        report = program.hear()
        with scene.open_client() as client:
            client.restore(scene.did, refresh=True)  # no lock is left taken: the process is still there
        program.say()
        assert program.end()[0] == 0
    assert report["errors"] == {}
    assert report["alive"] == []
    assert min(report["struck"].values()) >= STRIKES
    uses = quick_network.refresh_token_uses
    assert set(uses.values()) == {1}
    assert quick_network.rotations == len(uses) >= REFRESHES
    assert (quick_network.replays, quick_network.revocations) == (0, 0)
    with scene.open_client() as client:
        stored = client.sessions.get_session(scene.did)
        assert stored.attempt is None
        assert client.restore(scene.did).get(GET_SESSION).status_code == 200
