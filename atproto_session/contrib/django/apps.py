"""The app, and what it does when others do something."""

from __future__ import annotations

from functools import partial
from typing import Any

from django.apps import AppConfig
from django.contrib.auth.signals import user_logged_out
from django.core.checks import Tags, register
from django.core.signals import setting_changed
from django.db import transaction
from django.db.models.signals import post_delete


class ATProtoConfig(AppConfig):
    name = "atproto_session.contrib.django"
    label = "atproto_session"
    verbose_name = "AT Protocol"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from .checks import check_deployment, check_settings
        from .models import Account

        register(check_settings, Tags.security)
        register(check_deployment, Tags.security, deploy=True)
        user_logged_out.connect(_end_sessions_of_browser)
        post_delete.connect(_end_sessions_of_account, sender=Account)
        setting_changed.connect(_forget_settings)


def _end_sessions_of_browser(request: Any, user: Any, **other: Any) -> None:
    """A log-out is one from the accounts as well, whichever page of the project it comes from."""
    from .conf import end_session
    from .models import Account
    from .signals import logged_out

    accounts = getattr(request, "atproto", None)
    if accounts is None:  # not a request of a browser, or the middleware is not there
        return
    ended = accounts.items()
    for did, session_id in ended:
        end_session(did, session_id)
        accounts.remove(did)
    for did, _ in ended:  # when all have ended, whatever a receiver does
        logged_out.send(sender=Account, request=request, user=user, did=did)


def _end_sessions_of_account(instance: Any, using: str, **other: Any) -> None:
    """Once it is sure that the account is gone: unlinked, or deleted with its user."""
    transaction.on_commit(partial(end_sessions, instance.did), using=using, robust=True)


def end_sessions(did: str) -> None:
    """End all sessions of an account, in every browser.

    :raises SessionError: one could not be ended.
    """
    from .conf import end_session, get_store
    from .store import DjangoStore

    store = get_store()
    keys = store.keys_of(did) if isinstance(store, DjangoStore) else list(store)
    for key in keys:
        owner, _, session_id = key.partition("#")
        if owner == did:
            end_session(did, session_id or None)


def _forget_settings(setting: str, **other: Any) -> None:
    from . import conf

    if setting in (conf.NAME, "ROOT_URLCONF", "DATABASES"):
        conf.reset()
