"""The library as people run it: gunicorn and Celery over one store, while tokens expire, over restarts and kills."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pytest
import requests

from atproto_session import SQLiteStore
from atproto_session.testing.network import LocalNetwork

from ..core import SOON, wait_until
from ..deployments import CeleryWorkers, Gunicorn, Users
from ..processes import ROOT

METADATA = {"scope": "atproto transition:generic", "redirect_uris": ["http://127.0.0.1:5000/oauth/callback"]}
THREADS = 4
PATCHED = ROOT / "tests" / "programs" / "gunicorn_patched.py"


class Deployment:
    """A site and Celery workers over one store, an account that is logged in, and those who use both.

    :param authorize: from the URL of the authorization server to that of the callback.
    """

    def __init__(
        self,
        directory: Path,
        broker: str,
        options: dict[str, Any],
        account: Any,
        authorize: Callable[[str], str],
        *,
        gunicorn: tuple[str, ...],
        pool: str,
    ) -> None:
        url = f"sqlite:///{directory}/sessions.db"
        scene = {"store": url, "options": options}
        self.store = SQLiteStore(directory / "sessions.db")
        self.site = Gunicorn("tests.programs.site:application", directory, scene, *gunicorn)
        self.celery = CeleryWorkers(broker, directory, pool, **scene, metadata=METADATA)
        self.account = account
        self.authorize = authorize
        self.expiries = 0
        self.visitors = Users(self._visit, threads=THREADS)
        self.senders = Users(self._send, threads=2)

    def __enter__(self) -> Self:
        try:
            self.site.start()
            self.celery.start()
            self.cookies = self.site.log_in(self.account.did, self.authorize)
            (self.key,) = self.store
            self.visitors.begin()
            self.senders.begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.site.kill()
        self.celery.kill()
        for users in (self.visitors, self.senders):
            users.end()
        self.celery.app.close()
        self.store.close()

    def _visit(self) -> str:
        answer = requests.get(self.site.url, cookies=self.cookies, headers={"Connection": "close"}, timeout=SOON)
        assert answer.status_code == 200, answer.text
        assert f"Hello {self.account.handle}" in answer.text, answer.text
        return answer.headers["X-Worker"]

    def _send(self) -> str:
        did, _, session_id = self.key.partition("#")
        handle, pid = self.celery.send("handle_of", did, session_id or None).get(timeout=SOON)
        assert handle == self.account.handle
        return str(pid)

    def expire(self) -> None:
        """Let the access token's time come."""
        self.expiries += 1
        while True:
            session = self.store.get(self.key)
            assert session is not None
            over = replace(session, token_set=replace(session.token_set, expires_at=datetime.now(UTC)))
            if self.store.replace(self.key, over, session):
                return

    def settle(self) -> None:
        """Everybody has a new token and uses it."""
        wait_until(self._is_refreshed)
        self.visitors.wait_for(2 * THREADS)
        self.senders.wait_for(4)

    def _is_refreshed(self) -> bool:
        session = self.store.get(self.key)
        assert session is not None, [*self.visitors.failures, *self.senders.failures]
        expires_at = session.token_set.expires_at
        return session.attempt is None and expires_at is not None and expires_at > datetime.now(UTC)

    # What happens to it

    def hang_up(self) -> None:
        """``HUP``: all workers of gunicorn are replaced, and nobody notices."""
        before = self.visitors.wait_for(4 * THREADS)
        self.expire()
        self.site.send_signal("HUP")
        wait_until(lambda: not before & self.visitors.wait_for(4 * THREADS))

    def kill_a_worker(self) -> None:
        """One worker of gunicorn is killed. Those fail who wait for its answer, and nobody else."""
        self.settle()  # not while it refreshes: what it was sent then is lost with it
        victim = self.visitors.latest[-1]
        os.kill(int(victim), signal.SIGKILL)
        self.expire()
        wait_until(lambda: victim not in self.visitors.wait_for(4 * THREADS))
        lost = [error for error in self.visitors.failures if isinstance(error, requests.ConnectionError)]
        assert len(lost) <= THREADS
        for error in lost:
            self.visitors.failures.remove(error)

    def restart_the_site(self) -> None:
        with self.visitors.resting():
            assert self.site.stop() == 0
            self.expire()
            self.site.start()

    def restart_celery(self) -> None:
        """Tasks wait meanwhile."""
        self.expire()
        assert self.celery.stop() == 0
        self.expire()
        self.celery.start()

    def kill_a_process_of_the_pool(self) -> None:
        """Its task goes to another one."""
        self.settle()
        victim = self.senders.latest[-1]
        os.kill(int(victim), signal.SIGKILL)
        self.expire()
        wait_until(lambda: victim not in self.senders.wait_for(8))

    def end(self) -> None:
        for users in (self.visitors, self.senders):
            users.end()
        assert self.site.stop() == 0
        assert self.celery.stop() == 0


@dataclass
class Way:
    """How it is run."""

    gunicorn: tuple[str, ...]
    pool: str


WAYS = {
    "threads and prefork": Way(("--workers", "4", "--threads", "4"), "prefork"),
    # gunicorn patches in its workers, which is too late for an application that was imported before: the file does it.
    "gevent": Way(("--workers", "4", "--worker-class", "gevent", "--config", str(PATCHED)), "gevent"),
}


@pytest.fixture(params=WAYS)
def deployment(
    request: pytest.FixtureRequest, network: LocalNetwork, redis_server: str, tmp_path: Path
) -> Iterator[Deployment]:
    account = network.create_account()
    way = WAYS[request.param]
    with Deployment(
        tmp_path,
        redis_server,
        network.client_options(),
        account,
        lambda url: network.authorize(url, account),
        gunicorn=way.gunicorn,
        pool=way.pool,
    ) as deployment:
        yield deployment


def test_one_refresh_for_each_expiry_and_no_request_is_lost(deployment: Deployment, network: LocalNetwork) -> None:
    is_prefork = deployment.celery.scene["pool"] == "prefork"
    steps = [
        deployment.hang_up,
        deployment.kill_a_worker,
        deployment.restart_celery,
        *([deployment.kill_a_process_of_the_pool, deployment.restart_the_site] if is_prefork else []),
    ]
    for step in steps:
        step()
        deployment.settle()
    deployment.end()
    assert deployment.visitors.failures == []
    assert deployment.senders.failures == []
    assert network.replays == 0
    assert set(network.refresh_token_uses.values()) == {1}
    assert network.rotations == deployment.expiries
