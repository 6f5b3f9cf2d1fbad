"""A refresh that is stopped where the test wants it, and a second client that comes in between.

On the local network, over stores in files: within one client, or between two that have nothing but a path in common.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing

from atproto_session import ClientMetadata, OAuthClient, Session, TokenSet, open_store
from atproto_session.locks import Hold, LockKind, Locks
from atproto_session.stores import FullStore
from atproto_session.testing.network import Account, Fault, LocalNetwork

from ..core import RESTLESS, SOON, Worker
from ..scenes import GET_SESSION

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
    def at(cls, fault: Fault, release: threading.Event | None = None) -> Pause:
        pause = cls()
        pause.reached, pause.release = fault.fired, release or fault.release
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
    """``store``, which tells ``steps`` of every call before and after it.

    :ivar logged_in: the session of the latest log-in.
    """

    def __init__(self, store: FullStore, steps: Steps, locks: Locks | None = None) -> None:
        self.logged_in: Session
        self._store = store
        self._steps = steps
        self.locks: Locks = WatchedLocks(locks or store.locks, steps)
        self.logins = store.logins

    def get(self, key: str) -> Session | None:
        self._steps.come_to("get")
        session = self._store.get(key)
        self._steps.come_to("after get")
        return session

    def set(self, key: str, session: Session) -> None:
        self.logged_in = session
        self._steps.come_to("set")
        self._store.set(key, session)
        self._steps.come_to("after set")

    def replace(self, key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
        step = "delete" if session is None else "store" if session.attempt is None else "attempt"
        if session is not None and not isinstance(expected, Session) and session.began_at == session.refreshed_at:
            self.logged_in, step = session, "set"
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
        clean_up: ExitStack,
        *,
        alone: bool = False,
        hasty: bool = False,
        locks: Callable[[], Locks] | None = None,
    ) -> None:
        def new_client() -> tuple[OAuthClient, Steps, FullStore]:
            steps, store = Steps(), clean_up.enter_context(closing(open_store(url)))
            watched = WatchedStore(store, steps, locks and locks())
            client = OAuthClient(
                ClientMetadata.loopback(), store=watched, timeout=SOON, times=RESTLESS, **network.client_options()
            )
            if hasty:
                client.sessions._lock_share = 0.0
            self._stores[client] = watched
            return clean_up.enter_context(client), steps, store

        self._stores: dict[OAuthClient, WatchedStore] = {}
        self.network = network
        self.account: Account = network.create_account()
        self.did = self.account.did
        self.one, self.steps, self.store = new_client()
        self.other, self.other_steps, self.other_store = (self.one, self.steps, self.store) if alone else new_client()

    @property
    def stored(self) -> Session | None:
        return self.store.get(self.did)

    def logged_in(self, session_id: str | None = None) -> Session:
        """A session that is good, from a log-in if there is none."""
        stored = self.store.get(self._key_of(session_id))
        if stored is None or self.is_over(stored):
            self.come_back(self.one, self.go_to_browser(self.one), session_id)
        return present(self.store.get(self._key_of(session_id)))

    def log_in(self) -> Session:
        self.come_back(self.one, self.go_to_browser(self.one))
        return present(self.stored)

    def go_to_browser(self, client: OAuthClient) -> str:
        return self.network.authorize(client.authorize(self.did, timeout=SOON), self.account)

    def come_back(self, client: OAuthClient, callback: str, session_id: str | None = None) -> Session:
        """End a log-in and return what it stored, whatever is stored now."""
        client.callback(callback, session_id=session_id, timeout=SOON)
        # Not what a listener was told last: listeners are told after the lock is released, in any order.
        return self._stores[client].logged_in

    # What happens

    def refresh(self, client: OAuthClient | None = None, key: str | None = None) -> Worker:
        sessions = (client or self.one).sessions
        return Worker(lambda: sessions.get_session(key or self.did, True, timeout=SOON))

    def stopped_refresh(self, instant: str, *, by_other: bool = False) -> tuple[Pause, Worker]:
        """A refresh that has come to that instant and stands there."""
        client, steps = (self.other, self.other_steps) if by_other else (self.one, self.steps)
        if instant == "while it looks for its server":  # without the lock
            pause = Pause.at(self.network.fault("plc", "hold"))
        elif instant in ("before the attempt", "at the attempt"):
            pause = steps.pause("attempt")
        elif instant == "before the last look":
            pause = steps.pause("after attempt")
        elif instant == "before the store":
            pause = steps.pause("store")
        else:
            pause = Pause.at(self.network.fault("refresh", "hold" if instant == "request sent" else "late"))
        refresh = self.refresh(client)
        pause.wait_until_reached()
        return pause, refresh

    def overlap(self, instant: str, intrude: Callable[[], object], *, waits_at: str | None = None) -> Worker:
        """Begin a refresh, let somebody intrude at that instant, and return the refresh, which goes on.

        :param waits_at: the step at which the intruder waits for the refresh; ``None`` if he does not wait at all.
        """
        pause, refresh = self.stopped_refresh(instant)
        self._go_on(pause, intrude, self.other_steps, waits_at)
        return refresh

    def cross(
        self,
        begin: Callable[[], object],
        steps: Steps,
        stop_at: str,
        intrude: Callable[[], object],
        other_steps: Steps,
        *,
        waits: bool,
    ) -> Worker:
        """Let somebody intrude while what has begun stands at the step ``stop_at``, and return this, which is over.

        :param waits: whether the intruder waits for the lock."""
        pause = steps.pause(stop_at)
        begun = Worker(begin)
        pause.wait_until_reached()
        self._go_on(pause, intrude, other_steps, "lock" if waits else None)
        begun.outcome()
        return begun

    def _go_on(self, pause: Pause, intrude: Callable[[], object], steps: Steps, waits_at: str | None) -> None:
        waiting = None if waits_at is None else steps.signal(waits_at)
        self.intruder = Worker(intrude)
        if waiting is None:
            self.intruder.outcome()
        else:
            assert waiting.wait(SOON)
        pause.release.set()
        self.intruder.outcome()

    def race(self, stop: int, meet: int, intrude: Callable[[], object]) -> tuple[Worker, Worker]:
        """A refresh that stops at its step number ``stop`` until the intruder has come to his step number ``meet``,
        unless one or the other has ended before."""
        pause, met = self.steps.pause(after=stop), self.other_steps.signal(after=meet)
        refresh = self.refresh()
        watcher = Worker(lambda: _set_at_end(refresh, pause.reached))
        pause.wait_until_reached()
        intruder = Worker(intrude)
        other_watcher = Worker(lambda: _set_at_end(intruder, met))
        assert met.wait(SOON)
        pause.release.set()
        for worker in (refresh, intruder, watcher, other_watcher):
            worker.join(SOON)
        self.steps.let_go()
        self.other_steps.let_go()
        return refresh, intruder

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
        assert session is not None
        assert tokens_of(present(self.store.get(self._key_of(session_id)))) == tokens_of(session)
        rotations = self.network.rotations
        account = self.one.restore(self.did, False, session_id=session_id)
        assert account.get(GET_SESSION).json()["did"] == self.did
        assert self.network.rotations == rotations

    def _key_of(self, session_id: str | None) -> str:
        return self.did if session_id is None else f"{self.did}#{session_id}"


def _set_at_end(worker: Worker, event: threading.Event) -> None:
    worker.join(SOON)
    event.set()


def present(session: object) -> Session:
    assert isinstance(session, Session)
    return session


def tokens_of(session: Session) -> tuple[str, str | None]:
    return session.token_set.access_token, session.token_set.refresh_token
