from __future__ import annotations

from django.contrib import admin
from django.urls import include, path

from . import views

urlpatterns = [
    path("admin/", admin.site.urls),
    path("", views.home, name="home"),
    path("post", views.post, name="post"),
    path("atproto/", include("atproto_session.contrib.django.urls")),
]
