"""Several processes over one store."""

from __future__ import annotations

from typing import Any, Self

from .processes import Program


class Crew:
    """Processes of :mod:`tests.worker` that share a store.

    :param store: a store URL that they share.
    :param did: the account that they use.
    :param options: keyword arguments for their clients.
    :param metadata: the document of the client that they are; by default a development client's.
    :param jwks: its private keys, if it is confidential.
    :param apart: as if each were on a machine of its own: without common locks, and without knowing of each other.
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
        apart: bool = False,
    ) -> None:
        setup: dict[str, Any] = {"store": store, "did": did, "options": options, "freshness": freshness or {}}
        setup["apart"] = apart
        if metadata is not None:
            setup["metadata"] = metadata
        if jwks is not None:
            setup["jwks"] = jwks
        self._programs = [Program("worker", is_measured=False) for _ in range(processes)]
        for program in self._programs:
            program.say(setup)
        for program in self._programs:
            assert program.hear() == {"ready": True}

    def do(self, action: str, *, threads: int = 8, **details: Any) -> list[str]:
        """Have every thread of every process do ``action`` at once. Returns what they got; fails if any failed."""
        ok, errors = self.try_to_do(action, threads=threads, **details)
        assert errors == []
        assert len(ok) == threads * len(self._programs)
        return ok

    def try_to_do(self, action: str, *, threads: int = 8, **details: Any) -> tuple[list[str], list[str]]:
        for program in self._programs:
            program.say({"do": action, "threads": threads} | details)
        answers = [program.hear() for program in self._programs]
        return [one for answer in answers for one in answer["ok"]], [e for answer in answers for e in answer["errors"]]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for program in self._programs:
            program.__exit__(*error)
