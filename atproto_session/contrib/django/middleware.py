"""``request.atproto``, and what becomes of the errors that views leave to it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from django.contrib.auth import logout
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.shortcuts import render
from django.urls import reverse
from django.utils.cache import add_never_cache_headers
from django.utils.functional import SimpleLazyObject

from ...errors import SessionError
from .. import _web
from .accounts import BrowserAccounts, NobodyLoggedInError
from .conf import keeping_connections

log = logging.getLogger("atproto_session.contrib.django")


class ATProtoMiddleware:
    """Belongs behind ``django.contrib.auth.middleware.AuthenticationMiddleware``.

    A view may leave the errors of accounts alone: a session that is over leads to the log-in, if it is this browser's
    own, and what a server does not do at the moment is a 502, 503 or 504. Those who ask for JSON get JSON.

    Somebody who has logged in with an account is logged in as long as that session is in the store. A copy of the
    cookie from before a log-out is of no use, wherever Django keeps its sessions.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        request.atproto = BrowserAccounts(request)  # type: ignore[attr-defined]
        user = getattr(request, "user", None)
        if user is not None:
            request.user = SimpleLazyObject(lambda: _user_of(request, user))  # type: ignore[assignment]
            request.auser = _later(request)
        with keeping_connections():
            return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        accounts: BrowserAccounts = request.atproto  # type: ignore[attr-defined]
        did = getattr(error, "did", None)
        if isinstance(error, NobodyLoggedInError):
            return to_login(request)
        if did is not None and any(_web.is_over(error, *own) for own in accounts.items()):
            log.info("a session is over: %s", error)
            forget(request, did)
            return to_login(request)
        problem = _web.problem_of(error)
        if problem is None:
            return None
        log.warning("%s %s: %s", request.method, request.path, _said(error))
        return answer(request, problem)


def forget(request: HttpRequest, did: str) -> None:
    """Take an account that is over out of this browser; its user too, who has logged in with it."""
    accounts: BrowserAccounts = request.atproto  # type: ignore[attr-defined]
    rests_on_it = accounts.login == did
    accounts.remove(did)
    if rests_on_it:
        logout(request)


def to_login(request: HttpRequest) -> HttpResponse:
    """The way to the log-in, and back again; for programs, a 401."""
    if wants_json(request):
        said = {"error": "login_required", "message": "Please log in.", "login": reverse("atproto:login")}
        return JsonResponse(said, status=401)
    query = f"?{urlencode({'next': request.get_full_path()}, safe='/')}" if request.method in ("GET", "HEAD") else ""
    return HttpResponseRedirect(reverse("atproto:login") + query)


def answer(request: HttpRequest, problem: _web.Problem) -> HttpResponse:
    """What is said of a problem."""
    if not wants_json(request):
        return page(request, "atproto_session/problem.html", {"problem": problem}, problem)
    said = {"error": problem.error, "message": problem.message}
    return _finished(JsonResponse(said, status=problem.status), problem)


def page(
    request: HttpRequest, template: str, context: dict[str, Any], problem: _web.Problem | None = None
) -> HttpResponse:
    """A page of this app."""
    response = render(request, template, context, status=None if problem is None else problem.status)
    # No page of somebody else shows this one in a frame, and leads people to press its buttons. Not by a
    # Content-Security-Policy, which would take the place of the project's own.
    response["X-Frame-Options"] = "DENY"
    return _finished(response, problem)


def _finished(response: HttpResponse, problem: _web.Problem | None) -> HttpResponse:
    if problem is not None:
        add_never_cache_headers(response)
        if problem.retry_after is not None:
            response["Retry-After"] = str(problem.retry_after)
    return response


def wants_json(request: HttpRequest) -> bool:
    """Whether a program asks, which has no use for a page."""
    return _web.wants_json(request.headers.get("Accept", ""), request.headers.get("Content-Type", ""))


def _said(error: Exception) -> str:
    # The messages of our own errors hold no secret. Those of requests may hold a whole URL.
    return f"{type(error).__name__}: {error}" if isinstance(error, SessionError) else type(error).__name__


def _user_of(request: HttpRequest, user: Any) -> Any:
    accounts: BrowserAccounts = request.atproto  # type: ignore[attr-defined]
    if user.is_authenticated and accounts.login is not None and not accounts.is_stored(accounts.login):
        from django.contrib.auth.models import AnonymousUser

        return AnonymousUser()
    return user


def _later(request: HttpRequest) -> Callable[[], Any]:
    from asgiref.sync import sync_to_async

    async def auser() -> Any:
        return await sync_to_async(_resolved)(request.user)

    return auser


def _resolved(user: Any) -> Any:
    user.is_authenticated  # noqa: B018 - it is looked up here, and not in the event loop
    return user
