"""What was looked up a short while ago."""

from atproto_session._recent import Recent


def test_the_oldest_go_first() -> None:
    recent = Recent[str](60.0, most=2)
    for now, key in enumerate(["a", "b", "a", "c"]):
        recent.set(key, (float(now), key.upper()))
    assert [recent.get(key) for key in "abc"] == [(2.0, "A"), None, (3.0, "C")]


def test_age_evicts() -> None:
    recent = Recent[str](60.0)
    recent.set("a", (0.0, "A"))
    recent.set("b", (59.9, "B"))
    assert recent.get("a") is not None
    recent.set("c", (60.0, "C"))
    assert [recent.get(key) for key in "abc"] == [None, (59.9, "B"), (60.0, "C")]


def test_a_value_can_be_taken_out() -> None:
    recent = Recent[str](60.0)
    recent.set("a", (0.0, "A"))
    recent.delete("a")
    recent.delete("a")
    assert recent.get("a") is None


def test_what_is_to_be_kept_for_no_time_is_not_kept() -> None:
    recent = Recent[str](0.0)
    recent.set("a", (0.0, "A"))
    assert recent.get("a") is None
