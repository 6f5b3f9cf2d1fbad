"""What an answer holds. Documents keep to the rules of HTTP, or they are refused (:func:`undo_coding`). The answer to a
token request is read whatever rules it breaks (:func:`find_answer`): the token that it was paid with is gone, so there
is nothing to win by refusing it. No I/O.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from requests.structures import CaseInsensitiveDict

#: How much a body may hold after its codings are undone, where the rules are not kept, in bytes.
_MOST = 1024 * 1024
#: Codings on top of each other.
_CODINGS = 3
_STATUS = re.compile(rb"HTTP/[0-9.]+[ \t]+([0-9]{3})(?![0-9])", re.IGNORECASE)
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_CHUNK = re.compile(rb"[\r\n]{0,4}([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
_GZIP_OR_ZLIB, _DEFLATE = 47, -15


def undo_coding(body: bytes, coding: str, limit: int) -> bytes:
    """``body`` without the ``Content-Encoding`` that was declared for it.

    :param limit: how much it may hold, in bytes.
    :raises ValueError: it cannot be undone. The text completes "its answer ...".
    """
    coding = coding.strip().lower()
    if coding in ("", "identity") or not body:
        return body
    if coding not in ("gzip", "x-gzip"):
        raise ValueError("is in a coding that was not asked for")
    # urllib3 would do it, but not all its releases do so within a bound.
    decompressor = zlib.decompressobj(wbits=31)
    try:
        plain = decompressor.decompress(body, limit + 1)
    except zlib.error:
        raise ValueError("is not the gzip it says it is") from None
    if len(plain) > limit:
        raise ValueError("is too large")
    if not decompressor.eof:
        raise ValueError("was cut off")
    return plain


class Found(NamedTuple):
    """An answer that holds one JSON object, which is ``body`` once more, in UTF-8."""

    status: int
    headers: CaseInsensitiveDict[str]
    body: bytes


def find_answer(received: bytes) -> Found | None:
    """The answer in all bytes that a server sent, if there is a whole JSON object where the body begins.

    How long the body is, how it is divided and coded, and what it is said to be does not matter. A JSON object tells by
    itself whether it is whole, so no part of a token is ever taken for a token. Interim answers (1xx) are skipped.
    """
    status, fields, rest = 100, b"", received
    while 100 <= status < 200:
        head, *after = _END_OF_HEAD.split(rest.lstrip(b"\r\n"), maxsplit=1)
        match = _STATUS.match(head)
        if match is None or not after:
            return None
        status, fields, rest = int(match[1]), head.partition(b"\n")[2], after[0]
    for body in (rest, _without_chunks(rest)):
        for plain in _decoded(body):
            if (document := _object_in(plain)) is not None:
                return Found(status, _headers(fields), json.dumps(document).encode())
    return None


def _headers(fields: bytes) -> CaseInsensitiveDict[str]:
    headers: CaseInsensitiveDict[str] = CaseInsensitiveDict()
    for line in fields.decode("latin-1").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            name, value = name.strip(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _without_chunks(body: bytes) -> bytes:
    """The chunks of ``body`` put together, as far as there are any (RFC 9112 section 7.1)."""
    pieces, position = [], 0
    while (match := _CHUNK.match(body, position)) and (size := int(match[1], 16)):
        position = match.end() + size
        pieces.append(body[match.end() : position])
    return b"".join(pieces)


def _decoded(body: bytes, depth: int = _CODINGS) -> Iterator[bytes]:
    """``body`` as it is, and with every coding undone that it may be in."""
    yield body
    if depth and not body.lstrip().startswith(b"{"):
        for wbits in (_GZIP_OR_ZLIB, _DEFLATE):
            if plain := _inflated(body, wbits):
                yield from _decoded(plain, depth - 1)


def _inflated(body: bytes, wbits: int) -> bytes:
    """As much as can be decompressed of ``body``, however many streams it consists of."""
    plain = bytearray()
    stream = zlib.decompressobj(wbits)
    # Byte by byte: of what fails to decompress, nothing is returned.
    for position in range(len(body)):
        if stream.eof:
            stream = zlib.decompressobj(wbits)
        try:
            plain += stream.decompress(body[position : position + 1], _MOST)
        except zlib.error:
            break
        if len(plain) > _MOST:
            break
    return bytes(plain)


def _number(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


# The numbers matter little here, and must not be a reason to refuse the rest.
_DECODER = json.JSONDecoder(parse_int=_number, parse_float=_number, parse_constant=lambda _: None)


def _object_in(body: bytes) -> dict[str, Any] | None:
    """The JSON object that ``body`` begins with, in any of the encodings of Unicode."""
    text = body.decode(json.detect_encoding(body), errors="replace").lstrip("\ufeff\0 \t\r\n")
    if not text.startswith("{"):
        return None
    try:
        document, _ = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None  # which it is
