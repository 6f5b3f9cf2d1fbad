"""Processes that are killed, at every step of what they do and at no particular one. Whoever comes next finds a store
that can be read, a lock that is free, and a record that tells what may have been lost."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from atproto_session import (
    ClientAuthMethod,
    ClientMetadata,
    OAuthCallbackError,
    OAuthClient,
    Session,
    SessionNotFoundError,
    StoreError,
    TokenRefreshError,
)
from atproto_session.locks import LockKind
from atproto_session.session import Attempt
from atproto_session.stores import open_store, rotate_encryption
from atproto_session.testing.network import LocalNetwork
from atproto_session.testing.network.wire import ConnectionCut, Request, Response

from ..core import DID, KEY, RESTLESS, SOON, make_tokens, wait_until
from ..processes import Program
from ..scenes import Scene

#: Kills at random instants, of each kind and in each store. Every other kill is at a step, and every step has one.
ALONE, BESIDE_ANOTHER = 20, 8


class DeathRow(Program):
    """A process of :mod:`tests.programs.death_row`, and the child of it that lives at the moment."""

    def __init__(self) -> None:
        super().__init__("programs.death_row", is_measured=False)  # most are killed before they can save it
        self._child = 0

    def start(self, **order: Any) -> None:
        """Have a child carry out ``order``."""
        self.say(order)
        self._child = self.hear()["pid"]

    def stop(self) -> dict[str, Any]:
        """Have a child that hammers come to its end; what it says about it."""
        self.say("")
        return self.end()

    def end(self) -> dict[str, Any]:
        """What a child that needs nothing more says at its end."""
        answer: dict[str, Any] = self.hear()
        assert "done" in answer, answer
        assert self.hear() == {"ended": 0}
        return answer

    def kill(self) -> None:
        """Kill the child. When this returns, nothing of it is left."""
        os.kill(self._child, signal.SIGKILL)
        while "ended" not in (answer := self.hear()):
            pass
        assert answer == {"ended": -signal.SIGKILL}

    def kill_at(self, step: int, **order: Any) -> str | None:
        """Have a child carry out ``order`` and kill it at this step. Returns the step's name, or ``None`` if the child
        came to its end before."""
        self.start(stop_at=step, **order)
        answer = self.hear()
        if "done" in answer:
            assert answer["errors"] == []
            assert self.hear() == {"ended": 0}
            return None
        self.kill()
        return str(answer["at"])


@pytest.fixture(scope="module")
def row() -> Iterator[DeathRow]:
    with closing(DeathRow()) as row:
        yield row


@pytest.fixture(scope="module")
def another_row() -> Iterator[DeathRow]:
    with closing(DeathRow()) as row:
        yield row


class DeathScene(Scene):
    """A store that the victims share with others, an account, and what becomes of it.

    :ivar lost: the refresh tokens that were used twice, as they may be after an answer was lost.
    """

    def __init__(self, network: LocalNetwork, store: str) -> None:
        super().__init__(network, store)
        self.lost: set[str] = set()
        self.had_leftovers = False

    @property
    def is_in_files(self) -> bool:
        """Whether the steps of the system are seen as well."""
        return self.store.startswith(("json", "sqlite"))

    def callback_url(self) -> str:
        return self.network.authorize(self.client.authorize(self.did), self.account)

    @contextmanager
    def aftermath(self) -> Iterator[OAuthClient]:
        """What has to be true after every death, and a client that comes new to the store."""
        self.settle()
        leftovers = Path(self.store.removeprefix("json:///")) / "writing"
        self.had_leftovers = self.had_leftovers or (leftovers.is_dir() and any(leftovers.iterdir()))
        with closing(open_store(self.store)) as store:
            assert not leftovers.is_dir() or not any(leftovers.iterdir())
            # A server may need a moment to see that a connection has ended.
            with store.locks.hold(self.did, timeout=0 if store.locks.kind is LockKind.HOLDER else SOON):
                pass
            assert set(store) <= {self.did}
            left = store.get(self.did)
            assert self.client.sessions.get_stored(self.did) == left
            assert set(store) == (set() if left is None else {self.did})
            yield OAuthClient(ClientMetadata.loopback(), store=store, times=RESTLESS, **self.network.client_options())

    def settle(self) -> None:
        """Until the servers have done whatever the dead have asked for."""
        listeners = self.network._listeners
        wait_until(lambda: not any(listener._server._connections for listener in listeners))

    def refresh_after_death(self) -> str:
        """What the record says after a death in a refresh, and that the next worker finds it to be so: ``"unspent"``
        if its token works, ``"lost"`` if the answer is."""
        with self.aftermath() as successor:
            left = self.stored()
            token = self.refresh_token()
            spent = not self.is_current(token)
            assert self.network.refresh_token_uses[token] == spent
            if spent:
                assert left.attempt is not None
            if left.attempt is not None:
                self.check_that_the_cautious_give_up(left)
            if not spent:
                renewed = successor.sessions.get_session(self.did, True, timeout=SOON)
                assert renewed.token_set.refresh_token == self.refresh_token()
                assert self.is_current(self.refresh_token())
                assert self.network.refresh_token_uses[token] == 1
                return "unspent"
            with pytest.raises(TokenRefreshError) as caught:
                successor.sessions.get_session(self.did, True, timeout=SOON)
            assert caught.value.answer_lost
            assert caught.value.login_required
            assert successor.sessions.get_stored(self.did) is None
            self.lost.add(token)
            return "lost"

    def check_that_the_cautious_give_up(self, left: Session) -> None:
        """With ``on_interrupted="fail"``: without a request, and the record stays."""
        cautious = OAuthClient(
            ClientMetadata.loopback(),
            store=self.client._store,
            on_interrupted="fail",
            **self.network.client_options(),
        )
        requests = self.network.token_requests
        with pytest.raises(TokenRefreshError) as caught:
            cautious.sessions.get_session(self.did, True, timeout=SOON)
        assert caught.value.answer_lost
        assert self.network.token_requests == requests
        assert self.stored() == left

    def is_current(self, token: str) -> bool:
        info = self.network.session_of(token)
        return info is not None and info.current

    def check_uses(self) -> None:
        """No refresh token was used twice, except where it is known to be lost."""
        uses = self.network.refresh_token_uses
        assert {token for token, count in uses.items() if count > 1} == self.lost
        assert all(uses[token] == 2 for token in self.lost)
        assert self.network.replays == len(self.lost)


@pytest.fixture(params=["json", "sqlite"])
def scene(request: pytest.FixtureRequest, network: LocalNetwork, tmp_path: Path) -> Iterator[DeathScene]:
    with closing(DeathScene(network, f"{request.param}:///{tmp_path}/sessions")) as scene:
        yield scene
        scene.check_uses()


# At every step


def test_killed_at_every_step_of_a_refresh(scene: DeathScene, row: DeathRow) -> None:
    became: dict[str, list[str]] = {"unspent": [], "lost": [], "stored": []}
    steps: list[str] = []
    order: list[str] = []
    before = scene.refresh_token()
    while (step := row.kill_at(len(steps), do="refresh", **scene.setup)) is not None:
        if scene.refresh_token() != before:
            assert scene.client.sessions.get_session(scene.did) == scene.stored()
            assert scene.refresh_after_death() == "unspent"
            outcome = "stored"
        else:
            outcome = scene.refresh_after_death()
        became[outcome].append(step)
        order.append(outcome)
        steps.append(step)
        if outcome == "lost":
            scene.log_in()
        before = scene.refresh_token()
    assert order == sorted(order, key=list(became).index)
    assert "before send" in became["unspent"]
    assert "after replace in store" in became["unspent"]
    assert became["lost"][0] == "after send"
    assert "before replace in store" in became["lost"]
    assert "after replace in store" in became["stored"]
    assert became["stored"][-1] == "after unlock"
    assert min(map(len, became.values())) >= (3 if scene.is_in_files else 2)
    if scene.store.startswith("json"):
        assert scene.had_leftovers
        # That it survives a power failure, nobody can try here: the file reaches the disk before it has its name, and
        # so does the name.
        assert steps.count("before replace") == 2
        for number, step in enumerate(steps):
            if step == "before replace":
                assert steps[number - 1] == "before fsync"
                assert steps[number + 1 : number + 4] == ["before open", "after open", "before fsync"]


def test_killed_at_every_step_of_storing_a_log_in(scene: DeathScene, row: DeathRow) -> None:
    """In the place of an older session, or of none: the one or the other is there, whole; and a log-in whose state was
    taken out cannot be ended again."""
    became = set()
    number = 0
    while True:
        before = scene.stored() if number % 3 else None
        if before is None:
            scene.client.sessions._store.delete(scene.did)
        callback = scene.callback_url()
        step = row.kill_at(number, do="log-in", callback=callback, **scene.setup)
        if step is None:
            break
        number += 1
        with scene.aftermath() as successor:
            left = successor.sessions.get_stored(scene.did)
            try:
                successor.callback(callback)
                taken = False
            except OAuthCallbackError:
                taken = True
            if left == before:
                became.add("gone" if taken else "pending")
            else:
                assert taken
                assert left is not None
                assert before is None or not left.is_same_grant(before)
                became.add("stored")
            if left is not None:
                assert left.attempt is None
            if successor.sessions.get_stored(scene.did) is not None:
                successor.sessions.get_session(scene.did, True, timeout=SOON)
            else:
                assert taken
                scene.log_in()
    assert number >= (15 if scene.is_in_files else 10)
    assert became == {"pending", "gone", "stored"}


def test_killed_at_every_step_of_a_log_out(scene: DeathScene, row: DeathRow) -> None:
    """As long as the session is there it works; only when it is gone is it ended at its server."""
    became: list[str] = []
    before = scene.stored()
    while (step := row.kill_at(len(became), do="log-out", **scene.setup)) is not None:
        with scene.aftermath() as successor:
            left = successor.sessions.get_stored(scene.did)
            if left is None:
                became.append("gone")
                with pytest.raises(SessionNotFoundError):
                    successor.sessions.get_session(scene.did)
                assert scene.is_current(before.token_set.refresh_token or "") == (step != "after revoke")
                scene.log_in()
            else:
                assert left == before
                became.append("there")
                successor.sessions.get_session(scene.did, True, timeout=SOON)
            before = scene.stored()
    assert became == sorted(became, reverse=True)
    assert set(became) == {"there", "gone"}
    assert len(became) >= 10
    assert scene.client.sessions.get_stored(scene.did) is None
    assert not scene.is_current(before.token_set.refresh_token or "")


@pytest.mark.parametrize("kind", ["json", "sqlite"])
def test_killed_at_every_step_of_a_rotation_of_encryption_keys(kind: str, row: DeathRow, tmp_path: Path) -> None:
    """Every record is readable all the time, the trace of a refresh in it, and the rotation can be begun again."""
    url = f"{kind}:///{tmp_path}/sessions"
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    attempt = Attempt("a1", "a worker", 1.0, 2.0, 1)
    expires_at = datetime.fromtimestamp(4e9, UTC)  # not to the microsecond, which is not stored
    sessions = {
        DID: Session(KEY, ClientAuthMethod("none"), make_tokens(1, expires_at=expires_at)),
        f"{DID}#2": Session(KEY, ClientAuthMethod("none"), make_tokens(2, expires_at=expires_at), attempt),
    }
    killed = 0
    before = open_store(url, encryption_keys=[old])
    while True:
        for key, session in sessions.items():
            before.set(key, session)
        if row.kill_at(killed, do="rotate", store=url, encryption_keys=[new, old]) is None:
            break
        killed += 1
        with closing(open_store(url, encryption_keys=[new, old])) as store:
            assert {key: store.get(key) for key in store} == sessions
            for key in sessions:
                with store.locks.hold(key, timeout=0):
                    pass
            if killed % 8 == 0:
                assert rotate_encryption(store) == len(sessions)
                assert stored_at(url, new) == sessions
    before.close()
    assert killed >= 20
    assert stored_at(url, new) == sessions
    with pytest.raises(StoreError):
        stored_at(url, old)


def stored_at(url: str, key: str) -> dict[str, Session | None]:
    with closing(open_store(url, encryption_keys=[key])) as store:
        return {name: store.get(name) for name in store}


# While the server is at work


@pytest.mark.parametrize("processed", [False, True])
def test_killed_while_the_answer_is_awaited(scene: DeathScene, row: DeathRow, processed: bool) -> None:
    """The request has left; whether it was processed, only the next one finds out."""
    kill_while_the_answer_is_awaited(scene, row, processed=processed)
    left = scene.stored()
    assert left.attempt is not None
    assert left.attempt.answers_lost == 0
    assert scene.refresh_after_death() == ("lost" if processed else "unspent")


def test_killed_again_and_again_while_the_answer_is_awaited(scene: DeathScene, row: DeathRow) -> None:
    for answers_lost in range(4):
        kill_while_the_answer_is_awaited(scene, row, processed=False)
        left = scene.stored()
        assert left.attempt is not None
        assert left.attempt.answers_lost == answers_lost
    assert scene.refresh_after_death() == "unspent"


def kill_while_the_answer_is_awaited(scene: DeathScene, row: DeathRow, *, processed: bool) -> None:
    dead = threading.Event()

    def lose(request: Request) -> Response:
        assert dead.wait(SOON)
        raise ConnectionCut

    if processed:
        fault = scene.network.fault("refresh", "late")
    else:
        fault = scene.network.fault("refresh", "custom", respond=lose, after=1)  # what comes first asks for a nonce
    row.start(do="refresh", **scene.setup)
    assert fault.fired.wait(SOON)
    row.kill()
    dead.set()
    fault.disarm()


def test_a_request_of_the_dead_that_is_processed_late(scene: DeathScene, row: DeathRow) -> None:
    """After the one of the next worker, for which it is too late: nothing that a client can do would keep the session,
    which ends as it does when the server takes a token for stolen."""
    fault = scene.network.fault("refresh", "hold", after=1)
    row.start(do="refresh", **scene.setup)
    assert fault.fired.wait(SOON)
    row.kill()
    token = scene.refresh_token()
    renewed = scene.client.sessions.get_session(scene.did, True, timeout=SOON)
    assert renewed.token_set.refresh_token == scene.refresh_token() != token
    fault.disarm()
    scene.settle()
    assert scene.network.refresh_token_uses[token] == 2
    scene.lost.add(token)
    with pytest.raises(TokenRefreshError) as caught:
        scene.client.sessions.get_session(scene.did, True, timeout=SOON)
    assert caught.value.answer_lost
    assert scene.client.sessions.get_stored(scene.did) is None


# At any instant


def test_killed_at_any_instant(scene: DeathScene, row: DeathRow) -> None:
    """Threads that refresh one session after the other as fast as they can. The instants are those of a seed, as far as
    a machine keeps to them; every one of them is a good one."""
    instants = random.Random(20260801)
    became = Counter[str]()
    kills = in_a_refresh = 0
    while kills < ALONE or in_a_refresh < 5:
        assert kills < 100, "hardly any is killed where it matters"
        start_hammering(scene, row, threads=3)
        time.sleep(instants.uniform(0.0, 0.06))
        row.kill()
        kills += 1
        scene.settle()
        in_a_refresh += scene.stored().attempt is not None
        outcome = scene.refresh_after_death()
        became[outcome] += 1
        if outcome == "lost":
            scene.log_in()
    assert became["unspent"] > 0


def start_hammering(scene: DeathScene, *rows: DeathRow, threads: int) -> None:
    """Until the first request has arrived: a machine may be so busy that it takes long to come that far."""
    requests = scene.network.token_requests
    for row in rows:
        row.start(do="hammer", dids=[scene.did], threads=threads, **scene.setup)
    for row in rows:
        assert row.hear() == {"hammering": True}
    wait_until(lambda: scene.network.token_requests > requests)


def test_the_others_go_on_when_one_is_killed(scene: DeathScene, row: DeathRow, another_row: DeathRow) -> None:
    """Two processes refresh the same session as fast as they can, until one of them is killed."""
    instants = random.Random(20260802)
    for _ in range(BESIDE_ANOTHER):
        start_hammering(scene, row, another_row, threads=2)
        time.sleep(instants.uniform(0.0, 0.06))
        replays = scene.network.replays
        earliest = scene.refresh_token()
        row.kill()
        left = scene.client.sessions.get_stored(scene.did)
        latest = None if left is None else left.token_set.refresh_token
        rotations = scene.network.rotations
        wait_until(lambda: scene.network.rotations >= rotations + 3 or scene.network.replays > replays)  # noqa: B023
        survivor = another_row.stop()
        scene.settle()
        if scene.network.replays == replays:
            assert survivor["errors"] == []
            assert scene.refresh_after_death() == "unspent"
        else:
            check_a_request_of_the_dead(scene, earliest, latest, survivor["errors"])
            scene.log_in()


def check_a_request_of_the_dead(scene: DeathScene, earliest: str, latest: str | None, errors: list[str]) -> None:
    """A token was used twice. That is nobody's fault if the victim had sent it, and the survivor had to find out what
    had become of that.

    :param earliest: the token that was stored just before the death.
    :param latest: the one that was stored just after it, if any was.
    :param errors: what the survivor's threads got.
    """
    uses = scene.network.refresh_token_uses
    in_order = list(uses)  # of their first use
    (token,) = {token for token, count in uses.items() if count > 1} - scene.lost
    scene.lost.add(token)
    assert scene.network.replays == len(scene.lost)
    end = in_order.index(latest) + 1 if latest is not None and latest in uses else None
    assert token in in_order[in_order.index(earliest) : end], "the victim did not have it"

    if scene.client.sessions.get_stored(scene.did) is not None:  # the survivor was stopped before it found out
        with pytest.raises(TokenRefreshError) as caught:
            scene.client.sessions.get_session(scene.did, True, timeout=SOON)
        errors = [*errors, "TokenRefreshError" + " of a lost answer" * caught.value.answer_lost]
    assert scene.client.sessions.get_stored(scene.did) is None
    (error,) = set(errors) - {"SessionNotFoundError"}  # those who waited share it
    # The record told of the victim's request, and the next one remembers it. What came after that was good, and nobody
    # could know that a request of the dead would still end it.
    if len(in_order) - in_order.index(token) <= 2:
        assert error == "TokenRefreshError of a lost answer"
    else:
        assert error.startswith("TokenRefreshError")
