"""How a request of an account is signed, and what its answer means. No I/O but the getter's: the requests are sent, and
their answers brought, by whoever drives :meth:`Signer.flow`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import requests
from requests.utils import rewind_body

from ._records import check_key, log
from ._urls import origin
from .dpop import Answer, NonceCache, challenge_errors, dpop_flow, error_in, next_proof, proof
from .errors import SessionError, TokenInvalidError, TransportError, printable
from .session import Session, TokenSet
from .session_getter import SessionGetter

#: The token that was stored, one that another worker has brought, one that is refreshed for this request.
_TOKENS_TRIED = 3
#: How long to wait before a token that was just issued is tried again, each time, in seconds. A server that was just
#: started, or a copy that lags behind, may not know it yet. One that refuses it after all this refuses the session.
PAUSES = (0.5, 1.0, 2.0, 4.0)
#: For how long a refusal that no answer has contradicted is remembered, in seconds.
_REMEMBERED = 60.0
#: For how long a session that was just read is not read again, in seconds. Should its token be replaced meanwhile, the
#: server says so.
_KNOWN_FOR = 0.5
#: Answers to a first try are read to the end up to this size, so that their connection can be used again.
_DRAINED = 65536
#: What is asked for a nonce: the least that any account may call.
_CHEAPEST = "/xrpc/com.atproto.server.getSession"
_NOT_REPEATED = "the body of this request could be read only once, so it was not sent again"
#: What some servers say of a token in the error of an XRPC method, where a challenge should say it.
_REFUSING_WORDS = {400: ("ExpiredToken",), 401: ("ExpiredToken", "InvalidToken", "invalid_token")}

#: Yields requests and is sent their responses.
Flow = Generator[requests.PreparedRequest, requests.Response, None]


@dataclass
class _Refusal:
    """A token was refused."""

    token: str
    session: Session
    at: float
    lasting_since: float | None = None  # when a token that was issued afterwards was first refused, too
    over_at: float | None = None  # when a token was accepted


class Refusals:
    """The tokens that servers have refused, by account. Shared by all requests of a client, so that one refresh answers
    a refusal, however many requests meet it. It has no lock: each change is one step; to lose one costs a refresh."""

    def __init__(self) -> None:
        self._refusals: dict[str, _Refusal] = {}

    def before(self, key: str, session: Session, now: float, sent: float) -> _Refusal | None:
        """The refusal after which the token of ``session`` was issued, if there is one and no token has been accepted
        between it and ``sent``."""
        refusal = self._refusals.get(key)
        if refusal is None or not 0.0 <= now - refusal.at <= _REMEMBERED or not refusal.session.is_same_grant(session):
            return None
        if refusal.over_at is not None and refusal.over_at <= sent:
            return None
        is_newer = session.token_set.access_token != refusal.token and (session.refreshed_at or 0.0) >= refusal.at
        return refusal if is_newer else None

    def add(self, key: str, session: Session, now: float, sent: float) -> None:
        """The token of ``session``, which left at ``sent``, was refused."""
        for other, refusal in self._refusals.copy().items():
            if not 0.0 <= now - refusal.at <= _REMEMBERED:
                self._refusals.pop(other, None)
        known = self._refusals.get(key)
        is_over = known is not None and known.over_at is not None and known.over_at <= sent
        if known is None or is_over or known.token != session.token_set.access_token:
            self._refusals[key] = _Refusal(session.token_set.access_token, session, now)

    def end(self, key: str, now: float) -> None:
        """A token was accepted. Requests that left before may bring refusals yet."""
        if (refusal := self._refusals.get(key)) is not None and refusal.over_at is None:
            refusal.over_at = now

    def forget(self, key: str) -> None:
        """The session is over."""
        self._refusals.pop(key, None)


class Signer:
    """Signs the requests of one account and judges the answers.

    :param session: what the getter has just returned: not read again for a request that follows at once.
    :param refusals: those that the client knows of.
    :param sleep: lets time pass, in the thread of the caller.
    :param monotonic: the clock that deadlines are of.
    """

    def __init__(
        self,
        getter: SessionGetter,
        key: str,
        nonces: NonceCache,
        *,
        timeout: float | None = None,
        session: Session | None = None,
        refusals: Refusals | None = None,
        sleep: Callable[[float], object] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.getter = getter
        self.key = key
        self.monotonic = monotonic
        self._nonces = nonces
        self._timeout = timeout
        self._refusals = refusals or Refusals()
        self._clock = getter.freshness.clock
        self._sleep = sleep
        self._known = session
        self._known_until = time.monotonic() + _KNOWN_FOR

    def flow(
        self, request: requests.PreparedRequest, audience: str | None = None, *, deadline: float | None = None
    ) -> Flow:
        """Yield ``request``, signed, be sent the response, and yield it again while another try is due: with a nonce
        that the server asked for (RFC 9449 section 9), with a new proof in the place of one that it had seen, or with a
        newer token in the place of one that it refused. Another request comes first if ``request`` has a body that can
        be sent only once, and no nonce of its server is known.

        :param audience: the PDS as it was when the URL was made; such a URL follows the account when it moves.
        :param deadline: when the time of the request is over, by the clock ``monotonic``.
        :raises TokenInvalidError: a token that had just been issued was refused for seconds; the session is ended.
        :raises SessionError: the request would go to somebody else than the account's PDS, or there is no good token.
        """
        try:
            if not _is_repeatable(request):
                yield from self._fetch_nonce(request, audience, deadline)
            yield from self._flow(request, audience, deadline)
        except SessionError as error:
            error.about(self.key)
            raise

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self._sleep(seconds)

    def has_time(self, seconds: float, deadline: float | None) -> bool:
        """Whether ``seconds`` can pass before ``deadline``."""
        return deadline is None or self.monotonic() + seconds < deadline

    def forget(self) -> None:
        """Read the session again for the next request, however recently that was done."""
        self._known = None

    def _fetch_nonce(self, request: requests.PreparedRequest, audience: str | None, deadline: float | None) -> Flow:
        """Call a method that costs nothing, so that its answer, and not that to ``request``, asks for a nonce or for
        another token."""
        self._known = session = self._session(None, deadline)
        tokens = session.token_set
        _aim(request, audience, tokens)
        if self._nonces.get(origin(tokens.aud)) is None:
            first = requests.Request("GET", origin(tokens.aud) + _CHEAPEST).prepare()
            yield from self._flow(first, None, deadline)

    def _flow(self, request: requests.PreparedRequest, audience: str | None, deadline: float | None) -> Flow:
        rejected, tried, pauses = None, 0, iter(PAUSES)
        while True:
            session = self._session(rejected, deadline)
            tokens = session.token_set
            _aim(request, audience, tokens)
            audience = tokens.aud
            sent = self._clock()
            response = yield from self._prove(request, session)
            if response.ok:
                self._refusals.end(self.key, self._clock())
            if (refused := _refused_by(response)) is None or not self._can_repeat(request, response):
                return
            now = self._clock()
            earlier = self._refusals.before(self.key, session, now, sent)
            if earlier is None or self.getter.freshness.is_expired(tokens):
                self._refusals.add(self.key, session, now, sent)
                rejected, tried = tokens.access_token, tried + 1
                if tried == _TOKENS_TRIED:
                    return
            elif refused == "words":
                return  # who says it in another way than RFC 6750 does may mean something else: no session ends by it
            elif (pause := self._pause(earlier, pauses, now)) is None:
                self._give_up(session)
                return
            elif not self.has_time(pause, deadline):
                return
            else:
                let_go(response)  # no connection is kept from others meanwhile
                self.sleep(pause)
                rejected = earlier.token  # what is stored by then is tried, and nothing refreshed for it

    def _pause(self, refusal: _Refusal, pauses: Iterator[float], now: float) -> float | None:
        """How long to give a server that refuses a new token before the next try; ``None`` if it had time enough."""
        if refusal.lasting_since is None:
            refusal.lasting_since = now
        pause = next(pauses, None)
        # A caller with little time does not wait to the end. What later requests meet is the same refusal, if there is
        # one try more between.
        has_lasted = pause != PAUSES[0] and now - refusal.lasting_since >= sum(PAUSES)
        return None if has_lasted else pause

    def _give_up(self, session: Session) -> None:
        """End a session whose server refuses what was just issued; unless another worker has renewed it meanwhile."""
        cause = TokenInvalidError(f"the server of {self.key} refuses tokens that were just issued; log in again")
        self.getter.delete_rejected(self.key, session, cause)
        self._refusals.forget(self.key)
        if self.getter.get_stored(self.key) is None:
            raise cause

    def _prove(
        self, request: requests.PreparedRequest, session: Session
    ) -> Generator[requests.PreparedRequest, requests.Response, requests.Response]:
        """Send ``request`` with the token of ``session``, until its proof is accepted or there is no way to that."""
        check_key(self.key, session)
        key, token = session.dpop_key, session.token_set.access_token
        url, method = request.url or "", request.method or "GET"
        options: dict[str, Any] = {"access_token": token, "clock": self._clock}

        def renew() -> str:
            return proof(key, method, url, nonce=self._nonces.get(origin(url)), **options)

        replaced = False
        while True:
            proofs = dpop_flow(key, method, url, self._nonces, **options)
            current: str | None = next(proofs)
            while current is not None:
                request.headers["Authorization"] = f"DPoP {token}"
                request.headers["DPoP"] = _Proof(current, renew)
                response = yield request
                answer = _answer_of(response)
                if response.ok:
                    self._nonces.check(answer, url)
                current = next_proof(proofs, answer)
                if current is not None and not self._can_repeat(request, response):
                    return response
            # The proof may have been repeated on the way: by a proxy, or an adapter of the caller's.
            refused = response.status_code == 401 and "invalid_dpop_proof" in challenge_errors(response.headers)
            if not refused or replaced or not self._can_repeat(request, response):
                return response
            replaced = True

    def _session(self, rejected: str | None, deadline: float | None) -> Session:
        known, self._known = self._known, None
        is_good = known is not None and time.monotonic() < self._known_until
        if rejected is None and known is not None and is_good and not self.getter.freshness.is_stale(known.token_set):
            return known
        timeout = self._timeout
        if deadline is not None:
            left = max(0.0, deadline - self.monotonic())
            timeout = left if timeout is None else min(timeout, left)
        return self.getter.get_session(self.key, rejected=rejected, timeout=timeout)

    def _can_repeat(self, request: requests.PreparedRequest, response: requests.Response) -> bool:
        """Make ready to send ``request`` again; whether that can be done. If not, ``response`` says so as well."""
        if rewind(request):
            return True
        log.warning(
            "%s answered a request of %s with %d; %s",
            origin(request.url or ""),
            self.key,
            response.status_code,
            _NOT_REPEATED,
        )
        response.reason = f"{response.reason} ({_NOT_REPEATED})"
        return False


class _Proof(str):
    """A proof that is another one each time it is sent. urllib3, when it repeats a request (``Retry``), sends the very
    same headers, and a server takes a proof only once (RFC 9449 section 11.1)."""

    _renew: Callable[[], str]
    _is_sent: bool

    def __new__(cls, text: str, renew: Callable[[], str]) -> _Proof:
        self = super().__new__(cls, text)
        self._renew, self._is_sent = renew, False
        return self

    def encode(self, encoding: str = "latin-1", errors: str = "strict") -> bytes:
        text, self._is_sent = self._renew() if self._is_sent else str(self), True
        return text.encode(encoding, errors)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)  # with the response, whose request it belongs to


def _aim(request: requests.PreparedRequest, audience: str | None, tokens: TokenSet) -> None:
    """Let the request go to the account's PDS and nowhere else."""
    url = request.url or ""
    if url.startswith(f"{tokens.aud}/"):
        return
    try:
        at, pds = origin(url), origin(tokens.aud)
    except ValueError as error:  # of a redirect, for instance
        raise TransportError(f"a request was not sent, because its address {error}", retryable=False) from None
    if at == pds:
        return
    if audience is None or at != origin(audience):
        raise TransportError(
            f"the tokens of {tokens.sub} are for {pds} alone; a request to {printable(at)} was not sent",
            retryable=False,
        )
    to = urlsplit(pds)
    request.url = urlsplit(url)._replace(scheme=to.scheme, netloc=to.netloc).geturl()


def _answer_of(response: requests.Response) -> Answer:
    return Answer.of(response.status_code, response.headers, lambda: response.content if _is_small(response) else b"")


def _refused_by(response: requests.Response) -> Literal["challenge", "words"] | None:
    """How the server said, if it did, that it does not like the token: by a challenge (RFC 6750 section 3.1), or by the
    error of an XRPC method alone. A 403 never is about that."""
    words = _REFUSING_WORDS.get(response.status_code)
    if words is None:
        return None
    if errors := challenge_errors(response.headers):
        return "challenge" if response.status_code == 401 and "invalid_token" in errors else None
    is_readable = _is_small(response) and "json" in response.headers.get("Content-Type", "").lower()
    return "words" if is_readable and error_in(response.content) in words else None


def _is_repeatable(request: requests.PreparedRequest) -> bool:
    """Whether the body can, as far as one sees, be sent a second time."""
    body: Any = request.body
    if body is None or isinstance(body, bytes | str):
        return True
    if not isinstance(getattr(request, "_body_position", None), int) or not hasattr(body, "seek"):
        return False
    return not hasattr(body, "seekable") or bool(body.seekable())


def rewind(request: requests.PreparedRequest) -> bool:
    """Whether the body can be sent again; a file is wound back for it."""
    if not _is_repeatable(request):
        return False
    if request.body is None or isinstance(request.body, bytes | str):
        return True
    try:
        rewind_body(request)
    except requests.exceptions.UnrewindableBodyError:
        return False
    return True


def _is_small(response: requests.Response) -> bool:
    if getattr(response, "_content_consumed", False):  # not in the stubs
        return True
    length = response.headers.get("Content-Length", "")
    return length.isdecimal() and int(length[:9]) <= _DRAINED


def let_go(response: requests.Response) -> None:
    """Be done with a response that the caller does not get."""
    if _is_small(response):
        response.content  # noqa: B018 - read to its end, the connection goes back to the pool
    response.close()
