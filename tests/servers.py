"""Private servers for tests: Redis, PostgreSQL and MariaDB, on free ports, from Debian's packages.

``redis_server``, ``postgresql_server`` and ``mysql_server`` are the URL of a server that all processes of a test run
share. ``redis_url``, ``postgresql_url`` and ``mysql_url`` are that of a place there that one test has for itself. An
environment variable (:data:`VARIABLES`) names a server to use instead. A test that stops its server starts one of its
own: ``with Redis() as server:``.

What is shared is started by the first test that asks for it, and ended when the last process of the test run has gone,
whatever became of it: each holds a lock on one file, which its keeper (``python -m tests.servers``) waits for.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

if TYPE_CHECKING:
    from pymysql.connections import Connection

ROOT = Path(__file__).parent.parent
#: The URL of a server that is there already.
VARIABLES = {
    "redis": "ATPROTO_TEST_REDIS_URL",
    "postgresql": "ATPROTO_TEST_POSTGRESQL_URL",
    "mysql": "ATPROTO_TEST_MYSQL_URL",
}
PASSWORD = "a-password-for-tests"
#: How long a server may take to start, and to end, in seconds.
_WITHIN = 60.0


class Missing(Exception):
    """A server is not installed."""


class Server(ABC):
    """A server of one's own, with its data in a directory that ends with it.

    :param host: the address that it listens at.
    :param prefix: a command that runs it somewhere else, such as ``["ip", "netns", "exec", "name"]``.
    """

    package: ClassVar[str]
    program: ClassVar[str]
    #: Whom it runs as, where the tests are run by root.
    user: ClassVar[str | None] = None

    def __init__(self, *, host: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> None:
        self.host = host
        self.port = 0
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str: ...

    @property
    @abstractmethod
    def local_url(self) -> str:
        """By a Unix socket, which leads from every network namespace of this machine to it."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make what the server begins with."""

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def ping(self) -> None:
        """Raises if it does not answer."""

    @classmethod
    def find(cls, program: str) -> str:
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
        if (found := shutil.which(program, path=path)) is None:
            raise Missing(f"needs {cls.program}: apt-get install {cls.package}")
        return found

    def __enter__(self) -> Self:
        self.find(self.program)
        # Not in the directory of the tests, which another user may not enter.
        self.directory = Path(tempfile.mkdtemp(prefix=f"atproto-test-{self.program}-"))
        try:
            if self._other_user is not None:
                shutil.chown(self.directory, self._other_user, pwd.getpwnam(self._other_user).pw_gid)
            self._prepare()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def _other_user(self) -> str | None:
        return self.user if os.geteuid() == 0 else None

    def run(self, *command: str) -> None:
        """A command of the server's user."""
        done = subprocess.run(command, **self._as_user(), capture_output=True, text=True, errors="replace", check=False)  # type: ignore[call-overload]
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")

    def _as_user(self) -> dict[str, object]:
        options: dict[str, object] = {"cwd": self.directory, "stdin": subprocess.DEVNULL}
        if self._other_user is not None:
            group = pwd.getpwnam(self._other_user).pw_gid
            options |= {"user": self._other_user, "group": group, "extra_groups": []}
        return options

    def start(self) -> None:
        """Also after :meth:`stop` and :meth:`kill`, at the same port."""
        port = self.port
        for _ in range(
            5
        ):  # another program may take the port in between, or it may be too high for a node of a cluster
            self.port = port or free_port()
            command, options = self._command(), self._as_user()
            if self._prefix:  # which takes root
                user = options.pop("user", None)
                options = {"cwd": self.directory, "stdin": subprocess.DEVNULL}
                as_user = [] if user is None else ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
                command = [*self._prefix, *as_user, *command]
            with (self.directory / "log").open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    **options,  # type: ignore[call-overload]
                    stdout=log,
                    stderr=log,
                )
            deadline = time.monotonic() + _WITHIN
            while self._process.poll() is None and time.monotonic() < deadline:
                try:
                    return self.ping()
                except Exception:  # it is not ready
                    time.sleep(0.02)
            self.kill()
        log_text = (self.directory / "log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{self.program} does not start:\n{log_text[-3000:]}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it in an orderly way, and wait until it has ended."""
        if self._process is not None:
            self._process.send_signal(how)
            try:
                self._process.wait(_WITHIN)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_WITHIN)
            self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid


class Redis(Server):
    """
    :param arguments: more of them, such as ``--appendonly yes``.
    """

    package, program = "redis-server", "redis-server"

    def __init__(self, *arguments: str, host: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> None:
        super().__init__(host=host, prefix=prefix)
        self._arguments = arguments

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD}@{self.host}:{self.port}/0"

    @property
    def local_url(self) -> str:
        return f"unix://{self.directory}/socket?password={PASSWORD}"

    def _prepare(self) -> None:
        pass

    def _command(self) -> list[str]:
        return [
            *(self.find(self.program), "--port", str(self.port), "--bind", self.host, "--dir", str(self.directory)),
            *(
                "--unixsocket",
                f"{self.directory}/socket",
                "--save",
                "",
                "--appendonly",
                "no",
                "--requirepass",
                PASSWORD,
                *self._arguments,
            ),
        ]

    def ping(self) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        with redis.Redis.from_url(self.local_url, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as connection:
            connection.ping()


class PostgreSQL(Server):
    package, program, user = "postgresql", "postgres", "postgres"

    @classmethod
    def find(cls, program: str) -> str:
        # Debian keeps them out of PATH.
        versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda path: int(path.parts[-3]))
        return str(versions[-1]) if versions else super().find(program)

    @property
    def url(self) -> str:
        return f"postgresql://postgres:{PASSWORD}@{self.host}:{self.port}/postgres"

    @property
    def local_url(self) -> str:
        return f"postgresql://postgres:{PASSWORD}@/postgres?host={self.directory}&port={self.port}"

    def _prepare(self) -> None:
        password = self.directory / "password"
        password.write_text(PASSWORD, encoding="ascii")
        password.chmod(0o644)
        self.run(
            *(self.find("initdb"), "--pgdata", str(self.directory / "data"), "--username", "postgres"),
            *("--pwfile", str(password), "--auth", "password", "--no-sync", "--encoding", "UTF8", "--locale", "C"),
        )
        with (self.directory / "data" / "pg_hba.conf").open("a", encoding="ascii") as hosts:
            hosts.write("host all all all password\n")

    def _command(self) -> list[str]:
        options = {
            "listen_addresses": self.host,
            "unix_socket_directories": str(self.directory),
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": "200",
            "shared_buffers": "64MB",
            "max_wal_size": "4GB",
        }
        command = [self.find(self.program), "-D", str(self.directory / "data"), "-p", str(self.port)]
        return command + [f"--{name}={value}" for name, value in options.items()]

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """As ``pg_ctl stop -m fast`` does: the connections are ended."""
        super().stop(how)

    def kill(self) -> None:
        """With its children, as it would do itself: SIGQUIT is its ``immediate`` shutdown."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(_WITHIN)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(_WITHIN)
            self._process = None

    def ping(self) -> None:
        import psycopg

        psycopg.connect(self.local_url, connect_timeout=5).close()


class PgBouncer(Server):
    """A proxy in front of a PostgreSQL.

    :param behind: the URL of the server, whose databases it has all.
    :param mode: for how long a client keeps a connection of the server's: ``"session"`` or ``"transaction"``.
    :param size: so many of them there are.
    """

    package, program, user = "pgbouncer", "pgbouncer", "postgres"

    def __init__(self, behind: str, mode: str, size: int) -> None:
        super().__init__()
        self._behind = urlsplit(behind)
        self._settings = {"pool_mode": mode, "default_pool_size": str(size), "auth_type": "any"}

    @property
    def url(self) -> str:
        return f"postgresql://postgres@{self.host}:{self.port}/postgres"

    local_url = url

    def _prepare(self) -> None:
        """Its settings have the port, and are written when that is known."""

    def _command(self) -> list[str]:
        behind = self._behind
        server = f"host={behind.hostname} port={behind.port} user={behind.username} password={behind.password}"
        settings = {**self._settings, "listen_addr": self.host, "listen_port": str(self.port), "unix_socket_dir": ""}
        lines = [f"{name} = {value}" for name, value in settings.items()]
        file = self.directory / "pgbouncer.ini"
        file.write_text("\n".join(["[databases]", f"* = {server}", "[pgbouncer]", *lines, ""]), encoding="ascii")
        return [self.find(self.program), str(file)]

    def ping(self) -> None:
        import psycopg

        psycopg.connect(self.url, connect_timeout=5).close()


class MySQL(Server):
    """MariaDB, that is."""

    package, program, user = "mariadb-server", "mariadbd", "mysql"

    @property
    def url(self) -> str:
        return f"mysql://tester:{PASSWORD}@{self.host}:{self.port}/tests"

    @property
    def local_url(self) -> str:
        return f"mysql://tester:{PASSWORD}@/tests?unix_socket={self.directory}/socket"

    def _prepare(self) -> None:
        script = self.directory / "begin.sql"
        script.write_text(
            f"CREATE USER IF NOT EXISTS tester@'%' IDENTIFIED BY '{PASSWORD}';\n"
            "GRANT ALL ON *.* TO tester@'%' WITH GRANT OPTION;\n"
            "CREATE DATABASE IF NOT EXISTS tests;\n",
            encoding="ascii",
        )
        script.chmod(0o644)
        user = [] if self._other_user is None else [f"--user={self._other_user}"]
        self.run(
            *(self.find("mariadb-install-db"), "--no-defaults", f"--datadir={self.directory / 'data'}", *user),
            f"--tmpdir={self.directory}",  # servers that start side by side would empty one that they share
            *("--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"),
        )

    def _command(self) -> list[str]:
        return [
            *(self.find(self.program), "--no-defaults", f"--datadir={self.directory / 'data'}", f"--port={self.port}"),
            *(f"--bind-address={self.host}", f"--socket={self.directory / 'socket'}", "--skip-name-resolve"),
            *(f"--pid-file={self.directory / 'pid'}", f"--init-file={self.directory / 'begin.sql'}"),
            f"--tmpdir={self.directory}",
            *("--innodb-flush-log-at-trx-commit=2", "--innodb-flush-method=nosync", "--skip-log-bin"),
            *("--innodb-buffer-pool-size=64M", "--max-connections=200", "--performance-schema=OFF"),
        ]

    def ping(self) -> None:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(f"{self.directory}/socket")  # PyMySQL leaves its own open where this fails
        with closing(connect_mysql(self.local_url)):
            pass


SERVERS: dict[str, type[Server]] = {"redis": Redis, "postgresql": PostgreSQL, "mysql": MySQL}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def connect_mysql(url: str) -> Connection[Any]:
    import pymysql

    parts = urlsplit(url)
    return pymysql.connect(
        host=parts.hostname,
        port=parts.port or 3306,
        unix_socket=dict(parse_qsl(parts.query)).get("unix_socket"),
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        database=parts.path.lstrip("/") or None,
        autocommit=True,
        connect_timeout=5,
    )


# What the processes of a test run share


@contextmanager
def shared(kind: str, directory: Path) -> Iterator[str]:
    """The URL of the server of this kind that all who name this directory use; see the top of this module.

    :raises Missing: it is not installed.
    """
    if url := os.environ.get(VARIABLES[kind]):
        yield url
        return
    place = directory / f"server-{kind}"
    place.mkdir(exist_ok=True)
    server = SERVERS[kind]
    server.find(server.program)
    with (place / "users").open("wb") as users, (place / "begin").open("wb") as begin:
        fcntl.flock(begin, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)  # a keeper that is about to end ends first
        if not (place / "url").exists():
            _start_keeper(kind, place)
        fcntl.flock(begin, fcntl.LOCK_UN)
        yield (place / "url").read_text(encoding="ascii")


def _start_keeper(kind: str, place: Path) -> None:
    # In a session of its own, so that Ctrl-C does not end it before those who use the server.
    keeper = subprocess.Popen(
        [sys.executable, "-m", "tests.servers", kind, str(place)],
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")},
        cwd=ROOT,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert keeper.stdout is not None
    with keeper.stdout as output:
        said = output.readline()
        if said != "ready\n":
            raise RuntimeError(f"the {kind} server does not start: {said}{output.read()}")
    _keepers.append(keeper)  # not waited for: the interpreter would say so


_keepers: list[subprocess.Popen[str]] = []


def keep(kind: str, place: Path) -> None:
    """Keep a server running for as long as somebody uses it."""
    with (place / "users").open("wb") as users, SERVERS[kind]() as server:
        new = place / "url.new"
        new.write_text(server.url, encoding="ascii")
        new.rename(place / "url")
        print("ready", flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        fcntl.flock(users, fcntl.LOCK_EX)
        (place / "url").unlink()


# Fixtures


def _server(kind: str, factory: pytest.TempPathFactory) -> Iterator[str]:
    base = factory.getbasetemp()
    directory = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    try:
        with shared(kind, directory) as url:
            yield url
    except Missing as missing:
        skip(missing)


def skip(missing: Missing) -> None:
    """Skip the test, but not in CI."""
    if os.environ.get("CI"):  # where nobody would notice
        pytest.fail(str(missing), pytrace=False)
    pytest.skip(str(missing))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from _server("redis", tmp_path_factory)


@pytest.fixture(scope="session")
def postgresql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from _server("postgresql", tmp_path_factory)


@pytest.fixture(scope="session")
def mysql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from _server("mysql", tmp_path_factory)


@pytest.fixture
def redis_url(redis_server: str) -> Iterator[str]:
    """The store under a prefix that no other test has."""
    import redis

    prefix = f"test-{uuid.uuid4().hex}:"
    yield f"{redis_server}?prefix={prefix}"
    with redis.Redis.from_url(redis_server) as connection:
        for key in connection.scan_iter(f"{prefix}*", 1000):
            connection.delete(key)


@pytest.fixture
def postgresql_url(postgresql_server: str) -> Iterator[str]:
    """A schema that no other test has: a database would take a fifth of a second."""
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
        yield f"{postgresql_server}?options=-csearch_path%3D{name}"
        connection.execute(f"DROP SCHEMA {name} CASCADE".encode())


@pytest.fixture
def mysql_url(mysql_server: str) -> Iterator[str]:
    """A database that no other test has."""
    name = f"test_{uuid.uuid4().hex}"
    with closing(connect_mysql(mysql_server)) as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
        yield urlsplit(mysql_server)._replace(path=f"/{name}").geturl()
        cursor.execute(f"DROP DATABASE {name}")


if __name__ == "__main__":
    keep(sys.argv[1], Path(sys.argv[2]))
