"""What ``manage.py check`` finds."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.checks import CheckMessage, Error, Warning
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.models import EmailField
from django.urls import reverse
from django.utils import translation
from django.utils.module_loading import import_string

from ...errors import ClientMetadataError, SessionError, StoreError
from ...stores._opening import backend_of
from .conf import DEFAULTS, NAME, called, get_alias, get_option, get_settings

_MIDDLEWARE = "atproto_session.contrib.django.middleware.ATProtoMiddleware"
_BEFORE = "django.contrib.auth.middleware.AuthenticationMiddleware"
_BACKEND = "atproto_session.contrib.django.backends.ATProtoBackend"
_VENDORS = ("postgresql", "mysql", "sqlite")


def check_settings(app_configs: Any, **options: Any) -> list[CheckMessage]:
    """Whether all that the app needs is there and can be used."""
    try:
        known = get_settings()
    except (ClientMetadataError, ImproperlyConfigured) as error:
        return [Error(str(error), id="atproto_session.E001"), *_check_surroundings()]
    try:
        known.open_client(store="memory:", encryption_keys=()).close()
    except SessionError as error:
        found = Error(f"{called('OPTIONS')}: {error}", id="atproto_session.E001")
        return [found, *_check_surroundings()]
    return [*_check_surroundings(), *_check_store(), *_check_languages()]


def _check_surroundings() -> list[CheckMessage]:
    found: list[CheckMessage] = []
    middleware = list(settings.MIDDLEWARE)
    if _MIDDLEWARE not in middleware:
        found.append(Error(f'MIDDLEWARE has no "{_MIDDLEWARE}".', id="atproto_session.E002"))
    elif _BEFORE not in middleware[: middleware.index(_MIDDLEWARE)]:
        found.append(Error(f'In MIDDLEWARE, "{_MIDDLEWARE}" is not behind "{_BEFORE}".', id="atproto_session.E003"))
    if not any(_is_our_backend(path) for path in settings.AUTHENTICATION_BACKENDS):
        found.append(
            Error(
                f'AUTHENTICATION_BACKENDS has no "{_BACKEND}": nobody could log in with an account.',
                id="atproto_session.E004",
            )
        )
    if str(settings.SESSION_COOKIE_SAMESITE).lower() == "strict":
        found.append(
            Error(
                'SESSION_COOKIE_SAMESITE is "Strict": a browser that comes back from its authorization server would '
                "leave its session behind.",
                hint='"Lax" is Django\'s default.',
                id="atproto_session.E005",
            )
        )
    found += _check_new_user()
    return found


def _check_new_user() -> list[CheckMessage]:
    try:
        path = get_option("NEW_USER")
    except ImproperlyConfigured:
        return []  # said by E001
    hint = "It is the path of a function, such as mysite.users.new_user."
    try:
        if callable(import_string(path)):
            return []
        problem = f"{called('NEW_USER')} names no function, but something else."
    except (ImportError, AttributeError, TypeError) as error:
        problem = f"{called('NEW_USER')} names no function: {error}"
    return [Error(problem, hint=hint, id="atproto_session.E006")]


def _is_our_backend(path: str) -> bool:
    from .backends import ATProtoBackend

    try:
        return issubclass(import_string(path), ATProtoBackend)
    except (ImportError, TypeError):
        return False  # which Django says itself


def _check_store() -> list[CheckMessage]:
    if isinstance(store := getattr(settings, NAME).get("STORE"), str):
        return _check_url(store)
    if store is not None:
        return []
    alias = get_alias()
    if not isinstance(alias, str) or alias not in connections.settings:
        return [Error(f"{called('DATABASE')} names no database of DATABASES: {alias!r}", id="atproto_session.E007")]
    vendor = connections[alias].vendor
    if vendor not in _VENDORS:
        return [
            Error(
                f'Sessions cannot be kept in the database "{alias}", which is {vendor}.',
                hint=f"Name one of PostgreSQL, MySQL, MariaDB or SQLite in {called('DATABASE')}, or a place in "
                f"{called('STORE')}.",
                id="atproto_session.E008",
            )
        ]
    return []


def _check_url(store: str) -> list[CheckMessage]:
    """Whether there is such a store. It is not opened."""
    try:
        backend_of(store)
    except StoreError as error:
        return [Error(f"{called('STORE')}: {error}", id="atproto_session.E010")]
    return []


def _check_languages() -> list[CheckMessage]:
    paths = set()
    for code, _ in settings.LANGUAGES:
        with translation.override(code):
            paths.add(reverse("atproto:callback"))
    if len(paths) == 1:
        return []
    return [
        Error(
            "The pages of the log-in are inside of i18n_patterns(): they would have an address for each language, and "
            "authorization servers know one.",
            id="atproto_session.E009",
        )
    ]


def _check_names() -> list[CheckMessage]:
    model: Any = get_user_model()
    name = model._meta.get_field(model.USERNAME_FIELD)
    if get_option("NEW_USER") != DEFAULTS["NEW_USER"] or not isinstance(name, EmailField):
        return []
    return [
        Warning(
            f"Users are named by their {name.name}, which an account does not tell: new ones get a name that is none.",
            hint=f"Name a function that makes users in {called('NEW_USER')}.",
            id="atproto_session.W004",
        )
    ]


def check_deployment(app_configs: Any, **options: Any) -> list[CheckMessage]:
    """What is right for development, and not in production (``check --deploy``)."""
    try:
        known = get_settings()
    except (ClientMetadataError, ImproperlyConfigured):
        return []  # said by E001
    found: list[CheckMessage] = []
    if known.is_development:
        found.append(
            Warning(
                f"{called('PUBLIC_URL')} is not set: this is a client for development, at http://127.0.0.1.",
                id="atproto_session.W001",
            )
        )
    elif known.keys is None:
        found.append(
            Warning(
                f"{called('KEYS')} is not set: sessions of a client without a key end after two weeks.",
                hint="manage.py atproto_keygen makes one.",
                id="atproto_session.W002",
            )
        )
    found += _check_names()
    if not known.encryption_keys:
        found.append(
            Warning(
                f"{called('ENCRYPTION_KEYS')} is not set: who reads the database, or a backup of it, has the tokens.",
                hint="manage.py atproto_keygen --encryption makes one.",
                id="atproto_session.W003",
            )
        )
    return found
