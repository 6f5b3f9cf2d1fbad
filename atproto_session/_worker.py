"""Which worker this is, and whether another one of this machine is still there, and still at work.

A worker is a process. It is known by its machine's boot, its namespaces, its number, and the moment it was started, so
that another process with the same number is not taken for it. What it is at work on it shows by a sign: a socket with a
name that every process of the machine can look up. The system takes the sign down when the process ends. Only Linux has
all of that; elsewhere nothing is known about other workers.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from enum import Enum
from pathlib import Path

#: Ends the name of a worker whose system lets it show nothing: one that may not have Unix sockets, or no more files.
_WITHOUT_SIGN = "?"


class Life(Enum):
    """What is known about a worker."""

    ALIVE = "its process exists on this machine, and is at work"
    GONE = "it ran on this machine, and its process does not exist any more, or is not at work on this any more"
    UNKNOWN = "it runs or ran elsewhere, or this machine does not tell"


@functools.cache
def this_worker() -> str:
    """The name of this process: host, machine, number and start."""
    pid = os.getpid()
    return f"{socket.gethostname()}/{_machine()}/{pid}/{_start_of(pid) or ''}"


@contextmanager
def at_work(on: str) -> Iterator[str]:
    """Show, as long as this lasts, that this worker is at work ``on`` something. Brings the worker's name, which tells
    if that cannot be shown."""
    worker, is_seen = this_worker(), False
    with ExitStack() as held:
        if not worker.endswith("/"):  # the system tells about workers
            with suppress(OSError):
                held.enter_context(_sign_of(on))
                # A thread may have gone to where others do not look.
                is_seen = _is_at_work(on) and worker.rsplit("/", 3)[1] == _machine()
        yield worker if is_seen else f"{worker}{_WITHOUT_SIGN}"


def life_of(worker: str, on: str | None = None) -> Life:
    """What is known about the worker of this name.

    :param on: what it was :func:`at_work` on.
    """
    _, machine, pid, start = worker.rsplit("/", 3) if worker.count("/") >= 3 else ("", "", "", "")
    began = start.removesuffix(_WITHOUT_SIGN)
    if not (machine and began and pid.isdecimal()) or machine != _machine():
        return Life.UNKNOWN
    if _start_of(int(pid)) != began:
        return Life.GONE
    return Life.ALIVE if on is None or start != began or _is_at_work(on) else Life.GONE


def _machine() -> str:
    """This boot of this machine, and the namespaces of process numbers and of signs; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        processes = os.readlink("/proc/self/ns/pid").strip("pid:[]")  # noqa: PTH115 - the text, not a path
        signs = os.readlink("/proc/thread-self/ns/net").strip("net:[]")  # noqa: PTH115
    except OSError:
        return ""
    return f"{boot}-{processes}-{signs}"


def _start_of(pid: int) -> str | None:
    """When the process was started, in ticks since the boot; ``None`` if there is none, or only what is left of one
    that nobody has waited for."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = status.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in ("Z", "X") else rest[18]


#: The signs of this process.
_signs: set[socket.SocketType] = set()


@contextmanager
def _sign_of(work: str) -> Iterator[None]:
    with closing(_new_socket()) as sign:
        _signs.add(sign)  # before it has its name: a child that is forked now must not keep it
        try:
            sign.bind(_place_of(work))
            yield
        finally:
            _signs.discard(sign)


def _is_at_work(on: str) -> bool:
    try:
        with closing(_new_socket()) as probe:
            probe.connect(_place_of(on))
    except ConnectionRefusedError:
        return False
    except OSError:  # nobody can tell
        return True
    return True


def _new_socket() -> socket.SocketType:
    # Not socket.socket, which gevent and guards against the network in tests replace. Nothing is ever sent.
    return socket.SocketType(socket.AF_UNIX, socket.SOCK_DGRAM)


def _place_of(work: str) -> bytes:
    """An abstract address: no file, and gone with its socket."""
    return b"\0atproto_session/" + hashlib.sha256(work.encode("utf-8", "replace")).hexdigest().encode("ascii")


def _take_down() -> None:
    """A child that was forked is another worker, and does not do its parent's work."""
    this_worker.cache_clear()
    while _signs:
        _signs.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_take_down)
