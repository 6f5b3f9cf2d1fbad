"""A process of an application: holds a client over a shared store and does what its parent says, one JSON line each.

Started by :mod:`tests.crew`. ``{"do": "request", "threads": 8}`` makes 8 threads that each do that once, at the same
moment; the answer is ``{"ok": [...], "errors": [...]}``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from atproto_session import ClientMetadata, Freshness, Keyset, OAuthClient, _worker

from .core import NoLocks
from .scenes import GET_SESSION


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    freshness = Freshness(**setup["freshness"])
    metadata = ClientMetadata.from_document(setup["metadata"]) if "metadata" in setup else ClientMetadata.loopback()
    keyset = Keyset.from_jwks(setup["jwks"]) if "jwks" in setup else None
    store, options = setup["store"], setup["options"]
    if setup["apart"]:
        _worker._machine = lambda: f"machine {os.getpid()}"
        options["locks"] = NoLocks()
    with OAuthClient(metadata, store=store, keyset=keyset, freshness=freshness, **options) as client:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps(carry_out(client, setup["did"], order)), flush=True)


def carry_out(client: OAuthClient, did: str, order: dict[str, Any]) -> dict[str, Any]:
    actions: dict[str, Callable[[], str]] = {
        "request": lambda: request(client, did),
        "restore": lambda: client.sessions.get_session(did).token_set.access_token,
        "refresh": lambda: client.sessions.get_session(did, True).token_set.access_token,
        "rejected": lambda: client.sessions.get_session(did, rejected=order["rejected"]).token_set.access_token,
        "revoke": lambda: str(client.revoke(did)),  # type: ignore[func-returns-value]
    }
    ok: list[str] = []
    errors: list[str] = []
    barrier = threading.Barrier(order["threads"])

    def act() -> None:
        barrier.wait()
        try:
            ok.append(actions[order["do"]]())
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=act) for _ in range(order["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"ok": ok, "errors": errors}


def request(client: OAuthClient, did: str) -> str:
    response = client.restore(did).get(GET_SESSION)
    if response.status_code != 200:
        raise RuntimeError(f"answered {response.status_code} {response.text}")
    return str(response.json()["did"])


if __name__ == "__main__":
    main()
