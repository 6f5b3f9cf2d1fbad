"""Each extra works alone: with what it brings itself, and nothing else. ``make extras`` really installs them so."""

from __future__ import annotations

import configparser
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from .extras import NAME, PROGRAMS, Blocker, closure, extras, requirements
from .processes import ROOT


def run_alone(extra: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", str(PROGRAMS.parent / "extras.py"), extra],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
    )


@pytest.mark.parametrize("extra", extras())
def test_an_extra_works_alone(extra: str, tmp_path: Path) -> None:
    done = run_alone(extra, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "works"


def test_what_an_extra_does_not_bring_is_missed(tmp_path: Path) -> None:
    """The program of one extra does not run with what another brings."""
    program = PROGRAMS / "flask.py"
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import sys, runpy; from extras import Blocker; "
         f"sys.meta_path.insert(0, Blocker('cli')); runpy.run_path({str(program)!r})"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROGRAMS.parent)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: flask does not come with this extra"


def test_the_programs_are_those_of_extras() -> None:
    known = importlib.metadata.metadata(NAME).get_all("Provides-Extra") or ()
    assert {program.stem for program in PROGRAMS.glob("[!_]*.py")} <= set(known)


def test_what_comes_with_an_extra() -> None:
    assert {NAME, "flask", "werkzeug", "requests", "urllib3"} <= closure("flask")
    assert not {"click", "rich", "pytest"} & closure("")
    assert "flask" not in closure("cli")
    with pytest.raises(ModuleNotFoundError):
        Blocker("cli").find_spec("flask.views")
    assert list(requirements("no-such-distribution", [])) == []
    assert {"cli", "flask"} <= set(extras())


def test_every_file_of_the_package_is_installed() -> None:
    """Python modules are; every other file needs a pattern."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    package = ROOT / "atproto_session"
    installed = {
        path for pattern in config["options.package_data"]["atproto_session"].split() for path in package.glob(pattern)
    }
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files - installed == set()
