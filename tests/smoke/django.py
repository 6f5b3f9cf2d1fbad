"""The extra ``django`` alone: a log-in as far as it goes without a network, and the tables of the store."""

from typing import Any, ClassVar

import django
from django.conf import settings
from django.core.management import call_command
from django.urls import include, path


class Urls:
    urlpatterns: ClassVar[list[Any]] = []


settings.configure(
    SECRET_KEY="for tests",
    ALLOWED_HOSTS=["*"],
    INSTALLED_APPS=[
        *("django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"),
        "atproto_session.contrib.django",
    ],
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "atproto_session.contrib.django.middleware.ATProtoMiddleware",
    ],
    AUTHENTICATION_BACKENDS=["atproto_session.contrib.django.backends.ATProtoBackend"],
    ROOT_URLCONF=Urls,
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
    DATABASES={
        "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "file:smoke?mode=memory&cache=shared"},
    },
    ATPROTO_SESSION={"PUBLIC_URL": "https://app.example.com"},
)
django.setup()
Urls.urlpatterns.append(path("atproto/", include("atproto_session.contrib.django.urls")))
call_command("check")
call_command("migrate", verbosity=0)

from django.test import Client  # noqa: E402 - needs the settings

browser = Client()
form = browser.get("/atproto/login").content.decode()
if 'name="account"' not in form:
    raise SystemExit(f"no form: {form}")
document = browser.get("/atproto/oauth-client-metadata.json").json()
if document["client_id"] != "https://app.example.com/atproto/oauth-client-metadata.json":
    raise SystemExit(f"no document: {document}")
refused = browser.post("/atproto/login", {"account": "nobody"})
if refused.status_code != 400 or b"is not a handle" not in refused.content:
    raise SystemExit(f"no problem: {refused.content!r}")

from atproto_session.contrib.django.conf import get_store, reset  # noqa: E402

if list(get_store()) != []:
    raise SystemExit("the store is not empty")
reset()
