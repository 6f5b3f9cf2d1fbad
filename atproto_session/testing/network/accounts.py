"""Accounts, and the directory that tells where each of them lives (``did:plc`` and handle resolution)."""

from __future__ import annotations

import base64
import hmac
import re
import secrets
import threading
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

from .wire import Request, Response

_HANDLE = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+test")


@dataclass(frozen=True)
class Account:
    """An account as its owner knows it. A later change of handle does not show here."""

    did: str
    handle: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Home:
    """Where an account lives: the origin of its PDS, and the issuer that speaks for that PDS."""

    pds: str
    issuer: str


@dataclass(frozen=True)
class _Entry:
    account: Account
    home: Home
    resolves: bool = True


class Directory:
    """Every account of the network. Safe to share between threads."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def create(self, handle: str | None, home: Home) -> Account:
        """Make an account.

        :raises ValueError: the handle is malformed, not under ``.test``, or taken.
        """
        with self._lock:
            handle = handle or f"user{len(self._entries) + 1}.test"
            self._check_free(handle)
            did = "did:plc:" + base64.b32encode(secrets.token_bytes(15)).decode().lower()
            account = Account(did, handle, secrets.token_urlsafe(12))
            self._entries[did] = _Entry(account, home)
            return account

    def move(self, did: str, home: Home) -> None:
        with self._lock:
            self._entries[did] = replace(self._entries[did], home=home)

    def change_handle(self, did: str, handle: str, *, resolves: bool) -> None:
        """Let the DID document claim another handle. Without ``resolves`` the handle does not resolve to the DID.

        :raises ValueError: as :meth:`create`.
        """
        with self._lock:
            entry = self._entries[did]
            if handle != entry.account.handle:
                self._check_free(handle)
            self._entries[did] = replace(entry, account=replace(entry.account, handle=handle), resolves=resolves)

    def knows(self, did: str) -> bool:
        with self._lock:
            return did in self._entries

    def account(self, did: str) -> Account:
        return self._entry(did).account

    def home(self, did: str) -> Home:
        return self._entry(did).home

    def resolve(self, handle: str) -> str | None:
        """The DID that a handle resolves to."""
        with self._lock:
            entries = list(self._entries.values())
        return next((e.account.did for e in entries if e.resolves and e.account.handle == handle.lower()), None)

    def log_in(self, identifier: str, password: str) -> Account | None:
        """The account of this handle or DID, if the password is right."""
        did = identifier if identifier.startswith("did:") else self.resolve(identifier)
        with self._lock:
            entry = self._entries.get(did or "")
        if entry is None or not hmac.compare_digest(entry.account.password.encode(), password.encode()):
            return None
        return entry.account

    def answer_did_document(self, request: Request) -> Response:
        """The PLC directory's one question: ``GET /{did}``."""
        did = unquote(request.path.removeprefix("/"))
        try:
            entry = self._entry(did)
        except KeyError:
            return Response.of_json({"message": f"DID not registered: {did[:100]}"}, 404)
        document = {
            "@context": ["https://www.w3.org/ns/did/v1"],
            "id": did,
            "alsoKnownAs": [f"at://{entry.account.handle}"],
            "verificationMethod": [],
            "service": [
                {"id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": entry.home.pds},
            ],
        }
        return Response.of_json(document, content_type="application/did+ld+json")

    def answer_resolve_handle(self, request: Request) -> Response:
        """``GET /xrpc/com.atproto.identity.resolveHandle``."""
        handle = request.parameters.get("handle", [""])[0]
        did = self.resolve(handle)
        if did is None:
            return Response.of_json({"error": "HandleNotFound", "message": "Unable to resolve handle"}, 400)
        return Response.of_json({"did": did})

    def _entry(self, did: str) -> _Entry:
        with self._lock:
            return self._entries[did]

    def _check_free(self, handle: str) -> None:
        if len(handle) > 253 or not _HANDLE.fullmatch(handle):
            raise ValueError(f"{handle!r} is not a lowercase handle under .test")
        if any(entry.account.handle == handle for entry in self._entries.values()):
            raise ValueError(f"{handle!r} is taken")
