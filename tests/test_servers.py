"""The servers of the tests themselves."""

from __future__ import annotations

import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from . import servers
from .core import wait_until
from .servers import SERVERS, Missing, Redis, connect_mysql, shared


def test_those_who_share_a_server_share_one_that_ends_with_the_last_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_server: str
) -> None:
    import redis

    monkeypatch.delenv(servers.VARIABLES["redis"], raising=False)
    keepers: list[subprocess.Popen[str]] = []
    monkeypatch.setattr(servers, "_keepers", keepers)
    with shared("redis", tmp_path) as first, redis.Redis.from_url(first) as connection:
        with shared("redis", tmp_path) as second:
            assert first == second
        assert connection.ping()
    (keeper,) = keepers
    wait_until(lambda: keeper.poll() is not None)
    assert keeper.returncode == 0
    with redis.Redis.from_url(first) as connection, pytest.raises(redis.ConnectionError):
        connection.ping()
    with shared("redis", tmp_path) as third, redis.Redis.from_url(third) as connection:
        assert connection.ping()
    assert keepers[1].wait(60) == 0


def test_a_server_of_ones_own_starts_again_at_its_port(redis_server: str) -> None:
    with Redis("--appendonly", "yes") as server:
        before = server.url
        for end in (server.stop, server.kill):
            end()
            with pytest.raises(Exception, match=r"refused|No such file"):
                server.ping()
            server.start()
            assert server.url == before


@pytest.mark.parametrize("kind", SERVERS)
def test_what_is_missing_is_said(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(servers.VARIABLES[kind], raising=False)
    monkeypatch.setattr(SERVERS[kind], "program", "not-installed")
    with pytest.raises(Missing, match=f"apt-get install {SERVERS[kind].package}"), shared(kind, tmp_path):
        pass


@pytest.mark.parametrize("kind", SERVERS)
def test_a_server_that_is_there_already_is_used(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(servers.VARIABLES[kind], "the://url")
    with shared(kind, tmp_path) as url:
        assert url == "the://url"


def test_each_test_has_a_place_of_its_own(redis_url: str, postgresql_url: str, mysql_url: str) -> None:
    import psycopg

    assert "prefix=test-" in redis_url
    with psycopg.connect(postgresql_url) as postgres:
        assert postgres.execute("SELECT current_schema()").fetchone() == (postgresql_url.rpartition("%3D")[2],)
    with closing(connect_mysql(mysql_url)) as mysql, mysql.cursor() as cursor:
        assert cursor.execute("SHOW TABLES") == 0
