"""What accounts keep on a PDS: records, such as posts, and blobs, such as images. As it would be in a real one, but for
what nobody reads through the API: there are no commits, and no record is checked against its Lexicon.

A record's CID is the real one (DAG-CBOR, SHA-256), so that it can be compared with that of another PDS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .accounts import Directory
from .sessions import Grant
from .wire import Request, Response

_NSID = re.compile(r"[a-zA-Z][a-zA-Z0-9-]{0,62}(?:\.[a-zA-Z0-9-]{1,63})+\.[a-zA-Z][a-zA-Z0-9]{0,62}")
_RKEY = re.compile(r"(?!\.\.?$)[A-Za-z0-9._:~-]{1,512}")
_SORTABLE = "234567abcdefghijklmnopqrstuvwxyz"
_DAG_CBOR, _RAW = 0x71, 0x55
_LARGEST_BLOB = 5 * 1024 * 1024


class MethodError(Exception):
    """A method cannot do what it was asked to (XRPC, "Error Responses")."""

    def __init__(self, message: str, error: str = "InvalidRequest", status: int = 400) -> None:
        super().__init__(message)
        self.response = Response.of_json({"error": error, "message": message}, status)


@dataclass(frozen=True)
class Record:
    value: dict[str, Any]
    cid: str

    def at(self, uri: str) -> dict[str, Any]:
        return {"uri": uri, "cid": self.cid, "value": self.value}


@dataclass(frozen=True)
class Blob:
    data: bytes
    mime_type: str


class Repositories:
    """The records and blobs of all accounts. Safe to share between threads."""

    def __init__(self, directory: Directory, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[str, dict[tuple[str, str], Record]] = {}
        self._blobs: dict[str, dict[str, Blob]] = {}
        self._last = 0
        #: By NSID: what needs a token.
        self.methods: Mapping[str, tuple[str, Callable[[Request, Grant], Response]]] = {
            "com.atproto.repo.createRecord": ("POST", self._create),
            "com.atproto.repo.putRecord": ("POST", self._put),
            "com.atproto.repo.deleteRecord": ("POST", self._delete),
            "com.atproto.repo.uploadBlob": ("POST", self._upload),
        }
        #: By NSID: what anybody may ask.
        self.public_methods: Mapping[str, Callable[[Request], Response]] = {
            "com.atproto.repo.getRecord": self._get,
            "com.atproto.repo.listRecords": self._list,
            "com.atproto.sync.getBlob": self._get_blob,
        }

    # Writing

    def _create(self, request: Request, grant: Grant) -> Response:
        body = _body_of(request)
        did, collection = self._place(body, grant, "create")
        rkey = self._rkey(body) if "rkey" in body else self._next_tid()
        with self._lock:
            if (collection, rkey) in self._records.get(did, {}):
                raise MethodError(f"Record already exists: at://{did}/{collection}/{rkey}")
        return self._store(did, collection, rkey, body)

    def _put(self, request: Request, grant: Grant) -> Response:
        body = _body_of(request)
        did, collection = self._place(body, grant, "create")
        self._place(body, grant, "update")
        rkey = self._rkey(body)
        self._check_swap(did, collection, rkey, body)
        return self._store(did, collection, rkey, body)

    def _delete(self, request: Request, grant: Grant) -> Response:
        body = _body_of(request)
        did, collection = self._place(body, grant, "delete")
        rkey = self._rkey(body)
        self._check_swap(did, collection, rkey, body)
        with self._lock:
            was_there = self._records.get(did, {}).pop((collection, rkey), None)
        return Response.of_json({"commit": self._commit()} if was_there else {})

    def _upload(self, request: Request, grant: Grant) -> Response:
        mime_type = request.headers.get("Content-Type") or "application/octet-stream"
        if not _allows(grant, "blob", mime_type, ""):
            raise _scope_missing(f"blob:{mime_type}")
        if len(request.body) > _LARGEST_BLOB:
            raise MethodError("request entity too large", "PayloadTooLarge", 413)
        cid = _cid_of(request.body, _RAW)
        with self._lock:
            self._blobs.setdefault(grant.did, {})[cid] = Blob(request.body, mime_type)
        blob = {"$type": "blob", "ref": {"$link": cid}, "mimeType": mime_type, "size": len(request.body)}
        return Response.of_json({"blob": blob})

    def _place(self, body: Mapping[str, Any], grant: Grant, action: str) -> tuple[str, str]:
        """The account and the collection that a record is in, if ``grant`` allows ``action`` there."""
        did = self._did_of(_text(body, "repo"), MethodError("Account not found", "AccountNotFound", 403))
        if did != grant.did:
            raise MethodError("Authentication Required", "AuthenticationRequired", 401)
        collection = _text(body, "collection")
        if not _NSID.fullmatch(collection):
            raise MethodError("collection must be a valid nsid")
        if not _allows(grant, "repo", collection, action):
            raise _scope_missing(f"repo:{collection}?action={action}")
        return did, collection

    def _rkey(self, body: Mapping[str, Any]) -> str:
        rkey = _text(body, "rkey")
        if not _RKEY.fullmatch(rkey):
            raise MethodError("rkey must be a valid Record Key")
        return rkey

    def _check_swap(self, did: str, collection: str, rkey: str, body: Mapping[str, Any]) -> None:
        if "swapRecord" in body:
            with self._lock:
                there = self._records.get(did, {}).get((collection, rkey))
            if (there.cid if there else None) != body["swapRecord"]:
                raise MethodError(f"Record was at {there.cid if there else 'null'}", "InvalidSwap")

    def _store(self, did: str, collection: str, rkey: str, body: Mapping[str, Any]) -> Response:
        value = body.get("record")
        if not isinstance(value, dict):
            raise MethodError("Input/record must be an object")
        value = {"$type": collection, **value}
        if value["$type"] != collection:
            raise MethodError(f"Invalid $type: expected {collection}, got {value['$type']}")
        try:
            cid = _cid_of(dag_cbor(value), _DAG_CBOR)
        except (ValueError, RecursionError):
            raise MethodError("Bad record") from None
        with self._lock:
            self._records.setdefault(did, {})[collection, rkey] = Record(value, cid)
        uri = f"at://{did}/{collection}/{rkey}"
        return Response.of_json({"uri": uri, "cid": cid, "commit": self._commit(), "validationStatus": "unknown"})

    def _commit(self) -> dict[str, str]:
        rev = self._next_tid()
        return {"cid": _cid_of(rev.encode(), _DAG_CBOR), "rev": rev}

    def _next_tid(self) -> str:
        """A new identifier that sorts by time (AT Protocol, "Timestamp Identifiers")."""
        with self._lock:
            self._last = max(self._last + 1, int(self._clock() * 1_000_000))
            number = self._last << 10
        return "".join(_SORTABLE[number >> shift & 31] for shift in range(60, -1, -5))

    # Reading

    def _get(self, request: Request) -> Response:
        asked = _parameters(request)
        did, collection, rkey = self._did_of(_text(asked, "repo")), _text(asked, "collection"), _text(asked, "rkey")
        uri = f"at://{did}/{collection}/{rkey}"
        with self._lock:
            record = self._records.get(did, {}).get((collection, rkey))
        if record is None or asked.get("cid", record.cid) != record.cid:
            raise MethodError(f"Could not locate record: {uri}", "RecordNotFound")
        return Response.of_json(record.at(uri))

    def _list(self, request: Request) -> Response:
        asked = _parameters(request)
        did, collection = self._did_of(_text(asked, "repo")), _text(asked, "collection")
        try:
            limit = int(asked.get("limit", "50"))
        except ValueError:
            limit = 0
        if not 1 <= limit <= 100:
            raise MethodError("limit must be an integer between 1 and 100")
        in_order = asked.get("reverse") == "true"  # the newest come first otherwise
        with self._lock:
            found = [(rkey, record) for (where, rkey), record in self._records.get(did, {}).items()
                     if where == collection]  # fmt: skip
        found.sort(key=lambda pair: pair[0], reverse=not in_order)
        if (cursor := asked.get("cursor")) is not None:
            found = [pair for pair in found if (pair[0] > cursor if in_order else pair[0] < cursor)]
        page = found[:limit]
        answer: dict[str, Any] = {"records": [record.at(f"at://{did}/{collection}/{rkey}") for rkey, record in page]}
        return Response.of_json(answer | ({"cursor": page[-1][0]} if page else {}))

    def _get_blob(self, request: Request) -> Response:
        asked = _parameters(request)
        with self._lock:
            blob = self._blobs.get(_text(asked, "did"), {}).get(_text(asked, "cid"))
        if blob is None:
            raise MethodError("Blob not found")
        return Response(200, blob.data, {"Content-Type": blob.mime_type, "X-Content-Type-Options": "nosniff"})

    def _did_of(self, repo: str, unknown: MethodError | None = None) -> str:
        did = repo if self._directory.knows(repo) else self._directory.resolve(repo)
        if did is None:
            raise unknown or MethodError("Could not locate record")
        return did


def _body_of(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(request.body)
    except ValueError:
        body = None
    if not isinstance(body, dict) or request.headers.get_content_type() != "application/json":
        raise MethodError("Request encoding must be application/json, with an object as its body")
    return body


def _parameters(request: Request) -> dict[str, str]:
    return {name: values[0] for name, values in request.parameters.items()}


def _text(members: Mapping[str, Any], name: str) -> str:
    value = members.get(name)
    if not isinstance(value, str) or not value:
        raise MethodError(f'Missing or invalid "{name}"')
    return value


# What was granted


def _allows(grant: Grant, resource: str, what: str, action: str) -> bool:
    """Whether ``grant`` holds a scope for ``what``, a collection or a media type (AT Protocol, "Permissions")."""
    for scope in grant.scope.split():
        if scope == "transition:generic":
            return True
        pattern, _, query = scope.partition("?")
        if pattern.partition(":")[0] != resource:
            continue
        parameters = Request("GET", "", "", query).parameters
        named = [pattern.partition(":")[2], *parameters.get("collection" if resource == "repo" else "accept", [])]
        if action and action not in parameters.get("action", [action]):
            continue
        if any(_covers(name, what) for name in named):
            return True
    return False


def _covers(pattern: str, what: str) -> bool:
    is_wide = pattern in ("*", "*/*") or (pattern.endswith("/*") and what.startswith(pattern[:-1]))
    return is_wide or pattern == what


def _scope_missing(scope: str) -> MethodError:
    return MethodError(f'Missing required scope "{scope}"', "ScopeMissingError", 403)


# DAG-CBOR and CIDs


def dag_cbor(value: object) -> bytes:  # noqa: PLR0911 - a kind of value each
    """A record in DAG-CBOR: deterministic, so that its hash names it. In JSON, ``{"$link": CID}`` stands for a link and
    ``{"$bytes": BASE64}`` for bytes (AT Protocol, "Data Model").

    :raises ValueError: the data model does not have such a value.
    """
    if value is None or isinstance(value, bool):
        return {None: b"\xf6", False: b"\xf4", True: b"\xf5"}[value]
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError("an integer has 64 bits")
        return _head(0, value) if value >= 0 else _head(1, -1 - value)
    if isinstance(value, str):
        data = value.encode()
        return _head(3, len(data)) + data
    if isinstance(value, list):
        return _head(4, len(value)) + b"".join(map(dag_cbor, value))
    if not isinstance(value, dict):
        raise ValueError("there are no numbers but integers")  # noqa: TRY004 - bad data, not a bad call
    if set(value) == {"$link"}:
        text = str(value["$link"]).removeprefix("b")
        link = b"\0" + base64.b32decode(text.upper() + "=" * (-len(text) % 8))
        return b"\xd8\x2a" + _head(2, len(link)) + link
    if set(value) == {"$bytes"}:
        data = base64.b64decode(str(value["$bytes"]) + "==")
        return _head(2, len(data)) + data
    pairs = sorted((len(name.encode()), name.encode(), member) for name, member in value.items())
    return _head(5, len(pairs)) + b"".join(dag_cbor(n.decode()) + dag_cbor(member) for _, n, member in pairs)


def _head(kind: int, number: int) -> bytes:
    if number < 24:
        return bytes([kind << 5 | number])
    size = next(size for size in range(4) if number < 1 << (8 << size))  # 1, 2, 4 or 8 bytes
    return bytes([kind << 5 | 24 + size]) + struct.pack(">Q", number)[8 - (1 << size) :]


def _cid_of(data: bytes, codec: int) -> str:
    """CID version 1 of what ``data`` holds (SHA-256, base32)."""
    cid = bytes([1, codec, 0x12, 0x20]) + hashlib.sha256(data).digest()
    return "b" + base64.b32encode(cid).decode().rstrip("=").lower()
