"""Using an account: a ``requests.Session`` whose requests carry a good token, no matter who refreshes it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from requests.auth import AuthBase
from requests.utils import rewind_body
from urllib3.util import Retry

from ._records import check_key
from ._urls import origin
from .dpop import Answer, NonceCache, challenge_errors, dpop_flow, error_in, next_proof
from .errors import SessionError, TokenInvalidError, TransportError, printable
from .session import Session, TokenInfo, TokenSet, subject_of
from .session_getter import SessionGetter

_log = logging.getLogger("atproto_session")

#: Connecting and every wait for more of an answer, in seconds, where the caller did not say.
_DEFAULT_TIMEOUT = (10.0, 60.0)
#: The token that was stored, one that another worker has brought, one that is refreshed for this request.
_TOKENS_TRIED = 3
#: How long to wait before a token that was just issued is tried again, each time, in seconds. A server that was just
#: started, or a copy that lags behind, may not know it yet. One that refuses it after all this refuses the session.
_PAUSES = (0.5, 1.0, 2.0, 4.0)
#: For how long a session that was just read is not read again, in seconds. Should its token be replaced meanwhile, the
#: server says so.
_KNOWN_FOR = 0.5
#: Answers to a first try are read to the end up to this size, so that their connection can be used again.
_DRAINED = 65536


class Signer:
    """Signs the requests of one account and judges the answers. No I/O but the getter's.

    :param session: what the getter has just returned: not read again for a request that follows at once.
    :param sleep: lets time pass, in the thread of the caller.
    """

    def __init__(
        self,
        getter: SessionGetter,
        key: str,
        nonces: NonceCache,
        *,
        timeout: float | None = None,
        session: Session | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.getter = getter
        self.key = key
        self._nonces = nonces
        self._timeout = timeout
        self._clock = getter.freshness.clock
        self._sleep = sleep
        self._known = session
        self._known_until = time.monotonic() + _KNOWN_FOR

    def flow(
        self, request: requests.PreparedRequest, audience: str | None = None
    ) -> Generator[requests.PreparedRequest, requests.Response, None]:
        """Yield ``request``, signed, be sent the response, and yield it again while another try is due: with a nonce
        that the server asked for (RFC 9449 section 9), or with a newer token in the place of one that it refused.

        :param audience: the PDS as it was when the URL was made; such a URL follows the account when it moves.
        :raises TokenInvalidError: a token that had just been issued was refused for seconds; the session is ended.
        :raises SessionError: the request would go to somebody else than the account's PDS, or there is no good token.
        """
        try:
            yield from self._flow(request, audience)
        except SessionError as error:
            error.about(self.key)
            raise

    def _flow(
        self, request: requests.PreparedRequest, audience: str | None
    ) -> Generator[requests.PreparedRequest, requests.Response, None]:
        began, rejected, tried, pauses = self._clock(), None, 0, iter(_PAUSES)
        while tried < _TOKENS_TRIED:
            session = self._take_known() or self.getter.get_session(self.key, rejected=rejected, timeout=self._timeout)
            tokens = session.token_set
            _aim(request, audience, tokens)
            audience = tokens.aud
            check_key(self.key, session)
            proofs = dpop_flow(
                session.dpop_key,
                request.method or "GET",
                request.url or "",
                self._nonces,
                access_token=tokens.access_token,
                clock=self._clock,
            )
            proof: str | None = next(proofs)
            while proof is not None:
                request.headers["Authorization"] = f"DPoP {tokens.access_token}"
                request.headers["DPoP"] = proof
                response = yield request
                answer = _answer_of(response)
                if response.ok:
                    self._nonces.check(answer, request.url or "")
                proof = next_proof(proofs, answer)
                if proof is not None and not _rewind(request):
                    return
            if not _is_refused(response):
                return
            if not _rewind(request):
                _log.warning("a request of %s was refused, and its body cannot be sent again", self.key)
                return
            just_issued = (session.refreshed_at or 0.0) >= began and not self.getter.freshness.is_expired(tokens)
            if rejected is None or not just_issued:
                rejected, tried = tokens.access_token, tried + 1
            elif (pause := next(pauses, None)) is not None:
                self._sleep(pause)  # the next try takes what is stored by then
            else:
                self._give_up(session)
                return

    def forget(self) -> None:
        """Read the session again for the next request, however recently that was done."""
        self._known = None

    def _take_known(self) -> Session | None:
        known, self._known = self._known, None
        if known is None or time.monotonic() >= self._known_until or self.getter.freshness.is_stale(known.token_set):
            return None
        return known

    def _give_up(self, session: Session) -> None:
        """End a session whose server refuses what was just issued; unless another worker has renewed it meanwhile."""
        cause = TokenInvalidError(f"the server of {self.key} refuses tokens that were just issued; log in again")
        self.getter.delete_rejected(self.key, session, cause)
        if self.getter.get_stored(self.key) is None:
            raise cause


class DPoPAdapter(BaseAdapter):
    """Sends the requests of one account over the connections of its client. The proof is made here, below redirects
    and proxies, so that no two requests share one."""

    def __init__(self, signer: Signer, pool: BaseAdapter, audience: str) -> None:
        super().__init__()
        self.audience = audience
        self._signer = signer
        self._pool = pool

    def send(  # noqa: PLR0917 - as in requests
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: float | tuple[float, float] | tuple[float, None] | None = None,
        verify: bool | str = True,
        cert: bytes | str | tuple[bytes | str, bytes | str] | None = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        flow = self._signer.flow(request, self.audience)
        signed = next(flow)
        while True:
            response = self._pool.send(signed, stream, timeout or _DEFAULT_TIMEOUT, verify, cert, proxies)
            _read_refusal(response, stream)
            again = _resume(flow, response)
            if again is None:
                return response
            _let_go(response)
            signed = again

    def close(self) -> None:
        """Nothing: the connections are the client's."""


class OAuthSession(requests.Session):
    """One account, ready to use: a ``requests.Session`` for its PDS. Relative URLs go there, and nothing else may:
    tokens are for the PDS alone, so a request or a redirect to another origin is a :exc:`.TransportError`. A request
    without ``timeout`` has 10 seconds to connect and 60 between any two pieces of the answer. Beside what requests
    raises, a request raises what :meth:`.SessionGetter.get_session` does. Made by :class:`.OAuthClient`; cheap, so make
    one for each thread.

    :ivar did: the account's DID.
    """

    def __init__(self, signer: Signer, pool: HTTPAdapter, session: Session) -> None:
        self._signer = signer
        self._adapter = DPoPAdapter(signer, pool, session.token_set.aud)
        super().__init__()
        self.adapters.clear()
        self.auth = _unchanged  # or requests would read ~/.netrc for every request
        super().mount("", self._adapter)
        self.did = subject_of(signer.key)

    def mount(self, prefix: str | bytes, adapter: BaseAdapter) -> None:
        """As in requests. What ``adapter`` sends is signed before, and goes to the account's PDS alone. If it repeats
        requests of its own accord (``max_retries``), it is asked not to: the second time, a proof would be refused."""
        if isinstance(adapter, HTTPAdapter):
            adapter.max_retries = Retry(0, read=False)
        super().mount(prefix, DPoPAdapter(self._signer, adapter, self._adapter.audience))

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        """As in requests, with a relative URL taken from the account's PDS."""
        request.url = urljoin(self._adapter.audience, request.url or "")
        return super().prepare_request(request)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """As in requests, which does not expect any text in a ``Location``.

        :raises TransportError: the redirect leads to no http or https URL.
        """
        target = super().get_redirect_target(resp)
        if target is not None:
            try:
                origin(urljoin(resp.url, target))
            except ValueError as error:
                resp.close()
                raise TransportError(
                    f"{self._adapter.audience} redirects to an address that {printable(str(error))}",
                    sent=True,
                    retryable=False,
                ) from None
        return target

    def token_info(self, refresh: Literal["auto"] | bool = "auto") -> TokenInfo:
        """What may be shown of the tokens. ``refresh`` and the errors as in :meth:`.SessionGetter.get_session`."""
        tokens = self._signer.getter.get_session(self._signer.key, refresh).token_set
        expired = None if tokens.expires_at is None else self._signer.getter.freshness.is_expired(tokens)
        return TokenInfo(tokens.expires_at, expired, tokens.scope, tokens.iss, tokens.aud, tokens.sub)

    def sign_out(self) -> None:
        """Delete the session here, and end it at its server if that can be reached.

        :raises StoreError: the store cannot be written.
        """
        self._signer.forget()
        self._signer.getter.delete_stored(self._signer.key, revoke=True)

    def __repr__(self) -> str:
        return f"<OAuthSession {self._signer.key}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("an OAuthSession cannot be pickled; send the DID, and call client.restore(did) over there")


class AccountAuth(AuthBase):
    """Authentication for requests made with a ``requests.Session`` of the program's own::

    requests.get(url, auth=client.auth(did))
    """

    def __init__(self, signer: Signer) -> None:
        self._signer = signer

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if not isinstance(request, requests.PreparedRequest):
            raise TypeError(f"client.auth() is for requests, not for {type(request).__module__.partition('.')[0]}")
        flow = self._signer.flow(request)
        next(flow)
        request.hooks["response"].append(_SignedRequest(self._signer, request, flow))
        return request

    def __repr__(self) -> str:
        return f"<AccountAuth {self._signer.key}>"


class _SignedRequest:
    """Goes on with a signed request once its response is there."""

    def __init__(
        self,
        signer: Signer,
        request: requests.PreparedRequest,
        flow: Generator[requests.PreparedRequest, requests.Response, None],
    ) -> None:
        self._signer = signer
        self._url = request.url
        self._flow = flow

    def __call__(self, response: requests.Response, **options: Any) -> requests.Response:
        request = response.request
        _read_refusal(response, options.get("stream", False))
        if request.url == self._url:
            signed = _resume(self._flow, response)
        # requests makes the request of a redirect from the first one: with its proof, which is another URL's, and, if
        # it leads elsewhere, without its token.
        elif response.status_code == 401 and "Authorization" in request.headers and _rewind(request):
            self._url, self._flow = request.url, self._signer.flow(request)
            signed = next(self._flow)
        else:
            return response
        while signed is not None:
            _let_go(response)
            again: requests.Response = response.connection.send(signed, **options)
            again.history.append(response)
            response = again
            _read_refusal(response, options.get("stream", False))
            signed = _resume(self._flow, response)
        return response


def _resume(
    flow: Generator[requests.PreparedRequest, requests.Response, None], response: requests.Response
) -> requests.PreparedRequest | None:
    try:
        return flow.send(response)
    except StopIteration:
        return None
    except BaseException:
        response.close()
        raise


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


def _is_refused(response: requests.Response) -> bool:
    """Whether it was the token that the server did not like (RFC 6750 section 3.1). Some say so by the error of an XRPC
    method alone. A 403 never is about that."""
    if response.status_code == 400 and _is_small(response) and "json" in response.headers.get("Content-Type", ""):
        return error_in(response.content) == "ExpiredToken"
    return response.status_code == 401 and "invalid_token" in challenge_errors(response.headers)


def _rewind(request: requests.PreparedRequest) -> bool:
    """Whether the body can be sent again; a file is wound back for it."""
    if request.body is None or isinstance(request.body, bytes | str):
        return True
    if not isinstance(request._body_position, int):
        return False
    try:
        rewind_body(request)
    except requests.exceptions.UnrewindableBodyError:
        return False
    return True


def _read_refusal(response: requests.Response, stream: bool) -> None:
    """Read a body that may ask for a nonce, of whatever length, unless it is the caller's to read: requests would do so
    in a moment."""
    if not stream and response.status_code in (400, 401):
        response.content  # noqa: B018


def _is_small(response: requests.Response) -> bool:
    if getattr(response, "_content_consumed", False):  # not in the stubs
        return True
    length = response.headers.get("Content-Length", "")
    return length.isdecimal() and int(length[:9]) <= _DRAINED


def _let_go(response: requests.Response) -> None:
    if _is_small(response):
        response.content  # noqa: B018 - read to its end, the connection goes back to the pool
    response.close()


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
