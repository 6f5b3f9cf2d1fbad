"""With the extra ``celery`` and nothing else: a task that is tried again, and one that keeps sessions alive."""

from __future__ import annotations

from celery import Celery

from atproto_session import ClientMetadata, OAuthClient, TransportError
from atproto_session.contrib.celery import KEEP_ALIVE, ATProtoTask, add_keep_alive

app = Celery("smoke", broker="memory://", task_cls=ATProtoTask)
app.conf.update(task_always_eager=True)
errors = [TransportError("the server is away")]


@app.task
def work() -> str:
    if errors:
        raise errors.pop()
    return "done"


with OAuthClient(ClientMetadata.loopback(), store="memory:") as client:
    add_keep_alive(app, client)
    if work.delay().get() != "done" or app.tasks[KEEP_ALIVE].delay().get() != {}:
        raise SystemExit("a task did not do its work")
