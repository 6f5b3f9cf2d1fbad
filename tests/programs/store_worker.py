"""A worker process whose disk can fill up. It does what its parent says, one JSON line each.

A limit on the size of files stands for the disk: what would make a file longer than that fails, and what is there can
be read.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from typing import Any

from atproto_session import ClientMetadata, OAuthClient, Session, SessionError, StoreError, TokenSet, open_store
from atproto_session._terms import Times

from ..core import SOON, Worker

#: In bytes. No record is so short, and no page of a database.
FULL = 256


class Disk:
    """The store's own, and of nobody else."""

    def __init__(self, client: OAuthClient) -> None:
        self.failures = threading.Semaphore(0)
        self.emptied = threading.Event()
        self._client = client
        self._size = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        self._refresh: Worker | None = None

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, self._size))

    def empty(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._size))
        self.emptied.set()

    def wait_for_failure(self) -> None:
        """Until a write has failed."""
        assert self.failures.acquire(timeout=SOON)

    def read(self, did: str) -> str:
        return self._client.sessions.get_session(did).token_set.access_token

    def begin_refresh(self, did: str) -> None:
        self._refresh = Worker(lambda: self._client.sessions.get_session(did, True, timeout=SOON))

    def end_refresh(self) -> dict[str, Any]:
        assert self._refresh is not None
        try:
            session = self._refresh.outcome()
        except SessionError as error:
            cause = error.__cause__
            causes = cause.exceptions if isinstance(cause, ExceptionGroup) else []
            return {"error": type(error).__name__, "message": str(error), "causes": [str(one) for one in causes]}
        assert isinstance(session, Session)
        return {"access_token": session.token_set.access_token}


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = open_store(setup["store"])
    times = Times(store_for=setup["store_for"], first_rest=0.0, longest_rest=0.0)
    with OAuthClient(ClientMetadata.loopback(), store=store, times=times, **setup["options"]) as client:
        disk = Disk(client)
        replace = store.replace

        def noted(key: str, session: Session | None, expected: Session | TokenSet | None, /) -> bool:
            try:
                return replace(key, session, expected)
            except StoreError:
                disk.failures.release()
                if setup["patient"]:
                    assert disk.emptied.wait(SOON)
                raise

        store.replace = noted  # type: ignore[method-assign]
        for line in sys.stdin:
            order, *arguments = json.loads(line)
            print(json.dumps(getattr(disk, order)(*arguments)), flush=True)
    store.close()


if __name__ == "__main__":
    main()
