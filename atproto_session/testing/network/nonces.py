"""DPoP nonces, and a memory for identifiers that may be used once."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import threading
from collections.abc import Callable
from itertools import islice


class Nonces:
    """The nonces of one server (RFC 9449 sections 8 and 9).

    The nonce handed out changes every ``interval`` seconds and is accepted for three intervals. Nothing is stored:
    a nonce is derived from the number of its interval.
    """

    def __init__(self, interval: float, clock: Callable[[], float]) -> None:
        self._interval = interval
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._skipped = 0
        self._lock = threading.Lock()

    def current(self) -> str:
        return self._nonce(self._counter())

    def accepts(self, nonce: str) -> bool:
        counter = self._counter()
        return any(hmac.compare_digest(nonce.encode(), self._nonce(counter - age).encode()) for age in range(3))

    def rotate(self) -> None:
        """Make every nonce handed out so far stale."""
        with self._lock:
            self._skipped += 3

    def _counter(self) -> int:
        return int(self._clock() // self._interval) + self._skipped

    def _nonce(self, counter: int) -> str:
        digest = hmac.digest(self._secret, b"%d" % counter, hashlib.sha256)
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


class UsedIdentifiers:
    """Remembers identifiers (``jti``) for ``lifetime`` seconds, so that each is accepted once."""

    def __init__(self, lifetime: float, clock: Callable[[], float]) -> None:
        self._lifetime = lifetime
        self._clock = clock
        self._expiry: dict[str, float] = {}
        self._lock = threading.Lock()

    def use(self, identifier: str) -> bool:
        """Whether this is the first use."""
        with self._lock:
            now = self._clock()
            # The oldest come first; forgetting up to two for each new one keeps the memory small without a sweep.
            for oldest in list(islice(self._expiry, 2)):
                if self._expiry[oldest] < now:
                    del self._expiry[oldest]
            if identifier in self._expiry:
                return False
            self._expiry[identifier] = now + self._lifetime
            return True
