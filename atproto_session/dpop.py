"""Proof of possession (DPoP, RFC 9449) and the proof key for code exchange (PKCE, RFC 7636). No I/O.

:func:`dpop_flow` is the whole of what a client does about DPoP: it yields proofs, is sent the answers to them, and
keeps the nonces. Whoever drives it brings the HTTP.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import jwt

from ._fork import reset_in_child
from ._urls import origin
from .keys import algorithm_of, load_private_key, public_jwk

_ALGORITHMS = {name: jwt.get_algorithm_by_name(name) for name in ("ES256", "ES256K")}

#: Longer ones are not kept: a nonce comes from outside, and goes into every proof.
_LONGEST_NONCE = 512


class NonceCache:
    """The last nonce of every server, by origin. Safe to share between threads; bounded."""

    def __init__(self, max_entries: int = 1000) -> None:
        self._max_entries = max_entries
        self._nonces: OrderedDict[str, str] = OrderedDict()
        self.reset_after_fork()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        self._mutex = threading.Lock()

    def get(self, server: str) -> str | None:
        return self._nonces.get(server)

    def set(self, server: str, nonce: str) -> None:
        if self._nonces.get(server) == nonce or not 0 < len(nonce) <= _LONGEST_NONCE:
            return
        with self._mutex:
            self._nonces[server] = nonce
            self._nonces.move_to_end(server)
            if len(self._nonces) > self._max_entries:
                self._nonces.popitem(last=False)


@dataclass(frozen=True)
class Answer:
    """What an HTTP answer says about DPoP.

    :ivar nonce: its ``DPoP-Nonce`` header.
    :ivar wants_nonce: it refuses the proof for the lack of a (current) nonce.
    """

    nonce: str | None
    wants_nonce: bool

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str], body: bytes | Callable[[], bytes]) -> Answer:
        """Read an answer. Both kinds of servers may ask in both ways: an OAuth error in the body (RFC 9449 section
        8), or a challenge in ``WWW-Authenticate`` (section 9).

        :param headers: looked up without regard to case.
        :param body: if a function, called only where the headers do not decide.
        """
        wants_nonce = False
        if status in (400, 401):
            challenge = headers.get("WWW-Authenticate") or ""
            wants_nonce = challenge_error(challenge) == "use_dpop_nonce" or (
                "json" in (headers.get("Content-Type") or "").lower()
                and _error_in(body() if callable(body) else body) == "use_dpop_nonce"
            )
        return cls(headers.get("DPoP-Nonce"), wants_nonce)


def dpop_flow(
    key: Mapping[str, Any],
    method: str,
    url: str,
    nonces: NonceCache,
    *,
    access_token: str | None = None,
    clock: Callable[[], float] = time.time,
) -> Generator[str, Answer, None]:
    """Yield the proof for a request, be sent its :class:`Answer`, and yield another proof if the server wants a nonce
    that it has just given. Ends when the last answer is final::

        flow = dpop_flow(key, "POST", url, nonces)
        proof = next(flow)
        while proof is not None:
            response = ...  # with the header "DPoP: <proof>"
            proof = next_proof(flow, Answer.of(...))

    :param key: the private JWK of the session.
    :param access_token: the token that the request carries, if it does.
    """
    server = origin(url)
    used = nonces.get(server)
    answer = yield proof(key, method, url, nonce=used, access_token=access_token, clock=clock)
    if answer.nonce is not None:
        nonces.set(server, answer.nonce)
    if not answer.wants_nonce or answer.nonce is None or answer.nonce == used:
        return
    answer = yield proof(key, method, url, nonce=answer.nonce, access_token=access_token, clock=clock)
    if answer.nonce is not None:
        nonces.set(server, answer.nonce)


def next_proof(flow: Generator[str, Answer, None], answer: Answer) -> str | None:
    """The proof to try once more with, or ``None`` when the answer is final."""
    try:
        return flow.send(answer)
    except StopIteration:
        return None


def proof(
    key: Mapping[str, Any],
    method: str,
    url: str,
    *,
    nonce: str | None = None,
    access_token: str | None = None,
    clock: Callable[[], float] = time.time,
) -> str:
    """One DPoP proof (RFC 9449 section 4.2), good for one request."""
    parts = urlsplit(url)
    claims: dict[str, Any] = {
        "jti": secrets.token_urlsafe(16),
        "htm": method,
        "htu": urlunsplit((parts.scheme, parts.netloc, parts.path or "/", "", "")),
        "iat": int(clock()),
    }
    if nonce is not None:
        claims["nonce"] = nonce
    if access_token is not None:
        claims["ath"] = _base64url(hashlib.sha256(access_token.encode()).digest()).decode("ascii")
    algorithm = algorithm_of(key)
    header = _encoded_header(algorithm, **public_jwk(key))
    message = header + b"." + _base64url(json.dumps(claims, separators=(",", ":")).encode())
    signature = _ALGORITHMS[algorithm].sign(message, load_private_key(key))
    return (message + b"." + _base64url(signature)).decode("ascii")


@functools.lru_cache(maxsize=1024)
def _encoded_header(algorithm: str, **jwk: str) -> bytes:
    # The same for every proof of a session, and a third of the cost of one.
    return _base64url(json.dumps({"typ": "dpop+jwt", "alg": algorithm, "jwk": jwk}, separators=(",", ":")).encode())


def challenge_error(challenge: str) -> str | None:
    """The ``error`` of a ``WWW-Authenticate`` challenge of the scheme ``DPoP`` or ``Bearer`` (RFC 6750 section 3)."""
    scheme, _, parameters = challenge.strip()[:4096].partition(" ")
    if scheme.lower() not in ("dpop", "bearer"):
        return None
    for parameter in _split_unquoted(parameters):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "error":
            return value.strip().strip('"')
    return None


def _split_unquoted(text: str) -> list[str]:
    """``text`` split at the commas that stand outside of quotes."""
    parts, start, quoted, escaped = [], 0, False, False
    for position, character in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _error_in(body: bytes) -> object:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document.get("error") if isinstance(document, dict) else None


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


# PKCE


def generate_verifier() -> str:
    """A new PKCE code verifier of 43 characters."""
    return secrets.token_urlsafe(32)


def challenge_of(verifier: str) -> str:
    """The S256 code challenge of a verifier (RFC 7636 section 4.2)."""
    return _base64url(hashlib.sha256(verifier.encode("ascii")).digest()).decode("ascii")
