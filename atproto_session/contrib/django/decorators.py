"""Views for those who have logged in with an account."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.http import HttpRequest, HttpResponse

from .accounts import BrowserAccounts
from .middleware import to_login


def account_required(view: Callable[..., Any]) -> Callable[..., Any]:
    """Sends a browser whose session is not there, or not there any more, to the log-in; programs get a 401. In the view
    ``request.atproto`` is the account."""

    @wraps(view)
    def checked(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return view(request, *args, **kwargs) if _has_account(request) else to_login(request)

    return checked


class AccountRequiredMixin:
    """As :func:`account_required`, for views that are classes. Name it before the view's own class."""

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if not _has_account(request):
            return to_login(request)
        return super().dispatch(request, *args, **kwargs)  # type: ignore[misc,no-any-return]


def _has_account(request: HttpRequest) -> bool:
    accounts: BrowserAccounts = request.atproto  # type: ignore[attr-defined]
    return accounts.is_there()
