"""Several processes over one store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Crew:
    """Processes of :mod:`tests.worker` that share a store.

    :param store: a store URL that they share.
    :param did: the account that they use.
    :param options: keyword arguments for their clients.
    :param metadata: the document of the client that they are; by default a development client's.
    :param jwks: its private keys, if it is confidential.
    """

    def __init__(
        self,
        store: str,
        did: str,
        options: dict[str, Any],
        *,
        processes: int = 4,
        freshness: dict[str, float] | None = None,
        metadata: dict[str, Any] | None = None,
        jwks: dict[str, Any] | None = None,
    ) -> None:
        setup: dict[str, Any] = {"store": store, "did": did, "options": options, "freshness": freshness or {}}
        if metadata is not None:
            setup["metadata"] = metadata
        if jwks is not None:
            setup["jwks"] = jwks
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for _ in range(processes)
        ]
        for process in self._processes:
            self._say(process, setup)
        for process in self._processes:
            assert self._hear(process) == {"ready": True}

    def do(self, action: str, *, threads: int = 8, **details: Any) -> list[str]:
        """Have every thread of every process do ``action`` at once. Returns what they got; fails if any failed."""
        ok, errors = self.try_to_do(action, threads=threads, **details)
        assert errors == []
        assert len(ok) == threads * len(self._processes)
        return ok

    def try_to_do(self, action: str, *, threads: int = 8, **details: Any) -> tuple[list[str], list[str]]:
        for process in self._processes:
            self._say(process, {"do": action, "threads": threads} | details)
        answers = [self._hear(process) for process in self._processes]
        return [one for answer in answers for one in answer["ok"]], [e for answer in answers for e in answer["errors"]]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(60)
            assert process.stdout is not None
            process.stdout.close()
            assert process.returncode == 0 or error[0] is not None

    @staticmethod
    def _say(process: subprocess.Popen[str], message: dict[str, Any]) -> None:
        assert process.stdin is not None
        print(json.dumps(message), file=process.stdin, flush=True)

    @staticmethod
    def _hear(process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "a worker process ended"
        return json.loads(line)
