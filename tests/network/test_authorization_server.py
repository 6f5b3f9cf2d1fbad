"""The authorization server, where it is more than the real one. What both do is in :mod:`tests.pds.test_same_rules`."""

from __future__ import annotations

import threading
import time

import requests

from atproto_session.testing.network import LocalNetwork

from .raw import RawClient


def test_the_token_endpoint_may_take_its_time() -> None:
    with LocalNetwork(latency=0.05) as network:
        client = RawClient(network.issuer)
        before = time.monotonic()
        assert client.post("/oauth/token", {}).status_code == 400
        assert time.monotonic() - before >= 0.05


def test_stopping_ends_the_latency() -> None:
    with LocalNetwork(latency=60) as network:
        fault = network.fault("token", "status", processed=True)
        threading.Thread(target=_post_quietly, args=(f"{network.issuer}/oauth/token",), daemon=True).start()
        assert fault.arrived.wait(10)
        before = time.monotonic()
    assert time.monotonic() - before < 30


def _post_quietly(url: str) -> None:
    try:
        requests.post(url, timeout=30)
    except requests.ConnectionError:
        return
