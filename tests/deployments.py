"""What people run: a web application under gunicorn, Celery workers, and somebody who uses both all the time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from json import dumps
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import requests
from celery import Celery

from atproto_session import SQLiteStore
from atproto_session.stores import FullStore

from .contrib.django.project import open_django_store
from .core import SOON, wait_until
from .processes import ROOT
from .servers import free_port

#: How long a user waits between two requests, in seconds: two cores are to be shared with other tests.
_BREATH = 0.02


def unmeasured() -> dict[str, str]:
    """The environment of processes whose coverage is not measured."""
    hidden = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
    return {name: value for name, value in os.environ.items() if name not in hidden}


class Service:
    """A program that goes on until it is told to end."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, environment: dict[str, str]) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def send_signal(self, name: str) -> None:
        assert self.process is not None
        self.process.send_signal(getattr(signal, f"SIG{name}"))

    def stop(self, how: str = "TERM") -> int:
        """End it in an orderly way. Returns its exit code."""
        self.send_signal(how)
        return self.wait()

    def wait(self) -> int:
        assert self.process is not None
        try:
            return self.process.wait(SOON)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.log.read_text(errors='replace')[-3000:]}") from None

    def kill(self) -> None:
        """End what is left of it, the processes that it has started too."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class CeleryWorkers(Service):
    """``celery worker`` with the tasks of :mod:`tests.programs.celery_app`.

    :param scene: what that has to know: ``store``, ``options`` and whatever else.
    """

    def __init__(self, broker: str, directory: Path, pool: str, **scene: Any) -> None:
        super().__init__(directory / "celery.log")
        self.events = directory / "events"
        self.events.touch()
        defaults = {"did": "", "refresh_token": "", "keep_alive_every": 3600.0, "idle": 3600.0}
        queue = uuid.uuid4().hex
        given = {"broker": broker, "queue": queue, "events": str(self.events), "pool": pool}
        self.scene: dict[str, Any] = {**defaults, **given, **scene}
        self.app: Any = Celery("tests", broker=broker, backend=broker, set_as_current=False)
        self.app.conf.update(task_default_queue=queue, result_backend_transport_options={"global_keyprefix": queue})

    def start(self, *arguments: str, measured: bool = False) -> None:
        """Start it, and wait until it takes tasks."""
        before = self.happened("begun")
        options = ["--concurrency", "4", "--without-gossip", "--without-mingle", "--without-heartbeat", *arguments]
        environment = dict(os.environ) if measured else unmeasured()
        self.run(
            *("celery", "--app", "tests.programs.celery_app", "worker", "--pool", str(self.scene["pool"]), *options),
            environment={**environment, "CELERY_SCENE": dumps(self.scene), "SITE_SCENE": dumps(self.scene)},
        )
        wait_until(lambda: self.happened("begun") > before)

    def send(self, task: str, *arguments: object) -> Any:
        return self.app.send_task(f"tests.programs.celery_app.{task}", arguments)

    def happened(self, event: str) -> int:
        """How often."""
        return self.events.read_text(encoding="ascii").splitlines().count(event)

    @contextmanager
    def working(self, *arguments: str, measured: bool = False) -> Iterator[None]:
        try:
            self.start(*arguments, measured=measured)
            yield
            assert self.process is not None
            if self.process.poll() is None:
                self.stop()
        finally:
            self.kill()
            self.app.close()


class Gunicorn(Service):
    """``gunicorn`` with the application of a module of the tests.

    :param scene: what that has to know.
    """

    def __init__(self, application: str, directory: Path, scene: dict[str, Any], *options: str) -> None:
        super().__init__(directory / "gunicorn.log")
        self.application = application
        self.scene = scene
        self.options = options
        self.url = f"http://127.0.0.1:{free_port()}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.run(
            *("gunicorn", "--bind", urlsplit(self.url).netloc, "--preload", "--no-control-socket", *self.options),
            self.application,
            environment={**unmeasured(), "SITE_SCENE": dumps(self.scene)},
        )
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        try:
            return requests.get(self.url, timeout=SOON).status_code == 200
        except requests.ConnectionError:
            return False

    def log_in(self, account: str, authorize: Callable[[str], str]) -> requests.cookies.RequestsCookieJar:
        """Log in by the form of the page, as a browser does. Returns its cookies.

        :param authorize: from the URL of the authorization server to the one that the browser is sent back to.
        """
        with requests.Session() as browser:
            page = browser.get(self.url, timeout=SOON)
            (action,) = re.findall(r'<form method="post"(?: action="(.*?)")?>', page.text)
            hidden = dict(re.findall(r'<input type="hidden" name="(.*?)" value="(.*?)">', page.text))
            asked = browser.post(
                urljoin(page.url, action),
                data={**hidden, "account": account},
                headers={"Origin": self.url},
                allow_redirects=False,
                timeout=SOON,
            )
            assert asked.is_redirect, asked.text
            back = urlsplit(authorize(asked.headers["Location"]))
            done = browser.get(f"{self.url}{back.path}?{back.query}", timeout=SOON)
            assert done.status_code == 200, done.text
            return browser.cookies


class Users:
    """Threads that use a service all the time.

    :param use: one use; returns who has answered, and raises what went wrong.
    """

    def __init__(self, use: Callable[[], str], *, threads: int) -> None:
        self._use = use
        self._ended = False
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self.answers: Counter[str] = Counter()
        self.latest: list[str] = []
        self.failures: list[Exception] = []
        self._idle: set[int] = set()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._ended:
            if not self._may_go_on.is_set():
                self._idle.add(threading.get_ident())
                self._may_go_on.wait()
                self._idle.discard(threading.get_ident())
                continue
            try:
                answer = self._use()
            except Exception as error:
                self.failures.append(error)
            else:
                self.answers[answer] += 1
                self.latest.append(answer)
            time.sleep(_BREATH)

    def wait_for(self, number: int) -> set[str]:
        """Wait until they have had so many answers more. Returns who has given them."""
        before = len(self.latest)
        failures = len(self.failures)
        wait_until(lambda: len(self.latest) >= before + number or len(self.failures) > failures + 20)
        return set(self.latest[before:])

    @contextmanager
    def resting(self) -> Iterator[None]:
        """None of them waits for an answer in this block."""
        self._may_go_on.clear()
        wait_until(lambda: len(self._idle) == len(self._threads))
        yield
        self._may_go_on.set()

    def end(self) -> None:
        self._ended = True
        self._may_go_on.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(SOON)
            assert not thread.is_alive(), "it waits for an answer"


THREADS = 4


class Deployment:
    """A site and Celery workers over one store, an account that is logged in, and those who use both.

    :param site: the module of the site, and its page that shows the handle.
    :param store: that of the site; by default in SQLite.
    :param scene: what the site has to know besides.
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
        site: tuple[str, str] = ("site", "/account"),
        store: FullStore | None = None,
        scene: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        module, self.page = f"tests.programs.{site[0]}", site[1]
        scene = {"store": f"sqlite:///{directory}/sessions.db", "options": options, **scene}
        self.store: FullStore = SQLiteStore(directory / "sessions.db") if store is None else store
        self.site = Gunicorn(f"{module}:application", directory, scene, *gunicorn)
        self.celery = CeleryWorkers(broker, directory, pool, **scene, site=module)
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
        answer = requests.get(
            f"{self.site.url}{self.page}", cookies=self.cookies, headers={"Connection": "close"}, timeout=SOON
        )
        assert answer.status_code == 200, answer.text
        assert self.account.handle in answer.text, answer.text
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
        cut = requests.ConnectionError, requests.exceptions.ChunkedEncodingError
        lost = [error for error in self.visitors.failures if isinstance(error, cut)]
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
        # Celery (5.7) may wait for half a minute at its end, if it has to end tasks then.
        with self.senders.resting():
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


@contextmanager
def django_deployment(
    directory: Path,
    broker: str,
    database: dict[str, Any],
    options: dict[str, Any],
    account: Any,
    authorize: Callable[[str], str],
) -> Iterator[Deployment]:
    """The Django example under gunicorn, with its sessions in its own database, and Celery.

    :param database: an entry of ``DATABASES``.
    """
    scene = {"database": database, "options": options}
    subprocess.run(
        [sys.executable, "-m", "tests.programs.django_site"],
        env={**unmeasured(), "SITE_SCENE": dumps(scene)},
        cwd=ROOT,
        check=True,
    )
    with Deployment(
        directory,
        broker,
        options,
        account,
        authorize,
        gunicorn=("--workers", "4", "--threads", "4"),
        pool="prefork",
        site=("django_site", "/"),
        store=open_django_store(database),
        scene=scene,
    ) as deployment:
        yield deployment
