"""Locks that Redis keeps: leases, by redis-py's own lock."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    LockError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.lock import Lock

from .._worker import Life, at_work, life_of
from ..errors import CancelledError, LockTimeoutError, StoreError, printable
from . import LockKind
from .threads import ThreadLocks

#: How long a lock lasts that is not extended, in seconds: as long as an attempt (``Times.window``), so that whoever
#: waits for a worker that died elsewhere waits for both at once.
_LEASE = 15.0
#: How long one wait on the server lasts, in seconds. In between, ``cancel`` and the holder are looked at.
_SLICE = 0.25
#: How long it is remembered that a lock was released, in milliseconds, for those who are about to wait for it.
_SIGNAL_LASTS = 1000
#: What may be over a moment later.
_PASSING = (
    RedisConnectionError,
    RedisTimeoutError,
    BusyLoadingError,
    ReadOnlyError,
    RedisClusterException,
    OSError,
)


class RedisLocks:
    """A lock for each name, which is a lease: Redis gives it up when its time is over, or forgets it with all else, and
    its holder may be alive (``LockKind.LEASE``). It is the record that keeps two workers apart.

    Those who wait are told of a release, one at a time. A lock names its worker: that of a worker of this machine that
    is gone, or that could not release it, is taken at once. Threads of one process queue at a :class:`ThreadLocks`
    first.

    :param client: a ``redis.Redis`` or ``redis.RedisCluster``.
    :param prefix: what the names of all keys begin with.
    """

    kind = LockKind.LEASE

    def __init__(self, client: Any, *, prefix: str = "atproto:") -> None:
        self._client = client
        self._prefix = prefix
        self._threads = ThreadLocks()

    @contextmanager
    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> Iterator[RedisHold]:
        deadline = time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
        id = uuid.uuid4().hex
        with self._threads.hold(name, timeout=timeout, cancel=cancel), at_work(id) as worker:
            hold = RedisHold(self._client, self._key_of(name), f"{worker}/{id}")
            try:
                while not hold.take():
                    if cancel is not None and cancel.is_set():
                        raise CancelledError(f"waiting for the lock of {printable(name)} was cancelled")
                    if (left := deadline - time.monotonic()) <= 0:
                        raise LockTimeoutError(f"another worker keeps the lock of {printable(name)}; try again later")
                    hold.wait(min(left, _SLICE))
            except RedisError as error:
                raise unusable(error, "the locks") from error
            try:
                yield hold
            finally:
                hold.end()

    def _key_of(self, name: str) -> str:
        # Braces: in a cluster, what they enclose decides where a key lives, and a lock's two have to live together.
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        return f"{self._prefix}lock:{{{digest}}}"


class RedisHold:
    """
    :param token: who holds it: a worker, and what it is :func:`.at_work` on.
    :ivar lock: see :class:`.Hold`.
    """

    def __init__(self, client: Any, lock: str, token: str) -> None:
        self.lock = lock
        self._token = token
        self._client = client
        self._signal = f"{lock}:released"
        self._process = os.getpid()
        self._lock = Lock(client, lock, timeout=_LEASE, thread_local=False)

    def take(self) -> bool:
        """Whether the lock was free, or that of a worker that is gone."""
        while True:
            if self._lock.acquire(blocking=False, token=self._token):
                return True
            holder = self._client.get(self.lock) or ""
            holder = holder.decode("utf-8", "replace") if isinstance(holder, bytes) else holder
            worker, _, id = holder.rpartition("/")
            if life_of(worker, id) is not Life.GONE:
                return False
            with suppress(LockError):  # another one was faster
                self._lock.do_release(holder)

    def wait(self, seconds: float) -> None:
        """Until somebody releases the lock, or so many ``seconds`` have passed."""
        self._client.blpop([self._signal], timeout=max(0.001, seconds))

    def extend(self, seconds: float) -> bool:
        """A child forked in the block does not hold it."""
        if self._process != os.getpid():
            return False
        try:
            return self._lock.extend(max(seconds, _LEASE), replace_ttl=True)
        except LockError:
            return False
        except RedisError as error:
            raise unusable(error, "the locks") from error

    def end(self) -> None:
        if self._process != os.getpid():
            return
        with suppress(RedisError):  # the lease runs out by itself; or it has, and is another one's
            self._lock.release()
            with self._client.pipeline() as pipeline:
                pipeline.delete(self._signal)
                pipeline.rpush(self._signal, 1)
                pipeline.pexpire(self._signal, _SIGNAL_LASTS)
                pipeline.execute()


def unusable(error: Exception, what: str) -> StoreError:
    """The error for what redis-py says of ``what`` is kept in Redis."""
    # Its message names commands and addresses, never what was stored or the password.
    said = f"{type(error).__name__}: {printable(str(error), 200)}"
    is_passing = isinstance(error, _PASSING) and not isinstance(error, AuthenticationError)
    advice = "try again later" if is_passing else "the server, or the URL of the store, has to be mended"
    return StoreError(f"{what} in Redis cannot be used ({said}); {advice}", retryable=is_passing)
