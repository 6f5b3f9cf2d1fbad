"""gunicorn and Celery over one store, with an account of the real PDS."""

from __future__ import annotations

from pathlib import Path

from atproto_session.testing.network import Account
from tests.pds.harness import Browser, RealPDS

from ..contrib.django.project import database_of
from ..deployments import Deployment, django_deployment


def test_one_refresh_for_each_expiry_and_no_request_is_lost(
    real_pds: RealPDS, browser: Browser, pds_account: Account, redis_server: str, tmp_path: Path
) -> None:
    with Deployment(
        tmp_path,
        redis_server,
        real_pds.client_options(),
        pds_account,
        lambda url: browser.authorize(url, pds_account),
        gunicorn=("--workers", "4", "--threads", "4"),
        pool="prefork",
    ) as deployment:
        use(deployment, real_pds)


def test_django_with_its_sessions_in_postgresql(
    real_pds: RealPDS, browser: Browser, pds_account: Account, redis_server: str, postgresql_url: str, tmp_path: Path
) -> None:
    with django_deployment(
        tmp_path,
        redis_server,
        database_of(postgresql_url),
        real_pds.client_options(),
        pds_account,
        lambda url: browser.authorize(url, pds_account),
    ) as deployment:
        use(deployment, real_pds)


def use(deployment: Deployment, real_pds: RealPDS) -> None:
    for step in (deployment.hang_up, deployment.kill_a_worker):
        step()
        deployment.settle()
    deployment.end()
    assert deployment.visitors.failures == []
    assert deployment.senders.failures == []
    refreshes = real_pds.proxy.refreshes()
    assert [refresh.status for refresh in refreshes] == [200] * deployment.expiries
    assert len(set(real_pds.proxy.refresh_tokens())) == deployment.expiries
