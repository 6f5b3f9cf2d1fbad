"""Whatever overlaps with a refresh, in whatever order: nobody overwrites or deletes a session that is newer than the
one they looked at, and nothing is spent twice.

Every overlap is made, not hoped for: the refresh is stopped at an instant, the other comes in between, the refresh goes
on. On the local network, over stores in files, within one client and between two that have nothing but a path in common.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path

import pytest

from atproto_session import (
    ClientMetadata,
    LockTimeoutError,
    OAuthClient,
    Session,
    SessionNotFoundError,
    StoreError,
    TokenRefreshError,
    TokenRevokedError,
    TokenSet,
    open_store,
)
from atproto_session.locks import FileLocks, Hold, LockKind, Locks
from atproto_session.stores import FullStore
from atproto_session.testing.network import Account, Fault, LocalNetwork, Request, Response

from .core import SOON, Worker

#: Overlaps of each sort, for each store and both numbers of clients.
ROUNDS = 3
#: Overlaps at random instants of each kind, for each store.
RANDOM_ROUNDS = 20
GET_SESSION = "/xrpc/com.atproto.server.getSession"

#: Where a refresh can be stopped, in their order. From the third on its request has left.
INSTANTS = ["before the attempt", "before the last look", "request sent", "answer under way", "before the store"]
SENT = INSTANTS[2:]
PROCESSED = INSTANTS[3:]


# Stopping at an instant


class Pause:
    """Stops the first thread that comes to ``step``, or to any step, after letting so many pass.

    :param error: raised in that thread when it goes on.
    """

    def __init__(self, step: str | None = None, after: int = 0, error: Exception | None = None) -> None:
        self.error = error
        self.reached = threading.Event()
        self.release = threading.Event()
        self._step = step
        self._after = after

    def is_due(self, step: str) -> bool:
        if self._step not in (None, step):
            return False
        self._after -= 1
        return self._after < 0

    def wait_until_reached(self) -> None:
        assert self.reached.wait(SOON)

    @classmethod
    def at(cls, fault: Fault) -> Pause:
        pause = cls()
        pause.reached, pause.release = fault.fired, fault.release
        return pause


class Steps:
    """What a client does to its store and its locks, step by step."""

    def __init__(self) -> None:
        self._pauses: list[Pause] = []
        self._mutex = threading.Lock()

    def pause(self, step: str | None = None, *, after: int = 0, error: Exception | None = None) -> Pause:
        """Stop the next who comes to this step."""
        pause = Pause(step, after, error)
        with self._mutex:
            self._pauses.append(pause)
        return pause

    def signal(self, step: str | None = None, *, after: int = 0) -> threading.Event:
        """Set when somebody comes to this step, who is not stopped."""
        pause = self.pause(step, after=after)
        pause.release.set()
        return pause.reached

    def come_to(self, step: str) -> None:
        with self._mutex:
            due = [pause for pause in self._pauses if pause.is_due(step)]
            self._pauses = [pause for pause in self._pauses if pause not in due]
        for pause in due:
            pause.reached.set()
            assert pause.release.wait(SOON)
            if pause.error is not None:
                raise pause.error

    def let_go(self) -> None:
        """Forget the pauses that nobody came to."""
        with self._mutex:
            self._pauses.clear()


class WatchedStore:
    """``store``, which tells ``steps`` of every call before and after it."""

    def __init__(self, store: FullStore, steps: Steps, locks: Locks | None = None) -> None:
        self._store = store
        self._steps = steps
        self.locks: Locks = WatchedLocks(locks or store.locks, steps)
        self.logins = store.logins

    def get(self, key: str) -> Session | None:
        self._steps.come_to("get")
        return self._store.get(key)

    def set(self, key: str, session: Session) -> None:
        self._steps.come_to("set")
        self._store.set(key, session)
        self._steps.come_to("after set")

    def replace(self, key: str, session: Session | None, expected: TokenSet | None) -> bool:
        step = "delete" if session is None else "store" if session.attempt is None else "attempt"
        self._steps.come_to(step)
        done = self._store.replace(key, session, expected)
        self._steps.come_to(f"after {step}")
        return done

    def delete(self, key: str) -> None:
        self._store.delete(key)

    def clear(self) -> None:
        self._steps.come_to("clear")
        self._store.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def close(self) -> None:
        self._store.close()


class WatchedLocks:
    def __init__(self, locks: Locks, steps: Steps) -> None:
        self._locks = locks
        self._steps = steps

    @property
    def kind(self) -> LockKind:
        return self._locks.kind

    def hold(self, name: str, *, timeout: float, cancel: threading.Event | None = None) -> AbstractContextManager[Hold]:
        self._steps.come_to("lock")
        return self._locks.hold(name, timeout=timeout, cancel=cancel)


# The scene


class Scene:
    """An account, a client ``one`` that refreshes its session, and a client ``other`` that comes in between.

    :param url: the store that they share.
    :param alone: both are the same client.
    :param hasty: their log-outs and log-ins do not wait for a refresh under way.
    :param locks: by default those of the store.
    """

    def __init__(
        self,
        network: LocalNetwork,
        url: str,
        closing_: ExitStack,
        *,
        alone: bool = False,
        hasty: bool = False,
        locks: Callable[[], Locks] | None = None,
    ) -> None:
        def new_client() -> tuple[OAuthClient, Steps, FullStore]:
            steps, opened = Steps(), closing_.enter_context(closing(open_store(url)))
            store = WatchedStore(opened, steps, locks and locks())
            timeout = 0.001 if hasty else SOON
            metadata = ClientMetadata.loopback()
            client = OAuthClient(metadata, store=store, timeout=timeout, **network.client_options())
            return closing_.enter_context(client), steps, opened

        self.network = network
        self.account: Account = network.create_account()
        self.did = self.account.did
        self.one, self.steps, self.store = new_client()
        self.other, self.other_steps, _ = (self.one, self.steps, self.store) if alone else new_client()

    @property
    def stored(self) -> Session | None:
        return self.store.get(self.did)

    def log_in(self, session_id: str | None = None) -> Session:
        self.come_back(self.one, self.go_to_browser(self.one), session_id)
        return _present(self.store.get(self.did if session_id is None else f"{self.did}#{session_id}"))

    def go_to_browser(self, client: OAuthClient) -> str:
        return self.network.authorize(client.authorize(self.did), self.account)

    def come_back(self, client: OAuthClient, callback: str, session_id: str | None = None) -> Session:
        """Returns what was stored by this log-in, whatever is stored now."""
        sessions: list[Session] = []
        stop = client.sessions.on_updated(
            lambda event: sessions.append(Session(event.dpop_key, event.auth_method, event.token_set))
        )
        client.callback(callback, session_id=session_id)
        stop()
        return sessions[-1]

    def pause(self, instant: str) -> Pause:
        """Stop the next refresh by ``one`` there."""
        if instant == "before the attempt":
            return Pause.at(self.network.fault("plc", "hold"))
        if instant == "before the last look":
            return self.steps.pause("after attempt")
        if instant == "before the store":
            return self.steps.pause("store")
        return Pause.at(self.network.fault("refresh", "hold" if instant == "request sent" else "late"))

    def refresh(self, client: OAuthClient | None = None, key: str | None = None) -> Worker:
        sessions = (client or self.one).sessions
        return Worker(lambda: sessions.get_session(key or self.did, True, timeout=SOON))

    def overlap(self, instant: str, intrusion: Callable[[], object], *, waits_at: str | None = None) -> Worker:
        """Begin a refresh, let ``intrusion`` happen at that instant, and return the refresh, which goes on.

        :param waits_at: the step at which the intrusion waits for the refresh; ``None`` if it does not wait at all.
        """
        pause = self.pause(instant)
        refresh = self.refresh()
        pause.wait_until_reached()
        if waits_at is None:
            intrusion()
            pause.release.set()
        else:
            waiting = self.other_steps.signal(waits_at)
            intruder = Worker(intrusion)
            assert waiting.wait(SOON)
            pause.release.set()
            intruder.outcome()
        return refresh

    # What must be true

    def uses_of(self, session: Session) -> int:
        return self.network.refresh_token_uses[session.token_set.refresh_token or ""]

    def is_over(self, session: Session) -> bool:
        """Whether the server has ended the grant."""
        info = self.network.session_of(session.token_set.refresh_token or "")
        assert info is not None
        return info.revoked

    def check_spent_once(self) -> None:
        assert set(self.network.refresh_token_uses.values()) <= {1}
        assert self.network.replays == 0

    def check_works(self, session: Session | None, session_id: str | None = None) -> None:
        """``session`` is what is stored, and it is good as it is."""
        key = self.did if session_id is None else f"{self.did}#{session_id}"
        assert session is not None
        assert _tokens(_present(self.store.get(key))) == _tokens(session)
        rotations = self.network.rotations
        account = self.one.restore(self.did, False, session_id=session_id)
        assert account.get(GET_SESSION).json()["did"] == self.did
        assert self.network.rotations == rotations


def _present(session: object) -> Session:
    assert isinstance(session, Session)
    return session


def _tokens(session: Session) -> tuple[str, str | None]:
    return session.token_set.access_token, session.token_set.refresh_token


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
            assert _present(refresh.outcome()).is_same_grant(first)
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
        result = _present(refresh.outcome())
        assert not logged_in[0].is_same_grant(first)
        scene.check_works(logged_in[0])
        assert not scene.is_over(logged_in[0])
        if hasty:
            assert _tokens(result) == _tokens(logged_in[0])
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
        assert _tokens(results[0]) == _tokens(_present(refresh.outcome()))
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
            renewed.append(_present(scene.refresh(scene.other).outcome()))

        refresh = scene.overlap(instant, usurp)
        assert _tokens(_present(refresh.outcome())) == _tokens(renewed[0])
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
        scene.check_works(_present(usurper.outcome()))
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
        scene.check_works(_present(scene.refresh().outcome()))


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
            renewed = _present(usurper.outcome())
            pause.release.set()
            assert _tokens(_present(refresh.outcome())) == _tokens(renewed)
            assert _tokens(_present(scene.stored)) == _tokens(renewed)
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
        renewed = _present(scene.refresh(scene.other).outcome())
        pause.release.set()
        assert _tokens(_present(refresh.outcome())) == _tokens(renewed)
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
                session = _present(scene.refresh(scene.other).outcome())
            pause.release.set()
            assert _tokens(_present(refresh.outcome())) == _tokens(session)
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
                seen.append(_present(scene.refresh(scene.other, f"{scene.did}#phone").outcome()))

        refresh = scene.overlap(instant, happen)
        renewed = _present(refresh.outcome())
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
            assert not scene.is_over(_present(scene.stored))
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
            result: Session | None = _present(refresh.outcome())
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
