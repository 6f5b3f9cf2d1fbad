"""To be included in the project's ``urls.py``: ``path("atproto/", include("atproto_session.contrib.django.urls"))``."""

from __future__ import annotations

from django.urls import path

from .. import _web
from . import views

app_name = "atproto"
urlpatterns = [
    path(_web.LOGIN.lstrip("/"), views.login_view, name="login"),
    path(_web.LOGOUT.lstrip("/"), views.logout_view, name="logout"),
    path(_web.CALLBACK.lstrip("/"), views.callback, name="callback"),
    path("accounts", views.accounts, name="accounts"),
    path("link", views.link, name="link"),
    path("unlink", views.unlink, name="unlink"),
    path(_web.METADATA.lstrip("/"), views.metadata, name="metadata"),
    path(_web.JWKS.lstrip("/"), views.jwks, name="jwks"),
]
