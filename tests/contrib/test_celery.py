"""Tasks that are tried again by what their error says; real workers, whose refreshes end before they do."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from celery import Celery
from celery.exceptions import Retry, SoftTimeLimitExceeded
from celery.signals import worker_process_shutdown

from atproto_session import (
    ClientMetadata,
    MemoryStore,
    OAuthClient,
    OAuthResponseError,
    SessionError,
    TokenRefreshError,
    TransportError,
)
from atproto_session.contrib import celery as contrib
from atproto_session.contrib.celery import ATProtoTask, add_keep_alive
from atproto_session.testing.network import LocalNetwork

from ..core import SOON, wait_until
from ..deployments import CeleryWorkers
from ..processes import in_child
from ..scenes import Scene, log_in

POOLS = ["prefork", "threads", "gevent"]


# What the error says


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    app = Celery("posts", broker="memory://", backend="cache+memory://", task_cls=ATProtoTask, set_as_current=False)
    app.conf.update(task_always_eager=True, task_store_eager_result=False)
    # Celery would add the tasks to all other applications of the process.
    monkeypatch.setattr(app, "task", partial(app.task, shared=False))
    return app


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before each further try."""
    pauses: list[float] = []
    signature = ATProtoTask.signature_from_request

    def noted(self: Any, *args: Any, countdown: float, **options: Any) -> Any:
        pauses.append(countdown)
        return signature(self, *args, countdown=countdown, **options)

    monkeypatch.setattr(ATProtoTask, "signature_from_request", noted)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    return pauses


def failing(*errors: Exception) -> Callable[[], str]:
    """A function that raises one after the other, and then succeeds."""
    left = list(errors)

    def run() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return run


def test_a_task_is_tried_again_when_the_error_says_so(app: Any, pauses: list[float]) -> None:
    slow_down = OAuthResponseError("slow down", status=429, retry_after=90.0)
    errors = [TransportError("reset"), TransportError("reset"), slow_down, TransportError("reset")]
    task = app.task(failing(*errors), name="post")
    assert task.delay().get() == "done"
    assert pauses == [1.25, 2.5, 112.5, 10.0]


@pytest.mark.parametrize(
    "error", [TokenRefreshError("over"), OAuthResponseError("bad", status=400), TransportError("no", retryable=False)]
)
def test_a_task_is_not_tried_again_where_that_is_of_no_use(app: Any, pauses: list[float], error: SessionError) -> None:
    result = app.task(failing(error), name="post").delay()
    assert result.state == "FAILURE"
    with pytest.raises(type(error)):
        result.get()
    assert pauses == []


def test_other_errors_are_not_the_librarys(app: Any, pauses: list[float]) -> None:
    assert app.task(failing(ValueError("wrong")), name="post").delay().state == "FAILURE"
    too = app.task(failing(ValueError(), TransportError("")), name="both", autoretry_for=(SessionError, ValueError))
    assert too.delay().get() == "done"
    assert pauses == [180.0, 2.5], "Celery's own pause, and ours"


def test_tries_come_to_an_end_and_pauses_are_bounded(app: Any, pauses: list[float]) -> None:
    result = app.task(failing(*[TransportError("away")] * 20), name="post").delay()
    with pytest.raises(TransportError):
        result.get()
    assert pauses[:10] == [1.25 * seconds for seconds in (1, 2, 4, 8, 16, 32, 64, 128, 256, 300)]
    assert len(pauses) == 11, "that of a try that is one too many, and that there is not"
    del pauses[:]
    for_long = TransportError("maintenance")
    for_long.retry_after = 1e6
    assert app.task(failing(for_long), name="later", max_retries=1).delay().get() == "done"
    assert pauses == [1800.0]


def test_pauses_of_the_tasks_own_are_not_shorter_than_what_the_error_says(app: Any, pauses: list[float]) -> None:
    limited = OAuthResponseError("slow down", status=429, retry_after=40.0)
    again = OAuthResponseError("slow down", status=429, retry_after=40.0)
    assert app.task(failing(limited, again), name="post", retry_backoff=100, retry_jitter=False).delay().get() == "done"
    assert pauses == [100, 200]
    del pauses[:]
    last = OAuthResponseError("slow down", status=429, retry_after=40.0)
    assert app.task(failing(last), name="soon", retry_backoff=1, retry_jitter=False).delay().get() == "done"
    assert pauses == [50.0]


def test_a_task_may_retry_by_itself(app: Any, pauses: list[float]) -> None:
    run = failing(TransportError("reset"), TokenRefreshError("over"))

    @app.task(bind=True)  # type: ignore[untyped-decorator]
    def post(self: Any, *, at: datetime | None) -> str:
        try:
            return run()
        except SessionError as error:
            raise self.retry(exc=error, eta=at) from error

    result = post.delay(at=None)
    with pytest.raises(TokenRefreshError):
        result.get()
    assert pauses == [1.25]


def test_a_time_of_the_tasks_own_stays(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    task = app.task(failing(), name="post")
    task.push_request(called_directly=False, retries=0, args=(), kwargs={}, delivery_info={})
    signature = Mock()
    monkeypatch.setattr(ATProtoTask, "signature_from_request", signature)
    with pytest.raises(Retry):
        task.retry(exc=TransportError("reset"), eta=at, throw=True)
    assert (signature.call_args.kwargs["eta"], signature.call_args.kwargs["countdown"]) == (at, None)


def test_a_task_that_is_called_as_a_function_raises(app: Any) -> None:
    with pytest.raises(TransportError):
        app.task(failing(TransportError("reset")), name="post")()


# Keeping alive


def test_the_task_that_keeps_alive(
    app: Any, network: LocalNetwork, client: OAuthClient, caplog: pytest.LogCaptureFixture
) -> None:
    dids = [log_in(network, client, network.create_account()).did for _ in range(3)]
    network.revoke_sessions(dids[1])
    made: list[OAuthClient] = []

    def the_client() -> OAuthClient:
        made.append(client)
        return client

    add_keep_alive(app, the_client, schedule=60.0, idle=0, pace=0)
    assert made == []
    assert app.tasks[contrib.KEEP_ALIVE].delay().get() == {"refreshed": 2, "ended": 1}
    assert f"ended: the session {dids[1]} is over" in caplog.text
    assert [(entry["task"], entry["schedule"]) for entry in app.conf.beat_schedule.values()] == [
        (contrib.KEEP_ALIVE, 60.0)
    ]


def test_a_walk_that_is_of_no_use_is_tried_again_when_the_store_is_back(app: Any, pauses: list[float]) -> None:
    class Store(MemoryStore[Any]):
        def __iter__(self) -> Iterator[str]:
            return iter(failing_once())

    fail = failing(TransportError("the database is away"))

    def failing_once() -> list[str]:
        fail()
        return []

    with OAuthClient(ClientMetadata.loopback(), store=Store()) as client:
        add_keep_alive(app, client)
        assert app.tasks[contrib.KEEP_ALIVE].delay().get() == {}
    assert pauses == [1.25]


# Real workers


class Crew:
    """A worker of Celery's over a store with an account that is logged in."""

    def __init__(self, network: LocalNetwork, broker: str, directory: Path, pool: str, **scene: Any) -> None:
        self.network = network
        self.scene = Scene(network, f"sqlite:///{directory}/sessions.db")
        self.refresh_token = self.scene.refresh_token()
        self.celery = CeleryWorkers(
            broker, directory, pool, **self.scene.setup, refresh_token=self.refresh_token, **scene
        )

    @contextmanager
    def working(self, *arguments: str) -> Iterator[None]:
        # gevent is nothing for a tracer that knows threads.
        with self.celery.working(*arguments, measured=self.celery.scene["pool"] != "gevent"):
            yield
        self.scene.close()

    def handle_of(self, did: str) -> str:
        return str(self.celery.send("handle_of", did).get(timeout=SOON)[0])

    def expire(self) -> None:
        """Let the access token's time come."""
        self.network.expire_access_tokens(self.scene.did)
        session = self.scene.stored()
        over = replace(session, token_set=replace(session.token_set, expires_at=datetime.now(UTC)))
        assert self.scene.client._store.replace(self.scene.did, over, session.token_set)


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_tasks_share_one_refresh_and_are_tried_again(
    network: LocalNetwork, redis_server: str, tmp_path: Path, pool: str
) -> None:
    crew = Crew(network, redis_server, tmp_path, pool)
    handle = crew.scene.account.handle
    gone = network.create_account()
    with crew.working():
        crew.expire()
        tasks = [crew.celery.send("handle_of", crew.scene.did) for _ in range(12)]
        assert {task.get(timeout=SOON)[0] for task in tasks} == {handle}
        assert network.rotations == 1
        crew.expire()
        fault = network.fault("refresh", "status", status=503)
        assert crew.handle_of(crew.scene.did) == handle
        assert (fault.count, network.rotations) == (1, 2)
        with pytest.raises(SessionError, match="log in first") as caught:
            crew.handle_of(gone.did)
        assert caught.value.login_required
    assert network.replays == 0


@pytest.mark.parametrize(("pool", "how"), [*((pool, "TERM") for pool in POOLS), ("prefork", "QUIT")])
def test_a_worker_ends_when_its_refreshes_have(
    network: LocalNetwork, redis_server: str, tmp_path: Path, pool: str, how: str
) -> None:
    crew = Crew(network, redis_server, tmp_path, pool)
    celery = crew.celery
    hold = network.fault("refresh", "hold")
    with crew.working():
        assert celery.send("leave_behind", crew.scene.did).get(timeout=SOON) == "LockTimeoutError"
        assert hold.fired.wait(SOON)
        celery.send_signal(how)
        wait_until(lambda: celery.happened("ending"))
        hold.release.set()
        assert celery.wait() == 0
        assert celery.happened("ended, refreshed")
        assert network.rotations == 1
        assert crew.scene.refresh_token() != crew.refresh_token


def test_a_time_limit_ends_the_task_and_not_its_refresh(
    network: LocalNetwork, redis_server: str, tmp_path: Path
) -> None:
    crew = Crew(network, redis_server, tmp_path, "prefork")
    hold = network.fault("refresh", "hold")
    with crew.working():
        task = crew.celery.send("refresh_in_a_hurry", crew.scene.did)
        with pytest.raises(SoftTimeLimitExceeded):
            task.get(timeout=SOON)
        assert hold.fired.wait(SOON)
        hold.release.set()
        assert crew.handle_of(crew.scene.did) == crew.scene.account.handle
        wait_until(lambda: crew.scene.refresh_token() != crew.refresh_token)
        assert network.rotations == 1


def test_the_beat_keeps_alive(network: LocalNetwork, redis_server: str, tmp_path: Path) -> None:
    crew = Crew(network, redis_server, tmp_path, "threads", keep_alive_every=0.5, idle=3600.0)
    session = crew.scene.stored()
    aged = replace(session, refreshed_at=time.time() - 7200, began_at=time.time() - 7200)
    assert crew.scene.client._store.replace(crew.scene.did, aged, session)
    with crew.working("--beat", "--schedule", str(tmp_path / "schedule")):
        wait_until(lambda: crew.scene.refresh_token() != crew.refresh_token)
        assert network.rotations == 1
        assert crew.scene.stored().refreshed_at != aged.refreshed_at


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_what_a_process_of_the_pool_does_at_its_end() -> None:
    def end() -> Any:
        worker_process_shutdown.send(sender=None, pid=1, exitcode=0)
        return signal.getsignal(signal.SIGTERM) is signal.SIG_IGN

    assert in_child(end)
