"""Celery tasks that act for accounts::

    app = Celery("posts", task_cls=ATProtoTask)
    add_keep_alive(app, client)

To import this module is enough for the processes of the prefork pool to end their refreshes before they end themselves.
"""

from __future__ import annotations

import logging
import random
import signal
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery import Celery, Task
from celery.schedules import BaseSchedule
from celery.signals import worker_process_shutdown

from .._fork import end_now
from ..client import OAuthClient
from ..errors import SessionError

if TYPE_CHECKING:
    _Task = Task[..., Any]
else:
    _Task = Task

#: What the task that :func:`add_keep_alive` adds is called, unless it is said otherwise.
KEEP_ALIVE = "atproto_session.keep_alive"

#: The longest pause before another try, in seconds: of those that grow, and of all. With Redis as its broker, Celery
#: gives a task to a second worker after an hour's pause (``visibility_timeout``).
_LONGEST_BACKOFF = 300.0
_LONGEST_PAUSE = 1800.0

_log = logging.getLogger("atproto_session")


class ATProtoTask(_Task):
    """A task that is tried again when a :class:`.SessionError` says that this may help, and only then.

    It waits as long as the error says (``retry_after``), or otherwise 1, 2, 4 and so on up to 300 seconds, and a random
    part of that longer, ``max_retries`` times at most: about a quarter of an hour. An error that is not ``retryable``
    ends the task at once; where it says ``login_required``, only a log-in helps.

    Celery's own ``autoretry_for`` sees to this. A task that has further errors there names ``SessionError``, too.
    """

    autoretry_for: tuple[type[Exception], ...] = (SessionError,)
    max_retries = 10

    def retry(  # type: ignore[override]  # noqa: PLR0917 - the options are those of Celery's own
        self,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        exc: Exception | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        **options: Any,
    ) -> Any:
        """As Celery's own. A ``countdown`` is not shorter than what the error says.

        :raises SessionError: ``exc``, if it is one that is not ``retryable``.
        """
        if isinstance(exc, SessionError):
            if not exc.retryable:
                raise exc
            if eta is None:
                countdown = _pause(exc, countdown, self.request.retries)
        return super().retry(args, kwargs, exc, throw, eta, countdown, **options)


def _pause(error: SessionError, countdown: float | None, retries: int) -> float:
    """Seconds to wait before another try. Not all tasks come back in the same instant."""
    backoff = min(2.0 ** min(retries, 20), _LONGEST_BACKOFF) if countdown is None else 0.0
    pause = max(error.retry_after or 0.0, backoff) * random.uniform(1.0, 1.25)  # noqa: S311 - no secret
    return max(countdown or 0.0, min(pause, _LONGEST_PAUSE))


@worker_process_shutdown.connect
def end_refreshes(**_: object) -> None:
    """Wait for the refreshes that this process has sent, and send no other.

    A process of the prefork pool ends without the interpreter's own way of ending, which would wait for them."""
    # Celery's cold shutdown sends it more than once, and the second one would kill.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_now()


def add_keep_alive(
    app: Celery[Any],
    client: OAuthClient | Callable[[], OAuthClient],
    *,
    schedule: float | BaseSchedule = 3600.0,
    timeout: float = 600.0,
    name: str = KEEP_ALIVE,
    **options: Any,
) -> None:
    """Have ``celery beat`` keep idle sessions alive: adds a task that calls :meth:`.OAuthClient.keep_alive`, logs what
    it could not refresh, and returns how many sessions have which outcome.

    :param client: or a function that returns it, called in the worker.
    :param schedule: how often, in seconds, or a schedule of Celery's.
    :param timeout: how long one run goes on, in seconds. The next one goes on from there.
    :param name: of the task. An application with several clients gives each task a name of its own.
    :param options: further ones for :meth:`.OAuthClient.keep_alive`, such as ``idle`` and ``pace``.
    """

    limit = int(timeout) + 60

    # Shared, it would be a task of every application in the process.
    @app.task(name=name, base=ATProtoTask, shared=False, soft_time_limit=limit, time_limit=limit + 60)
    def keep_alive() -> dict[str, int]:
        the_client = client if isinstance(client, OAuthClient) else client()
        results = the_client.keep_alive(timeout=timeout, **options)
        for result in results:
            if result.error is not None:
                _log.warning("%s: %s", result.outcome, result.error)
        return dict(Counter(result.outcome for result in results))

    @app.on_after_finalize.connect(weak=False)
    def plan(sender: Celery[Any], **_: object) -> None:
        sender.add_periodic_task(schedule, sender.signature(name), name=name)
