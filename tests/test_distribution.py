"""What would be published is whole, and nothing else is in it."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from .distribution import build, tracked_files
from .processes import ROOT


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build(tmp_path_factory.mktemp("build"), "--wheel", "--sdist")


def test_they_can_be_published(distributions: list[Path]) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_wheel_has_all_of_the_package_and_nothing_else(distributions: list[Path]) -> None:
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        about = email.message_from_bytes(wheel.read(metadata))
        entry_points = wheel.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == set(tracked_files("atproto_session"))
    assert "atproto_session/py.typed" in inside
    assert any(name.endswith("licenses/LICENSE") for name in names)

    assert (about["Name"], about["Requires-Python"]) == ("atproto-session", ">=3.11")
    assert about["License"] or about["License-Expression"]
    assert about["Summary"]
    assert about["Description-Content-Type"].startswith("text/x-rst")
    classifiers = about.get_all("Classifier") or []
    assert "Typing :: Typed" in classifiers
    assert [name[-2:] for name in classifiers if " :: Python :: 3." in name] == ["11", "12", "13", "14"]
    assert {"cli", "sdk", "httpx", "flask", "django", "celery", "redis", "sql"} <= set(
        about.get_all("Provides-Extra") or []
    )
    assert "atproto-session = atproto_session.cli:main" in entry_points
    assert "[pytest11]" in entry_points


def test_the_workflow_runs_the_two_commands_with_each_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"] == {
        "os": ["ubuntu-latest", "macos-latest", "windows-latest"],
        "python": re.findall(r"Python :: (3\.\d+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE),
    }
    commands = [step["run"].split(" PYTHON")[0] for step in job["steps"] if "run" in step]
    assert commands == [".ci/run", "make test", "make lint"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"make test", "make lint"} <= set(script)


def test_the_source_distribution_can_be_tested(distributions: list[Path]) -> None:
    with tarfile.open(distributions[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    wanted = [name for name in tracked_files() if not name.startswith(".") and name != "MANIFEST.in"]
    assert set(wanted) <= names
