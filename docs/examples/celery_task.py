"""Celery tasks that act for accounts: ``celery --app celery_task worker``."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

from celery import Celery, Task
from celery.signals import worker_process_shutdown

from atproto_session import ClientMetadata, OAuthClient, SessionError

app = Celery("posts", broker=os.environ["CELERY_BROKER_URL"])
app.conf.task_soft_time_limit = 60
app.conf.task_time_limit = 120  # kills the process: leave a refresh that is under way the time to end

# Made once, before the pool forks. What must not be shared with the children is not.
client = OAuthClient(
    ClientMetadata.loopback(scope="atproto transition:generic"),  # in production, the web application's own metadata
    store=os.environ["ATPROTO_STORE"],
)
# A worker process of the pool ends without the interpreter's own way of ending, which would wait for refreshes.
worker_process_shutdown.connect(lambda **_: client.close(), weak=False)


@app.task(bind=True, max_retries=8)
def post(self: Task, did: str, text: str) -> None:
    """Post as the account. Sent off with ``post.delay(session.did, "Hello")``: the DID goes along, never a session."""
    record = {"$type": "app.bsky.feed.post", "text": text, "createdAt": datetime.now(UTC).isoformat()}
    call: dict[str, Any] = {"repo": did, "collection": "app.bsky.feed.post", "record": record}
    try:
        account = client.restore(did)
        account.total_timeout = 30  # seconds for a request, all told
        account.post("/xrpc/com.atproto.repo.createRecord", json=call).raise_for_status()
    except SessionError as error:
        if not error.retryable:
            raise
        wait = 2**self.request.retries if error.retry_after is None else error.retry_after
        raise self.retry(exc=error, countdown=wait) from error
