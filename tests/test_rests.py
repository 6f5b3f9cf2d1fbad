"""How long a server is left alone after a failure."""

from __future__ import annotations

import pytest

from atproto_session import CancelledError, IdentityError, OAuthResponseError, SessionError, StoreError, TransportError
from atproto_session._rests import check_rest, rest_after
from atproto_session._terms import Times
from atproto_session.session import Rest

TIMES = Times()


def seconds(error: SessionError, failures: int = 0) -> float:
    earlier = Rest(0.0, failures, "StoreError", "?") if failures else None
    rest = rest_after(error, earlier, 100.0, TIMES)
    assert rest is not None
    assert rest.failures == failures + 1
    return rest.until - 100.0


def test_it_grows_with_each_failure_and_has_an_end() -> None:
    error = TransportError("cannot reach it")
    assert [seconds(error, failures) for failures in (0, 1, 2, 10, 10_000)] == [1.0, 2.0, 4.0, 60.0, 60.0]


@pytest.mark.parametrize(
    ("status", "asked", "given"), [(429, 120.0, 120.0), (429, 1e9, 3600.0), (503, 3600.0, 60.0), (503, None, 1.0)]
)
def test_what_the_server_asks_for(status: int, asked: float | None, given: float) -> None:
    assert seconds(OAuthResponseError("no", status=status, retry_after=asked)) == given


def test_what_is_wrong_with_this_process_is_nothing_for_others() -> None:
    earlier = Rest(50.0, 1, "TransportError", "?")
    for error in (SessionError("the program is ending", retryable=True), StoreError("no room"), CancelledError("no")):
        assert rest_after(error, earlier, 100.0, TIMES) is earlier


def test_none_where_none_is_wanted() -> None:
    assert rest_after(TransportError("no"), None, 100.0, Times(first_rest=0.0, longest_rest=0.0)) is None


@pytest.mark.parametrize(
    "error",
    [
        OAuthResponseError("503", status=503, error="server_error", error_description="down"),
        TransportError("cut", sent=False, retryable=False),
        IdentityError("gone", reason="failed", retryable=True),
    ],
)
def test_the_error_is_told_again(error: SessionError) -> None:
    rest = rest_after(error, None, 100.0, TIMES)
    with pytest.raises(type(error)) as caught:
        check_rest(rest, 100.25, TIMES)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == {**vars(error), "retry_after": 0.75}


@pytest.mark.parametrize("name", ["SessionErr", "rebuild", "Any", "annotations"])
def test_an_error_that_is_not_known_here(name: str) -> None:
    with pytest.raises(SessionError, match="whatever it was"):
        check_rest(Rest(101.0, 1, name, "whatever it was"), 100.0, TIMES)


def test_a_rest_that_is_over_or_out_of_reason() -> None:
    for rest in (None, Rest(100.0, 1, "StoreError", "?"), Rest(1e9, 1, "StoreError", "?")):
        check_rest(rest, 100.0, TIMES)
    with pytest.raises(StoreError):
        check_rest(Rest(100.1, 1, "StoreError", "?"), 100.0, TIMES)
