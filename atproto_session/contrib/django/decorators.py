"""Views for those who have logged in with an account."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.http import HttpRequest

from .accounts import BrowserAccounts
from .middleware import to_login


def account_required(view: Callable[..., Any]) -> Callable[..., Any]:
    """Sends a browser whose session is not there, or not there any more, to the log-in; programs get a 401. In the view
    ``request.atproto`` is the account. The view may be asynchronous."""
    if iscoroutinefunction(view):

        @wraps(view)
        async def later(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            return await view(request, *args, **kwargs) if await _is_there(request) else to_login(request)

        return later

    @wraps(view)
    def checked(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return view(request, *args, **kwargs) if _has_account(request) else to_login(request)

    return checked


class AccountRequiredMixin:
    """As :func:`account_required`, for views that are classes. Name it before the view's own class."""

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "view_is_async", False):
            return self._dispatch_later(request, *args, **kwargs)
        if not _has_account(request):
            return to_login(request)
        return super().dispatch(request, *args, **kwargs)  # type: ignore[misc]

    async def _dispatch_later(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        if not await _is_there(request):
            return to_login(request)
        return await super().dispatch(request, *args, **kwargs)  # type: ignore[misc]


async def _is_there(request: HttpRequest) -> bool:
    return await sync_to_async(_has_account)(request)


def _has_account(request: HttpRequest) -> bool:
    accounts: BrowserAccounts = request.atproto  # type: ignore[attr-defined]
    return accounts.is_there()
