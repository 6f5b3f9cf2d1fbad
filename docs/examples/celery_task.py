"""Celery tasks that act for accounts: ``celery --app celery_task worker --beat``."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from celery import Celery

from atproto_session import OAuthClient
from atproto_session.contrib.celery import ATProtoTask, add_keep_alive

app = Celery("posts", broker=os.environ.get("CELERY_BROKER_URL", "redis://localhost"), task_cls=ATProtoTask)
app.conf.update(task_soft_time_limit=60, task_time_limit=120)

client = OAuthClient.for_scripts()
add_keep_alive(app, client)


@app.task
def post(did: str, text: str) -> str:
    """Post as the account. Returns the address of the post."""
    account = client.restore(did)
    account.total_timeout = 30  # seconds for a request, all told
    record = {"$type": "app.bsky.feed.post", "text": text, "createdAt": datetime.now(UTC).isoformat()}
    call = {"repo": did, "collection": "app.bsky.feed.post", "record": record}
    answer = account.post("/xrpc/com.atproto.repo.createRecord", json=call)
    answer.raise_for_status()
    return str(answer.json()["uri"])
