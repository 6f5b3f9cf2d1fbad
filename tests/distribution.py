"""The distributions, as they would be published."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .processes import ROOT


def tracked_files(under: str = ".") -> list[str]:
    """The files that belong to the project, as git knows them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", under],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def build(place: Path, *what: str) -> list[Path]:
    """Build in a copy of the project, which leaves nothing behind in it. ``what``: ``--wheel``, ``--sdist`` or both."""
    copy = place / "copy"
    for name in tracked_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(place / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted((place / "dist").iterdir())
