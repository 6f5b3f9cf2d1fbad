"""Which server answers which request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from .errors import OAuthError
from .nonces import Nonces
from .wire import Request, Response

Process = Callable[[Request], Response]


class NonceServer(Protocol):
    """A server that hands out DPoP nonces."""

    nonces: Nonces

    def refuse(self, error: OAuthError) -> Response:
        """The error as this server words it, with a nonce."""
        ...


@dataclass(frozen=True)
class Route:
    """One path of one server.

    :ivar path: the whole path, or what it begins with if it ends in ``*``.
    :ivar endpoint: the name that faults know it by.
    :ivar server: who answers, or ``None`` for one that knows no nonces.
    """

    method: str
    path: str
    endpoint: str
    process: Process
    server: NonceServer | None = None

    def leads_to(self, path: str) -> bool:
        return path.startswith(self.path[:-1]) if self.path.endswith("*") else path == self.path

    def allows(self, method: str) -> bool:
        return self.method in (method, "*")


def find_route(routes: Iterable[Route], request: Request) -> Route | Response:
    """The first route for a request, or the 404 or 405 that says there is none."""
    allowed = [route for route in routes if route.leads_to(request.path)]
    if not allowed:
        return Response.of_json({"error": "NotFound", "message": "Not Found"}, 404)
    for route in allowed:
        if route.allows(request.method):
            return route
    return Response.of_json({"error": "MethodNotAllowed", "message": "Method Not Allowed"}, 405)


def endpoints_of(route: Route, request: Request) -> frozenset[str]:
    """The names that a request answers to: that of its route, and ``refresh`` for a refresh."""
    names = {route.endpoint}
    if route.endpoint == "token" and b"grant_type=refresh_token" in request.body:
        names.add("refresh")
    return frozenset(names)
