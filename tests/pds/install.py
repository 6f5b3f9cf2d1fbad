"""Installs the PDS, the PLC directory, the Node client and the Node that runs them: ``python -m tests.pds.install``.

Everything comes from the npm registry, Node included, since the PDS needs a newer one than many machines have. It is
done once for a machine: one to four minutes, in ``$XDG_CACHE_HOME/atproto-session-tests``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import filelock

NODE = "22"
_HERE = Path(__file__).parent
_INPUTS = ("package.json", "package-lock.json")
_MARKER = "installed"
_STEP_TIMEOUT = 1200.0
_LINES_SHOWN = 30


class InstallError(Exception):
    """The servers could not be installed; the message ends with npm's last words."""


@dataclass(frozen=True)
class Installation:
    """Where everything is.

    :ivar node: the Node executable.
    :ivar directory: the folder that holds ``node_modules``.
    :ivar env: the environment to run it in.
    """

    node: Path
    directory: Path
    env: Mapping[str, str] = field(repr=False)


def ensure_installed() -> Installation:
    """The installation, made first if it is not there yet. A run that was killed is taken up where it can be; several
    at once do the work once.

    :raises InstallError: npm is missing or failed.
    """
    directory = _directory()
    installation = _installation(directory)
    if (directory / _MARKER).exists():
        return installation
    npm = shutil.which("npm")
    if npm is None:
        raise InstallError("the real PDS is installed with npm, which is not on PATH")
    directory.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{directory}.lock"):
        if not (directory / _MARKER).exists():
            _install_node(npm, directory)
            _install_packages(npm, installation)
            (directory / _MARKER).touch()
    return installation


def is_installed() -> bool:
    """Whether :func:`ensure_installed` has nothing to do."""
    return (_directory() / _MARKER).exists()


def _directory() -> Path:
    digest = hashlib.sha256(f"{NODE} {_node_package()}".encode())
    for name in _INPUTS:
        digest.update((_HERE / name).read_bytes())
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "atproto-session-tests" / digest.hexdigest()[:16]


def _node_package() -> str:
    machine = platform.machine().lower()
    return f"node-{sys.platform}-" + {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64"}.get(machine, machine)


def _installation(directory: Path) -> Installation:
    home = directory / "node"
    # node-gyp compiles better-sqlite3 against the headers in nodedir; the environment outranks every .npmrc.
    env = dict(os.environ, PATH=f"{home / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}", npm_config_nodedir=str(home))
    return Installation(home / "bin" / "node", directory, env)


def _install_node(npm: str, directory: Path) -> None:
    home = directory / "node"
    if home.exists():
        return
    partial = directory / "node.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _run([npm, "pack", "--silent", f"{_node_package()}@{NODE}"], partial, os.environ)
    (archive,) = partial.glob("*.tgz")
    with tarfile.open(archive) as tar:
        wanted = [entry for entry in tar if entry.name.startswith(("package/bin/", "package/include/"))]
        tar.extractall(partial, wanted, filter="data")
    (partial / "package").replace(home)
    shutil.rmtree(partial)


def _install_packages(npm: str, installation: Installation) -> None:
    for name in _INPUTS:
        shutil.copyfile(_HERE / name, installation.directory / name)
    # Only better-sqlite3 has a script that is needed, and it must find the Node that will load it.
    try:
        _run([npm, "ci", "--ignore-scripts"], installation.directory, installation.env)
    except InstallError as error:
        # A mirror may lack a locked version of something that does not matter here.
        print(f"{error}\nTrying again without the lock file.", file=sys.stderr)
        command = [npm, "install", "--ignore-scripts", "--no-package-lock", "--prefer-online"]
        _run(command, installation.directory, installation.env)
    _run([npm, "rebuild", "better-sqlite3"], installation.directory, installation.env)


def _run(command: list[str], directory: Path, env: Mapping[str, str]) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_STEP_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"{' '.join(command)} did not end within {_STEP_TIMEOUT:.0f} seconds") from error
    if done.returncode:
        words = "\n".join(done.stdout.splitlines()[-_LINES_SHOWN:])
        raise InstallError(f"{' '.join(command)} failed with status {done.returncode} in {directory}:\n{words}")


def main() -> int:
    try:
        print(ensure_installed().directory)
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
