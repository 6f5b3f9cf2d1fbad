from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from atproto_session import demo
from atproto_session.demo import Load, Outcome
from atproto_session.demo.display import display, table
from atproto_session.demo.figures import Collector, Failure, Figures, Tokens, percentile
from atproto_session.demo.load import Crew
from atproto_session.demo.naive import NaiveStore, NoLocks
from atproto_session.demo.worker import START, Job, work
from atproto_session.session import Attempt, Session
from atproto_session.stores import JSONStore, MemoryStore

from .core import DID, SOON, make_session

COMMAND = [sys.executable, "-m", "atproto_session", "demo"]
GOOD = Outcome(Figures(latencies=[0.01, 0.02], waits=[0.1]), Tokens(spends=4, rotations=4, spent_twice=0))
DEAD = Outcome(Figures(failures=[Failure(2.5, "TokenRefreshError: log in again")]), Tokens(3, 1, 1))


def rows_in(output: str) -> dict[str, str]:
    return dict(re.findall(r"^  (\S.*?)  +(\S.*)$", output, re.MULTILINE))


# The whole of it


def test_all_promises_are_kept_under_load() -> None:
    ended = subprocess.run(
        [*COMMAND, "--seconds", "4", "--processes", "2", "--threads", "4"],
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    rows = rows_in(ended.stdout)
    assert int(rows["requests served"].replace(",", "")) > 0
    assert rows["requests failed"] == "0"
    assert int(rows["token rotations"]) >= 1
    assert rows["refresh tokens spent twice"] == "0"
    assert rows["refreshes for each rotation"] == "1"
    assert rows["requests that waited for a refresh"] != "0"
    assert re.search(r" \d s: requests", ended.stdout)
    # Which worker notices first, and so with which of these errors, is chance.
    assert re.search(r"What users see: \w+: |survived by luck", ended.stdout)
    assert "BROKEN" not in ended.stdout


def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--seconds", "60", "--processes", "2", "--threads", "2", "--store", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    with process:
        assert process.stdout is not None
        assert any("s: requests" in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=SOON)
    assert process.returncode == 130
    assert output.strip().endswith("Stopped.")
    assert errors == ""
    assert not list(tmp_path.iterdir()), "the sessions of the demo were left behind"


# The verdict


@pytest.mark.parametrize(
    ("outcome", "promise"),
    [
        (Outcome(Figures([0.1], [], [Failure(2, "b"), Failure(1, "a")]), Tokens(1, 1, 0)), "2 failures, the first: a"),
        (Outcome(Figures(), Tokens(1, 1, 0)), "no request was served"),
        (Outcome(Figures([0.1]), Tokens(3, 3, 1)), "1 refresh tokens were spent more than once"),
        (Outcome(Figures([0.1]), Tokens(3, 2, 0)), "3 refreshes were sent for 2 rotations"),
    ],
)
def test_broken_promise_makes_the_exit_code_1(
    outcome: Outcome, promise: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "play", lambda load, *, naive=False: DEAD if naive else outcome)
    assert demo.run(Load()) == 1
    assert f"BROKEN: {promise}" in capsys.readouterr().out


def test_only_the_first_part_decides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "play", lambda load, *, naive=False: DEAD if naive else GOOD)
    assert demo.run(Load()) == 0
    output = capsys.readouterr().out
    assert "died after 2.5 seconds under load and 0 requests: a refresh token was spent twice" in output
    assert "What users see: TokenRefreshError: log in again" in output
    assert rows_in(output)["latency, p99"] == "20 ms"


def test_luck_is_not_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "play", lambda load, *, naive=False: GOOD)
    assert demo.run(Load()) == 0
    assert "survived by luck" in capsys.readouterr().out


def test_nothing_is_divided_by_no_rotations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "play", lambda load, *, naive=False: Outcome(Figures([0.1]), Tokens(0, 0, 0)))
    assert demo.run(Load()) == 0
    assert rows_in(capsys.readouterr().out)["their wait, longest"] == "0 ms"


# Worker processes


def job(store: str) -> Job:
    return Job(DID, store, {}, threads=2)


def test_worker_that_dies_is_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    crew = Crew(job("nonsense:"), processes=2)
    with crew:
        crew.run(60.0, lambda passed: True)  # not for 60 seconds: nobody is left
    assert [failure.message for failure in crew.figures.failures] == ["a worker process ended with exit code 1"] * 2
    assert "no session store is known" in capfd.readouterr().err


def test_what_ends_a_run_early(tmp_path: Path) -> None:
    crew = Crew(job(f"json:///{tmp_path}/sessions"), processes=1)
    with crew:
        crew.run(60.0, lambda passed: not crew.figures.failures)
    assert {failure.message for failure in crew.figures.failures} == {
        f"SessionNotFoundError: no session is stored for {DID}; log in first"
    }
    assert len(crew.figures.failures) == 2, "each thread stops when it has to log in again"


def test_failures_that_may_pass_do_not_stop_a_thread(tmp_path: Path) -> None:
    unused = "http://localhost:1"
    session = make_session()
    JSONStore(tmp_path / "sessions").set(DID, replace(session, token_set=replace(session.token_set, aud=unused)))
    crew = Crew(Job(DID, f"json:///{tmp_path}/sessions", {"allow_http": True}, threads=1), processes=1)
    with crew:
        crew.run(SOON, lambda passed: len(crew.figures.failures) < 3)
    assert len(crew.figures.failures) >= 3
    assert all("ConnectionError" in failure.message for failure in crew.figures.failures)


def test_interrupt_while_they_start_leaves_nobody_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listen = Crew._listen

    def interrupted(crew: Crew, timeout: float) -> None:
        monkeypatch.setattr(Crew, "_listen", listen)
        raise KeyboardInterrupt

    monkeypatch.setattr(Crew, "_listen", interrupted)
    with pytest.raises(KeyboardInterrupt), Crew(job(f"json:///{tmp_path}/sessions"), processes=2):
        raise AssertionError("it goes no further")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("messages", [[], [START]])
def test_worker_ends_with_its_parent(messages: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(job(f"json:///{tmp_path}/sessions"), theirs))
    process.start()
    theirs.close()
    assert ours.poll(SOON)
    assert ours.recv() == Figures()
    for message in messages:
        ours.send(message)
    ours.close()
    process.join(SOON)
    assert process.exitcode == 0


# The part without locks


def test_naive_store_writes_without_comparing() -> None:
    inner = MemoryStore[Session]()
    one, other = NaiveStore(inner), NaiveStore(inner)
    assert one.get(DID) is None
    one.set(DID, make_session(1))
    assert other.replace(DID, make_session(3), make_session(2).token_set)
    stored = one.get(DID)
    assert stored is not None
    assert stored.token_set.refresh_token == "refresh-3"
    assert one.replace(DID, None, make_session(2).token_set)
    assert other.get(DID) is None


def test_naive_store_hides_an_attempt_from_everybody_else() -> None:
    inner = MemoryStore[Session]()
    one, other = NaiveStore(inner), NaiveStore(inner)
    session = make_session(1)
    one.set(DID, session)
    attempt = Attempt("id", "worker", 1.0, 2.0)
    assert one.replace(DID, replace(session, attempt=attempt), session.token_set)
    assert one.get(DID) == replace(session, attempt=attempt)
    assert other.get(DID) == session
    one.delete(DID)
    assert inner.get(DID) is None


def test_no_locks_exclude_nobody() -> None:
    locks = NoLocks()
    with locks.hold(DID, timeout=0) as first, locks.hold(DID, timeout=0) as second:
        assert first.extend(1.0)
        assert second.extend(1.0)


# Figures and how they are shown


def test_collector_gives_what_came_since() -> None:
    collector = Collector()
    collector.add(Figures(latencies=[0.1]))
    collector.add(Figures(waits=[0.2], failures=[Failure(1.0, "x")]))
    assert collector.take() == Figures([0.1], [0.2], [Failure(1.0, "x")])
    assert collector.take() == Figures()


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 51.0), (0.99, 100.0), (1.0, 100.0)])
def test_percentile(share: float, value: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], share) == value


def test_percentile_of_nothing() -> None:
    assert percentile([], 0.5) == 0.0


def test_table_is_aligned() -> None:
    assert table([("one", "1"), ("eleven", "11")]) == "  one      1\n  eleven  11"


def test_lines_come_once_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    with display(3.0) as show:
        for passed in (0.5, 1.0, 1.2, 1.9, 2.1):
            show(passed, Figures(latencies=[0.01]), Tokens(2, 2, 0))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert "requests 1, rotations 2, latency p50 10 ms, latency p99 10 ms, errors 0" in lines[0]


def test_terminal_gets_a_live_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with display(3.0) as show:
        show(1.0, Figures(latencies=[0.01]), Tokens(2, 2, 0))
    output = capsys.readouterr().out
    assert "\x1b[" in output
    assert Counter(word for word in ("rotations", "time left", "2 s") if word in output).total() == 3


def test_terminal_without_rich_gets_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich", None)
    with display(3.0) as show:
        show(1.0, Figures(), Tokens(0, 0, 0))
    assert capsys.readouterr().out.startswith("    1 s: requests 0")
