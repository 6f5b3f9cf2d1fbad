"""A Celery application, for ``celery --app tests.programs.celery_app worker``. ``CELERY_SCENE`` tells where it is.

What happens is written to a file, a line each: ``begun`` when a worker process is up, ``ending`` when one is about to
end, and ``ended`` with whether the session in question was refreshed, when the library has ended its part.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
from pathlib import Path
from typing import Any

import celery.signals as signals
from celery import Celery

scene: dict[str, Any] = json.loads(os.environ["CELERY_SCENE"])


def note(what: str) -> None:
    with Path(scene["events"]).open("a", encoding="ascii") as events:
        events.write(f"{what}\n")


def begun(**_: object) -> None:
    note("begun")


def ending(**_: object) -> None:
    note("ending")


def ended(**_: object) -> None:
    session = client.sessions.get_stored(scene["did"])
    token = session and session.token_set.refresh_token
    note("ended, lost" if token == scene["refresh_token"] else "ended, refreshed")


is_prefork = scene["pool"] == "prefork"
if is_prefork:
    signals.worker_process_init.connect(begun)
    signals.worker_process_shutdown.connect(ending)  # before the library is told of it
else:
    signals.worker_ready.connect(begun)
    signals.worker_shutdown.connect(ending)
    atexit.register(ended)  # after the library's own, which come first

from atproto_session import ClientMetadata, OAuthClient, SessionError  # noqa: E402
from atproto_session.contrib.celery import ATProtoTask, add_keep_alive  # noqa: E402

from ..core import RESTLESS  # noqa: E402
from ..scenes import GET_SESSION  # noqa: E402

if is_prefork:
    signals.worker_process_shutdown.connect(ended)

app = Celery("tests", broker=scene["broker"], backend=scene["broker"], task_cls=ATProtoTask)
app.conf.update(
    task_default_queue=scene["queue"],
    result_backend_transport_options={"global_keyprefix": scene["queue"]},
    # What a process that is killed has taken goes to another one.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    broker_connection_retry_on_startup=True,
    worker_enable_remote_control=False,
)
if scene.get("site"):
    client = importlib.import_module(scene["site"]).client()
else:
    client = OAuthClient(ClientMetadata.loopback(), store=scene["store"], times=RESTLESS, **scene["options"])
add_keep_alive(app, client, schedule=scene["keep_alive_every"], idle=scene["idle"], pace=0)


@app.task
def handle_of(did: str, session_id: str | None = None) -> tuple[str, int]:
    """An account's handle, as its server tells it, and which process has asked."""
    return client.restore(did, session_id=session_id).get(GET_SESSION).json()["handle"], os.getpid()


@app.task(soft_time_limit=1)
def refresh_in_a_hurry(did: str) -> None:
    """Refresh, and have a second for that."""
    client.restore(did, refresh=True)


@app.task
def leave_behind(did: str) -> str:
    """Begin a refresh, and do not wait for it."""
    try:
        client.sessions.get_session(did, True, timeout=0)
    except SessionError as error:
        return type(error).__name__
    return "it did not take long"
