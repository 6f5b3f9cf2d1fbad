"""What :mod:`tests.soak` knows of the refreshes, as their server sees them."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from atproto_session.testing.network import LocalNetwork
from atproto_session.testing.network.routes import Route
from atproto_session.testing.network.wire import ConnectionCut, Request, Response

from .soak_worker import ANSWER_WITHIN, HEADER

#: Whoever has to wait so long for the server, in seconds, may have given up, with all that comes before and after.
SLOW = ANSWER_WITHIN / 3


@dataclass
class Use:
    """One use of a refresh token, as the server sees it.

    :ivar end: what became of the answer: ``""`` (none yet), ``"sent"``, ``"unspent"`` (the token was not looked at),
        ``"renewed"`` (it stays good), ``"unusable"`` or ``"lost"``.
    :ivar took: seconds until then.
    """

    did: str
    pid: int
    began: float
    end: str = ""
    took: float = 0.0


class Watch:
    """Sees every refresh request, and says whether it was one too many.

    :param broken: where it says so.
    :ivar killed: when which process was.
    """

    def __init__(self, network: LocalNetwork, broken: list[str]) -> None:
        self.killed: dict[int, float] = {}
        self._network = network
        self._broken = broken
        self._lock = threading.Lock()
        self._uses: defaultdict[str, list[Use]] = defaultdict(list)
        self._answer = network._faults.answer
        network._faults.answer = self.answer  # type: ignore[method-assign]

    def answer(self, endpoints: Iterable[str], route: Route, request: Request) -> Response:
        if "refresh" not in endpoints:
            return self._answer(endpoints, route, request)
        token = request.form["refresh_token"]
        use = self._begin(token, int(request.headers[HEADER]))
        answers: list[Response] = []

        def process(request: Request) -> Response:
            answers.append(route.process(request))
            return answers[-1]

        try:
            response = self._answer(endpoints, replace(route, process=process), request)
        except ConnectionCut:
            self._end(use, "lost" if answers else "unspent")
            raise
        if b"use_dpop_nonce" in response.body:
            with self._lock:
                self._uses[token].remove(use)
        elif not answers:
            self._end(use, "unspent")
        elif response.body == answers[-1].body:
            info = self._network.session_of(token)
            self._end(use, "renewed" if info is not None and info.current else "sent")
        else:
            self._end(use, "unusable" if b"access_token" in response.body else "lost")
        return response

    def _begin(self, token: str, pid: int) -> Use:
        info, now = self._network.session_of(token), time.monotonic()
        use = Use("" if info is None else info.did, pid, now)
        with self._lock:
            for earlier in self._uses[token]:
                harmless = earlier.end in ("unspent", "renewed")
                if not harmless and self._how_lost(earlier, now) is None:
                    self._broken.append(f"{use.did}: a token was sent twice, though nothing was lost")
            self._uses[token].append(use)
        return use

    def _end(self, use: Use, end: str) -> None:
        use.end, use.took = end, time.monotonic() - use.began

    def _how_lost(self, use: Use, at: float) -> str | None:
        """How the answer to ``use`` may have been lost, for all that was known ``at`` that moment."""
        if use.end in ("lost", "unusable"):
            return f"an answer was {use.end}"
        if use.took > SLOW or (use.end == "" and at - use.began > SLOW):
            return "an answer came late"
        killed = self.killed.get(use.pid)
        if killed is not None and killed < at and killed - use.began < use.took + ANSWER_WITHIN:
            return "a process was killed"
        return None

    def why_it_ended(self, did: str, since: float) -> str | None:
        """Why a session that began at that moment may have ended, as far as refreshes can tell."""
        with self._lock:
            histories = [
                uses for uses in self._uses.values() if uses and uses[-1].did == did and uses[-1].began >= since
            ]
        for uses in histories:
            # What is lost shows when the token is sent again.
            for use in uses if uses[-1].end == "unusable" else uses[:-1]:
                if (how := self._how_lost(use, time.monotonic())) is not None:
                    return how
        return None
