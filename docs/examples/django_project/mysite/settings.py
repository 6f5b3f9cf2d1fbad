"""As ``django-admin startproject mysite`` makes them. What log-in needs is between the two lines."""

from __future__ import annotations

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = os.environ.get("SECRET_KEY", "only-for-development")
DEBUG = "SECRET_KEY" not in os.environ
ALLOWED_HOSTS = os.environ.get("ALLOWED_HOSTS", "127.0.0.1 localhost").split()

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "mysite.urls"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": BASE_DIR / "db.sqlite3"}}
USE_TZ = True
STATIC_URL = "static/"

# ---
INSTALLED_APPS += ["atproto_session.contrib.django"]
MIDDLEWARE += ["atproto_session.contrib.django.middleware.ATProtoMiddleware"]
AUTHENTICATION_BACKENDS = [
    "django.contrib.auth.backends.ModelBackend",
    "atproto_session.contrib.django.backends.ATProtoBackend",
]
LOGIN_URL, LOGIN_REDIRECT_URL = "atproto:login", "home"
ATPROTO_SESSION = {"NAME": "My site", "SCOPE": "atproto transition:generic"}
# ---
if "PUBLIC_URL" in os.environ:  # in production
    ATPROTO_SESSION |= {
        "PUBLIC_URL": os.environ["PUBLIC_URL"],
        "KEYS": os.environ.get("ATPROTO_KEYS"),
        "ENCRYPTION_KEYS": os.environ.get("ATPROTO_ENCRYPTION_KEYS"),
    }
