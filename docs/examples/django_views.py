"""Django views for a confidential client: log-in, a page, log-out, and what authorization servers fetch.

``urlpatterns`` belongs into the project's URLs, ``SessionErrors`` into ``MIDDLEWARE``. The settings hold
``ATPROTO_STORE`` (a URL such as ``"sqlite:////var/lib/app/sessions.db"``) and ``ATPROTO_ENCRYPTION_KEYS``.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

from django.conf import settings
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.urls import path
from django.views.decorators.http import require_GET, require_POST

from atproto_session import (
    ClientMetadata,
    DiscoveryError,
    IdentityError,
    Keyset,
    OAuthCallbackError,
    OAuthClient,
    SessionError,
)

SITE = "https://app.example.com"

client = OAuthClient(
    ClientMetadata(
        client_id=f"{SITE}/client-metadata.json",
        client_name="Example",
        client_uri=f"{SITE}/",
        redirect_uris=[f"{SITE}/oauth/callback"],
        scope="atproto transition:generic",
        token_endpoint_auth_method="private_key_jwt",
        jwks_uri=f"{SITE}/jwks.json",
    ),
    keyset=Keyset.from_env("ATPROTO_CLIENT_KEYS"),
    store=settings.ATPROTO_STORE,
    encryption_keys=settings.ATPROTO_ENCRYPTION_KEYS,
)


@require_GET
def client_metadata(request: HttpRequest) -> HttpResponse:
    return JsonResponse(client.metadata_document())


@require_GET
def jwks(request: HttpRequest) -> HttpResponse:
    return JsonResponse(client.jwks())


@require_GET
def home(request: HttpRequest) -> HttpResponse:
    did = request.session.get("did")
    if did is None:
        return render(request, "login.html")
    account = client.restore(did)
    account.total_timeout = 10  # seconds for a request, all told
    profile = account.get("/xrpc/com.atproto.server.getSession").json()
    return render(request, "home.html", {"handle": profile["handle"]})


@require_POST
def login(request: HttpRequest) -> HttpResponse:
    browser = request.session.setdefault("browser", secrets.token_urlsafe(16))
    try:
        return redirect(client.authorize(request.POST.get("account", ""), bound_to=browser))
    except (IdentityError, DiscoveryError) as error:
        return render(request, "login.html", {"problem": str(error)}, status=400)


@require_GET
def callback(request: HttpRequest) -> HttpResponse:
    try:
        result = client.callback(dict(request.GET.lists()), bound_to=request.session.get("browser"))
    except OAuthCallbackError as error:  # declined, twice, or another browser's
        return render(request, "login.html", {"problem": str(error)}, status=400)
    request.session.cycle_key()
    request.session["did"] = result.session.did
    return redirect("home")


@require_POST
def logout(request: HttpRequest) -> HttpResponse:
    did = request.session.get("did")
    request.session.flush()
    if did is not None:
        client.revoke(did)
    return redirect("home")


class SessionErrors:
    """Middleware: what a view does not handle itself becomes the log-in page, or a 503."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        if not isinstance(error, SessionError):
            return None
        if error.login_required:
            request.session.flush()
            return redirect("home")
        if error.retryable:
            wait = 5 if error.retry_after is None else math.ceil(error.retry_after)
            return HttpResponse("Please try again in a moment.", status=503, headers={"Retry-After": str(wait)})
        return None


urlpatterns = [
    path("", home, name="home"),
    path("login", login, name="login"),
    path("logout", logout, name="logout"),
    path("oauth/callback", callback, name="callback"),
    path("client-metadata.json", client_metadata),
    path("jwks.json", jwks),
]
