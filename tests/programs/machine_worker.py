"""A worker on a machine of :mod:`tests.machines`: holds a client over a shared store and does what its parent says, one
JSON line each. ``{"do": "refresh", "did": ..., "pause_at": "send"}`` stops before that step, says so, and goes on with
the next line."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

from atproto_session import ClientMetadata, OAuthClient, Session, TokenSet, _driver, _worker
from atproto_session._terms import Times
from atproto_session._worker import Life

from ..core import NoLocks


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    # The processes of one machine know of each other, and of no other's.
    _worker._machine = lambda: str(setup["machine"])
    options = setup["options"] | ({"locks": NoLocks()} if setup["without_locks"] else {})
    times = Times(**({"first_rest": 0.0, "longest_rest": 0.0} | setup["times"]))
    with OAuthClient(ClientMetadata.loopback(), store=setup["store"], times=times, **options) as client:
        pauses = Pauses(client)
        say({"ready": True})
        for line in sys.stdin:
            order = json.loads(line)
            pauses.step = order.get("pause_at")
            say(carry_out(client, order))


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


class Pauses:
    """
    :ivar step: where the next one to come stops: ``"attempt"`` and ``"send"`` are before these, ``"announced"`` is
        between; ``"found"`` is where another worker's attempt was found.
    """

    step: str | None = None

    def __init__(self, client: OAuthClient) -> None:
        store, authority = client._store, client._authority
        replace, prepare = store.replace, authority.prepare

        def replaced(key: str, session: Session | None, expected: Session | TokenSet | None) -> bool:
            is_attempt = session is not None and session.attempt is not None
            if is_attempt:
                self.come_to("attempt")
            is_done = replace(key, session, expected)
            if is_attempt:
                self.come_to("announced")
            return is_done

        def prepared(session: Session) -> Callable[[Session], Session]:
            send = prepare(session)

            def sent(spent: Session) -> Session:
                self.come_to("send")
                return send(spent)

            return sent

        def life_of(worker: str, on: str | None = None) -> Life:
            self.come_to("found")
            return _worker.life_of(worker, on)

        _driver.life_of = life_of  # type: ignore[attr-defined]
        vars(store)["replace"] = replaced
        vars(authority)["prepare"] = prepared

    def come_to(self, step: str) -> None:
        if self.step == step:
            self.step = None
            say({"at": step})
            sys.stdin.readline()


def carry_out(client: OAuthClient, order: dict[str, Any]) -> dict[str, Any]:
    ok: list[str] = []
    errors: list[str] = []
    threads = order.get("threads", 1)
    barrier = threading.Barrier(threads)

    def act(did: str) -> None:
        barrier.wait()
        try:
            wanted: Any = {"restore": "auto", "refresh": True}[order["do"]]
            session = client.sessions.get_session(did, wanted, timeout=order.get("timeout"))
            ok.append(session.token_set.access_token)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    at_work = [threading.Thread(target=act, args=(order["did"],)) for _ in range(threads)]
    for thread in at_work:
        thread.start()
    for thread in at_work:
        thread.join()
    return {"ok": ok, "errors": errors}


if __name__ == "__main__":
    main()
