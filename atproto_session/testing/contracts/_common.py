"""What the suites share."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, TypeVar

from ...locks import Locks
from ...session import ClientAuthMethod, Session, TokenSet

T = TypeVar("T")

DID = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
#: For what has to happen and does, in seconds: generous, since it passes only when a test fails.
SOON = 60.0
#: In the future for as long as anybody runs this, and in the past.
LATER, EARLIER = 4e9, 1e9

#: Keys that can occur: a DID of up to 2,048 characters, and after a ``#`` up to 256 printable ones.
KEYS = [
    DID,
    f"{DID}#work",
    f"{DID}#Work",
    f"{DID}#work ",
    f"{DID}# work",
    f"{DID}#100%_",
    f"{DID}#a/b\\c",
    f"{DID}#../../etc/passwd",
    f"{DID}#quote'; DROP TABLE sessions; --\"",
    f"{DID}##",
    f"{DID}#did:web:example.com",
    f"{DID}#\u00e9",
    f"{DID}#e\u0301",
    f"{DID}#ключ",
    f"{DID}#\U0001f469",
    f"{DID}#" + "x" * 256,
    f"{DID}#" + "x" * 255 + "y",
    f"{DID}#" + "Ü" * 256,
    "did:web:example.com",
    "did:web:localhost%3A8080",
    "did:web:" + "a" * 2040,
    "did:web:" + "a" * 2039 + "b",
    "did:web:" + "a" * 2040 + "#" + "\U0001f469" * 256,
]
#: Keys that can not, but do no harm either in the stores of this library.
HOSTILE_KEYS = [
    *KEYS,
    "",
    "did:web:Example.com",
    "../../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".hidden",
    "a/b\\c",
    "a:b*c?d|e<f>g",
    "con",
    "NUL.txt",
    "trailing. ",
    "with spaces\tand\r\nlines",
    "quote'; DROP TABLE sessions; --\"",
    "100%_",
    "%00",
    "\0",
    "zero\0inside",
    "zero",
    "ключ",
    "x" * 200,
    "x" * 201,
    "y" * 5000,
    "y" * 4999 + "z",
    "Ü" * 1000,
]


def make_session(name: str = "1", *, key: str = DID) -> Session:
    """A session whose tokens are told apart by ``name``."""
    return Session(
        dpop_key={"kty": "EC", "crv": "P-256", "x": "x" * 43, "y": "y" * 43, "d": "d" * 43},
        auth_method=ClientAuthMethod("private_key_jwt", "key-1"),
        token_set=TokenSet(
            iss="https://issuer.example.com",
            sub=key.partition("#")[0] or DID,
            aud="https://pds.example.com",
            scope="atproto transition:generic",
            refresh_token=f"refresh-{name}",
            access_token=f"access-{name}",
            expires_at=datetime(2035, 6, 7, 8, 9, 10, 123000, tzinfo=UTC),
        ),
    )


def take(locks: Locks, name: str, *, timeout: float = 0.0, cancel: threading.Event | None = None) -> None:
    with locks.hold(name, timeout=timeout, cancel=cancel):
        pass


def at_once(work: Callable[[str], T], names: str) -> list[T]:
    """The results of ``work(name)``, all begun at the same instant, each in a thread of its own."""
    start = threading.Barrier(len(names))

    def run(name: str) -> T:
        start.wait(SOON)
        return work(name)

    with ThreadPoolExecutor(len(names)) as threads:
        return list(threads.map(run, names))


class Process:
    """``work(connection, *arguments)`` in a process of its own, at the other end of a connection."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs, *arguments))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._process.join(SOON)
        self.kill()

    def send(self, message: str) -> None:
        self._connection.send(message)

    def receive(self) -> Any:
        assert self._connection.poll(SOON), "the other process does not answer"
        return self._connection.recv()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
