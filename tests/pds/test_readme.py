"""A new user's first log-in and first post, by the README word for word: from the wheel to the post."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from atproto_session import ClientMetadata, OAuthClient
from tests.core import SOON
from tests.distribution import build
from tests.network.raw import SCOPE
from tests.pds.conftest import World
from tests.processes import ROOT

PROGRAM = ROOT / "tests" / "programs" / "readme.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip has installed the wheel. What it requires is here already."""
    place = tmp_path_factory.mktemp("wheel")
    (wheel,) = build(place, "--wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(place / "site"),
        str(wheel),
    ]
    subprocess.run(command, check=True, timeout=150)
    return place / "site"


def first_code() -> str:
    readme = (ROOT / "README.rst").read_text(encoding="utf-8")
    code = re.search(r"In ten lines\n-+\n\n\.\. code-block:: python\n\n((?:    .*\n|\n)+)", readme)
    assert code is not None
    return textwrap.dedent(code.group(1))


def test_the_first_log_in_and_the_first_post(installed: Path, server: World, tmp_path: Path) -> None:
    given = json.dumps([first_code(), server.account.handle, server.client_options])
    program = subprocess.Popen(
        [sys.executable, str(PROGRAM), given],
        env={**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"},
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    with program:
        transcript = [program.stdout.readline(), program.stdout.readline()]
        assert Path(transcript[0].strip()) == installed / "atproto_session" / "__init__.py"
        assert transcript[1].startswith("Open http")
        callback = server.authorize(transcript[1].split()[1], server.account)
        print(callback, file=program.stdin, flush=True)
        transcript.append(program.communicate(timeout=SOON)[0])
    assert program.returncode == 0, transcript
    uri = transcript[2].removeprefix("Paste the address that the browser ends at: ").strip()
    assert re.fullmatch(rf"at://{server.account.did}/app\.bsky\.feed\.post/\w+", uri)
    assert (tmp_path / "sessions.db").is_file()

    repo, collection, rkey = uri.removeprefix("at://").split("/")
    with OAuthClient(
        ClientMetadata.loopback(SCOPE), store=f"sqlite:///{tmp_path}/sessions.db", **server.client_options
    ) as client:
        where = {"repo": repo, "collection": collection, "rkey": rkey}
        there = client.restore(server.account.did).get("/xrpc/com.atproto.repo.getRecord", params=where)
    assert there.json()["value"]["text"] == "Hello"
