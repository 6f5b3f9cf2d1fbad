"""Users of accounts."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth import authenticate
from django.db import IntegrityError
from django.test import Client, override_settings

from atproto_session.contrib.django import backends, conf
from atproto_session.contrib.django.models import Account, StoredSession
from atproto_session.contrib.django.test import log_in
from atproto_session.testing.network import LocalNetwork

from .conftest import users
from .test_views import who


class Result:
    """What a log-in brings, as far as the backend looks at it."""

    def __init__(self, did: str, handle: str | None = None) -> None:
        self.session = type("", (), {"did": did})
        self.handle = handle


@pytest.mark.usefixtures("site")
def test_a_password_is_not_looked_at() -> None:
    users().create_user("alice", password="secret")
    backend = backends.ATProtoBackend()
    assert backend.authenticate(None, username="alice", password="secret") is None
    assert authenticate(None, username="alice", password="secret") is not None, "Django's own backend is there, too"


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    ("did", "name"),
    [
        ("did:plc:ewvi7nxzyoun6zhxrhs64oiz", "plc.ewvi7nxzyoun6zhxrhs64oiz"),
        ("did:web:example.com", "web.example.com"),
        ("did:web:localhost%3A8080", "8d8b4a2638ef7bd8"),
        ("did:web:" + "a" * 200, "f38d161e2f7a9838"),
    ],
)
def test_the_name_of_a_new_user_comes_from_the_did(did: str, name: str) -> None:
    user = backends.new_user(None, did, "alice.test")
    assert user.get_username().startswith(name)
    user.full_clean(exclude=["password"])
    # Somebody who has chosen that name is another user.
    another = backends.new_user(None, did, "alice.test")
    assert another != user
    assert another.get_username() != user.get_username()
    another.full_clean(exclude=["password"])


def nobody(request: Any, did: str, handle: str | None) -> None:
    """Lets nobody in who is not known."""


def somebody(request: Any, did: str, handle: str | None) -> Any:
    assert request is not None
    return users().create_user(handle)


def test_who_makes_new_users_is_a_setting(site: LocalNetwork, browser: Client) -> None:
    from django.conf import settings

    given = getattr(settings, conf.NAME)
    alice = site.create_account("alice.test")
    with override_settings(**{conf.NAME: {**given, "NEW_USER": f"{__name__}.nobody"}}):
        assert log_in(browser, site, alice).status_code == 403
    assert (Account.objects.count(), StoredSession.objects.count()) == (0, 0)
    with override_settings(**{conf.NAME: {**given, "NEW_USER": f"{__name__}.somebody"}}):
        log_in(browser, site, alice)
    assert who(browser)["user"] == "alice.test"


@pytest.mark.usefixtures("site")
def test_two_log_ins_of_a_new_account_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    did = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
    account = Account.objects.create(user=users().create_user("first"), did=did)
    backend = backends.ATProtoBackend()
    for found, outcome in (([None, account], account.user), ([None, None], None)):
        looked = iter(found)
        monkeypatch.setattr(backends, "_find", lambda did, looked=looked: next(looked))
        if outcome is not None:  # the other one is committed between the two looks
            assert backend.authenticate(None, atproto=Result(did)) == outcome  # type: ignore[arg-type]
        else:
            with pytest.raises(IntegrityError):
                backend.authenticate(None, atproto=Result(did))  # type: ignore[arg-type]
    assert users().count() == 1, "a user without an account is left over"
