"""Whatever overlaps with a refresh, in whatever order: nobody overwrites or deletes a session that is newer than the
one they looked at, and nothing is spent twice.

Every overlap is made, not hoped for: the refresh is stopped at an instant, the other comes in between, the refresh goes
on. How many overlaps of each kind there are is said by the ``overlaps`` marks, and told in ``docs/faults.rst``.
"""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from atproto_session import (
    CallbackResult,
    Session,
    SessionNotFoundError,
    StoreError,
    TokenRefreshError,
    TokenRevokedError,
)
from atproto_session._steps import Protocol
from atproto_session.locks import FileLocks
from atproto_session.refresh import Refresh
from atproto_session.session import Attempt
from atproto_session.testing.network import LocalNetwork, Request, Response

from ..core import SOON
from ..processes import ROOT
from ..programs.store_scene import INSTANTS, PROCESSED, SENT, Pause, Scene, present, tokens_of
from ..scenes import GET_SESSION


@pytest.fixture(params=["json", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}:///{tmp_path}/sessions"


@pytest.fixture
def clean_up() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


Scenes = Callable[..., list[Scene]]


@pytest.fixture
def scenes(network: LocalNetwork, url: str, clean_up: ExitStack) -> Scenes:
    """One within a single client, and one between two that have nothing but a path in common."""

    def scenes(*, hasty: bool = False) -> list[Scene]:
        return [Scene(network, url, clean_up, alone=alone, hasty=hasty) for alone in (True, False)]

    return scenes


@pytest.fixture
def scene(network: LocalNetwork, url: str, clean_up: ExitStack) -> Scene:
    return Scene(network, url, clean_up)


def overlaps(fault: str, rounds: int = 1) -> pytest.MarkDecorator:
    """How often the test, with each of its parameters, makes what ``docs/faults.rst`` calls ``fault``."""
    return pytest.mark.overlaps(fault, rounds)


at_every_instant = pytest.mark.parametrize("instant", INSTANTS)
waiting_or_not = pytest.mark.parametrize("hasty", [False, True], ids=["waiting", "hasty"])


# Refresh against log-out, log-in, clear


@overlaps("a refresh overlaps a log-out", 2)
@at_every_instant
@waiting_or_not
def test_a_log_out_is_final(scenes: Scenes, instant: str, hasty: bool) -> None:
    for scene in scenes(hasty=hasty):
        first = scene.log_in()
        refresh = scene.overlap(instant, partial(scene.other.revoke, scene.did), waits_at=None if hasty else "lock")
        if hasty:
            with pytest.raises(TokenRevokedError):
                refresh.outcome()
        else:
            assert present(refresh.outcome()).is_same_grant(first)
        assert scene.stored is None
        assert scene.is_over(first)
        assert scene.uses_of(first) == (not hasty or instant in SENT)
        scene.check_spent_once()


@overlaps("a refresh overlaps a log-in", 2)
@at_every_instant
@waiting_or_not
def test_a_log_in_is_not_replaced(scenes: Scenes, instant: str, hasty: bool) -> None:
    for scene in scenes(hasty=hasty):
        first = scene.log_in()
        callback = scene.go_to_browser(scene.other)
        refresh = scene.overlap(
            instant, partial(scene.come_back, scene.other, callback), waits_at=None if hasty else "lock"
        )
        result, newer = present(refresh.outcome()), present(scene.intruder.outcome())
        scene.check_works(newer)
        assert not newer.is_same_grant(first)
        if hasty:
            assert tokens_of(result) == tokens_of(newer)
        else:
            assert result.is_same_grant(first)
        assert scene.is_over(first), "the grant that was replaced"
        assert scene.uses_of(first) == (not hasty or instant in SENT)
        scene.check_spent_once()


@overlaps("a refresh overlaps a log-out")
def test_a_refresh_that_looks_for_its_server_keeps_nobody_waiting(scene: Scene) -> None:
    first = scene.log_in()
    refresh = scene.overlap("while it looks for its server", partial(scene.other.revoke, scene.did))
    with pytest.raises(TokenRevokedError):
        refresh.outcome()
    second = scene.log_in()
    callback = scene.go_to_browser(scene.other)
    refresh = scene.overlap("while it looks for its server", partial(scene.come_back, scene.other, callback))
    newer = present(scene.intruder.outcome())
    assert tokens_of(present(refresh.outcome())) == tokens_of(newer)
    assert [scene.uses_of(one) for one in (first, second, newer)] == [0, 0, 0]
    scene.check_works(newer)


@overlaps("a refresh overlaps ``clear()``", 2)
@at_every_instant
def test_what_was_cleared_stays_away(scenes: Scenes, instant: str) -> None:
    for scene in scenes():
        first = scene.log_in()
        refresh = scene.overlap(instant, scene.store.clear)
        with pytest.raises(TokenRevokedError):
            refresh.outcome()
        assert scene.stored is None
        assert scene.is_over(first) == (instant in SENT), "its tokens had been renewed for nobody"
        assert scene.uses_of(first) == (instant in SENT)
        scene.check_spent_once()


# Refresh against refresh


@at_every_instant
@pytest.mark.parametrize(
    "rejected",
    [
        pytest.param(False, marks=overlaps("a refresh overlaps another", 2), id="refresh"),
        pytest.param(True, marks=overlaps("a refresh overlaps a rejected token", 2), id="rejected token"),
    ],
)
def test_two_that_need_another_token_spend_one(scenes: Scenes, instant: str, rejected: bool) -> None:
    for scene in scenes():
        first = scene.logged_in()
        token = first.token_set.access_token if rejected else None
        # Of one client, the second joins the flight of the first and never comes to the lock: it has to have looked.
        refresh = scene.overlap(
            instant,
            partial(scene.other.sessions.get_session, scene.did, not rejected, rejected=token, timeout=SOON),
            waits_at="after get" if scene.one is scene.other else "lock",
        )
        renewed = present(refresh.outcome())
        assert tokens_of(present(scene.intruder.outcome())) == tokens_of(renewed)
        scene.check_works(renewed)
        assert scene.uses_of(first) == 1
        assert scene.uses_of(renewed) == 0
        scene.check_spent_once()


def break_lock(directory: Path, how: str) -> None:
    """Do to the lock files of sessions what a cleaner of old files, or somebody's restored backup, does."""
    for path in list(directory.rglob("*.lock")):
        if path.parent.name in ("writing", "schema"):  # other locks, which are held for moments only
            continue
        if how == "replaced":
            new = path.with_suffix(".new")
            new.touch()
            new.rename(path)
        else:
            path.unlink()


broken = pytest.mark.parametrize("how", ["deleted", "replaced"])


@pytest.fixture
def nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever announced a refresh counts as gone: the time in which its answer may come is over."""

    def is_over(refresh: Refresh, attempt: Attempt) -> Protocol[bool]:
        return True
        yield

    monkeypatch.setattr(Refresh, "_is_over", is_over)


@overlaps("the lock is broken from outside")
@broken
@pytest.mark.parametrize("instant", INSTANTS[:2])
@pytest.mark.usefixtures("nothing_to_wait_for")
def test_a_lost_lock_stops_a_refresh_unspent(scene: Scene, tmp_path: Path, instant: str, how: str) -> None:
    def usurp() -> None:
        break_lock(tmp_path, how)
        scene.refresh(scene.other).outcome()

    first = scene.logged_in()
    refresh = scene.overlap(instant, usurp)
    renewed = scene.stored
    assert tokens_of(present(refresh.outcome())) == tokens_of(present(renewed))
    scene.check_works(renewed)
    assert scene.uses_of(first) == 1
    scene.check_spent_once()


@overlaps("the lock is broken from outside")
@broken
@pytest.mark.parametrize("instant", SENT)
@pytest.mark.parametrize("lost", ["before the attempt", "at the attempt"])
def test_a_lost_lock_stops_a_refresh_beside_another_in_flight(
    scene: Scene, tmp_path: Path, lost: str, instant: str, how: str
) -> None:
    # No token has changed yet: only the attempt in the record tells.
    first = scene.logged_in()
    stopped, refresh = scene.stopped_refresh(lost)
    break_lock(tmp_path, how)
    pause, usurper = scene.stopped_refresh(instant, by_other=True)
    waits = scene.steps.signal("lock")
    stopped.release.set()
    assert waits.wait(SOON)
    assert scene.uses_of(first) == (instant in PROCESSED)
    pause.release.set()
    renewed = present(usurper.outcome())
    assert tokens_of(present(refresh.outcome())) == tokens_of(renewed)
    scene.check_works(renewed)
    assert scene.uses_of(first) == 1
    scene.check_spent_once()


@broken
def test_a_worker_that_has_lost_its_lock_takes_it_anew_before_it_sends(scene: Scene, tmp_path: Path, how: str) -> None:
    first = scene.logged_in()
    stopped, refresh = scene.stopped_refresh("before the last look")
    break_lock(tmp_path, how)
    anew = scene.steps.signal("lock")
    stopped.release.set()
    scene.check_works(present(refresh.outcome()))
    assert anew.is_set()
    assert scene.uses_of(first) == 1
    scene.check_spent_once()


@overlaps("the lock is broken from outside")
@broken
def test_of_two_attempts_at_once_one_is_made(scene: Scene, tmp_path: Path, how: str) -> None:
    first = scene.logged_in()
    stopped, refresh = scene.stopped_refresh("at the attempt")
    break_lock(tmp_path, how)
    looking, usurper = scene.stopped_refresh("before the last look", by_other=True)
    waits = scene.steps.signal("lock")
    stopped.release.set()
    assert waits.wait(SOON)
    assert scene.uses_of(first) == 0
    looking.release.set()
    renewed = present(usurper.outcome())
    assert tokens_of(present(refresh.outcome())) == tokens_of(renewed)
    assert scene.uses_of(first) == 1
    scene.check_works(renewed)


@overlaps("the lock is broken from outside")
@broken
@pytest.mark.parametrize("instant", SENT)
def test_whoever_gets_a_broken_lock_waits_for_the_answer_to_another(
    scene: Scene, tmp_path: Path, instant: str, how: str
) -> None:
    # The lock is free, and yet says nothing of its holder: it is not the one that was held for the attempt.
    first = scene.logged_in()
    pause, refresh = scene.stopped_refresh(instant)
    break_lock(tmp_path, how)
    looks = scene.other_steps.signal("get", after=2)
    usurper = scene.refresh(scene.other)
    assert looks.wait(SOON)
    assert scene.uses_of(first) == (instant in PROCESSED)
    pause.release.set()
    renewed = present(refresh.outcome())
    assert tokens_of(present(usurper.outcome())) == tokens_of(renewed)
    scene.check_works(renewed)
    assert scene.uses_of(first) == 1
    scene.check_spent_once()


@overlaps("the lock is broken from outside")
@broken
@pytest.mark.parametrize("instant", SENT)
@pytest.mark.usefixtures("nothing_to_wait_for")
def test_a_lock_broken_in_flight_costs_no_newer_session(scene: Scene, tmp_path: Path, instant: str, how: str) -> None:
    # An answer that comes later than it may: the token has been sent again by then, and the server ends the session.
    # What is left to promise: whoever comes last changes nothing that he has not seen.
    first = scene.log_in()
    pause, refresh = scene.stopped_refresh(instant)
    break_lock(tmp_path, how)
    usurper = scene.refresh(scene.other)
    if instant == "request sent":
        renewed = present(usurper.outcome())
        pause.release.set()
        assert tokens_of(present(refresh.outcome())) == tokens_of(renewed)
        assert tokens_of(present(scene.stored)) == tokens_of(renewed)
    else:
        with pytest.raises(TokenRefreshError) as caught:
            usurper.outcome()
        assert caught.value.answer_lost
        pause.release.set()
        with pytest.raises(TokenRevokedError):
            refresh.outcome()
        assert scene.stored is None
    assert scene.is_over(first)


@overlaps("the lock is broken from outside")
@broken
def test_newer_tokens_of_the_same_grant_are_not_revoked(scene: Scene, tmp_path: Path, how: str) -> None:
    # The store has taken the tokens and says that it has not; before it is asked again, another worker has refreshed
    # them. To revoke those that are stored no more would end those that are.
    first = scene.logged_in()
    pause = scene.steps.pause("after store", error=StoreError("it was not written, it says"))
    refresh = scene.refresh()
    pause.wait_until_reached()
    break_lock(tmp_path, how)
    renewed = present(scene.refresh(scene.other).outcome())
    pause.release.set()
    assert tokens_of(present(refresh.outcome())) == tokens_of(renewed)
    scene.check_works(renewed)
    assert not scene.is_over(first)
    assert scene.network.revocations == 0
    scene.check_spent_once()


# A late refusal


def refuse_when_released(network: LocalNetwork) -> Pause:
    """Have the next refresh refused with ``invalid_grant`` and not processed, as one with a client assertion that was
    seen before is."""
    release = threading.Event()

    def respond(request: Request) -> Response:
        release.wait(SOON)
        return Response.of_json({"error": "invalid_grant"}, 400)

    return Pause.at(network.fault("refresh", "custom", respond=respond), release)


@overlaps("an ``invalid_grant`` comes late")
@pytest.mark.parametrize("newer", ["log-in", "refresh", "log-out"])
@pytest.mark.usefixtures("nothing_to_wait_for")
def test_a_late_refusal_ends_nothing_newer(
    network: LocalNetwork, url: str, clean_up: ExitStack, tmp_path: Path, newer: str
) -> None:
    scene = Scene(network, url, clean_up, hasty=newer != "refresh")
    scene.logged_in()
    callback = scene.go_to_browser(scene.other) if newer == "log-in" else ""
    pause = refuse_when_released(network)
    refresh = scene.refresh()
    pause.wait_until_reached()
    if newer == "log-in":
        session: Session | None = scene.come_back(scene.other, callback)
    elif newer == "refresh":
        break_lock(tmp_path, "deleted")
        session = present(scene.refresh(scene.other).outcome())
    else:
        scene.other.revoke(scene.did)
        session = None
    pause.release.set()
    if session is None:
        with pytest.raises(TokenRevokedError):
            refresh.outcome()
        assert scene.stored is None
    else:
        assert tokens_of(present(refresh.outcome())) == tokens_of(session)
        scene.check_works(session)
    scene.check_spent_once()


# Several sessions of one account


@overlaps("a refresh overlaps another session")
@at_every_instant
@pytest.mark.parametrize("event", ["log-out", "log-in", "refresh"])
def test_two_sessions_of_one_account_leave_each_other_alone(
    network: LocalNetwork, url: str, clean_up: ExitStack, tmp_path: Path, instant: str, event: str
) -> None:
    # Names with the same hash share a lock file. Here, no two have the same.
    scene = Scene(network, url, clean_up, locks=lambda: FileLocks(tmp_path / "apart", stripes=2**48))
    phone = f"{scene.did}#phone"
    first, second = scene.logged_in(), scene.logged_in("phone")
    callback = scene.go_to_browser(scene.other) if event == "log-in" else ""
    events: dict[str, Callable[[], object]] = {
        "log-out": partial(scene.other.revoke, scene.did, session_id="phone"),
        "log-in": partial(scene.come_back, scene.other, callback, "phone"),
        "refresh": partial(scene.other.sessions.get_session, phone, True),
    }
    refresh = scene.overlap(instant, events[event])
    renewed = present(refresh.outcome())
    assert renewed.is_same_grant(first)
    scene.check_works(renewed)
    if event == "log-out":
        assert scene.store.get(phone) is None
        assert scene.is_over(second)
    else:
        changed = present(scene.store.get(phone))
        assert tokens_of(changed) != tokens_of(second)
        assert changed.is_same_grant(second) == (event == "refresh")
        scene.check_works(changed, "phone")
    scene.check_spent_once()


# Log-in against log-out, log-in against log-in


@overlaps("a log-in overlaps a log-out or a log-in", 2)
@pytest.mark.parametrize("begins", ["log-in", "log-out"])
@waiting_or_not
def test_of_a_log_in_and_a_log_out_the_later_counts(scenes: Scenes, begins: str, hasty: bool) -> None:
    for scene in scenes(hasty=hasty):
        old = scene.log_in()
        come_back = partial(scene.come_back, scene.one, scene.go_to_browser(scene.one))
        log_out = partial(scene.other.revoke, scene.did)
        if begins == "log-in":
            log_in = scene.cross(come_back, scene.steps, "set", log_out, scene.other_steps, waits=not hasty)
        else:
            scene.cross(log_out, scene.other_steps, "delete", come_back, scene.steps, waits=not hasty)
            log_in = scene.intruder
        new = present(log_in.outcome())
        if begins == "log-in" and not hasty:
            assert scene.stored is None
            assert scene.is_over(new)
        else:
            scene.check_works(new)
            assert scene.is_over(old), "its owner has signed out of it"
        scene.check_spent_once()


@overlaps("a log-in overlaps a log-out or a log-in", 2)
@waiting_or_not
def test_of_two_log_ins_the_later_stays_and_both_work(scenes: Scenes, hasty: bool) -> None:
    for scene in scenes(hasty=hasty):
        first = partial(scene.one.callback, scene.go_to_browser(scene.one), timeout=SOON)
        second = partial(scene.other.callback, scene.go_to_browser(scene.other), timeout=SOON)
        revoked_before = scene.network.revocations
        begun = scene.cross(first, scene.steps, "set", second, scene.other_steps, waits=not hasty)
        for log_in in (begun, scene.intruder):
            result = log_in.outcome()
            assert isinstance(result, CallbackResult)
            assert result.session.get(GET_SESSION).json()["did"] == scene.did
        scene.check_works(scene.stored)
        assert scene.network.rotations == 0
        assert scene.network.revocations == revoked_before + 1, "the grant that was replaced"


# Anything, at random instants


def log_out(scene: Scene, first: Session, callback: str) -> None:
    scene.other.revoke(scene.did)


def log_in(scene: Scene, first: Session, callback: str) -> Session:
    return scene.come_back(scene.other, callback)


def clear(scene: Scene, first: Session, callback: str) -> None:
    scene.other_store.clear()


def refresh(scene: Scene, first: Session, callback: str) -> Session:
    return scene.other.sessions.get_session(scene.did, True, timeout=SOON)


def use_rejected(scene: Scene, first: Session, callback: str) -> Session:
    return scene.other.sessions.get_session(scene.did, rejected=first.token_set.access_token, timeout=SOON)


ROUNDS = 10


@pytest.mark.parametrize(
    "intrude",
    [
        pytest.param(log_out, marks=overlaps("a refresh overlaps a log-out", ROUNDS)),
        pytest.param(log_in, marks=overlaps("a refresh overlaps a log-in", ROUNDS)),
        pytest.param(clear, marks=overlaps("a refresh overlaps ``clear()``", ROUNDS)),
        pytest.param(refresh, marks=overlaps("a refresh overlaps another", ROUNDS)),
        pytest.param(use_rejected, marks=overlaps("a refresh overlaps a rejected token", ROUNDS)),
    ],
)
@waiting_or_not
def test_anything_at_random_instants(
    network: LocalNetwork,
    url: str,
    clean_up: ExitStack,
    intrude: Callable[[Scene, Session, str], Session | None],
    hasty: bool,
) -> None:
    """The refresh stops at one random step of its own until the other has come to one of its own; then both run."""
    chance = random.Random(f"{intrude.__name__} {hasty}")
    scene = Scene(network, url, clean_up, hasty=hasty)
    for _ in range(ROUNDS):
        first = scene.logged_in()
        callback = scene.go_to_browser(scene.other) if intrude is log_in else ""
        # Whoever waits for the lock gets no further than that.
        stop, meet = chance.randrange(11), chance.randrange(6) if hasty and intrude in (log_out, log_in) else 0
        result, other = scene.race(stop, meet, partial(intrude, scene, first, callback))
        with_tokens: Session | None = None
        try:
            with_tokens = present(result.outcome())
        except (TokenRevokedError, SessionNotFoundError):
            assert intrude in (log_out, clear)
        if intrude in (log_out, clear):
            other.outcome()
            assert scene.stored is None
            if intrude is log_out or (with_tokens is None and scene.uses_of(first)):
                assert scene.is_over(first)
        elif intrude is log_in:
            # A refresh that looks only then finds the new session, and refreshes that.
            assert present(scene.stored).is_same_grant(present(other.outcome()))
            scene.check_works(scene.stored)
        else:
            assert present(other.outcome()).is_same_grant(first)
            assert present(with_tokens).is_same_grant(first)
            scene.check_works(scene.stored)
        scene.check_spent_once()


def test_the_documents_say_how_many_overlaps_there_are(request: pytest.FixtureRequest) -> None:
    options = request.config.option
    if options.keyword or any("::" in argument for argument in request.config.args):
        pytest.skip("only some of the overlaps are made in this run")
    made = Counter[str]()
    for item in request.session.items:
        if item.path != request.path:
            continue  # a test from here that runs over a server as well
        for mark in item.iter_markers("overlaps"):
            fault, rounds = mark.args
            made[fault] += rounds
    table = (ROOT / "docs" / "faults.rst").read_text(encoding="utf-8")
    said = {fault: re.search(rf"^{re.escape(fault)}  .*  ([0-9]+) +0$", table, re.MULTILINE) for fault in made}
    assert {fault: int(row[1]) for fault, row in said.items() if row} == made
