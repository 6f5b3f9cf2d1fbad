"""Which server answers which request."""

from __future__ import annotations

import pytest

from atproto_session.testing.network import Request, Response
from atproto_session.testing.network.routes import Route, endpoints_of, find_route

TOKEN = Route("POST", "/oauth/token", "token", lambda _: Response())
ANY = Route("*", "/xrpc/*", "resource", lambda _: Response())


@pytest.mark.parametrize(
    ("method", "path", "found"),
    [
        ("POST", "/oauth/token", TOKEN),
        ("GET", "/oauth/token", 405),
        ("POST", "/oauth/token/", 404),
        ("PUT", "/xrpc/a.b.c", ANY),
        ("GET", "/xrpc/", ANY),
        ("GET", "/xrpc", 404),
    ],
)
def test_a_route_is_found_by_path_and_method(method: str, path: str, found: Route | int) -> None:
    answer = find_route((TOKEN, ANY), Request(method, "http://localhost:1", path))
    assert (answer.status if isinstance(answer, Response) else answer) == found


def test_a_refresh_has_a_name_of_its_own_beside_that_of_its_endpoint() -> None:
    refresh = Request("POST", "http://localhost:1", "/oauth/token", body=b"grant_type=refresh_token&x=y")
    exchange = Request("POST", "http://localhost:1", "/oauth/token", body=b"grant_type=authorization_code")
    assert endpoints_of(TOKEN, refresh) == {"token", "refresh"}
    assert endpoints_of(TOKEN, exchange) == {"token"}
    assert endpoints_of(ANY, refresh) == {"resource"}
