"""The example's settings, with a database of the tests' own, and nothing slow."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from mysite.settings import *  # type: ignore[import-not-found] # noqa: F403

_folder = tempfile.mkdtemp(prefix="atproto-django-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("ATPROTO_TEST_DJANGO_DATABASE", f"{_folder}/db.sqlite3"),
    }
}
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "app.example.com", "testserver"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEBUG = False
LOGGING_CONFIG = None
ROOT_URLCONF = "tests.contrib.django.urls"
