from __future__ import annotations

from datetime import UTC, datetime

from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from atproto_session.contrib.django.decorators import account_required


@account_required
def home(request: HttpRequest) -> HttpResponse:
    profile = request.atproto.get("/xrpc/com.atproto.server.getSession")
    profile.raise_for_status()
    return render(request, "home.html", {"handle": profile.json()["handle"]})


@require_POST
@account_required
def post(request: HttpRequest) -> HttpResponse:
    record = {
        "$type": "app.bsky.feed.post",
        "text": request.POST["text"],
        "createdAt": datetime.now(UTC).isoformat(),
    }
    call = {"repo": request.atproto.did, "collection": "app.bsky.feed.post", "record": record}
    request.atproto.post("/xrpc/com.atproto.repo.createRecord", json=call).raise_for_status()
    return redirect("home")
