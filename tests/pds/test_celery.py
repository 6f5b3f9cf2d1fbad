"""The Celery tutorial, followed word for word, with an account of the real PDS."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import requests

from atproto_session.testing.network import Account
from tests.pds.harness import Browser, RealPDS

from ..core import wait_until
from ..deployments import Service, unmeasured
from ..processes import ROOT

#: In each Python that the reader starts: the people and servers of the tutorial are those of the test.
LOCAL = """
import json, os
import atproto_session

class LocalClient(atproto_session.OAuthClient):
    def __init__(self, metadata, **options):
        super().__init__(metadata, **json.loads(os.environ["READERS_NETWORK"]), **options)

    def authorize(self, account, **options):
        return super().authorize(account.replace("alice.example.com", os.environ["READERS_ACCOUNT"]), **options)

atproto_session.OAuthClient = LocalClient
"""


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
    assert install_too == "pip install '.[celery]' redis"
    examples = ROOT / change.removeprefix("cd ")
    (tmp_path / "sitecustomize.py").write_text(LOCAL)
    environment = unmeasured() | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(examples)]),
        "READERS_NETWORK": json.dumps(real_pds.client_options()),
        "READERS_ACCOUNT": pds_account.handle,
        "BROWSER": "true",  # a program that does nothing: the test is the browser
        "CELERY_BROKER_URL": redis_server,
        "ATPROTO_STORE": f"sqlite:///{tmp_path}/sessions.db",
    }
    worker = Service(tmp_path / "celery.log")
    with ExitStack() as clean_up:
        clean_up.callback(worker.kill)
        script = subprocess.Popen(
            [sys.executable, "-u", str(examples / log_in.split()[1]), log_in.split()[2]],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert script.stdout is not None
        with script.stdout as said:
            url = said.readline().removeprefix("Log in at ").strip()
            requests.get(browser.authorize(url, pds_account), timeout=60)
            did = re.findall(r"The next time: python script.py (\S+)", said.read())[0]
        assert script.wait(60) == 0
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
