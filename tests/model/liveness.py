"""Which variables a piece of code may still look at: the others make no difference to what it will do."""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType
from typing import Any

_ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD")


@cache
def live_after(code: CodeType) -> dict[int, frozenset[str]]:
    """For the offset of every instruction, the variables that may be read after it before they are assigned. What the
    instructions are is known no better than needed: in doubt, a variable is read."""
    bytecode = dis.Bytecode(code)
    instructions = list(bytecode)
    after = {instruction.offset: frozenset[str]() for instruction in instructions}
    before = dict(after)
    entries: Any = bytecode.exception_entries  # type: ignore[attr-defined]  # not in the stubs
    is_changing = True
    while is_changing:
        is_changing = False
        following: list[int] = []
        for instruction in reversed(instructions):
            offset, name = instruction.offset, instruction.opname
            targets = [entry.target for entry in entries if entry.start <= offset <= entry.end]
            if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
                targets.append(instruction.argval)
            if name not in _ENDS:
                targets += following
            live = frozenset[str]().union(*(before[target] for target in targets))
            is_changing = is_changing or live != after[offset]
            after[offset] = live
            names = (
                {instruction.argval}
                if isinstance(instruction.argval, str)
                else set(instruction.argval or ())
                if isinstance(instruction.argval, tuple)
                else set()
            )
            if name == "STORE_FAST":
                live -= names
            elif "FAST" in name:
                live |= names
            before[offset] = live
            following = [offset]
    hidden = frozenset(code.co_cellvars + code.co_freevars)  # other code may read those
    return {offset: live | hidden for offset, live in after.items()}
