"""A new user's first log-in and first post, by the README word for word: from ``pip install`` of the wheel to the post.

``make transcript`` shows what the user sees.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from atproto_session.testing.network import Account, LocalNetwork
from tests.command_line import Network, Process, browse, variables
from tests.pds.harness import PATIENCE, RealPDS
from tests.processes import ROOT

HANDLE = "alice.example.com"


def blocks_of_the_readme(language: str) -> str:
    text = (ROOT / "README.rst").read_text(encoding="utf-8")
    (section,) = re.findall(r"^A first post\n-+\n(.*?)\n\n[^\n]+\n-+\n", text, re.MULTILINE | re.DOTALL)
    blocks = re.findall(rf"^\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", section, re.MULTILINE)
    return textwrap.dedent("\n".join(blocks))


def script_of_the_readme() -> str:
    return blocks_of_the_readme("python")


def commands_of_the_readme() -> list[str]:
    lines = blocks_of_the_readme("console").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as it is published. It is built from a copy, since a build leaves files behind."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(place), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    return wheel


class User:
    """Somebody at a shell in an empty directory, with a new virtual environment.

    :ivar transcript: what is on the screen.
    """

    def __init__(self, place: Path, wheel: Path, network: Network, account: Account) -> None:
        self.transcript = ""
        self._wheel = wheel
        self._network = network
        self._account = account
        self._home = place / "home"
        self._home.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True)
        self._bin = place / "venv" / "bin"
        self._env = variables(network, place / "data")
        self._env |= {
            "PATH": f"{self._bin}:{self._env['PATH']}",
            "BROWSER": "true %s",
            "VIRTUAL_ENV": str(place / "venv"),
        }
        self._env = {name: value for name, value in self._env.items() if not name.startswith("COVERAGE_")}
        (self._home / "post.py").write_text(script_of_the_readme(), encoding="utf-8")

    def run(self, command: str) -> str:
        """What a command prints. It has to succeed."""
        self.transcript += f"$ {command}\n"
        program, *arguments = shlex.split(command.replace(HANDLE, self._account.handle))
        if program == "pip":
            # The wheel, and not what an index has. There is no pip in the environment: to make one takes seconds.
            arguments = [each.replace("atproto-session[", f"{self._wheel}[") for each in arguments]
            arguments = ["-m", "pip", "--quiet", "--python", str(self._bin / "python"), *arguments]
            process = Process(*arguments, env=self._env, program=sys.executable, cwd=self._home)
        else:
            process = Process(*arguments, env=self._env, program=str(self._bin / program), cwd=self._home)
        with process:
            if "login" in arguments:
                url = process.url()
                self.transcript += f"Log in at\n\n  {url}\n\n(Their browser opens; they agree.)\n"
                page = browse(self._network, url, self._account)
                assert page.status_code == 200
            said: str
            said, complained = process.process.communicate(timeout=500)
        self.transcript += said
        assert process.process.returncode == 0, self.transcript + complained
        return said


@pytest.fixture(params=["on the local network", "on the real PDS"])
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    if request.param == "on the local network":
        with LocalNetwork() as network:
            yield network
    else:
        yield request.getfixturevalue("real_pds")


@pytest.mark.timeout(600)  # pip may take its time
def test_a_new_user_logs_in_and_writes_a_post(network: LocalNetwork | RealPDS, wheel: Path, tmp_path: Path) -> None:
    account = network.create_account()
    user = User(tmp_path, wheel, network, account)
    first, second, third = commands_of_the_readme()
    assert first == "pip install 'atproto-session[cli]'"
    user.run(first)
    assert f"{account.handle} is logged in." in user.run(second)
    uri = user.run(third).strip()
    examined = user.run("atproto-session doctor")
    assert examined.endswith("Nothing is wrong.\n")
    assert ("clock: agrees with that of" in examined) is isinstance(network, RealPDS)
    print(user.transcript)

    did, collection, rkey = uri.removeprefix("at://").split("/")
    assert did == account.did
    place = {"repo": did, "collection": collection, "rkey": rkey}
    found = requests.get(f"{network.pds_url}/xrpc/com.atproto.repo.getRecord", params=place, timeout=PATIENCE).json()
    assert found["value"]["text"] == "Hello from a script."
    assert re.search(r"^Log in at\n\n  http://localhost:\d+/oauth/authorize\?", user.transcript, re.MULTILINE)
