"""One worker process of the demo: some threads that use an account as fast as they can."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import requests

from ..client import OAuthClient
from ..errors import SessionError
from ..metadata import ClientMetadata
from ..session import Freshness, Session
from ..stores import open_store
from .figures import Collector, Failure, Figures
from .naive import NaiveStore, NoLocks

#: A method that every PDS has.
PATH = "/xrpc/com.atproto.server.getSession"
#: What a worker process is told.
START, STOP = "start", "stop"
#: Seconds between two reports.
_REPORT_EVERY = 0.25
#: When a token of a few seconds counts as stale.
FRESHNESS = Freshness(margin=0.3, jitter=0.5)


@dataclass(frozen=True)
class Job:
    """What a worker process is told to do.

    :ivar store: a URL for :func:`.open_store`.
    :ivar network: arguments of :class:`.OAuthClient` that make it use the local network.
    :ivar naive: without any protection.
    """

    did: str
    store: str
    network: Mapping[str, Any]
    threads: int
    naive: bool = False


def work(job: Job, parent: Connection) -> None:
    """Report to say that this process is ready, wait for ``START``, report now and then, and end at ``STOP``, or when
    the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    with contextlib.suppress(EOFError, ConnectionError), contextlib.ExitStack() as stack:
        clients = _naive_clients(job) if job.naive else [_client(job, job.store)] * job.threads
        for client in set(clients):
            stack.enter_context(client)
        parent.send(Figures())
        if parent.recv() == START:
            _put_under_load(job.did, clients, parent)


def _client(job: Job, store: Any, **options: Any) -> OAuthClient:
    return OAuthClient(ClientMetadata.loopback(), store=store, freshness=FRESHNESS, **options, **job.network)


def _naive_clients(job: Job) -> list[OAuthClient]:
    # A client for each thread, or the threads of this process would share their refreshes.
    logging.getLogger("atproto_session").addHandler(logging.NullHandler())  # what goes wrong is no news here
    store = open_store(job.store)
    return [_client(job, NaiveStore(store), locks=NoLocks()) for _ in range(job.threads)]


def _put_under_load(did: str, clients: list[OAuthClient], parent: Connection) -> None:
    collector, stop, began = Collector(), threading.Event(), time.monotonic()
    for client in set(clients):
        _time_waits(client, collector)
    threads = [threading.Thread(target=_use, args=(client, did, collector, stop, began)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        while not parent.poll(_REPORT_EVERY):
            parent.send(collector.take())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    parent.send(collector.take())


def _use(client: OAuthClient, did: str, collector: Collector, stop: threading.Event, began: float) -> None:
    """Do what a request handler of a web application does, again and again."""
    while not stop.is_set():
        asked = time.monotonic()
        try:
            client.restore(did).get(PATH).raise_for_status()
        except (SessionError, requests.RequestException) as error:
            failure = Failure(time.monotonic() - began, f"{type(error).__name__}: {error}")
            collector.add(Figures(failures=[failure]))
            if isinstance(error, SessionError) and error.login_required:
                return
        else:
            collector.add(Figures(latencies=[time.monotonic() - asked]))


def _time_waits(client: OAuthClient, collector: Collector) -> None:
    """Have it recorded how long the callers of ``client`` wait for refreshes, no matter who makes them."""
    get_session: Callable[..., Session] = client.sessions.get_session

    def timed(*args: Any, **options: Any) -> Session:
        asked, clock = time.time(), time.monotonic()
        session = get_session(*args, **options)
        if (session.refreshed_at or 0.0) >= asked:
            collector.add(Figures(waits=[time.monotonic() - clock]))
        return session

    client.sessions.get_session = timed  # type: ignore[method-assign]  # to see what no other door shows
