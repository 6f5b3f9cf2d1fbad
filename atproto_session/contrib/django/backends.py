"""Users who log in with an AT Protocol account."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from django.contrib.auth import get_user_model
from django.contrib.auth.backends import ModelBackend
from django.db import IntegrityError, router, transaction
from django.http import HttpRequest
from django.utils import timezone
from django.utils.module_loading import import_string

from ...client import CallbackResult
from .conf import get_option


class ATProtoBackend(ModelBackend):
    """Lets those in whose account's authorization server says so. Users who are not active stay out.

    Passwords are not looked at; leave Django's ``ModelBackend`` beside it if there are some. Permissions are those of
    ``ModelBackend``.
    """

    def authenticate(  # type: ignore[override]
        self, request: HttpRequest | None, atproto: CallbackResult | None = None, **other: Any
    ) -> Any:
        """The user of the account, who is made at the first log-in by the function that ``NEW_USER`` names.

        :param atproto: a log-in that ended well.
        """
        if atproto is None:
            return None
        account = _find(atproto.session.did) or self._join(request, atproto)
        if account is None or not self.user_can_authenticate(account.user):
            return None
        note_login(account, atproto)
        return account.user

    def _join(self, request: HttpRequest | None, atproto: CallbackResult) -> Any:
        from .models import Account

        make = import_string(get_option("NEW_USER"))
        try:
            with transaction.atomic(using=router.db_for_write(Account)):
                user = make(request, atproto.session.did, atproto.handle)
                return None if user is None else Account.objects.create(user=user, did=atproto.session.did)
        except IntegrityError:
            # Another log-in of the same account was first, or there is another reason, which is not ours to hide.
            if (account := _find(atproto.session.did)) is None:
                raise
            return account


def _find(did: str) -> Any:
    from .models import Account

    return Account.objects.select_related("user").filter(did=did).first()


def note_login(account: Any, atproto: CallbackResult) -> None:
    """Write down what is known of an account since it has logged in."""
    account.handle = atproto.handle or ""
    account.last_login = timezone.now()
    account.save(update_fields=["handle", "last_login"])


def new_user(request: HttpRequest | None, did: str, handle: str | None) -> Any:
    """Make a user, without a password, for an account that logs in for the first time. ``NEW_USER`` may name another
    function like this one. What it returns is the account's user; with ``None``, nobody is let in.

    The name of the user comes from the DID, which never changes, and not from the handle, which may be somebody else's
    one day. Nobody is found by it: the user of an account is the one that its row in ``Account`` names.
    """
    model: Any = get_user_model()
    name = model.USERNAME_FIELD
    longest = getattr(model._meta.get_field(name), "max_length", None) or 150
    user = model(**{name: _username(did, longest, model)})
    user.set_unusable_password()
    user.save()
    return user


def _username(did: str, longest: int, model: Any) -> str:
    readable = did.removeprefix("did:").replace(":", ".")
    digest = hashlib.sha256(did.encode()).hexdigest()
    name = readable if re.fullmatch(r"[\w.@+-]+", readable) and len(readable) <= longest else digest[:longest]
    # Somebody may have chosen this name before.
    manager = model._default_manager
    taken = manager.filter(**{model.USERNAME_FIELD: name}).exists()
    return f"{name[: longest - 9]}-{digest[:8]}" if taken else name
