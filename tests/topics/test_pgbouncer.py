"""PostgreSQL behind PgBouncer, which gives its few connections now to one worker and now to another."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from atproto_session import ClientMetadata, OAuthClient, open_store
from atproto_session.testing.network import LocalNetwork

from ..contrib.django import project
from ..core import RESTLESS
from ..processes import Program
from ..scenes import log_in
from ..servers import Missing, PgBouncer, skip

PROCESSES = 3
ROUNDS = 3


@pytest.fixture(params=["session", "transaction"])
def bouncer_url(request: pytest.FixtureRequest, postgresql_server: str) -> Iterator[str]:
    """A database that no other test has, behind a pool. A connection that keeps a lock takes one of the pool: with
    ``session``, each of a worker's does."""
    name = f"test_{uuid.uuid4().hex}"
    size = {"session": 40, "transaction": PROCESSES + 1}[request.param]
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        try:
            with PgBouncer(postgresql_server, request.param, size) as bouncer:
                yield urlsplit(bouncer.url)._replace(path=f"/{name}").geturl()
        except Missing as missing:
            skip(missing)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.mark.parametrize("kind", ["sql", "django"])
def test_of_a_herd_of_processes_one_refreshes(bouncer_url: str, network: LocalNetwork, kind: str) -> None:
    setup: dict[str, Any] = {"options": network.client_options()}
    with ExitStack() as clean_up:
        if kind == "sql":
            program = "worker"
            store = open_store(bouncer_url)
            setup |= {"store": bouncer_url, "freshness": {}, "apart": False}
        else:
            program = "programs.django_worker"
            setup["database"] = project.database_of(bouncer_url)
            store = project.open_django_store(setup["database"])
            project.create_tables()
            clean_up.callback(project.forget)
        clean_up.callback(store.close)
        client = clean_up.enter_context(
            OAuthClient(ClientMetadata.loopback(), store=store, times=RESTLESS, **network.client_options())
        )
        account = network.create_account()
        log_in(network, client, account)
        herd = [clean_up.enter_context(Program(program, is_measured=False)) for _ in range(PROCESSES)]
        for each in herd:
            each.say({"did": account.did, **setup})
        assert [each.hear() for each in herd] == [{"ready": True}] * PROCESSES
        for lap in range(1, ROUNDS + 1):
            network.expire_access_tokens(account.did)
            for each in herd:
                each.say({"do": "request", "threads": 4})
            assert [each.hear()["errors"] for each in herd] == [[]] * PROCESSES
            assert (network.rotations, network.replays) == (lap, 0)
