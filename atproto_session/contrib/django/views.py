"""The pages of the log-in. Their templates are in ``atproto_session/``, to be overridden by the project's own.

None of them is a transaction, whatever ``ATOMIC_REQUESTS`` says: with SQLite, what they have written themselves would
keep the store from writing. None of them is left to ``LoginRequiredMiddleware``: who is not logged in needs them, and
the others look by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from django.conf import settings as django_settings
from django.contrib.auth import authenticate, login, logout
from django.contrib.auth.decorators import login_not_required
from django.contrib.auth.views import redirect_to_login
from django.core import signing
from django.db import transaction
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.shortcuts import resolve_url
from django.urls import get_script_prefix, reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_protect
from django.views.decorators.http import require_GET, require_http_methods, require_POST, require_safe

from ...client import CallbackResult
from ...errors import ClientMetadataError, SessionError
from .. import _web
from .accounts import BrowserAccounts
from .backends import note_login
from .conf import end_session, get_client, get_settings
from .middleware import answer, log, page, to_login, wants_json
from .signals import logged_in

_View = Callable[[HttpRequest], HttpResponse]

_BACKEND = "atproto_session.contrib.django.backends.ATProtoBackend"
#: What the signature of a link is for.
_LINK = "atproto_session.contrib.django.link"


def _own_page(view: _View) -> _View:
    """What all pages of the log-in have in common."""
    page: _View = login_not_required(transaction.non_atomic_requests(never_cache(csrf_protect(view))))
    return page


def _login_required(view: _View) -> _View:
    """As Django's own, but programs get a 401, and nobody comes back to a page that only takes forms."""

    @wraps(view)
    def checked(request: HttpRequest) -> HttpResponse:
        if request.user.is_authenticated:
            return view(request)
        if wants_json(request):
            return to_login(request)
        is_page = request.method in ("GET", "HEAD")
        return redirect_to_login(request.get_full_path() if is_page else reverse("atproto:accounts"))

    return checked


@_own_page
@require_http_methods(["GET", "HEAD", "POST"])
def login_view(request: HttpRequest) -> HttpResponse:
    """The form, and with POST the beginning of a log-in."""
    return _begin(request, next=_safe_next(request), link=False)


@_own_page
@_login_required
@require_http_methods(["GET", "HEAD", "POST"])
def link(request: HttpRequest) -> HttpResponse:
    """As :func:`login_view`; but the account is added to those of the user who is logged in."""
    target = _safe_next(request) or reverse("atproto:accounts")
    signed = signing.dumps([str(request.user.pk), target], salt=_LINK)
    return _begin(request, next=f"{reverse('atproto:link')}?{signed}", link=True)


def _begin(request: HttpRequest, *, next: str | None, link: bool) -> HttpResponse:
    settings = get_settings()
    here, target = _origin_of(request), _safe_next(request)
    try:
        elsewhere = settings.origin_for_login(here, get_script_prefix().rstrip("/"))
    except ClientMetadataError:
        if request.method == "POST":
            raise
        elsewhere = None  # to look at the form does no harm
    if elsewhere is not None:
        # Where the cookies of this page are those of the callback, too.
        return HttpResponseRedirect(f"{elsewhere}{request.get_full_path()}")
    if request.method != "POST":
        return _form(request, target=target, link=link)
    account = request.POST.get("account", "").strip()
    if not account:
        return _form(request, target=target, link=link, problem=_web.NO_ACCOUNT)
    try:
        begun = _web.begin_login(settings, get_client(), account, own=here, cookies=request.COOKIES, next=next)
    except SessionError as error:
        return _form(request, target=target, link=link, problem=_problem_of(error))
    response = HttpResponseRedirect(begun.url)
    response.set_cookie(**begun.ticket.cookie)
    return _without(response, begun.stale)


@_own_page
@require_GET
def callback(request: HttpRequest) -> HttpResponse:
    """Where the authorization server sends the browser back to."""
    settings, client = get_settings(), get_client()
    ended = _web.end_login(settings, client, dict(request.GET.lists()), request.COOKIES)
    if isinstance(ended, _web.FailedLogin):
        target = _link_target(ended.next)[1] if _is_link(ended.next) else ended.next
        page = _form(request, target=target, link=_is_link(ended.next), problem=_problem_of(ended.error))
        return _without(page, ended.stale)
    try:
        response = _enter(request, ended.result, ended.session_id, ended.next)
    except BaseException:
        end_session(ended.result.session.did, ended.session_id)
        raise
    return _without(response, ended.stale)


def _enter(request: HttpRequest, result: CallbackResult, session_id: str, target: str | None) -> HttpResponse:
    """Let the user of the account in, or add the account to those of the user who is in."""
    from .models import Account

    did = result.session.did
    is_new = not Account.objects.filter(did=did).exists()
    if target is not None and _is_link(target):
        pk, target = _link_target(target)
        account, problem = _link(request, result, pk)
    else:
        account, problem = _log_in(request, result)
    if account is None:
        end_session(did, session_id)
        return answer(request, _web.Problem(HTTPStatus.FORBIDDEN, "refused", problem))
    # A copy of the cookie of before is of no use. Django sees to that only where the user is another one.
    request.session.cycle_key()
    accounts: BrowserAccounts = request.atproto  # type: ignore[attr-defined]
    before = dict(accounts.items()).get(did)
    accounts.add(did, session_id)
    told = {"user": account.user, "account": account, "session": result.session, "is_new": is_new}
    try:
        logged_in.send(sender=Account, request=request, **told)
    except BaseException:  # a receiver does not want this account
        if accounts.login == did:
            logout(request)
        else:
            accounts.remove(did)
        raise
    finally:
        if before is not None:  # of this browser, which has no more use for it
            end_session(did, before)
    return HttpResponseRedirect(target or resolve_url(django_settings.LOGIN_REDIRECT_URL))


def _log_in(request: HttpRequest, result: CallbackResult) -> tuple[Any, str]:
    from .models import Account

    user = authenticate(request, atproto=result)
    if user is None:
        return None, "There is no user here for this account."
    accounts: BrowserAccounts = request.atproto  # type: ignore[attr-defined]
    if (request.user.is_authenticated or accounts.items()) and request.user.pk != user.pk:
        logout(request)  # or the sessions of the one before would be left over
    login(request, user, backend=_BACKEND)
    accounts.login = result.session.did
    return Account.objects.get(did=result.session.did), ""


def _link(request: HttpRequest, result: CallbackResult, pk: str) -> tuple[Any, str]:
    from .models import Account

    if not request.user.is_authenticated or str(request.user.pk) != pk:
        return None, "You have been logged out meanwhile. Please log in, and link the account again."
    account, _ = Account.objects.get_or_create(did=result.session.did, defaults={"user": request.user})
    if account.user.pk != request.user.pk:
        return None, "This account belongs to another user here."
    note_login(account, result)
    return account, ""


@_own_page
@require_POST
def logout_view(request: HttpRequest) -> HttpResponse:
    """End what this browser has: its sessions of accounts, and the user's own. Other browsers keep theirs."""
    target = _safe_next(request)
    logout(request)  # see apps.py for the sessions of the accounts
    return HttpResponseRedirect(target or resolve_url(django_settings.LOGOUT_REDIRECT_URL or "/"))


@_own_page
@_login_required
@require_safe
def accounts(request: HttpRequest) -> HttpResponse:
    """The accounts of the user."""
    from .models import Account

    linked = Account.objects.filter(user=request.user.pk).order_by("created_at")
    return page(request, "atproto_session/accounts.html", {"accounts": linked, "current": request.atproto.did})  # type: ignore[attr-defined]


@_own_page
@_login_required
@require_POST
def unlink(request: HttpRequest) -> HttpResponse:
    """Take an account from the user who is logged in, and end all its sessions. Not the last one of a user who has no
    password, since nobody could log in any more."""
    from .models import Account

    user: Any = request.user
    mine = Account.objects.filter(user=user.pk)
    account = mine.filter(did=request.POST.get("did", "")).first()
    if account is None:
        return answer(request, _web.Problem(HTTPStatus.NOT_FOUND, "unknown", "This account is not linked."))
    if mine.count() == 1 and not user.has_usable_password():
        said = "This is your only way to log in. Link another account first."
        return answer(request, _web.Problem(HTTPStatus.CONFLICT, "last_account", said))
    request.atproto.remove(account.did)  # type: ignore[attr-defined]
    account.delete()  # see apps.py for its sessions
    return HttpResponseRedirect(_safe_next(request) or reverse("atproto:accounts"))


@login_not_required
@require_safe
def metadata(request: HttpRequest) -> HttpResponse:
    """The client metadata document, which authorization servers fetch."""
    return _document(get_settings().metadata_document())


@login_not_required
@require_safe
def jwks(request: HttpRequest) -> HttpResponse:
    """The public keys of the client."""
    return _document(get_settings().jwks())


# What the views share


def _document(document: dict[str, Any]) -> HttpResponse:
    """What authorization servers fetch. It needs no store, no session and no request."""
    return JsonResponse(document, headers={"Cache-Control": "public, max-age=60"})


def _form(request: HttpRequest, *, target: str | None, link: bool, problem: _web.Problem | None = None) -> HttpResponse:
    if problem is not None and wants_json(request):
        return answer(request, problem)
    context = {
        "link": link,
        "action": reverse("atproto:link" if link else "atproto:login"),
        "next": target or "",
        "problem": problem,
        "account": request.POST.get("account") or request.GET.get("account") or "",
    }
    return page(request, "atproto_session/login.html", context, problem)


def _problem_of(error: SessionError) -> _web.Problem:
    """
    :raises SessionError: it is the application's own fault.
    """
    problem = _web.problem_of_login(error)
    if problem is None:
        raise error
    log.warning("a log-in was answered with %d: %s", problem.status, error)
    return problem


def _origin_of(request: HttpRequest) -> str:
    return f"{request.scheme}://{request.get_host()}"


def _is_link(target: str | None) -> bool:
    return target is not None and target.startswith(f"{reverse('atproto:link')}?")


def _link_target(target: str | None) -> tuple[str, str]:
    """Whose account it is to be, and where to go then."""
    try:
        pk, after = signing.loads((target or "").partition("?")[2], salt=_LINK)
    except signing.BadSignature:  # somebody has made it up
        return "", reverse("atproto:accounts")
    return pk, after


def _safe_next(request: HttpRequest) -> str | None:
    """The page of this site that the request asks for, as a path."""
    given = request.POST.get("next") or request.GET.get("next") or ""
    if not url_has_allowed_host_and_scheme(given, {request.get_host()}, require_https=request.is_secure()):
        return None
    return _web.safe_next(urlunsplit(("", "", *urlsplit(given)[2:])))


def _without(response: HttpResponse, cookies: list[str]) -> HttpResponse:
    for name in cookies:
        response.delete_cookie(name, samesite="Lax")
    return response
