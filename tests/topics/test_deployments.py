"""The library as people run it: gunicorn and Celery over one store, while tokens expire, over restarts and kills."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from atproto_session.testing.network import LocalNetwork

from ..contrib.django.project import database_of
from ..core import SOON, wait_until
from ..deployments import Deployment, django_deployment
from ..processes import ROOT

PATCHED = ROOT / "tests" / "programs" / "gunicorn_patched.py"


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


def hang_up_during_a_refresh(deployment: Deployment, network: LocalNetwork) -> None:
    """The workers that are replaced end their refresh, and the new ones find what it brings."""
    hold = network.fault("refresh", "hold")
    deployment.expire()
    assert hold.fired.wait(SOON)
    before = deployment.site.log.read_text().count("Hang up")
    deployment.site.send_signal("HUP")
    wait_until(lambda: deployment.site.log.read_text().count("Hang up") > before)
    hold.release.set()


def test_one_refresh_for_each_expiry_and_no_request_is_lost(deployment: Deployment, network: LocalNetwork) -> None:
    is_prefork = deployment.celery.scene["pool"] == "prefork"
    steps = [
        deployment.hang_up,
        lambda: hang_up_during_a_refresh(deployment, network),
        deployment.kill_a_worker,
        deployment.restart_celery,
        *([deployment.kill_a_process_of_the_pool, deployment.restart_the_site] if is_prefork else []),
    ]
    for step in steps * int(os.environ.get("ROUNDS", "1")):
        step()
        deployment.settle()
    check(deployment, network)


def test_django_with_its_sessions_in_postgresql(
    network: LocalNetwork, redis_server: str, postgresql_url: str, tmp_path: Path
) -> None:
    account = network.create_account()
    with django_deployment(
        tmp_path,
        redis_server,
        database_of(postgresql_url),
        network.client_options(),
        account,
        lambda url: network.authorize(url, account),
    ) as deployment:
        for step in (deployment.hang_up, deployment.kill_a_worker, deployment.restart_celery):
            step()
            deployment.settle()
        check(deployment, network)


def check(deployment: Deployment, network: LocalNetwork) -> None:
    """One refresh for each expiry, and nobody has lost a request."""
    deployment.end()
    assert deployment.visitors.failures == []
    assert deployment.senders.failures == []
    assert network.replays == 0
    assert set(network.refresh_token_uses.values()) == {1}
    assert network.rotations == deployment.expiries
