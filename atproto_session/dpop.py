"""Proof of possession (DPoP, RFC 9449) and the proof key for code exchange (PKCE, RFC 7636). No I/O.

:func:`dpop_flow` is the whole of what a client does about DPoP: it yields proofs, is sent the answers to them, and
keeps the nonces. Its caller brings the HTTP.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit
from urllib.request import parse_http_list

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from ._urls import origin
from .errors import TransportError
from .keys import algorithm_of, encoded, load_private_key, public_jwk, sign

_log = logging.getLogger("atproto_session")

#: Longer ones are not kept: a nonce comes from outside, and goes into every proof.
_LONGEST_NONCE = 512


class NonceCache:
    """The last nonce of every server, by origin, and what to make of servers that give none. Safe to share between
    threads, and with signal handlers: it has no lock. Bounded.

    :param strict: see :meth:`check`.
    """

    def __init__(self, max_entries: int = 1000, *, strict: bool = False) -> None:
        self._max_entries = max_entries
        self._strict = strict
        # What is asked of these happens in one step.
        self._nonces: OrderedDict[str, str] = OrderedDict()
        self._without: OrderedDict[str, str] = OrderedDict()

    def get(self, server: str) -> str | None:
        return self._nonces.get(server)

    def set(self, server: str, nonce: str) -> None:
        if self._nonces.get(server) != nonce and 0 < len(nonce) <= _LONGEST_NONCE:
            self._keep(self._nonces, server, nonce)

    def check(self, answer: Answer, url: str, *, may_refuse: bool = True) -> None:
        """The one rule for answers without a ``DPoP-Nonce``, whatever was asked for (RFC 9449 sections 8 and 9; the AT
        Protocol has clients reject them). They are used, and a warning is logged once for each server, since many
        servers give none. A ``strict`` client rejects them all; only tokens that were refreshed are never thrown away
        for it (``may_refuse=False``), since what they were paid with is gone.

        For the answer to a request that succeeded. One that did not is reported as what it is.

        :param url: what was asked.
        :raises TransportError: the answer is rejected. Not ``retryable``.
        """
        if answer.nonce is not None:
            return
        server = origin(url)
        if self._strict and may_refuse:
            raise TransportError(
                f"{server} answered without a DPoP nonce, so it may not have checked the proof; a client with "
                "strict=True does not use such an answer",
                sent=True,
                retryable=False,
            )
        if server not in self._without:
            self._keep(self._without, server, server)
            _log.warning("%s answers without DPoP nonces, so it may not check proofs", server)

    def _keep(self, entries: OrderedDict[str, str], server: str, value: str) -> None:
        entries[server] = value
        with suppress(KeyError):  # another thread has taken it out
            entries.move_to_end(server)
            while len(entries) > self._max_entries:
                entries.popitem(last=False)


class Answer(NamedTuple):
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
        wants_nonce = status in (400, 401) and (
            "use_dpop_nonce" in challenge_errors(headers)
            or error_in(body() if callable(body) else body) == "use_dpop_nonce"
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
    members = tuple(key.items())
    try:
        private, header = _key_and_header(members)
    except TypeError:  # one of them is a list, such as key_ops
        private, header = _key_and_header.__wrapped__(members)
    return sign(private, header, claims)


@functools.lru_cache(maxsize=1024)
def _key_and_header(members: tuple[tuple[str, Any], ...]) -> tuple[EllipticCurvePrivateKey, str]:
    """What is the same in all proofs of a key. To make it takes a quarter of the time of a proof."""
    key = dict(members)
    return load_private_key(key), encoded({"typ": "dpop+jwt", "alg": algorithm_of(key), "jwk": public_jwk(key)})


#: How much of a header is looked at.
_LONGEST_CHALLENGE = 16 * 1024
# One element of the list: a scheme, with its first parameter if it has any, or a further parameter of that scheme.
_SCHEME = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?:\s+(?!=)(.*))?", re.DOTALL)


def challenge_errors(headers: Mapping[str, str]) -> set[str]:
    """Every ``error``, in lower case, of all challenges of the schemes ``DPoP`` and ``Bearer`` in ``WWW-Authenticate``
    (RFC 9110 section 11.6.1, RFC 6750 section 3), however many there are.

    :param headers: looked up without regard to case; several fields of that name joined by commas, as in requests.
    """
    errors, scheme = set(), ""
    for element in parse_http_list((headers.get("WWW-Authenticate") or "")[:_LONGEST_CHALLENGE]):
        parameter = element
        if match := _SCHEME.fullmatch(element):
            scheme, parameter = match[1].lower(), match[2] or ""
        name, _, value = parameter.partition("=")
        if scheme in ("dpop", "bearer") and name.strip().lower() == "error":
            errors.add(value.strip().strip('"').strip().lower())
    return errors


def error_in(body: bytes) -> object:
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
