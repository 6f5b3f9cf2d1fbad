"""What a store writes: the session document as JSON, encrypted where there are keys.

Fernet (AES-128-CBC with HMAC-SHA256) encrypts the whole document, and the document holds its own key, so a record that
was moved to another account's place is refused. Records from before encryption was switched on stay readable and are
encrypted when they are next written, or all at once by :func:`atproto_session.stores.rotate_encryption`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import StoreError, printable
from ..session import Session, from_document, to_document

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

EncryptionKeys = Iterable[str | bytes] | str | bytes

#: How many decoded records are kept: most reads find the bytes of the read before.
_KEPT = 1024
#: The version byte and the first zeros of the timestamp of every Fernet token, in base64.
_FERNET_START = b"gAAAA"


class Codec:
    """Between records and bytes.

    :param encryption_keys: Fernet keys (``cryptography.fernet.Fernet.generate_key()``). The first encrypts, all
        decrypt; without any, records are written as plain JSON.
    :raises StoreError: one of them is not a Fernet key.
    """

    def __init__(self, encryption_keys: EncryptionKeys = ()) -> None:
        self._fernet = _fernet(encryption_keys)
        self._decoded: dict[str, tuple[bytes, Session]] = {}

    def encode(self, key: str, session: Session) -> bytes:
        """The record of ``session``.

        :raises StoreError: it could not be read back.
        """
        try:
            document = to_document(key, session)
            from_document(key, document)
            return self._seal(document)
        except (ValueError, TypeError, OverflowError) as error:
            raise StoreError(f"the session of {printable(key)} cannot be stored: {error}") from error

    def decode(self, key: str, data: bytes | str) -> Session:
        """The session in a record, which is text if it was written by hand.

        :raises StoreError: no encryption key opens it, it is damaged, another key's, or of a later release.
        """
        data = data.encode("utf-8", "replace") if isinstance(data, str) else data
        kept = self._decoded.get(key)
        if kept is not None and kept[0] == data:
            return kept[1]
        try:
            session = from_document(key, self._open(data))
        except ValueError as error:
            # Not chained: the errors of the JSON decoder carry the whole document.
            raise StoreError(f"the session of {printable(key)} cannot be read: {error}") from None
        if len(self._decoded) >= _KEPT:
            self._decoded.clear()
        self._decoded[key] = data, session
        return session

    def key_of(self, data: bytes) -> str:
        """The key that a record says it is stored under.

        :raises ValueError: it cannot be read, or does not say.
        """
        document = self._open(data)
        key = document["atprotoSession"].get("key") if isinstance(document.get("atprotoSession"), dict) else None
        if not isinstance(key, str):
            raise ValueError("it does not hold its key")  # noqa: TRY004 - bad data, not a bad call
        return key

    def encode_login(self, state: str, document: dict[str, Any], expires_at: float) -> bytes:
        """The record of a pending log-in."""
        try:
            return self._seal({"state": state, "expiresAt": expires_at, "login": document})
        except (ValueError, TypeError) as error:
            raise StoreError(f"the log-in cannot be stored: {error}") from error

    def decode_login(self, state: str, data: bytes, now: float) -> dict[str, Any] | None:
        """The document of a pending log-in, or ``None`` when it has expired."""
        try:
            record = self._open(data)
        except ValueError as error:
            raise StoreError(f"the log-in cannot be read: {error}") from None
        login, expires_at = record.get("login"), record.get("expiresAt")
        if record.get("state") != state or not isinstance(login, dict) or not isinstance(expires_at, int | float):
            raise StoreError("the log-in cannot be read: it is not the record of this log-in")
        return login if now < expires_at else None

    def _seal(self, document: dict[str, Any]) -> bytes:
        data = json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
        return data if self._fernet is None else self._fernet.encrypt(data)

    def _open(self, data: bytes) -> dict[str, Any]:
        if not data:
            raise ValueError("it is empty")
        if data.startswith(_FERNET_START):
            data = self._decrypt(data)
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError("it is damaged, or not a record of this library") from None
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")  # noqa: TRY004 - bad data, not a bad call
        return document

    def _decrypt(self, data: bytes) -> bytes:
        if self._fernet is None:
            raise ValueError("it is encrypted, and there are no encryption_keys: give those that it was written with")
        from cryptography.fernet import InvalidToken

        try:
            return self._fernet.decrypt(data)
        except InvalidToken:
            raise ValueError(
                "none of the encryption_keys opens it, or it is damaged: give the key that it was written with as well"
            ) from None


def _fernet(encryption_keys: EncryptionKeys) -> MultiFernet | None:
    keys = [encryption_keys] if isinstance(encryption_keys, str | bytes) else list(encryption_keys)
    if not keys:
        return None
    from cryptography.fernet import Fernet, MultiFernet

    try:
        return MultiFernet([Fernet(key) for key in keys])
    except (ValueError, TypeError):
        raise StoreError(
            "encryption_keys holds something that is not a Fernet key, which is 32 bytes in URL-safe base64: "
            "cryptography.fernet.Fernet.generate_key() makes one"
        ) from None
