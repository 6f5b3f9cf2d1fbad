"""Whatever overlaps with a refresh, in whatever order: nobody overwrites or deletes a session that is newer than the
one they looked at, and nothing is spent twice.

Every overlap is made, not hoped for: the refresh is stopped at an instant, the other comes in between, the refresh goes
on.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from atproto_session import (
    LockTimeoutError,
    Session,
    SessionNotFoundError,
    StoreError,
    TokenRefreshError,
    TokenRevokedError,
)
from atproto_session.locks import FileLocks
from atproto_session.testing.network import LocalNetwork, Request, Response

from .core import SOON, Worker
from .programs.store_scene import GET_SESSION, INSTANTS, PROCESSED, SENT, Pause, Scene, present, tokens_of


def invalid_grant(network: LocalNetwork) -> Pause:
    """Have the next refresh refused, unprocessed, when it is let go: an assertion that was seen before, for one, is
    refused with ``invalid_grant``."""
    release = threading.Event()

    def respond(request: Request) -> Response:
        release.wait(SOON)
        return Response.of_json({"error": "invalid_grant"}, 400)

    pause = Pause.at(network.fault("refresh", "custom", respond=respond))
    pause.release = release
    return pause


@pytest.fixture(params=["json", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}:///{tmp_path}/sessions"


@pytest.fixture
def closing_() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def scenes(network: LocalNetwork, url: str, closing_: ExitStack) -> Callable[..., Iterator[Scene]]:
    def scenes(*, hasty: bool = False) -> Iterator[Scene]:
        for alone in (True, False):
            scene = Scene(network, url, closing_, alone=alone, hasty=hasty)
            for _ in range(ROUNDS):
                yield scene

    return scenes


@pytest.fixture
def scene(network: LocalNetwork, url: str, closing_: ExitStack) -> Scene:
    """Two clients that have nothing but a path in common."""
    return Scene(network, url, closing_)


Scenes = Callable[..., Iterator[Scene]]
at_every_instant = pytest.mark.parametrize("instant", INSTANTS)
waiting_or_not = pytest.mark.parametrize("hasty", [False, True], ids=["waiting", "hasty"])


# Refresh against log-out, log-in, clear


@at_every_instant
@waiting_or_not
def test_a_log_out_is_final(scenes: Scenes, instant: str, hasty: bool) -> None:
    for scene in scenes(hasty=hasty):
        first = scene.log_in()
        refresh = scene.overlap(instant, lambda: scene.other.revoke(scene.did), waits_at=None if hasty else "lock")
        if hasty:
            with pytest.raises(TokenRevokedError):
                refresh.outcome()
        else:
            assert present(refresh.outcome()).is_same_grant(first)
        assert scene.stored is None
        assert scene.is_over(first)
        assert scene.uses_of(first) == (not hasty or instant in SENT)
        scene.check_spent_once()


@at_every_instant
@waiting_or_not
def test_a_log_in_is_not_replaced(scenes: Scenes, instant: str, hasty: bool) -> None:
    for scene in scenes(hasty=hasty):
        first = scene.log_in()
        callback = scene.go_to_browser(scene.other)
        logged_in: list[Session] = []
        refresh = scene.overlap(
            instant,
            lambda: logged_in.append(scene.come_back(scene.other, callback)),
            waits_at=None if hasty else "lock",
        )
        result = present(refresh.outcome())
        assert not logged_in[0].is_same_grant(first)
        scene.check_works(logged_in[0])
        assert not scene.is_over(logged_in[0])
        if hasty:
            assert tokens_of(result) == tokens_of(logged_in[0])
            # Its tokens had been rotated for nobody, so they were revoked; else nothing was spent.
            assert scene.is_over(first) == (instant in SENT)
        else:
            assert result.is_same_grant(first)
        assert scene.uses_of(first) == (not hasty or instant in SENT)
        scene.check_spent_once()


@at_every_instant
def test_what_was_cleared_stays_away(scenes: Scenes, instant: str) -> None:
    for scene in scenes():
        first = scene.log_in()
        refresh = scene.overlap(instant, scene.store.clear)
        with pytest.raises(TokenRevokedError):
            refresh.outcome()
        assert scene.stored is None
        assert scene.is_over(first) == (instant in SENT), "nobody holds its tokens any more"
        assert scene.uses_of(first) == (instant in SENT)
        scene.check_spent_once()


# Refresh against refresh


@at_every_instant
@pytest.mark.parametrize("rejected", [False, True], ids=["refresh", "rejected token"])
def test_two_that_need_another_token_spend_one(scenes: Scenes, instant: str, rejected: bool) -> None:
    for scene in scenes():
        first = scene.log_in()
        token = first.token_set.access_token if rejected else None
        results: list[Session] = []

        def ask(scene: Scene = scene, token: str | None = token, results: list[Session] = results) -> None:
            refresh = "auto" if token else True
            results.append(scene.other.sessions.get_session(scene.did, refresh, rejected=token, timeout=SOON))

        # Of one client, the second joins the flight of the first and never comes to the lock.
        refresh = scene.overlap(instant, ask, waits_at="get" if scene.one is scene.other else "lock")
        assert tokens_of(results[0]) == tokens_of(present(refresh.outcome()))
        scene.check_works(results[0])
        assert scene.uses_of(first) == 1
        assert scene.uses_of(results[0]) == 0
        scene.check_spent_once()


def break_lock(directory: Path, how: str) -> None:
    """As a cleaner of old files might."""
    for path in list(directory.rglob("*.lock")):
        if path.parent.name not in ("writing", "schema"):  # those are held for moments only
            if how == "replaced":
                (path.parent / "new").touch()
                (path.parent / "new").rename(path)
            else:
                path.unlink()


broken = pytest.mark.parametrize("how", ["deleted", "replaced"])


@broken
@pytest.mark.parametrize("instant", INSTANTS[:2])
def test_a_lost_lock_stops_a_refresh_unspent(scene: Scene, tmp_path: Path, instant: str, how: str) -> None:
    for _ in range(2 * ROUNDS):
        first = scene.log_in()
        renewed: list[Session] = []

        def usurp(renewed: list[Session] = renewed) -> None:
            break_lock(tmp_path, how)
            renewed.append(present(scene.refresh(scene.other).outcome()))

        refresh = scene.overlap(instant, usurp)
        assert tokens_of(present(refresh.outcome())) == tokens_of(renewed[0])
        scene.check_works(renewed[0])
        assert scene.uses_of(first) == 1
        scene.check_spent_once()


@broken
@pytest.mark.parametrize("instant", SENT)
def test_a_lost_lock_stops_a_refresh_beside_another_in_flight(
    scene: Scene, tmp_path: Path, instant: str, how: str
) -> None:
    # The attempt is taken by the store, since no token has changed yet: only the lock tells.
    for _ in range(2 * ROUNDS):
        first = scene.log_in()
        stopped = scene.pause("before the attempt")
        refresh = scene.refresh()
        stopped.wait_until_reached()
        break_lock(tmp_path, how)
        if instant == "before the store":
            pause = scene.other_steps.pause("store")
        else:
            pause = scene.pause(instant)
        usurper = scene.refresh(scene.other)
        pause.wait_until_reached()
        stopped.release.set()
        with pytest.raises(LockTimeoutError, match="lost to somebody else"):
            refresh.outcome()
        assert scene.uses_of(first) == (instant in PROCESSED)
        pause.release.set()
        scene.check_works(present(usurper.outcome()))
        assert scene.uses_of(first) == 1
        scene.check_spent_once()


@broken
def test_two_attempts_at_once_stop_each_other_unspent(scene: Scene, tmp_path: Path, how: str) -> None:
    for _ in range(2 * ROUNDS):
        first = scene.log_in()
        stopped = scene.pause("before the attempt")
        refresh = scene.refresh()
        stopped.wait_until_reached()
        break_lock(tmp_path, how)
        looking = scene.other_steps.pause("after attempt")
        usurper = scene.refresh(scene.other)
        looking.wait_until_reached()
        stopped.release.set()
        with pytest.raises(LockTimeoutError, match="lost to somebody else"):
            refresh.outcome()
        looking.release.set()
        with pytest.raises(LockTimeoutError, match="another worker"):
            usurper.outcome()
        assert scene.uses_of(first) == 0
        scene.check_works(first)
        scene.check_works(present(scene.refresh().outcome()))


@broken
@pytest.mark.parametrize("instant", SENT)
def test_a_lock_broken_in_flight_costs_no_newer_session(scene: Scene, tmp_path: Path, instant: str, how: str) -> None:
    # Nobody can know that the holder lives when its lock is free, so the token is sent twice and the server ends the
    # session. What is left to promise: who comes last changes nothing that it has not seen.
    for _ in range(2 * ROUNDS):
        first = scene.log_in()
        pause = scene.pause(instant)
        refresh = scene.refresh()
        pause.wait_until_reached()
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


@broken
def test_newer_tokens_of_the_same_grant_are_not_revoked(scene: Scene, tmp_path: Path, how: str) -> None:
    # The store has taken the tokens and said that it has not; before it is asked again, another worker has refreshed
    # them. To revoke the tokens that are stored no more would end those that are.
    for _ in range(2 * ROUNDS):
        first = scene.log_in()
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


@pytest.mark.parametrize("newer", ["log-in", "refresh", "log-out"])
def test_a_late_refusal_ends_nothing_newer(
    network: LocalNetwork, url: str, closing_: ExitStack, tmp_path: Path, newer: str
) -> None:
    scene = Scene(network, url, closing_, hasty=newer != "refresh")
    for _ in range(6 * ROUNDS):
        scene.log_in()
        callback = scene.go_to_browser(scene.other)
        pause = invalid_grant(network)
        refresh = scene.refresh()
        pause.wait_until_reached()
        if newer == "log-out":
            scene.other.revoke(scene.did)
            pause.release.set()
            with pytest.raises(TokenRevokedError):
                refresh.outcome()
            assert scene.stored is None
        else:
            if newer == "log-in":
                session = scene.come_back(scene.other, callback)
            else:
                break_lock(tmp_path, "deleted")
                session = present(scene.refresh(scene.other).outcome())
            pause.release.set()
            assert tokens_of(present(refresh.outcome())) == tokens_of(session)
            scene.check_works(session)
            assert not scene.is_over(session)
        scene.check_spent_once()


# Several sessions of one account


@at_every_instant
@pytest.mark.parametrize("event", ["log-out", "log-in", "refresh"])
def test_two_sessions_of_one_account_leave_each_other_alone(
    network: LocalNetwork, url: str, closing_: ExitStack, tmp_path: Path, instant: str, event: str
) -> None:
    # Lock files are shared by names that have the same hash. Here, no two have.
    scene = Scene(network, url, closing_, locks=lambda: FileLocks(tmp_path / "apart", stripes=2**48))
    for _ in range(2 * ROUNDS):
        first, phone = scene.log_in(), scene.log_in("phone")
        callback = scene.go_to_browser(scene.other)
        seen: list[Session] = []

        def happen(phone: Session = phone, callback: str = callback, seen: list[Session] = seen) -> None:
            if event == "log-out":
                scene.other.revoke(scene.did, session_id="phone")
            elif event == "log-in":
                seen.append(scene.come_back(scene.other, callback, "phone"))
            else:
                seen.append(present(scene.refresh(scene.other, f"{scene.did}#phone").outcome()))

        refresh = scene.overlap(instant, happen)
        renewed = present(refresh.outcome())
        assert renewed.is_same_grant(first)
        assert not renewed.is_same_grant(phone)
        scene.check_works(renewed)
        if event == "log-out":
            assert scene.store.get(f"{scene.did}#phone") is None
            assert scene.is_over(phone)
        else:
            assert seen[0].is_same_grant(phone) == (event == "refresh")
            scene.check_works(seen[0], "phone")
        assert not scene.is_over(first)
        scene.check_spent_once()


# Log-in against log-out, log-in against log-in


@pytest.mark.parametrize("first_to_come", ["log-in", "log-out"])
@waiting_or_not
def test_of_a_log_in_and_a_log_out_the_later_counts(scenes: Scenes, first_to_come: str, hasty: bool) -> None:
    for _ in range(2):
        for scene in scenes(hasty=hasty):
            old = scene.log_in()
            callback = scene.go_to_browser(scene.other)
            logged_in: list[Session] = []

            def log_in(scene: Scene = scene, callback: str = callback, logged_in: list[Session] = logged_in) -> None:
                logged_in.append(scene.come_back(scene.other, callback))

            def log_out(scene: Scene = scene) -> None:
                scene.one.revoke(scene.did)

            begun, then = (log_in, log_out) if first_to_come == "log-in" else (log_out, log_in)
            steps, other_steps = (
                (scene.other_steps, scene.steps) if first_to_come == "log-in" else (scene.steps, scene.other_steps)
            )
            pause = steps.pause("set" if first_to_come == "log-in" else "delete")
            one = Worker(begun)
            pause.wait_until_reached()
            if hasty:
                then()
                pause.release.set()
            else:
                asked = other_steps.signal("lock")
                other = Worker(then)
                assert asked.wait(SOON)
                pause.release.set()
                other.outcome()
            one.outcome()
            if first_to_come == "log-in" and not hasty:
                assert scene.stored is None
                assert scene.is_over(logged_in[0])
            else:
                scene.check_works(logged_in[0])
                assert scene.is_over(old), "its owner has signed out of it"
            scene.check_spent_once()


@waiting_or_not
def test_of_two_log_ins_the_later_stays_and_both_work(scenes: Scenes, hasty: bool) -> None:
    for _ in range(4):
        for scene in scenes(hasty=hasty):
            callbacks = [scene.go_to_browser(client) for client in (scene.one, scene.other)]
            pause = scene.steps.pause("set")
            one = Worker(lambda: scene.one.callback(callbacks[0]).session)
            pause.wait_until_reached()
            asked = scene.other_steps.signal("lock")
            other = Worker(lambda: scene.other.callback(callbacks[1]).session)
            if hasty:
                other.outcome()
            else:
                assert asked.wait(SOON)
            pause.release.set()
            for account in (one.outcome(), other.outcome()):
                assert account.get(GET_SESSION).json()["did"] == scene.did  # type: ignore[attr-defined]
            scene.check_works(scene.stored)
            assert not scene.is_over(present(scene.stored))
            assert network_is_untouched(scene)


def network_is_untouched(scene: Scene) -> bool:
    return scene.network.rotations == scene.network.revocations == 0


# Anything, at random instants


@pytest.mark.parametrize("kind", ["log-out", "log-in", "clear", "refresh", "rejected", "log-out twice"])
@waiting_or_not
def test_at_random_instants(network: LocalNetwork, url: str, closing_: ExitStack, kind: str, hasty: bool) -> None:
    """The refresh stops at one random step of its own until the other has come to one of its own, and both run."""
    chance = random.Random(f"{kind} {hasty}")
    scene = Scene(network, url, closing_, hasty=hasty)
    for _ in range(RANDOM_ROUNDS // 2):
        first = scene.log_in()
        callback = scene.go_to_browser(scene.other)
        logged_in: list[Session] = []
        intrusions: dict[str, Callable[[], object]] = {
            "log-out": lambda: scene.other.revoke(scene.did),
            "log-in": lambda callback=callback, logged_in=logged_in: logged_in.append(
                scene.come_back(scene.other, callback)
            ),
            "clear": scene.other._store.clear,
            "refresh": lambda: scene.refresh(scene.other).outcome(),
            "rejected": lambda first=first: scene.other.sessions.get_session(
                scene.did, rejected=first.token_set.access_token, timeout=SOON
            ),
            "log-out twice": lambda: [scene.other.revoke(scene.did), scene.other.revoke(scene.did)],
        }
        pause = scene.steps.pause(after=chance.randrange(9))
        # Who waits for the lock cannot come further than that.
        further = hasty and kind not in ("refresh", "rejected")
        met = scene.other_steps.signal(after=chance.randrange(5) if further else 0)
        refresh = scene.refresh()
        begun = Worker(lambda refresh=refresh, pause=pause: (refresh.join(SOON), pause.reached.set()))
        pause.wait_until_reached()

        def intrude(intrusion: Callable[[], object] = intrusions[kind], met: threading.Event = met) -> None:
            try:
                intrusion()
            finally:
                met.set()

        intruder = Worker(intrude)
        assert met.wait(SOON)
        pause.release.set()
        try:
            result: Session | None = present(refresh.outcome())
        except (TokenRevokedError, SessionNotFoundError):
            result = None
        intruder.outcome()
        begun.outcome()
        scene.steps.let_go()
        scene.other_steps.let_go()

        if kind in ("log-out", "log-out twice", "clear"):
            assert scene.stored is None
            assert scene.is_over(first) or kind == "clear"
            # What was spent and reached nobody is revoked.
            assert scene.is_over(first) or result is not None or not scene.uses_of(first)
        elif kind == "log-in":
            scene.check_works(logged_in[0])
            assert result is not None
        else:
            assert result is not None
            assert result.is_same_grant(first)
            scene.check_works(scene.stored)
            assert not scene.is_over(first)
        scene.check_spent_once()
