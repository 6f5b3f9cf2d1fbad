# mypy: disable-error-code="import-not-found,import-untyped"
"""The extra ``django`` alone: tables, and a log-in as far as it goes without a network."""

import django
from django.conf import settings

settings.configure(
    SECRET_KEY="for tests",
    ALLOWED_HOSTS=["127.0.0.1"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "atproto_session.contrib.django",
    ],
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"],
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
    ATPROTO_SESSION={"PUBLIC_URL": "https://app.example.com"},
)
django.setup()

from django.core.management import call_command  # noqa: E402 - it needs the settings
from django.test import Client  # noqa: E402
from django.urls import include, path  # noqa: E402

settings.ROOT_URLCONF = (path("atproto/", include("atproto_session.contrib.django.urls")),)

call_command("migrate", verbosity=0)
browser = Client(headers={"host": "127.0.0.1"})
form = browser.get("/atproto/login")
if form.status_code != 200 or 'name="account"' not in form.text:
    raise SystemExit(f"no form: {form.text}")
document = browser.get("/atproto/oauth-client-metadata.json").json()
if document["client_id"] != "https://app.example.com/atproto/oauth-client-metadata.json":
    raise SystemExit(f"no document: {document}")
