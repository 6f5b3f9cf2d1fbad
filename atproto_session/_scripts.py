"""What the command line and the scripts of a machine have in common: the client that they are, where its sessions are,
and what opens them. All of it comes from the environment, so that the two find the same accounts."""

from __future__ import annotations

import os
from typing import Any

from .errors import StoreError
from .metadata import ClientMetadata, parse_scope
from .stores import EncryptionKeys

#: What is asked for unless somebody says otherwise: all that an application password could do, but for messages.
SCOPE = "atproto transition:generic"

STORE = "ATPROTO_SESSION_STORE"
ENCRYPTION_KEYS = "ATPROTO_SESSION_ENCRYPTION_KEYS"
PLC_DIRECTORY = "ATPROTO_SESSION_PLC_DIRECTORY"
HANDLE_RESOLVER = "ATPROTO_SESSION_HANDLE_RESOLVER"
ALLOW_HTTP = "ATPROTO_SESSION_ALLOW_HTTP"
VARIABLES = (STORE, ENCRYPTION_KEYS, PLC_DIRECTORY, HANDLE_RESOLVER, ALLOW_HTTP)

#: What :data:`ENCRYPTION_KEYS` holds where the keys are in the keyring of the system, and where they are in there.
KEYRING = "keyring"
KEYRING_PLACE = ("atproto-session", "encryption-keys")


def metadata_of(scope: str) -> ClientMetadata:
    """The client that asks for ``scope``. A session belongs to the ``client_id`` that got it, and that of a loopback
    client holds its scopes: their order must not matter. Its redirect URIs have no port, so any port will do.

    :raises ClientMetadataError: ``scope`` cannot be asked for.
    """
    try:
        scopes = parse_scope(scope)
    except ValueError:
        return ClientMetadata.loopback(scope=scope)  # says what is wrong
    return ClientMetadata.loopback(scope=" ".join(sorted(scopes, key=lambda scope: (scope != "atproto", scope))))


def store_url() -> str:
    """Where the sessions are.

    :raises StoreError: it takes a package that is missing to say.
    """
    if url := os.environ.get(STORE):
        return url
    try:
        import platformdirs
    except ImportError:
        raise StoreError(
            f"to find the place of this user's data takes a package: pip install 'atproto-session[cli]', or name a "
            f"store in {STORE}, or with store="
        ) from None
    place = platformdirs.user_data_path("atproto-session", appauthor=False)
    return f"sqlite:///{(place / 'sessions.db').as_posix()}"


def encryption_keys() -> EncryptionKeys:
    """The Fernet keys that open the store: the first encrypts. None, if it is not encrypted.

    :raises StoreError: they are said to be in the keyring, and cannot be had from there.
    """
    keys = os.environ.get(ENCRYPTION_KEYS, "").replace(",", " ").split()
    return keys_in_keyring() if keys == [KEYRING] else keys


def keys_in_keyring() -> list[str]:
    """
    :raises StoreError: there are none, or they cannot be had.
    """
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        raise StoreError("the system's keyring takes a package: pip install 'atproto-session[keyring]'") from None
    try:
        kept = keyring.get_password(*KEYRING_PLACE)
    except KeyringError as error:
        raise StoreError(
            f"{ENCRYPTION_KEYS} says that the keys are in the system's keyring, which cannot be used "
            f"({type(error).__name__}): unlock it, or put the keys themselves there; a program that cron runs may not "
            "reach the keyring of its user"
        ) from None
    if not kept:
        raise StoreError(
            f"{ENCRYPTION_KEYS} says that the keys are in the system's keyring, and there are none: make one with "
            "atproto-session keygen --for encryption --keyring"
        )
    return kept.split()


def network_options() -> dict[str, Any]:
    """What :class:`.OAuthClient` is told of the network: nothing, but in development."""
    options: dict[str, Any] = {}
    if plc_directory := os.environ.get(PLC_DIRECTORY):
        options["plc_directory"] = plc_directory
    if handle_resolver := os.environ.get(HANDLE_RESOLVER):
        options["handle_resolver"] = handle_resolver
    if os.environ.get(ALLOW_HTTP, "").lower() in ("1", "true", "yes", "on"):
        options["allow_http"] = True
    return options
