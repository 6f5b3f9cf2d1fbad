"""Which worker this is, and whether another one of this machine is still there.

A worker is a process. It is known by its machine's boot, its namespace of process numbers, its number, and the moment
it was started, so that another process with the same number is not taken for it. Only Linux says all of that; elsewhere
nothing is known about other workers.
"""

from __future__ import annotations

import functools
import os
import socket
from enum import Enum
from pathlib import Path


class Life(Enum):
    """What is known about a worker."""

    ALIVE = "its process exists on this machine"
    GONE = "it ran on this machine, and its process does not exist any more"
    UNKNOWN = "it runs or ran elsewhere, or this machine does not tell"


@functools.cache
def this_worker() -> str:
    """The name of this process: host, machine, number and start."""
    pid = os.getpid()
    return f"{socket.gethostname()}/{_machine()}/{pid}/{_start_of(pid) or ''}"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=this_worker.cache_clear)


def life_of(worker: str) -> Life:
    """What is known about the worker of this name."""
    _, machine, pid, start = worker.rsplit("/", 3) if worker.count("/") >= 3 else ("", "", "", "")
    if not (machine and start and pid.isdecimal()) or machine != _machine():
        return Life.UNKNOWN
    return Life.ALIVE if _start_of(int(pid)) == start else Life.GONE


def _machine() -> str:
    """This boot of this machine, and the namespace that process numbers are counted in; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")  # noqa: PTH115 - the text, not a path
    except OSError:
        return ""
    return f"{boot}-{namespace}"


def _start_of(pid: int) -> str | None:
    """When the process was started, in ticks since the boot; ``None`` if there is none, or only what is left of one
    that nobody has waited for."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = status.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in ("Z", "X") else rest[18]
