"""Faults: what can go wrong between a client and a server, on demand.

A fault waits at an endpoint for the next request and does one thing to it; see :data:`ACTIONS`. Some act before the
request is processed (the refresh token stays unspent), some after (it is spent, and only the answer suffers).

A request that the server answers with a demand for a nonce is on its way to come again: faults that act after the
processing leave it alone and wait for the next one.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from .authorization_server import NO_REFRESH_TOKEN
from .errors import OAuthError, use_nonce
from .routes import NonceServer, Process, Route
from .wire import ConnectionCut, Drip, Ending, Request, Response

#: Where a fault may wait. ``refresh`` is the token endpoint with ``grant_type=refresh_token`` only.
ENDPOINTS = frozenset(
    {
        *("token", "refresh", "par", "revoke", "authorize", "resource"),
        *("plc", "protected-resource", "as-metadata", "resolve-handle"),
    }
)
_WITH_NONCES = frozenset({"token", "refresh", "par", "revoke", "resource"})


class Fault:
    """A fault that was set with :meth:`LocalNetwork.fault`.

    :ivar arrived: set when a request that the fault applies to is here.
    :ivar fired: set when the fault has taken effect. For one that acts after the processing, the request has been
        processed by then; for one that holds, the request is being held.
    :ivar release: set it to let held requests and answers go.
    """

    def __init__(
        self, endpoint: str, action: str, options: Mapping[str, Any], *, times: int | None, after: int
    ) -> None:
        self.endpoint = endpoint
        self.action = action
        self.options = options
        self.arrived = threading.Event()
        self.fired = threading.Event()
        self.release = threading.Event()
        self._times = times
        self._after = after
        self._count = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Fault {self.action} at {self.endpoint}, {self.count} times so far>"

    @property
    def count(self) -> int:
        """How many requests it has been applied to."""
        with self._lock:
            return self._count

    def disarm(self) -> None:
        """Apply it to no further request, and let go of those it holds."""
        with self._lock:
            self._times = self._count
        self.release.set()

    def take(self) -> bool:
        """Whether it applies to the request that is here now."""
        with self._lock:
            if self._times is not None and self._count >= self._times:
                return False
            if self._after > 0:
                self._after -= 1
                return False
            self._count += 1
        self.arrived.set()
        return True

    def give_back(self) -> None:
        """Wait for another request instead."""
        with self._lock:
            self._count -= 1


class _NotThisOne(Exception):
    def __init__(self, response: Response) -> None:
        self.response = response


@dataclass(frozen=True)
class Call:
    """A request that a fault applies to."""

    fault: Fault
    request: Request
    process: Process
    server: NonceServer | None

    def fire(self) -> None:
        self.fault.fired.set()

    def processed(self, mark: str | None = None) -> Response:
        """The server's answer, after which the fault counts as fired."""
        request = self.request
        if mark is not None:
            request = replace(request, marks=request.marks | {mark})
        response = self.process(request)
        if _demands_nonce(response):
            raise _NotThisOne(response)
        self.fire()
        return response

    def changed(self, **changes: Any) -> Response:
        """A successful answer with other members in its JSON object; ``None`` takes a member out."""
        response = self.process(self.request)
        if response.status != 200:
            raise _NotThisOne(response)
        members = {name: value for name, value in {**response.json(), **changes}.items() if value is not None}
        self.fire()
        return replace(response, body=Response.of_json(members).body)

    def answered(self, response: Response, *, processed: bool) -> Response:
        """``response`` in place of the server's, whether or not the server processes the request."""
        if processed:
            self.processed()
        else:
            self.fire()
        return response

    def refused(self, error: OAuthError, *, new_nonce: bool = False) -> Response:
        if self.server is None:  # pragma: no cover - Faults.set() keeps such faults away from these endpoints
            raise ValueError("this endpoint knows no OAuth errors")
        if new_nonce:
            self.server.nonces.rotate()
        self.fire()
        return self.server.refuse(error)

    def held(self, seconds: float | None) -> None:
        self.fault.release.wait(seconds)


def _demands_nonce(response: Response) -> bool:
    if response.status not in (400, 401):
        return False
    return b"use_dpop_nonce" in response.body


# Actions


def cut_before(call: Call) -> Response:
    """Close the connection; the request is never processed."""
    call.fire()
    raise ConnectionCut


def cut_after(call: Call) -> Response:
    """Process the request, then close the connection instead of answering."""
    call.processed()
    raise ConnectionCut


def hold(call: Call, *, seconds: float | None = None) -> Response:
    """Process the request only after ``seconds``, or when released."""
    call.fire()
    call.held(seconds)
    return call.process(call.request)


def late(call: Call, *, seconds: float | None = None) -> Response:
    """Process the request, but answer only after ``seconds``, or when released."""
    response = call.processed()
    call.held(seconds)
    return response


def drip(call: Call, *, interval: float = 0.05, body_only: bool = False) -> Response:
    """Process the request and answer one byte every ``interval`` seconds, until released."""
    return replace(call.processed(), drip=Drip(interval, call.fault.release, body_only))


def rewritten(call: Call, *, rewrite: Callable[[bytes, bytes], bytes], ending: Ending = "close") -> Response:
    """Process the request and send what ``rewrite`` makes of the bytes of the head and of the body of the answer; then
    ``"close"``, ``"reset"`` or ``"keep"`` the connection."""
    return replace(call.processed(), rewrite=rewrite, ending=ending)


def status(
    call: Call,
    *,
    status: int = 503,
    body: str | bytes = "",
    headers: Mapping[str, str] = MappingProxyType({}),
    processed: bool = False,
) -> Response:
    """Answer with this status, as a gateway might."""
    content = body.encode() if isinstance(body, str) else body
    return call.answered(Response(status, content, {"Content-Type": "text/plain", **headers}), processed=processed)


def html(call: Call, *, status: int = 200, processed: bool = False) -> Response:
    """Answer with a page of HTML, as a captive portal might."""
    page = Response.of_text("<!doctype html><title>Welcome</title>", status, "text/html; charset=utf-8")
    return call.answered(page, processed=processed)


def oversize(call: Call, *, size: int = 5_000_000, chunked: bool = False, processed: bool = False) -> Response:
    """Answer with a JSON object of ``size`` bytes; ``chunked`` gives no warning in a ``Content-Length``."""
    body = b'{"padding":"%b"}' % (b" " * (size - 14))
    response = Response(200, body, {"Content-Type": "application/json"}, chunked=chunked)
    return call.answered(response, processed=processed)


def redirect(call: Call, *, to: str, status: int = 302) -> Response:
    """Send the client elsewhere."""
    return call.answered(Response(status, headers={"Location": to}), processed=False)


def oauth_error(
    call: Call, *, error: str, description: str = "", status: int = 400, processed: bool = False
) -> Response:
    """Answer with an OAuth error in the server's own form."""
    if processed:
        call.processed()
    return call.refused(OAuthError(error, description, status))


def nonce_challenge(call: Call) -> Response:
    """Demand a nonce newer than any that was handed out."""
    return call.refused(use_nonce(), new_nonce=True)


def no_nonce(call: Call) -> Response:
    """Leave ``DPoP-Nonce`` out of the answer."""
    response = call.processed()
    return replace(response, headers={n: v for n, v in response.headers.items() if n.lower() != "dpop-nonce"})


def wrong_sub(call: Call, *, sub: str = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa") -> Response:
    """Name another account in the token response."""
    return call.changed(sub=sub)


def scope_without_atproto(call: Call, *, scope: str = "transition:generic") -> Response:
    """Name scopes without ``atproto`` in the token response."""
    return call.changed(scope=scope)


def wrong_token_type(call: Call, *, token_type: str = "Bearer") -> Response:  # noqa: S107 - a scheme's name
    """Name another token type in the token response."""
    return call.changed(token_type=token_type)


def no_expires_in(call: Call) -> Response:
    """Do not say when the access token expires."""
    return call.changed(expires_in=None)


def no_refresh_token(call: Call) -> Response:
    """Issue an access token alone; a refresh token that was used for it stays valid."""
    return call.processed(NO_REFRESH_TOKEN)


def custom(call: Call, *, respond: Callable[[Request], Response]) -> Response:
    """Answer as ``respond`` says. It may raise :class:`ConnectionCut`."""
    call.fire()
    return respond(call.request)


#: Every action, by the name that :meth:`LocalNetwork.fault` takes.
ACTIONS: Mapping[str, Callable[..., Response]] = {
    action.__name__: action
    for action in (
        *(cut_before, cut_after, hold, late, drip, rewritten),
        *(status, html, oversize, redirect, oauth_error, nonce_challenge, no_nonce),
        *(wrong_sub, scope_without_atproto, wrong_token_type, no_expires_in, no_refresh_token, custom),
    )
}


class Faults:
    """The faults of one network, first set, first applied."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def set(self, endpoint: str, action: str, *, times: int | None, after: int, options: Mapping[str, Any]) -> Fault:
        """Arm a fault.

        :raises ValueError: there is no such endpoint or action, or not the one at the other.
        :raises TypeError: the action has no such option.
        """
        if endpoint not in ENDPOINTS:
            raise ValueError(f"no endpoint {endpoint!r}; there are {', '.join(sorted(ENDPOINTS))}")
        if action not in ACTIONS:
            raise ValueError(f"no action {action!r}; there are {', '.join(sorted(ACTIONS))}")
        if action in ("nonce_challenge", "oauth_error") and endpoint not in _WITH_NONCES:
            raise ValueError(f"{action} makes no sense at {endpoint}")
        inspect.signature(ACTIONS[action]).bind(None, **options)
        fault = Fault(endpoint, action, options, times=times, after=after)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Disarm every fault."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.disarm()

    def answer(self, endpoints: Iterable[str], route: Route, request: Request) -> Response:
        """Answer a request, through the first fault that applies to it."""
        with self._lock:
            waiting = [fault for fault in self._faults if fault.endpoint in endpoints]
        fault = next((fault for fault in waiting if fault.take()), None)
        if fault is None:
            return route.process(request)
        try:
            return ACTIONS[fault.action](Call(fault, request, route.process, route.server), **fault.options)
        except _NotThisOne as passed:
            fault.give_back()
            return passed.response
