"""The project of the tutorial: as short as it says, with tests that pass as users run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .project import EXAMPLE, database_of

TUTORIAL = Path(__file__).parents[3] / "docs" / "django.rst"


def lines_of(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.strip() and not line.startswith("#")]


def test_twelve_lines_are_enough() -> None:
    """In the settings, and in the URLs: what the example has more than a new project, and what the tutorial says."""
    settings = (EXAMPLE / "mysite" / "settings.py").read_text(encoding="utf-8")
    _, ours, _ = re.split(r"^# ---\n", settings, flags=re.MULTILINE)
    urls = re.findall(r"^.*atproto.*$", (EXAMPLE / "mysite" / "urls.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(urls) == 1
    assert len(lines_of(ours)) + len(urls) <= 12
    tutorial = TUTORIAL.read_text(encoding="utf-8")
    assert "The first twelve lines" in tutorial
    assert "".join(f"    {line}\n" for line in lines_of(ours)) in tutorial


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE / "manage.py"), *arguments],
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "mysite.settings", "PYTHONPATH": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_tests_of_the_example_pass(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """As its users run them: with SQLite, in memory."""
    environment = {}
    if kind != "sqlite":
        url = request.getfixturevalue(f"{kind}_server")
        database = {**database_of(url), "TEST": {"NAME": f"test_{os.getpid()}"}}
        (tmp_path / "elsewhere.py").write_text(
            f"from mysite.settings import *\nDATABASES = {{'default': {database!r}}}\n", encoding="utf-8"
        )
        environment = {"DJANGO_SETTINGS_MODULE": "elsewhere"}
    done = run("test", "mysite", "--parallel", "1", folder=tmp_path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ran 2 tests" in done.stderr


def test_nothing_needs_a_key_or_a_store_before_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(
        "from mysite.settings import *\n"
        f"DATABASES['default']['NAME'] = {str(tmp_path / 'db.sqlite3')!r}\n"
        "ATPROTO_SESSION = {'PUBLIC_URL': 'https://app.example.com', 'STORE': 'redis://127.0.0.1:1'}\n",
        encoding="utf-8",
    )
    for command in (["check"], ["migrate"], ["makemigrations", "--check", "--dry-run"]):
        done = run(*command, folder=tmp_path, DJANGO_SETTINGS_MODULE="elsewhere")
        assert done.returncode == 0, done.stdout + done.stderr
