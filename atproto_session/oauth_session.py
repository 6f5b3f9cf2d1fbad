"""Using an account: a ``requests.Session`` whose requests carry a good token, no matter who refreshes it."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any, Literal
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from requests.auth import AuthBase
from requests.cookies import RequestsCookieJar, merge_cookies
from requests.hooks import default_hooks
from requests.sessions import merge_hooks, merge_setting
from requests.structures import CaseInsensitiveDict
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util import Retry, Timeout

from ._adapter import Bounds, HardenedAdapter
from ._checks import check_seconds
from ._environment import Environment
from ._fork import importing
from ._signer import Flow, Signer, let_go, rewind
from ._urls import origin
from .errors import TransportError, printable
from .session import Session, TokenInfo, subject_of

#: Connecting and every wait for more of an answer, in seconds, where the caller did not say.
_DEFAULT_TIMEOUT = (10.0, 60.0)
#: A ``RateLimit-Reset`` from here on is a time, in seconds since 1970; below, it is seconds from now.
_A_DATE = 1_000_000_000
#: What a new session of requests has.
_new_session = functools.cache(requests.Session)


class DPoPAdapter(BaseAdapter):
    """Sends the requests of one account over another adapter. The proof is made here, below redirects and proxies, so
    that no two requests share one.

    :param below: the connections.
    :param retries: which requests are sent again, and when; beside those that the signer sends again.
    """

    def __init__(self, signer: Signer, below: BaseAdapter, audience: str, *, retries: Retry | None = None) -> None:
        super().__init__()
        self.audience = audience
        self._signer = signer
        self._below = below
        self._retries = retries

    def send(  # noqa: PLR0917 - as in requests
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: float | tuple[float | None, float | None] | Timeout | None = None,
        verify: bool | str = True,
        cert: bytes | str | tuple[bytes | str, bytes | str] | None = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """As in requests.

        :param timeout: may be :class:`.Bounds`, too: then all tries have to be over by their deadline.
        """
        deadline = timeout.deadline if isinstance(timeout, Bounds) else None
        tries = _Tries(self._retries, self._signer, deadline)

        def send(signed: requests.PreparedRequest) -> requests.Response:
            left = self._within(timeout, deadline, signed)
            response = self._below.send(signed, stream, left, verify, cert, proxies)
            _read_refusal(response, stream)
            return response

        flow = self._signer.flow(request, self.audience, deadline=deadline)
        signed: requests.PreparedRequest | None = next(flow)
        while signed is not None:
            response = tries.send(signed, send)
            signed = _resume(flow, response)
            if signed is not None:
                let_go(response)
        return response

    def _within(self, timeout: Any, deadline: float | None, request: requests.PreparedRequest) -> Any:
        """``timeout`` for a try that begins now."""
        timeout = timeout or _DEFAULT_TIMEOUT
        if deadline is None:
            return timeout
        left = deadline - self._signer.monotonic()
        if left <= 0:
            raise requests.exceptions.Timeout("the total_timeout of the request is over", request=request)
        if isinstance(self._below, HardenedAdapter):
            return Bounds(within=left, connect=timeout.connect_timeout, read=timeout.read_timeout)
        # Another adapter can be told how long each wait may be, and no more.
        return tuple(min(left, wait or left) for wait in (timeout.connect_timeout, timeout.read_timeout))

    def close(self) -> None:
        """Nothing: the connections are the client's."""


class _Tries:
    """Sends a request as often as ``Retry`` allows. Not left to urllib3, which knows of no deadline."""

    def __init__(self, retries: Retry | None, signer: Signer, deadline: float | None) -> None:
        self._retries = retries
        self._signer = signer
        self._deadline = deadline

    def send(
        self, request: requests.PreparedRequest, send: Callable[[requests.PreparedRequest], requests.Response]
    ) -> requests.Response:
        while True:
            try:
                response = send(request)
            except requests.RequestException as error:
                # What requests raises holds what urllib3 raised, and that may hold what happened first.
                cause = error.args[0] if error.args else None
                cause = cause.reason if isinstance(cause, MaxRetryError) else cause
                if not isinstance(cause, HTTPError):
                    raise
                pause = self._pause_before_next(request, error=cause)
                if pause is None:
                    raise
            else:
                pause = self._pause_after(request, response)
                if pause is None:
                    return response
                let_go(response)
            self._signer.sleep(pause)

    def _pause_after(self, request: requests.PreparedRequest, response: requests.Response) -> float | None:
        if self._retries is None:
            return None
        after = retry_after(response.headers, self._signer.getter.freshness.clock())
        if not self._retries.is_retry(request.method or "", response.status_code, after is not None):
            return None
        return self._pause_before_next(request, after, response=response.raw)

    def _pause_before_next(
        self, request: requests.PreparedRequest, after: str | None = None, **outcome: Any
    ) -> float | None:
        """Count a try that ended with ``outcome``. How long to wait before the next; ``None`` if it was the last."""
        if self._retries is None:
            return None
        try:
            retries = self._retries.increment(request.method, request.url, **outcome)
        except MaxRetryError as error:
            if "response" in outcome and self._retries.raise_on_status:
                outcome["response"].close()  # nobody gets it
                raise requests.exceptions.RetryError(error, request=request) from error
            return None
        except HTTPError:
            return None
        pause = retries.get_backoff_time()
        if after is not None and retries.respect_retry_after_header:
            with suppress(HTTPError, ValueError):  # neither a number nor a date
                pause = retries.parse_retry_after(after)
        if not rewind(request) or not self._signer.has_time(pause, self._deadline):
            return None
        self._retries = retries
        return pause


def retry_after(headers: Mapping[str, str], now: float) -> str | None:
    """What the server says in ``Retry-After`` (RFC 9110 section 10.2.3), or else in ``RateLimit-Reset``: when the limit
    that a request has met ends, in seconds from now or, in the AT Protocol's own servers, since 1970."""
    if (said := headers.get("Retry-After")) is not None:
        return said
    reset = (headers.get("RateLimit-Reset") or "").strip()
    if not (reset.isascii() and reset.isdecimal() and len(reset) <= 10):
        return None
    seconds = int(reset)
    return str(max(0, math.ceil(seconds - now)) if seconds >= _A_DATE else seconds)


class OAuthSession(requests.Session):
    """One account, ready to use: a ``requests.Session`` for its PDS. Relative URLs go there, and nothing else may:
    tokens are for the PDS alone, so a request or a redirect to another origin is a :exc:`.TransportError`. A request
    without ``timeout`` has 10 seconds to connect and 60 between any two pieces of the answer. Beside what requests
    raises, a request raises what :meth:`.SessionGetter.get_session` does. Made by :class:`.OAuthClient`; cheap, so make
    one for each thread.

    Adapters of your own (``mount``) send what was signed here. A body that can be read only once (a generator, a pipe)
    is not sent a second time: where that was needed, the log and the ``reason`` of the response say so.

    :ivar did: the account's DID.
    :ivar total_timeout: how many seconds a request may take in all: waiting for a refresh, redirects, all tries, and
        the answer to its last byte. By default ``None``, any number. An adapter of your own keeps to it in each of its
        waits.
    """

    def __init__(
        self,
        signer: Signer,
        pool: HTTPAdapter,
        session: Session,
        environment: Environment,
        *,
        retries: Retry | int | None = None,
    ) -> None:
        self._signer = signer
        self._adapter = DPoPAdapter(
            signer, pool, session.token_set.aud, retries=None if retries is None else Retry.from_int(retries)
        )
        self._environment = environment
        self.total_timeout: float | None = None
        # As requests.Session.__init__ does, but for the adapters that it makes, here to be thrown away.
        like = _new_session()
        self.__dict__.update(vars(like))
        self.headers = CaseInsensitiveDict(like.headers)
        self.proxies, self.params, self.hooks = {}, {}, default_hooks()
        self.cookies = RequestsCookieJar()
        self.adapters = OrderedDict([("", self._adapter)])
        self.auth = _unchanged  # or requests would read ~/.netrc for every request
        self.trust_env = environment.trusted
        self.did = subject_of(signer.key)

    def get_adapter(self, url: str | bytes) -> BaseAdapter:
        """As in requests. What an adapter of your own sends is signed before, and goes to the account's PDS alone."""
        adapter = super().get_adapter(url)  # type: ignore[arg-type]
        if isinstance(adapter, DPoPAdapter):
            return adapter
        return DPoPAdapter(self._signer, adapter, self._adapter.audience)

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        """As in requests, with a relative URL taken from the account's PDS.

        :raises TypeError: the URL is no text.
        """
        url: object = request.url
        if isinstance(url, bytes):
            url = url.decode("utf-8", "replace")
        if not isinstance(url, str):
            raise TypeError(
                f"the url of a request is a str, such as '/xrpc/app.bsky.feed.getTimeline', not {type(url).__name__}"
            )
        pds = self._adapter.audience
        is_simple = url.startswith("/") and "//" not in url and "/." not in url and pds.count("/") == 2
        request.url = pds + url if is_simple else urljoin(pds, url)
        cookies: Any = merge_cookies(RequestsCookieJar(), self.cookies)  # type: ignore[no-untyped-call]
        # What requests does, but ~/.netrc is not looked at, and nothing is merged where there is one side only.
        prepared = requests.PreparedRequest()
        with nullcontext() if url.isascii() else importing():  # a name beyond ASCII needs the tables of Unicode
            prepared.prepare(
                method=(request.method or "").upper(),
                url=request.url,
                files=request.files,
                data=request.data,
                json=request.json,
                headers=_merged(request.headers, self.headers, CaseInsensitiveDict),
                params=_merged(request.params, self.params) or None,
                auth=self.auth if request.auth is None else request.auth,
                cookies=merge_cookies(cookies, request.cookies or {}),  # type: ignore[no-untyped-call]
                hooks=merge_hooks(request.hooks, self.hooks),  # type: ignore[no-untyped-call]
            )
        return prepared

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """As in requests."""
        if "proxies" not in options:
            options["proxies"] = self._resolved(request.url or "", self.proxies or {})
        timeout = options.get("timeout")
        if self.total_timeout is not None:
            check_seconds(total_timeout=self.total_timeout)
        # The requests of a redirect come here with the bounds of the first one.
        if self.total_timeout is not None and not isinstance(timeout, Bounds):
            if not isinstance(timeout, Timeout):
                timeout = timeout or _DEFAULT_TIMEOUT
                connect, read = timeout if isinstance(timeout, tuple) else (timeout, timeout)
                timeout = Timeout(connect=connect, read=read)
            timeout = timeout.clone()
            timeout.start_connect()  # or one with a total does not tell
            waits: Any = {"connect": timeout.connect_timeout, "read": timeout.read_timeout}
            options["timeout"] = Bounds(within=self.total_timeout, **waits)
        return super().send(request, **options)

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        """As in requests, from the environment as it was when the client was made."""
        if self.trust_env and (verify is None or verify is True):
            verify = self._environment.ca_bundle or verify
        given = proxies or {}
        found = self._environment.proxies_for(url, given.get("no_proxy")) if self.trust_env else {}
        merged = {**found, **given}
        if self.proxies is not None:
            merged = {name: proxy for name, proxy in {**self.proxies, **merged}.items() if proxy is not None}
        return {
            "proxies": merged,
            "stream": self.stream if stream is None else stream,
            "verify": self.verify if verify is None else verify,
            "cert": self.cert if cert is None else cert,
        }

    def rebuild_proxies(self, prepared_request: Any, proxies: Any) -> Any:
        """As in requests, from the environment as it was when the client was made."""
        resolved = self._resolved(prepared_request.url, proxies or {})
        trusted, self.trust_env = self.trust_env, False  # requests would read it again
        try:
            return super().rebuild_proxies(prepared_request, resolved)  # type: ignore[no-untyped-call]
        finally:
            self.trust_env = trusted

    def _resolved(self, url: str, proxies: Mapping[str, str]) -> dict[str, str]:
        """``proxies``, and that of the environment for ``url`` if they have none."""
        found = self._environment.proxies_for(url, proxies.get("no_proxy")) if self.trust_env else {}
        scheme = urlsplit(url).scheme
        proxy = found.get(scheme, found.get("all"))
        return {**({scheme: proxy} if proxy else {}), **proxies}

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

    def sign_out(self, timeout: float | None = None) -> None:
        """Delete the session here, and end it at its server if that can be reached.

        :param timeout: how long to wait, all told, in seconds; by default the client's. A server that takes longer is
            told in the background.
        :raises StoreError: the store cannot be written.
        :raises LockTimeoutError: ``timeout`` is over and the store has not answered. The session is deleted as soon as
            it does.
        :raises TokenRefreshError: it is the session of another client, and is kept.
        """
        self._signer.forget()
        self._signer.getter.delete_stored(self._signer.key, revoke=True, timeout=timeout)

    def __repr__(self) -> str:
        return f"<OAuthSession {self._signer.key}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("an OAuthSession cannot be pickled or copied; call client.restore(did), over there or here")


class AccountAuth(AuthBase):
    """Authentication for requests made with a ``requests.Session`` of the program's own::

    requests.get(url, auth=client.auth(did))
    """

    def __init__(self, signer: Signer, pool: HTTPAdapter, environment: Environment) -> None:
        self._signer = signer
        self._pool = pool
        self._environment = environment

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if not isinstance(request, requests.PreparedRequest):
            library = type(request).__module__.partition(".")[0]
            instead = "; use atproto_session.contrib.httpx" if library == "httpx" else ""
            raise TypeError(f"client.auth() is for requests, not for {library}{instead}")
        flow = self._signer.flow(request)
        signed: requests.PreparedRequest | None = next(flow)
        while signed is not None and signed is not request:  # a nonce is fetched first, over the client's connections
            of_environment: dict[str, Any] = {}
            if self._environment.trusted:
                proxies = self._environment.proxies_for(signed.url or "")
                of_environment = {"proxies": proxies, "verify": self._environment.ca_bundle or True}
            response = self._pool.send(signed, timeout=_DEFAULT_TIMEOUT, **of_environment)
            _read_refusal(response, stream=False)
            signed = _resume(flow, response)
            let_go(response)
        request.hooks["response"].append(_SignedRequest(self._signer, request, flow))
        return request

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("client.auth(did) cannot be pickled or copied; call it again, over there or here")

    def __repr__(self) -> str:
        return f"<AccountAuth {self._signer.key}>"


class _SignedRequest:
    """Goes on with a signed request once its response is there."""

    def __init__(
        self,
        signer: Signer,
        request: requests.PreparedRequest,
        flow: Flow,
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
        elif response.status_code == 401 and "Authorization" in request.headers and rewind(request):
            self._url, self._flow = request.url, self._signer.flow(request)
            signed = next(self._flow)
        else:
            return response
        while signed is not None:
            let_go(response)
            again: requests.Response = response.connection.send(signed, **options)
            again.history.append(response)
            response = again
            _read_refusal(response, options.get("stream", False))
            signed = _resume(self._flow, response)
        return response


def _resume(flow: Flow, response: requests.Response) -> requests.PreparedRequest | None:
    try:
        return flow.send(response)
    except StopIteration:
        return None
    except BaseException:
        response.close()
        raise


def _read_refusal(response: requests.Response, stream: bool) -> None:
    """Read a body that may ask for a nonce, of whatever length, unless it is the caller's to read: requests would do so
    in a moment."""
    if not stream and response.status_code in (400, 401):
        response.content  # noqa: B018


def _merged(of_request: Any, of_session: Any, kind: Any = OrderedDict) -> Any:
    """As ``merge_setting`` of requests, in less time where the request has nothing of its own."""
    if not of_request and isinstance(of_session, kind | dict) and None not in of_session.values():
        return of_session
    return merge_setting(of_request, of_session, kind)  # type: ignore[no-untyped-call]


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
