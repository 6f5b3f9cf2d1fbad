"""Records as bytes: what is written can be read by those who have the key, and by nobody as something else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cryptography.fernet import Fernet

from atproto_session import StoreError
from atproto_session.session import Session
from atproto_session.stores.codec import Codec
from atproto_session.testing.contracts import DID, make_session

KEY, OTHER = Fernet.generate_key().decode(), Fernet.generate_key()
STATE, LOGIN = "state", {"verifier": "v"}


@pytest.mark.parametrize("codec", [Codec(), Codec(KEY), Codec([OTHER, KEY])], ids=["plain", "one key", "two keys"])
def test_a_session_comes_back(codec: Codec) -> None:
    data = codec.encode(DID, make_session())
    assert codec.decode(DID, data) == make_session()
    assert codec.decode(DID, data.decode()) == make_session(), "text, if it was written by hand"
    assert codec.key_of(data) == DID


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    session = make_session()
    plain, old = Codec().encode(DID, session), Codec(KEY).encode(DID, session)
    both = Codec([OTHER, KEY], allow_plaintext=True)
    new = both.encode(DID, session)
    assert [both.decode(DID, data) for data in (plain, old, new)] == [session] * 3
    assert Codec(OTHER).decode(DID, new) == session
    token = session.token_set.access_token.encode()
    assert [token in data for data in (plain, old, new)] == [True, False, False]


@pytest.mark.parametrize(
    ("codec", "data", "reason"),
    [
        (Codec(), Codec(KEY).encode(DID, make_session()), "there are no encryption_keys"),
        (Codec(OTHER), Codec(KEY).encode(DID, make_session()), "none of the encryption_keys"),
        (Codec(KEY), Codec(KEY).encode("did:web:b", make_session()), "another key"),
        (Codec(), b"", "it is empty"),
        (Codec(), b"{", "it is damaged"),
        (Codec(), b"[" * 100_000, "it is damaged"),
        (Codec(), b"[]", "not a JSON object"),
    ],
    ids=["encrypted", "another secret", "moved", "empty", "cut off", "deep", "a list"],
)
def test_what_cannot_be_read_is_an_error_that_says_why_and_shows_nothing(
    codec: Codec, data: bytes, reason: str
) -> None:
    with pytest.raises(StoreError, match=f"the session of {DID} cannot be read: .*{reason}") as caught:
        codec.decode(DID, data)
    assert caught.value.__cause__ is None
    assert make_session().token_set.access_token not in str(caught.value)


def test_what_could_not_be_read_back_is_not_written() -> None:
    session = make_session()
    endless = replace(session, refreshed_at=float("nan"))
    with pytest.raises(StoreError, match="cannot be stored"):
        Codec().encode(DID, endless)


@pytest.mark.parametrize("document", [{}, {"atprotoSession": []}, {"atprotoSession": {"key": 7}}])
def test_a_record_that_does_not_hold_its_key(document: object) -> None:
    with pytest.raises(ValueError, match="does not hold its key"):
        Codec().key_of(json.dumps(document).encode())


@pytest.mark.parametrize("codec", [Codec(), Codec(KEY)], ids=["plain", "encrypted"])
def test_a_log_in_comes_back_until_it_expires(codec: Codec) -> None:
    data = codec.encode_login(STATE, LOGIN, 100.0)
    assert codec.decode_login(STATE, data, 99.0) == LOGIN
    assert codec.decode_login(STATE, data, 100.0) is None
    with pytest.raises(StoreError, match="not the record of this log-in"):
        codec.decode_login("another", data, 99.0)
    with pytest.raises(StoreError, match="cannot be read"):
        codec.decode_login(STATE, data[:-5], 99.0)


def test_a_log_in_that_is_no_json_is_not_stored() -> None:
    with pytest.raises(StoreError, match="cannot be stored"):
        Codec().encode_login(STATE, {"verifier": object()}, 100.0)


@pytest.mark.parametrize("keys", ["hunter2", [KEY, "hunter2"], [b""]])
def test_what_is_no_encryption_key_is_an_error_that_does_not_show_it(keys: list[str] | str) -> None:
    with pytest.raises(StoreError, match="not a Fernet key") as caught:
        Codec(keys)
    assert "hunter2" not in str(caught.value)


def test_a_record_is_decoded_once_as_long_as_it_is_the_same() -> None:
    codec = Codec()
    data = codec.encode(DID, make_session())
    first = codec.decode(DID, data)
    assert isinstance(first, Session)
    assert codec.decode(DID, bytes(bytearray(data))) is first
    assert codec.decode(DID, codec.encode(DID, make_session("2"))) == make_session("2")
