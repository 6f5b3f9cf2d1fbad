"""What a store writes: the session document as JSON, encrypted where there are keys.

Fernet (AES-128-CBC with HMAC-SHA256) encrypts the whole document, and the document holds its own key, so a record that
was moved to another account's place is refused. So is a record that is not encrypted: anybody who may write to the
place could have put it there. Records from before encryption was switched on are read with ``allow_plaintext=True``,
until :func:`atproto_session.stores.rotate_encryption` has encrypted them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .._checks import check_flags, check_kind, check_texts
from ..errors import StoreError, printable
from ..session import Session, from_document, to_document

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

EncryptionKeys = Iterable[str | bytes] | str | bytes

#: How many decoded records are kept in each of two generations: most reads find the bytes of the read before. Longer
#: records are not kept, so that the memory for all of them is bounded, to some 40 MB. Most have 2,000 bytes.
_KEPT = 512
_LONGEST_KEPT = 16384
#: The version byte and the first zeros of the timestamp of every Fernet token, in base64.
_FERNET_START = b"gAAAA"


class Codec:
    """Between records and bytes.

    :param encryption_keys: Fernet keys (``cryptography.fernet.Fernet.generate_key()``). The first encrypts, all
        decrypt; without any, records are written as plain JSON.
    :param allow_plaintext: read records that are not encrypted although there are keys, as long as there are some from
        before.
    :raises StoreError: one of them is not a Fernet key.
    """

    def __init__(self, encryption_keys: EncryptionKeys = (), *, allow_plaintext: bool = False) -> None:
        check_flags(allow_plaintext=allow_plaintext)
        self._fernet = _fernet(encryption_keys)
        self._allows_plaintext = self._fernet is None or allow_plaintext
        # Two generations: when the young one is full, the old one is forgotten.
        self._young: dict[tuple[str, bytes], Session] = {}
        self._old: dict[tuple[str, bytes], Session] = {}

    def encode(self, key: str, session: Session) -> bytes:
        """The record of ``session``.

        :raises StoreError: it could not be read back.
        """
        check_texts(key=key)
        check_kind("session", session, Session, "a Session")
        try:
            text = _text_of(to_document(key, session))
            read = from_document(key, json.loads(text))
            data = self._seal(text)
        except (ValueError, TypeError, OverflowError) as error:
            raise StoreError(f"the session of {printable(key)} cannot be stored: {error}") from error
        self._keep(key, data, read)
        return data

    def decode(self, key: str, data: bytes | str) -> Session:
        """The session in a record, which is text if it was written by hand.

        :raises StoreError: no encryption key opens it, it is not encrypted although it should be, it is damaged,
            another key's, or of a later release.
        """
        data = data.encode("utf-8", "replace") if isinstance(data, str) else data
        kept = self._young.get((key, data)) or self._old.get((key, data))
        if kept is not None:
            self._keep(key, data, kept)
            return kept
        try:
            session = from_document(key, self._open(data))
        except ValueError as error:
            # Not chained: the errors of the JSON decoder carry the whole document.
            raise StoreError(f"the session of {printable(key)} cannot be read: {error}") from None
        self._keep(key, data, session)
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
        """The record of a pending log-in.

        :raises StoreError: ``document`` is not JSON.
        """
        try:
            return self._seal(_text_of({"state": state, "expiresAt": expires_at, "login": document}))
        except (ValueError, TypeError) as error:
            raise StoreError(f"the log-in cannot be stored: {error}") from error

    def decode_login(self, state: str, data: bytes, now: float) -> dict[str, Any] | None:
        """The document of a pending log-in, or ``None`` when it has expired.

        :param now: seconds since the epoch.
        :raises StoreError: as for :meth:`decode`.
        """
        try:
            record = self._open(data)
        except ValueError as error:
            raise StoreError(f"the log-in cannot be read: {error}") from None
        login, expires_at = record.get("login"), record.get("expiresAt")
        if record.get("state") != state or not isinstance(login, dict) or not isinstance(expires_at, int | float):
            raise StoreError("the log-in cannot be read: it is not the record of this log-in")
        return login if now < expires_at else None

    def _keep(self, key: str, data: bytes, session: Session) -> None:
        if len(data) > _LONGEST_KEPT:
            return
        # Without a lock: two threads that do this at once forget more than they had to, and nothing else.
        self._young[key, data] = session
        if len(self._young) >= _KEPT:
            self._old, self._young = self._young, {}

    def _seal(self, data: bytes) -> bytes:
        return data if self._fernet is None else self._fernet.encrypt(data)

    def _open(self, data: bytes) -> dict[str, Any]:
        if not data:
            raise ValueError("it is empty")
        if data.startswith(_FERNET_START):
            data = self._decrypt(data)
        elif not self._allows_plaintext:
            raise ValueError(
                "it is not encrypted, and there are encryption_keys: if it is from before there were any, open the "
                "store with allow_plaintext=True and call rotate_encryption(store)"
            )
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


def _text_of(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")


def _fernet(encryption_keys: EncryptionKeys) -> MultiFernet | None:
    try:
        keys = [encryption_keys] if isinstance(encryption_keys, str | bytes) else list(encryption_keys)
    except TypeError:
        raise StoreError(
            f"encryption_keys is a list of Fernet keys, which is empty for no encryption, not "
            f"{type(encryption_keys).__name__}"
        ) from None
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
