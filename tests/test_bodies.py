"""What an answer holds, by the rules and beyond them."""

from __future__ import annotations

import gzip
import json
import time
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atproto_session._bodies import find_answer, undo_coding

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
BODY = b'{"access_token": "secret-token", "expires_in": 60}'


@pytest.mark.parametrize("coding", ["", " ", "identity", "IDENTITY"])
def test_a_body_without_a_coding(coding: str) -> None:
    assert undo_coding(b"body", coding, 4) == b"body"


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", " GZip "])
def test_a_body_in_gzip(coding: str) -> None:
    assert undo_coding(gzip.compress(BODY), coding, 100) == BODY
    with pytest.raises(ValueError, match="too large"):
        undo_coding(gzip.compress(BODY), coding, 10)


def test_documents_keep_to_the_rules() -> None:
    for body, coding, complaint in [
        (gzip.compress(BODY)[:-1], "gzip", "cut off"),
        (BODY, "gzip", "not the gzip"),
        (zlib.compress(BODY), "deflate", "not asked for"),
        (BODY, "br", "not asked for"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            undo_coding(body, coding, 1000)


def test_the_headers_of_an_answer() -> None:
    found = find_answer(
        b"HTTP/1.1 103 Early\r\nX: 1\r\n\r\nHTTP/1.0 400\r\nX: 2\r\nnonsense\r\nx:3\r\nDPoP-Nonce:  n \r\n\r\n" + BODY
    )
    assert found is not None
    assert found.status == 400
    assert dict(found.headers.lower_items()) == {"x": "2, 3", "dpop-nonce": "n"}
    assert json.loads(found.body) == json.loads(BODY)


@pytest.mark.parametrize(
    "received",
    [
        b"",
        BODY,
        b"SSH-2.0-OpenSSH\r\n\r\n{}",
        b"HTTP/1.1 2000 OK\r\n\r\n{}",
        b"HTTP/1.1 103 Early\r\n\r\n",
        b"HTTP/1.1 103 Early\r\n\r\n{}",
        HEAD[:-2],
        HEAD,
        HEAD + b"[{}]",
        HEAD + b"<script>{}</script>",
        HEAD + b'"{}"',
        HEAD + b"{" * 100_000,
        HEAD + b'{"a":' * 100_000,
        HEAD + BODY[:-1],
        HEAD + gzip.compress(BODY[:-1]),
        HEAD + b"10\r\n" + BODY[:16] + b"\r\n0\r\n\r\n",
        HEAD + b"10\r\n" + BODY[:16] + b"\r\nxx" + BODY[16:],
    ],
    ids=lambda received: str(received[-20:]),
)
def test_what_holds_no_answer(received: bytes) -> None:
    assert find_answer(received) is None


def test_a_chunk_that_is_longer_than_it_says_does_not_make_another_token() -> None:
    split = BODY.index(b"token") + 3
    chunks = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (split + 2, BODY[:split], len(BODY) - split, BODY[split:])
    assert find_answer(HEAD + chunks) is None


def test_numbers_that_are_none_do_not_spoil_the_rest() -> None:
    found = find_answer(HEAD + b'{"a": 1e999, "b": -Infinity, "c": %b, "d": 60, "access_token": "x"}' % (b"1" * 5000))
    assert found is not None
    assert json.loads(found.body) == {"a": None, "b": None, "c": None, "d": 60, "access_token": "x"}


def test_what_would_fill_the_memory_is_left() -> None:
    began = time.monotonic()
    assert find_answer(HEAD + gzip.compress(b" " * 50_000_000)) is None
    assert find_answer(HEAD + gzip.compress(gzip.compress(b" " * 50_000_000))) is None
    assert find_answer(HEAD + gzip.compress(b"") * 20_000) is None
    assert time.monotonic() - began < 30.0


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([HEAD, BODY, BODY[:20], BODY[20:], gzip.compress(BODY), b"\r\n", b"0\r\n", b"32\r\n"])
        | st.binary(max_size=20)
    )
)
@example([BODY[:20], b" ", BODY[20:]])
def test_any_bytes_hold_the_whole_token_or_none(pieces: list[bytes]) -> None:
    sent = b"".join(pieces)
    found = find_answer(HEAD + sent)
    if found is not None:
        token = json.loads(found.body).get("access_token", "secret-token")
        # What is put into the middle of the token makes another one, which is whole as well.
        assert token == "secret-token" or f'"{token}"' in sent.decode("utf-8", "replace")


@given(st.binary(max_size=200))
def test_any_bytes_can_be_looked_at(received: bytes) -> None:
    found = find_answer(received)
    assert found is None or 200 <= found.status <= 999
