"""The installer, with an npm of paper: what it says when npm fails, and that a killed run is taken up again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.pds import install

_NPM = """#!{python}
import io, pathlib, sys, tarfile
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as calls:
    print(sys.argv[1], file=calls)
if sys.argv[1] == (here / "broken").read_text():
    print("npm error all is lost")
    sys.exit(3)
if sys.argv[1] == "pack":
    with tarfile.open("node-22.0.0.tgz", "w:gz") as tar:
        for name in ("package/bin/node", "package/include/node/node.h", "package/README.md"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
"""


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an npm that notes its ``calls`` and fails at the command named in ``broken``."""
    folder = tmp_path / "npm"
    folder.mkdir()
    (folder / "npm").write_text(_NPM.format(python=sys.executable))
    (folder / "npm").chmod(0o755)
    (folder / "broken").touch()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def _calls(npm: Path) -> list[str]:
    calls = (npm / "calls").read_text().split()
    (npm / "calls").unlink()
    return calls


def test_installs_once(npm: Path) -> None:
    assert not install.is_installed()

    installation = install.ensure_installed()

    assert installation.node.is_file()
    assert installation.env["npm_config_nodedir"] == str(installation.node.parents[1])
    assert installation.env["PATH"].startswith(str(installation.node.parent))
    assert (installation.directory / "package.json").is_file()
    assert _calls(npm) == ["pack", "ci", "rebuild"]
    assert install.is_installed()
    assert install.ensure_installed() == installation
    assert not (npm / "calls").exists()


def test_a_failure_ends_with_npms_words_and_the_next_run_goes_on(npm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (npm / "broken").write_text("rebuild")
    assert install.main() == 1
    assert "rebuild better-sqlite3 failed with status 3" in (said := capsys.readouterr().err)
    assert said.endswith("npm error all is lost\n")
    assert not install.is_installed()
    assert _calls(npm) == ["pack", "ci", "rebuild"]

    (npm / "broken").write_text("")
    assert install.main() == 0
    assert _calls(npm) == ["ci", "rebuild"]
    assert install.is_installed()


def test_without_the_lock_file_if_it_cannot_be_followed(npm: Path) -> None:
    (npm / "broken").write_text("ci")
    install.ensure_installed()
    assert _calls(npm) == ["pack", "ci", "install", "rebuild"]


def test_no_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(install.InstallError, match="npm"):
        install.ensure_installed()
