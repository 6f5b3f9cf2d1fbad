"""Accounts and sessions in the admin. No token and no key is shown."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import DELETION, LogEntry
from django.db import router, transaction
from django.db.models import QuerySet
from django.http import HttpRequest

from ...errors import SessionError
from ...session import Session
from .conf import end_session, get_alias, get_store
from .models import Account, StoredSession


@admin.register(Account)
class AccountAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Who has logged in. To delete one ends its sessions."""

    list_display = ("did", "handle", "user", "last_login")
    search_fields = ("did", "handle")
    list_select_related = ("user",)
    raw_id_fields = ("user",)
    readonly_fields = ("handle", "created_at", "last_login")

    def get_readonly_fields(self, request: HttpRequest, obj: Account | None = None) -> Any:
        return (*self.readonly_fields, "did") if obj else self.readonly_fields


@admin.register(StoredSession)
class StoredSessionAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """The sessions. They cannot be changed, but ended: to delete one signs it out at its server, too."""

    list_display = ("account", "status", "began_at", "refreshed_at", "server")
    fields = ("account", "status", "began_at", "refreshed_at", "expires_at", "server", "scope", "client")
    readonly_fields = fields
    search_fields = ("key",)
    actions = ("delete_selected",)
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: StoredSession | None = None) -> bool:
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[StoredSession]:
        # What is shown of the document comes from the store, which can read it.
        return super().get_queryset(request).using(get_alias()).defer("document")

    def delete_model(self, request: HttpRequest, obj: StoredSession) -> None:
        """Outside of the transaction of the admin: with SQLite, that would keep the store from writing."""
        did, _, session_id = obj.key.partition("#")
        end = partial(end_session, did, session_id or None)
        transaction.on_commit(end, using=router.db_for_write(LogEntry))

    @admin.action(permissions=["delete"], description="End the selected sessions")
    def delete_selected(self, request: HttpRequest, queryset: QuerySet[StoredSession]) -> None:
        """In the place of Django's own action of this name."""
        ended, kept = 0, []
        for session in queryset:
            try:
                self.delete_model(request, session)
            except SessionError as error:
                kept.append(f"{session}: {error}")
            else:
                ended += 1
                LogEntry.objects.log_actions(request.user.pk or 0, [session], DELETION, single_object=True)
        if ended:
            self.message_user(request, f"{ended} sessions are ended.", messages.SUCCESS)
        for reason in kept:
            self.message_user(request, reason, messages.ERROR)

    # What is shown

    @admin.display(description="account")
    def account(self, obj: StoredSession) -> str:
        return str(obj)

    @admin.display(description="status")
    def status(self, obj: StoredSession) -> str:
        session = _stored(obj)
        return status_of(session, time.time())

    @admin.display(description="logged in")
    def began_at(self, obj: StoredSession) -> datetime | None:
        session = _stored(obj)
        return _moment(session.began_at) if isinstance(session, Session) else None

    @admin.display(description="last refresh")
    def refreshed_at(self, obj: StoredSession) -> datetime | None:
        session = _stored(obj)
        return _moment(session.refreshed_at) if isinstance(session, Session) else None

    @admin.display(description="access token expires")
    def expires_at(self, obj: StoredSession) -> datetime | None:
        session = _stored(obj)
        return session.token_set.expires_at if isinstance(session, Session) else None

    @admin.display(description="server")
    def server(self, obj: StoredSession) -> str:
        session = _stored(obj)
        return session.token_set.aud if isinstance(session, Session) else ""

    @admin.display(description="scope")
    def scope(self, obj: StoredSession) -> str:
        session = _stored(obj)
        return session.token_set.scope if isinstance(session, Session) else ""

    @admin.display(description="client")
    def client(self, obj: StoredSession) -> str:
        session = _stored(obj)
        return (session.client_id or "") if isinstance(session, Session) else ""


def status_of(session: Session | SessionError | None, now: float) -> str:
    """What the state of a session is, in a few words."""
    if session is None:
        return "over"
    if isinstance(session, SessionError):
        return f"cannot be read: {session}"
    if session.attempt is not None:
        return "a refresh is under way, or its answer was lost"
    if session.rest is not None and session.rest.until > now:
        return f"its server rests after {session.rest.error}"
    expires_at = session.token_set.expires_at
    if expires_at is None or expires_at.timestamp() > now:
        return "good"
    return "to be refreshed when it is used" if session.token_set.refresh_token else "over: it cannot be refreshed"


def _stored(row: StoredSession) -> Session | SessionError | None:
    """The session in a row; read once, though several columns show it."""
    if not hasattr(row, "_stored"):
        try:
            row._stored = get_store().get(row.key)  # type: ignore[attr-defined]
        except SessionError as error:
            row._stored = error  # type: ignore[attr-defined]
    return row._stored  # type: ignore[attr-defined,no-any-return]


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
