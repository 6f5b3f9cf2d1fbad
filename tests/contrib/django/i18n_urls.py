"""A project whose log-in has an address for each language."""

from django.conf.urls.i18n import i18n_patterns
from django.urls import include, path

urlpatterns = i18n_patterns(path("atproto/", include("atproto_session.contrib.django.urls")))
