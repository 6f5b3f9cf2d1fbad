"""The settings, and the client that they make."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import router
from django.urls import NoReverseMatch, get_script_prefix, reverse

from ...client import OAuthClient
from ...errors import ClientMetadataError, TokenRevokedError
from ...session import SessionDeletedEvent
from ...stores import FullStore, complete, open_store
from .. import _web
from .signals import session_over
from .store import DjangoStore

#: The name of the one setting.
NAME = "ATPROTO_SESSION"
#: What is Django's own in it, and what it is by default.
DEFAULTS = {"DATABASE": None, "NEW_USER": "atproto_session.contrib.django.backends.new_user"}


def called(name: str) -> str:
    """What users know a member of the setting by."""
    return f'{NAME}["{name}"]'


def get_option(name: str) -> Any:
    """One of the members that are Django's own."""
    return _given().get(name, DEFAULTS[name])


def get_settings() -> _web.Settings:
    """All other members.

    :raises ClientMetadataError: one is wrong.
    """
    prefix = _prefix()
    if (made := _settings.get(prefix)) is None:
        given = {name: value for name, value in _given().items() if name not in DEFAULTS}
        if "PREFIX" in given:
            raise ClientMetadataError(
                f"{called('PREFIX')} is no setting here: urls.py says where the pages are", field="PREFIX"
            )
        made = _settings.setdefault(prefix, _web.Settings.read(given, called, prefix=prefix))
    return made


def get_alias() -> str:
    """The database that the sessions are in."""
    from .models import StoredSession

    return get_option("DATABASE") or router.db_for_write(StoredSession)


def get_store() -> FullStore:
    """The store of this process: tables of the project's database, unless ``STORE`` names another.

    :raises SessionError: it cannot be opened, or a setting is wrong.
    """
    if (made := _stores.get("")) is None:
        known = get_settings()
        options: dict[str, Any] = {
            "encryption_keys": known.encryption_keys,
            "allow_plaintext": known.options.get("allow_plaintext", False),
        }
        store: Any = _given().get("STORE")
        if store is None:
            store = DjangoStore(get_alias(), **options)
        elif isinstance(store, str):
            store = open_store(store, **options)
        made = _stores.setdefault("", complete(store))
    if isinstance(made, DjangoStore):
        made.connections.join_test()
    return made


def get_client() -> OAuthClient:
    """The client of this process. It is made when it is first needed: ``migrate`` and ``check`` need no key.

    :raises SessionError: see :class:`.OAuthClient`; or a setting is wrong.
    """
    store = get_store()
    if (made := _clients.get("")) is None:
        new = get_settings().open_client(store=store, encryption_keys=(), allow_plaintext=False)
        made = _clients.setdefault("", new)
        if made is new:
            made.sessions.on_deleted(_tell)
        else:  # another thread was first
            new.close()
    return made


def end_session(did: str, session_id: str | None) -> None:
    """Delete a session, and end it at its server, which is waited for a few seconds.

    :raises SessionError: see :meth:`.OAuthClient.revoke`.
    """
    get_client().revoke(did, session_id=session_id, timeout=_web.END_WITHIN)


def keeping_connections() -> AbstractContextManager[None]:
    """The store's connections to the database stay open in this block."""
    store = _stores.get("")
    return store.connections.in_use() if isinstance(store, DjangoStore) else nullcontext()


def reset() -> None:
    """Forget what was made, since the settings have changed."""
    _settings.clear()
    while _clients:
        _clients.popitem()[1].close()
    while _stores:
        _stores.popitem()[1].close()


#: Of this process. Each is written in one step, by ``setdefault``, and needs no lock.
_settings: dict[str, _web.Settings] = {}
_stores: dict[str, FullStore] = {}
_clients: dict[str, OAuthClient] = {}


def _given() -> Mapping[str, Any]:
    given = getattr(settings, NAME, {})
    if not isinstance(given, Mapping):
        raise ImproperlyConfigured(f"{NAME} is a dictionary, not {type(given).__name__}")
    return given


def _prefix() -> str:
    """The path of the app's pages, below the project's own."""
    try:
        login = reverse("atproto:login")
    except NoReverseMatch:
        raise ClientMetadataError(
            'the pages of the log-in have no address: add path("atproto/", include('
            '"atproto_session.contrib.django.urls")) to urls.py'
        ) from None
    # A worker knows nothing of the prefix that a web server may have put before all paths. PUBLIC_URL has it.
    return "/" + login.removeprefix(get_script_prefix()).removesuffix(_web.LOGIN.lstrip("/")).strip("/")


def _tell(event: SessionDeletedEvent) -> None:
    if not isinstance(event.cause, TokenRevokedError):
        did, _, session_id = event.sub.partition("#")
        session_over.send_robust(sender=OAuthClient, did=did, session_id=session_id or None, cause=event.cause)
