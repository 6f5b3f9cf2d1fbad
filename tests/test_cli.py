from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from atproto_session import demo
from atproto_session.cli import main


def code_of(*argv: str) -> object:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    return exit_.value.code


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--help") == 0
    assert "demo" in capsys.readouterr().out


def test_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--version") == 0
    assert importlib.metadata.version("atproto-session") in capsys.readouterr().out


def test_unknown_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("nonsense") == 2
    assert "nonsense" in capsys.readouterr().err


def test_options_reach_the_demo_and_its_code_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[demo.Load] = []

    def run(load: demo.Load) -> int:
        loads.append(load)
        return 1

    monkeypatch.setattr(demo, "run", run)
    assert code_of("demo", "--seconds", "2.5", "--processes", "3", "--threads", "5", "--store", "json") == 1
    assert loads == [demo.Load(processes=3, threads=5, seconds=2.5, store="json")]


@pytest.mark.parametrize("option", ["--seconds=0", "--processes=0", "--threads=0", "--store=memory"])
def test_nonsense_is_refused_before_anything_runs(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("demo", option) == 2
    assert "Invalid value" in capsys.readouterr().err


def test_missing_extra_is_one_clear_line() -> None:
    script = "import sys; sys.modules['click'] = None; from atproto_session.cli import main; main(['demo'])"
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == ["The command line needs an extra: pip install 'atproto-session[cli]'"]
    assert ended.stdout == ""


def test_runs_as_a_module() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "atproto_session", "--version"], check=False, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0
    assert ended.stdout.startswith("atproto-session")
