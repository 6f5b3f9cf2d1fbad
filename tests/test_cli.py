from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from atproto_session.cli import main


def code_of(*argv: str) -> object:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    return exit_.value.code


def test_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--version") == 0
    assert importlib.metadata.version("atproto-session") in capsys.readouterr().out


def test_unknown_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("nonsense") == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["click", "rich", "platformdirs"])
def test_missing_extra_is_one_clear_line(missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; from atproto_session.cli import main; main(['demo'])"
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
