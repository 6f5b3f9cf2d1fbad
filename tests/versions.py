"""The tests with other versions than those that ``make test`` has: ``make lowest`` and ``make pythons``.

Each has a virtual environment of its own, in the cache of the tests. Arguments that follow are pytest's.
"""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "atproto-session-tests" / "versions"
#: What other libraries have a say in.
NEXT_TO_OTHERS = (
    *("tests/contrib/test_httpx.py", "tests/contrib/test_sdk.py", "tests/pds/test_sdk.py"),
    *("tests/test_oauth_session.py", "tests/test_client.py", "tests/test_transport.py", "tests/test_adapter.py"),
    *("tests/test_keys.py", "tests/test_locks.py", "tests/test_stores.py", "tests/test_identity.py"),
)
#: The extras whose lowest versions are tried, beside what the library always needs.
EXTRAS = ("httpx", "sdk")
LATER = ("3.12", "3.13", "3.14", "3.15")


def lowest_versions() -> list[str]:
    """Constraints for pip, from ``setup.cfg``."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in EXTRAS)]
    return re.sub(r">=", "==", "\n".join(wanted)).split()


def pythons() -> list[str]:
    """Interpreters of later versions, one of each: on ``PATH``, or installed by pyenv."""
    if chosen := os.environ.get("PYTHONS"):
        return chosen.split()
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = []
    for version in LATER:
        candidates = [*sorted(pyenv.glob(f"{version}.*/bin/python3"), reverse=True), f"python{version}"]
        found += [str(python) for python in candidates if version_of(str(python))][:1]
    return found


def version_of(python: str) -> str:
    """What ``python`` calls itself; empty if it cannot be run."""
    try:
        done = subprocess.run([python, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip().rpartition(" ")[2] if done.returncode == 0 else ""


def environment(python: str, name: str, *constraints: str) -> Path:
    """The interpreter of a virtual environment with the library, its extras and what its tests need."""
    place = CACHE / name
    subprocess.run([python, "-m", "venv", str(place)], check=True)
    file = place / "constraints.txt"
    file.write_text("\n".join(constraints), encoding="utf-8")
    own = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    # Those of the tests alone may not go with the lowest versions.
    wanted = ["-e", f"{ROOT}[test]"] if not constraints else ["-e", f"{ROOT}[{','.join(EXTRAS)}]", *TOOLS]
    subprocess.run([str(own), "-m", "pip", "install", "--quiet", "-c", str(file), *wanted], check=True)
    return own


TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "responses", "hypothesis", "trustme")


def run(python: Path, *arguments: str) -> int:
    workers = os.environ.get("WORKERS", "3")
    command = [str(python), "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main(what: str, *arguments: str) -> int:
    if what == "lowest":
        versions = lowest_versions()
        print("with", *versions, flush=True)
        # Old releases of other libraries may warn of newer ones.
        return run(environment(sys.executable, "lowest", *versions), "-W", "default", *(arguments or NEXT_TO_OTHERS))
    failed = []
    for python in pythons():
        version = version_of(python)
        print(f"Python {version}, {python}", flush=True)
        if run(environment(python, version), *arguments):
            failed.append(version)
    print("failed:" if failed else "all passed", *failed)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
