"""Something that happens between any two steps of a piece of code: what a signal can do, and a ``__del__``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

#: What to do, what comes in the middle of it, and what must be true afterwards.
Round = tuple[Callable[[], object], Callable[[], object], Callable[[], None]]


class Struck(BaseException):
    """What is raised from outside."""


def fail() -> None:
    raise Struck


def strike_everywhere(begin: Callable[[], Round], *, in_module: ModuleType) -> int:
    """Begin a round for each instruction of the module that is carried out, and strike there. Returns how many."""
    work, strike, _ = begin()
    _strike_at(-1, work, strike, str(in_module.__file__))  # nowhere: Python 3.12.1 tells of instructions from then on
    number = 0
    while True:
        work, strike, check = begin()
        if not _strike_at(number, work, strike, str(in_module.__file__)):
            return number
        check()
        number += 1


def _strike_at(number: int, work: Callable[[], object], strike: Callable[[], object], file: str) -> bool:
    left = number
    struck = False

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left, struck
        if frame.f_code.co_filename != file:
            return None
        # Python drops what is raised in __del__. An instruction without a line is one that CPython adds between a raise
        # and its except, where it runs no handlers; to raise there all the same, as only a trace can, leaks the frame.
        if "__del__" in (frame.f_code.co_name, frame.f_back and frame.f_back.f_code.co_name):
            return None
        frame.f_trace_opcodes = True
        if frame.f_lineno is None:
            return trace
        if event == "opcode" and not struck:
            if left == 0:
                struck = True
                strike()
            left -= 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with suppress(Struck):
            work()
    finally:
        sys.settrace(before)
    return struck


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Make ``path`` another user's. Returns the number of that user."""
    owner = path.stat().st_uid
    if owner == 0:
        os.chown(path, 12345, -1)
        return 12345
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    return owner
