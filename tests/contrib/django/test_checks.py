"""What ``manage.py check`` says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.conf import settings
from django.test import override_settings

from atproto_session.contrib.django.checks import check_deployment, check_settings
from atproto_session.keys import generate_jwk

GOOD = settings.ATPROTO_SESSION


def ids(check: Any) -> list[str]:
    return [message.id.partition(".")[2] for message in check(None)]


def test_the_example_is_right() -> None:
    assert ids(check_settings) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ATPROTO_SESSION": {"SCOPES": "atproto"}}, r'ATPROTO_SESSION\["SCOPES"\] is no setting; is it .*SCOPE'),
        ({"ATPROTO_SESSION": {"SCOPE": "transition:generic"}}, r'ATPROTO_SESSION\["SCOPE"\]: .*atproto'),
        ({"ATPROTO_SESSION": {"PUBLIC_URL": "app.example.com"}}, r'ATPROTO_SESSION\["PUBLIC_URL"\]: '),
        ({"ATPROTO_SESSION": {"PUBLIC_URL": "https://app.example.com", "KEYS": "no key"}}, r'\["KEYS"\]: '),
        ({"ATPROTO_SESSION": {"ENCRYPTION_KEYS": ["secret"]}}, r'\["ENCRYPTION_KEYS"\]: the key 1 is not'),
        ({"ATPROTO_SESSION": {"PREFIX": "/x"}}, r"urls.py says"),
        ({"ATPROTO_SESSION": ["atproto"]}, r"ATPROTO_SESSION is a dictionary"),
        ({"ATPROTO_SESSION": {7: "atproto"}}, r'ATPROTO_SESSION\["7"\] is no setting'),
        ({"ATPROTO_SESSION": {"OPTIONS": {"timeuot": 5}}}, r"\[\"OPTIONS\"\]: .*'timeuot' here; is it 'timeout'\?"),
        ({"ATPROTO_SESSION": {"OPTIONS": {"timeout": "5"}}}, r'\["OPTIONS"\]: timeout is a number'),
        ({"ATPROTO_SESSION": {"OPTIONS": {"plc_directory": "plc"}}}, r'\["OPTIONS"\]: plc_directory'),
        ({"ROOT_URLCONF": "tests.contrib.django.no_urls"}, r"have no address: add path"),
    ],
    ids=[
        "unknown",
        "scope",
        "url",
        "keys",
        "encryption",
        "prefix",
        "list",
        "number",
        "option",
        "type",
        "value",
        "urls",
    ],
)
def test_settings_that_are_wrong(changed: dict[str, Any], said: str) -> None:
    with override_settings(**changed):
        (message, *_) = check_settings(None)
        assert message.id == "atproto_session.E001"

        assert re.search(said, message.msg)
        assert "no key" not in message.msg
        assert "'secret'" not in message.msg
        if "OPTIONS" not in str(changed):
            assert ids(check_deployment) == []


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"MIDDLEWARE": []}, ["E002"]),
        ({"MIDDLEWARE": list(reversed(settings.MIDDLEWARE))}, ["E003"]),
        ({"AUTHENTICATION_BACKENDS": ["django.contrib.auth.backends.ModelBackend", "no.such.Backend"]}, ["E004"]),
        ({"SESSION_COOKIE_SAMESITE": "Strict"}, ["E005"]),
        ({"ATPROTO_SESSION": {**GOOD, "NEW_USER": "no.such.function"}}, ["E006"]),
        ({"ATPROTO_SESSION": {**GOOD, "NEW_USER": 7}}, ["E006"]),
        ({"ATPROTO_SESSION": {**GOOD, "NEW_USER": "os.sep"}}, ["E006"]),
        ({"ATPROTO_SESSION": {**GOOD, "DATABASE": "elsewhere"}}, ["E007"]),
        ({"ATPROTO_SESSION": {**GOOD, "DATABASE": ["default"]}}, ["E007"]),
        ({"ATPROTO_SESSION": {**GOOD, "STORE": "nonsense://"}}, ["E010"]),
        ({"ATPROTO_SESSION": {**GOOD, "STORE": 7}}, ["E001"]),
        ({"ATPROTO_SESSION": {**GOOD, "STORE": "redis://127.0.0.1:1"}}, []),
        ({"ATPROTO_SESSION": {**GOOD, "STORE": {}}}, []),
        ({"ATPROTO_SESSION": {**GOOD, "STORE": "memory:", "DATABASE": "elsewhere"}}, []),
    ],
)
def test_surroundings_that_are_wrong(changed: dict[str, Any], found: list[str]) -> None:
    with override_settings(**changed):
        assert ids(check_settings) == found


def test_pages_that_each_language_has_at_another_address() -> None:
    with override_settings(ROOT_URLCONF="tests.contrib.django.i18n_urls"):
        assert ids(check_settings) == ["E009"]


def test_a_database_that_there_is_no_store_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db import connections

    monkeypatch.setattr(type(connections["default"]), "vendor", "oracle")
    assert ids(check_settings) == ["E008"]


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, ["W001", "W003"]),
        ({"PUBLIC_URL": "https://app.example.com", "ENCRYPTION_KEYS": [Fernet.generate_key()]}, ["W002"]),
        ({"PUBLIC_URL": "https://app.example.com", "KEYS": generate_jwk()}, ["W003"]),
    ],
)
def test_what_is_not_for_production(changed: dict[str, Any], found: list[str]) -> None:
    with override_settings(ATPROTO_SESSION={**GOOD, **changed}):
        assert ids(check_settings) == []
        assert ids(check_deployment) == found


def test_users_who_are_named_by_something_that_an_account_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    from django.contrib.auth import get_user_model

    monkeypatch.setattr(get_user_model(), "USERNAME_FIELD", "email")
    assert ids(check_deployment) == ["W001", "W004", "W003"]
    with override_settings(ATPROTO_SESSION={**GOOD, "NEW_USER": "mysite.users.new"}):
        assert "W004" not in ids(check_deployment)
