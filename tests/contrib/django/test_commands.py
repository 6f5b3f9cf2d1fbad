"""The commands of ``manage.py``."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.conf import settings
from django.core.management import CommandError, call_command
from django.test import Client, override_settings

from atproto_session import Keyset
from atproto_session.contrib.django import conf
from atproto_session.contrib.django.models import StoredSession
from atproto_session.contrib.django.test import log_in
from atproto_session.testing.network import LocalNetwork


def run(command: str, *arguments: Any, **options: Any) -> str:
    out = StringIO()
    call_command(f"atproto_{command}", *arguments, stdout=out, stderr=out, **options)
    return out.getvalue()


def test_keys_that_can_be_used() -> None:
    line = run("keygen").strip()
    assert "\n" not in line
    assert list(Keyset.of(line)) == [json.loads(line)["kid"]]
    Fernet(run("keygen", "--encryption").strip())


def age(days: float) -> None:
    store = conf.get_store()
    for key in store:
        session = store.get(key)
        assert session is not None
        store.set(key, replace(session, refreshed_at=time.time() - days * 86400))


def test_keep_alive(site: LocalNetwork, browser: Client) -> None:
    alice = site.create_account()
    log_in(browser, site, alice)
    assert run("keep_alive") == "0 refreshed, 0 ended, 0 failed\n"
    age(6)
    assert run("keep_alive", "--pace", "0") == "1 refreshed, 0 ended, 0 failed\n"
    age(2)
    assert run("keep_alive", "--idle", "1", "--timeout", "60") == "1 refreshed, 0 ended, 0 failed\n"
    age(6)
    site.fault("token", "status", status=503, times=None)
    with pytest.raises(CommandError, match="the next run tries again"):
        run("keep_alive")
    site.clear_faults()
    site.revoke_sessions(alice.did)
    assert f"{alice.did}: ended: " in run("keep_alive")


def test_encryption_is_switched_on_and_its_key_changed(site: LocalNetwork, browser: Client) -> None:
    given = getattr(settings, conf.NAME)
    log_in(browser, site, site.create_account())
    assert b"access_token" in bytes(StoredSession.objects.get().document)
    old, new = (Fernet.generate_key().decode() for _ in range(2))
    for keys in ([old], [new, old], new):
        plain = {"allow_plaintext": True} if keys == [old] else {}
        changed = {**given, "ENCRYPTION_KEYS": keys, "OPTIONS": {**given["OPTIONS"], **plain}}
        with override_settings(**{conf.NAME: changed}):
            assert run("rotate_encryption") == "1 sessions were encrypted\n"
            assert browser.get("/data").status_code == 200
            assert b"access_token" not in bytes(StoredSession.objects.get().document)
    with pytest.raises(CommandError, match="no encryption_keys"):
        run("rotate_encryption")


def test_clean(site: LocalNetwork, browser: Client) -> None:
    log_in(browser, site, site.create_account())
    store = conf.get_store()
    store.logins.put("old", {}, 1.0)
    for key in store:
        session = store.get(key)
        assert session is not None
        past = session.token_set.expires_at.replace(year=2020)  # type: ignore[union-attr]
        store.set(key, replace(session, token_set=replace(session.token_set, refresh_token=None, expires_at=past)))
    assert run("clean").startswith("1 sessions and ")
    assert list(store) == []


@pytest.mark.parametrize("command", ["keep_alive", "rotate_encryption", "clean"])
def test_what_is_wrong_is_said_in_a_line(command: str) -> None:
    with override_settings(**{conf.NAME: {"SCOPES": "x"}}), pytest.raises(CommandError, match="is no setting"):
        run(command)
