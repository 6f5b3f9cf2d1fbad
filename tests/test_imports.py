"""Imports go down only: a room knows the rooms below it, and none beside or above."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import atproto_session

PACKAGE = Path(atproto_session.__file__).parent

#: Floor by floor, from the ground up. A package counts as one room; within it, modules may import each other.
FLOORS = [
    ["errors", "_fork", "_urls", "_worker", "_bodies"],
    ["session", "keys", "_threads"],
    ["dpop", "locks", "_flights"],
    ["stores", "_steps", "_terms", "cached_getter", "_recent"],
    ["_records", "_rests"],
    ["refresh", "_driver"],
    ["session_getter", "_adapter"],
    ["transport", "_signer", "_upkeep"],
    ["identity"],
    ["discovery", "metadata"],
    ["client_auth"],
    ["server", "oauth_session", "_warm"],
    ["_login"],
    ["client"],
    ["testing"],
    ["demo", "contrib"],
    ["_commands"],
    ["cli"],
    ["__main__"],
]
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> Iterator[str]:
    module = ["atproto_session", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            start = module[: -node.level] if node.level else []
            name = [*start, *(node.module or "").split(".")] if node.module else start
            names = [name] if len(name) > 1 else [[*name, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for parts in names:
            if parts[0] == "atproto_session" and len(parts) > 1:
                yield parts[1]


def test_every_room_has_a_floor_and_imports_go_down() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        if room == "__init__":
            continue
        assert room in ROOMS, f"{room} has no floor"
        wrong += [
            f"{path.name} imports {other}"
            for other in imported_rooms(path)
            if other != room and (other not in ROOMS or ROOMS[other] >= ROOMS[room])
        ]
    assert wrong == []


def test_the_floor_plan_is_complete() -> None:
    plan = (PACKAGE.parent / "CONTRIBUTING.rst").read_text(encoding="utf-8")
    rows = re.findall(r"^([0-9]+) +``(\w+)`` ", plan, re.MULTILINE)
    assert [(int(floor), room) for floor, room in rows] == [
        (floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms
    ]


def test_the_package_imports_no_extra_and_no_test_tool() -> None:
    code = (
        "import sys, atproto_session\n"
        "extras = {'redis', 'sqlalchemy', 'psycopg', 'pymysql', 'django', 'flask', 'celery'}\n"
        "extras |= {'click', 'rich', 'platformdirs', 'pytest'}\n"
        "print(sorted(extras & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_exported_is_there() -> None:
    assert sorted(atproto_session.__all__) == atproto_session.__all__
    for name in atproto_session.__all__:
        assert getattr(atproto_session, name).__module__.startswith("atproto_session")


@pytest.mark.duty(43)
def test_nothing_is_validated_by_assert() -> None:
    """Python runs without them under ``-O``."""
    found = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if "testing" not in path.parts
        and any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    ]
    assert found == []


TESTS = Path(__file__).parent
#: Rooms whose modules are tested together, by the name of the room.
TESTED_AS_ONE = {"stores", "locks", "demo", "contracts"}
#: Modules without anything to test by itself.
TESTED_ELSEWHERE = {"_steps.py"}


def where_tested(module: Path) -> Path:
    """Where the tests of a module are; see ``CONTRIBUTING.rst``."""
    *rooms, name = module.with_suffix("").parts
    if rooms[:1] == ["testing"]:
        rooms = rooms[1:]
    if rooms[:2] == ["contrib", "django"]:
        own = TESTS / "contrib" / "django" / f"test_{name.lstrip('_')}.py"
        # What has no tests of its own is tested through the pages, or where its room is.
        return own if own.exists() else own.with_name(f"test_{rooms[-1] if rooms[2:] else 'views'}.py")
    if rooms and rooms[0] in TESTED_AS_ONE and not (TESTS / f"test_{name}.py").exists():
        name = rooms[0]
    return TESTS.joinpath(*(room for room in rooms if room not in TESTED_AS_ONE), f"test_{name.lstrip('_')}.py")


def test_every_module_has_its_tests() -> None:
    modules = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")}
    assert {str(module) for module in modules if not where_tested(module).exists()} <= TESTED_ELSEWHERE
