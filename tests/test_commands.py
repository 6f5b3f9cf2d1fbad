"""The commands and their options."""

from __future__ import annotations

import pytest

from atproto_session import demo
from atproto_session._commands import program


def code_of(*argv: str) -> object:
    with pytest.raises(SystemExit) as exit_:
        program.main(argv)
    return exit_.value.code


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--help") == 0
    assert "demo" in capsys.readouterr().out


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
