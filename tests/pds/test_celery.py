"""The Celery tutorial, followed word for word, with an account of the real PDS."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import requests

from atproto_session.testing.network import Account
from tests.pds.harness import Browser, RealPDS

from ..command_line import Process, variables
from ..core import wait_until
from ..deployments import Service, unmeasured
from ..processes import ROOT


def commands() -> list[str]:
    """What the tutorial has its reader type."""
    text = (ROOT / "docs" / "celery.rst").read_text(encoding="utf-8")
    blocks = re.findall(r"::\n\n((?:    .*\n)+)", re.sub(r"\.\. code-block:: python\n\n(?:    .*\n|\n)+", "", text))
    return [line.strip() for block in blocks for line in block.splitlines()]


def test_the_tutorial(
    real_pds: RealPDS, browser: Browser, pds_account: Account, redis_server: str, tmp_path: Path
) -> None:
    install, install_too, change, log_in, work, post = commands()
    assert install == "sudo apt-get install redis-server"
    assert install_too == "pip install '.[celery,cli]' redis"
    examples = ROOT / change.removeprefix("cd ")
    assert log_in == "atproto-session login alice.example.com"
    environment = unmeasured() | variables(real_pds, f"sqlite:///{tmp_path}/sessions.db")
    environment |= {"PYTHONPATH": str(examples), "CELERY_BROKER_URL": redis_server}
    worker = Service(tmp_path / "celery.log")
    with ExitStack() as clean_up:
        clean_up.callback(worker.kill)
        with Process("login", pds_account.handle, env={**environment, "BROWSER": "true %s"}) as process:
            requests.get(browser.authorize(process.url(), pds_account), timeout=60)
            code, said, complained = process.end()
        assert code == 0, complained
        did = re.findall(r"did:plc:\w+", said + complained)[0]
        assert did == pds_account.did

        assert work.startswith("celery ")
        worker.run(*work.split(), "--schedule", str(tmp_path / "schedule"), environment=environment)
        code = re.findall(r'python -c "(.*)"', post)[0].replace("did:plc:...", did)
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, timeout=60)
        wait_until(lambda: re.search(r"Task celery_task\.post\[.*\] succeeded", worker.log.read_text()))
        assert worker.stop() == 0
    uri = re.findall(r"at://\S+/app\.bsky\.feed\.post/\w+", worker.log.read_text())[0]
    listed = requests.get(
        f"{real_pds.pds_url}/xrpc/com.atproto.repo.listRecords",
        params={"repo": did, "collection": "app.bsky.feed.post"},
        timeout=60,
    ).json()["records"]
    assert [(record["uri"], record["value"]["text"]) for record in listed] == [(uri, "Hello from Celery")]
