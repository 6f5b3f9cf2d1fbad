"""What a store over rows makes of answers that were lost, and of others that write in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from atproto_session.locks import ThreadLocks
from atproto_session.session import Attempt
from atproto_session.stores._rows import RowLogins, RowStore
from atproto_session.stores.codec import Codec
from atproto_session.testing.contracts import DID, make_session

LATER = 4e9


class DictRows:
    """Rows of sessions or of log-ins, in a dictionary.

    :ivar before_change: called before each conditional change; says what it returns instead, if anything.
    """

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.before_change: Callable[[Callable[[], bool]], bool] = lambda change: change()
        self.sweeps = 0

    def read(self, key: str) -> bytes | None:
        return self.data.get(key)

    def put(self, key: str, data: bytes, expires_at: float = 0.0) -> None:
        self.data[key] = data

    def insert(self, key: str, data: bytes) -> bool:
        return self.before_change(lambda: self.data.setdefault(key, data) is data)

    def update(self, key: str, data: bytes, expected: bytes) -> bool:
        def change() -> bool:
            if self.data.get(key) != expected:
                return False
            self.data[key] = data
            return True

        return self.before_change(change)

    def delete(self, key: str, expected: bytes | None = None) -> bool:
        def change() -> bool:
            return expected in (None, self.data.get(key)) and self.data.pop(key, None) is not None

        return self.before_change(change)

    def clear(self) -> None:
        self.data.clear()

    def keys(self) -> Iterator[str]:
        return iter(list(self.data))

    def close(self) -> None:
        """Nothing to close."""

    def sweep(self, now: float) -> None:
        self.sweeps += 1


def store_over(rows: DictRows) -> RowStore:
    return RowStore(rows, DictRows(), ThreadLocks(), Codec())


def lose_the_answer(change: Callable[[], bool]) -> bool:
    """The driver carries it out, hears nothing, and carries it out again by itself."""
    change()
    return change()


def test_a_write_that_a_driver_did_twice_was_done() -> None:
    rows = DictRows()
    store = store_over(rows)
    rows.before_change = lose_the_answer
    assert store.replace(DID, make_session("1"), None)
    assert store.replace(DID, make_session("2"), make_session("1"))
    assert store.get(DID) == make_session("2")


def test_a_change_in_between_is_compared_anew() -> None:
    """Tokens alone are expected, and only the attempt beside them has changed."""
    rows = DictRows()
    store = store_over(rows)
    store.set(DID, make_session("1"))

    def come_first(change: Callable[[], bool]) -> bool:
        rows.before_change = lambda change: change()
        store.set(DID, replace(make_session("1"), attempt=Attempt("a", "host:1", 1.0, 2.0)))
        return change()

    rows.before_change = come_first
    assert store.replace(DID, make_session("2"), make_session("1").token_set)
    rows.before_change = come_first
    assert not store.replace(DID, make_session("3"), make_session("2")), "another one has the tokens of 1 there by now"


def test_log_ins_that_have_expired_are_swept_now_and_then() -> None:
    rows = DictRows()
    logins = RowLogins(rows, Codec())
    for number in range(100):
        logins.put(str(number), {"verifier": "v"}, LATER)
    assert rows.sweeps == 1
    logins._swept_at -= 61.0
    logins.put("state", {"verifier": "v"}, LATER)
    assert rows.sweeps == 2
