"""The error tree: what a program may ask of every error, and the way from one process to another."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from atproto_session import errors
from atproto_session.errors import (
    LockTimeoutError,
    OAuthCallbackError,
    OAuthResponseError,
    SessionError,
    StoreError,
    TransportError,
    printable,
)

ALL = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, SessionError)]


@pytest.mark.parametrize("error", ALL)
def test_every_error_answers_the_two_questions(error: type[SessionError]) -> None:
    made = error("the message")  # the message alone is what Celery's JSON leaves of one
    assert str(made) == "the message"
    assert isinstance(made.retryable, bool)
    assert isinstance(made.login_required, bool)
    assert made.retry_after is None
    assert not (made.retryable and made.login_required)
    assert error.__doc__


def test_the_documentation_draws_the_tree_as_it_is() -> None:
    drawn = {
        line.split()[1]: line for line in (errors.__doc__ or "").splitlines() if line.strip().startswith(("├──", "└──"))
    }
    assert set(drawn) == {error.__name__ for error in ALL} - {"SessionError"}
    for error in ALL:
        if error is SessionError:
            continue
        line = drawn[error.__name__]
        assert error.__bases__[0] is SessionError
        assert line.endswith(" login_required") == error.login_required, line
        assert line.endswith(" retryable") == error.retryable, line


@pytest.mark.parametrize("error", ALL)
@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_every_error_survives_the_way_to_another_process(error: type[SessionError], again: object) -> None:
    made = error("the message")
    made.retryable, made.retry_after = True, 12.5
    made.add_note("a note")
    restored = again(made)  # type: ignore[operator]
    assert type(restored) is error
    assert str(restored) == "the message"
    assert restored.args == ("the message",)
    assert restored.__dict__ == made.__dict__
    assert restored.__notes__ == ["a note"]


def test_what_an_error_carries_survives_as_well() -> None:
    answer = OAuthResponseError("slow down", status=429, error="slow_down", error_description="!", retry_after=3.0)
    restored = pickle.loads(pickle.dumps(answer))
    assert (restored.status, restored.error, restored.error_description) == (429, "slow_down", "!")
    assert (restored.retryable, restored.retry_after) == (True, 3.0)
    assert pickle.loads(pickle.dumps(TransportError("gone", sent=True, retryable=False))).sent is True
    assert pickle.loads(pickle.dumps(TransportError("gone", sent=True, retryable=False))).retryable is False


@pytest.mark.parametrize(
    ("status", "retryable"), [(400, False), (401, False), (408, True), (429, True), (500, True), (503, True)]
)
def test_an_answer_is_worth_another_try_by_its_status(status: int, retryable: bool) -> None:
    assert OAuthResponseError("no", status=status).retryable is retryable
    assert OAuthResponseError("no", status=status, retryable=not retryable).retryable is not retryable


def test_a_lock_timeout_is_a_timeout() -> None:
    with pytest.raises(TimeoutError, match="too long"):
        raise LockTimeoutError("too long", retry_after=1.0)


def test_a_callback_error_keeps_no_code() -> None:
    error = OAuthCallbackError("no", params={"code": "secret", "response": "secret", "iss": "https://x"}, state="s")
    assert (error.params, error.state) == ({"iss": "https://x"}, "s")
    assert OAuthCallbackError("no").params == {}


def test_whether_a_store_error_is_worth_another_try_depends() -> None:
    assert StoreError("broken").retryable is False
    assert StoreError("locked", retryable=True).retryable is True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("did:plc:abc", "did:plc:abc"),
        ("ключ 👍", "ключ 👍"),
        ("it's", "it's"),
        ("a\nb\x1b[31m\u202e\ud800", r"a\nb\x1b[31m\u202e\ud800"),
        ("x" * 120, "x" * 120),
        ("x" * 121, "x" * 120 + "..."),
        ("", ""),
    ],
)
def test_text_from_outside_is_made_printable_and_short(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable("abcdef", 3) == "abc..."


def test_what_anybody_may_send_is_kept_in_part() -> None:
    error = OAuthCallbackError("no", params={f"{number}" * 500: "x" * 100_000 for number in range(1000)})
    assert len(pickle.dumps(error)) < 50_000
