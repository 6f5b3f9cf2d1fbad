"""The example's pages, and some that go wrong."""

from __future__ import annotations

from typing import Any

from asgiref.sync import sync_to_async
from django.db import transaction
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.views import View
from mysite.urls import urlpatterns as of_example  # type: ignore[import-not-found]

from atproto_session import SessionNotFoundError
from atproto_session.contrib.django.conf import get_client
from atproto_session.contrib.django.decorators import AccountRequiredMixin, account_required


def whoami(request: Any) -> HttpResponse:
    user = request.user.get_username() if request.user.is_authenticated else None
    accounts = request.atproto
    return JsonResponse({"user": user, "did": accounts.did, "handle": accounts.handle, "all": list(accounts)})


def data(request: Any) -> HttpResponse:
    answer = request.atproto.get("/xrpc/com.atproto.server.getSession")
    answer.raise_for_status()
    return JsonResponse(answer.json())


def other(request: Any, did: str) -> HttpResponse:
    """Uses an account that is not this browser's."""
    get_client().restore(did)
    raise AssertionError


def use(request: Any, did: str) -> HttpResponse:
    request.atproto.use(did)
    return HttpResponse(request.atproto[did].did)


def fail(request: Any) -> HttpResponse:
    raise ZeroDivisionError


def rolled_back(request: Any) -> HttpResponse:
    """Refreshes in a transaction that comes to nothing."""
    with transaction.atomic():
        request.atproto.token_info(refresh=True)
        transaction.set_rollback(True)
    return HttpResponse("done")


async def later(request: Any) -> HttpResponse:
    user = await request.auser()
    return HttpResponse(user.get_username() or "nobody")


class ByClass(AccountRequiredMixin, View):
    def get(self, request: Any) -> HttpResponse:
        return HttpResponse(request.atproto.did)


@account_required
async def data_later(request: Any) -> HttpResponse:
    return await sync_to_async(data)(request)


class DataLater(AccountRequiredMixin, View):
    async def get(self, request: Any) -> HttpResponse:
        return await sync_to_async(data)(request)


@account_required
def stream(request: Any) -> StreamingHttpResponse:
    """Uses the account when the middleware has ended its part."""
    return StreamingHttpResponse(data(request).content for _ in range(2))


@account_required
def gone(request: Any) -> HttpResponse:
    raise SessionNotFoundError("gone").about(f"{request.atproto.did}#{request.atproto.session_id}")


urlpatterns = [
    *of_example,
    path("whoami", whoami),
    path("data", data),
    path("other/<str:did>", other),
    path("use/<str:did>", use),
    path("fail", fail),
    path("rolled-back", rolled_back),
    path("later", later),
    path("by-class", ByClass.as_view()),
    path("gone", gone),
    path("data-later", data_later),
    path("data-later-by-class", DataLater.as_view()),
    path("stream", stream),
]
