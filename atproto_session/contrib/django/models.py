"""What the database holds: who has logged in, and the store of their sessions."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.db import models


class Account(models.Model):
    """An AT Protocol account that somebody has logged in with. A user may have several; an account has one user.

    An account is its DID. Its handle may be given to somebody else one day: show it, and look nothing up by it.
    """

    user: models.ForeignKey[Any, Any] = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="atproto_accounts"
    )
    did: models.CharField[str, str] = models.CharField("DID", max_length=255, unique=True)
    handle: models.CharField[str, str] = models.CharField(
        max_length=253, blank=True, help_text="As it was verified at the last log-in; empty if it could not be."
    )
    created_at: models.DateTimeField[Any, Any] = models.DateTimeField(auto_now_add=True)
    last_login: models.DateTimeField[Any, Any] = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name = "AT Protocol account"

    def __str__(self) -> str:
        return f"@{self.handle}" if self.handle else self.did


class StoredSession(models.Model):
    """A row of the session store. It is written by the store alone, on connections of its own.

    :ivar key_hash: of ``key``: keys are longer than an index may be, and databases may not tell upper case from lower.
    :ivar did_hash: of the account, to find all its sessions by.
    :ivar key: the DID, or ``did#session_id``, escaped as in a string of Python's.
    :ivar document: the session, encrypted if there are ``ENCRYPTION_KEYS``.
    """

    key_hash: models.CharField[str, str] = models.CharField(max_length=64, primary_key=True, editable=False)
    did_hash: models.CharField[str, str] = models.CharField(max_length=64, db_index=True, editable=False)
    key: models.TextField[str, str] = models.TextField(editable=False)
    document: models.BinaryField[bytes, bytes] = models.BinaryField(editable=False)

    class Meta:
        verbose_name = "session"

    def __str__(self) -> str:
        return self.key.partition("#")[0]


class PendingLogin(models.Model):
    """A log-in that has begun: a row of the session store, too."""

    state_hash: models.CharField[str, str] = models.CharField(max_length=64, primary_key=True, editable=False)
    document: models.BinaryField[bytes, bytes] = models.BinaryField(editable=False)
    expires_at: models.FloatField[float, float] = models.FloatField(db_index=True, editable=False)

    class Meta:
        verbose_name = "pending log-in"
