"""Each extra alone: ``python -m tests.extras`` installs one after the other into an empty environment, where a program
then uses it. The programs are in ``tests/smoke/``; an extra without one has all its modules imported.

As a script, with the name of an extra, this is what runs there. It needs the standard library alone.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from importlib.abc import MetaPathFinder
from pathlib import Path

NAME = "atproto-session"
HERE = Path(__file__).parent
PROGRAMS = HERE / "smoke"
#: Tools of those who change the library; and what measures the tests, wherever they are.
_TOOLS = ("test", "lint", "docs")
_MEASURES = "coverage"
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^]]*)\])?")
_OF_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")


def extras() -> list[str]:
    """Those for users, as far as they are tested: they come with the extra ``test``."""
    included = {extra for name, wanted in requirements(NAME, ["test"]) if name == NAME for extra in wanted}
    return sorted(included - set(_TOOLS))


def requirements(distribution: str, wanted: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """What a distribution requires with some of its extras: names, each with extras of its own."""
    try:
        lines = importlib.metadata.requires(distribution) or ()
    except importlib.metadata.PackageNotFoundError:  # for another platform
        return
    for line in lines:
        found, of = _REQUIREMENT.match(line), _OF_EXTRA.search(line)
        if found is not None and (of is None or of[1] in wanted):
            yield _normal(found[1]), [name.strip() for name in (found[2] or "").split(",") if name.strip()]


def closure(extra: str) -> set[str]:
    """The distributions that come with an extra."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    left = [(_normal(NAME), [extra])]
    while left:
        name, wanted = left.pop()
        if (name, tuple(wanted)) not in seen:
            seen.add((name, tuple(wanted)))
            left += requirements(name, wanted)
    return {name for name, _ in seen}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Blocker(MetaPathFinder):
    """Lets nothing be imported that was installed for another reason than an extra."""

    def __init__(self, extra: str) -> None:
        allowed = closure(extra) | {_MEASURES}
        modules = importlib.metadata.packages_distributions()
        self.blocked = {
            module for module, owners in modules.items() if not allowed & {_normal(owner) for owner in owners}
        }

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"{name} does not come with this extra", name=name)


def smoke(extra: str) -> None:
    """Use the extra. Raises whatever is wrong."""
    blocker = Blocker(extra)
    sys.meta_path.insert(0, blocker)
    program = PROGRAMS / f"{extra}.py"
    if program.exists():
        runpy.run_path(str(program), run_name="__main__")
    else:
        using = sorted(modules_of(extra, blocker.blocked))
        if not using:
            raise SystemExit(f"no module uses the extra {extra}, and there is no {program}")
        for module in using:
            importlib.import_module(module)
    print("works")


def modules_of(extra: str, missing: Set[str]) -> Iterator[str]:
    """The modules of the library that import, somewhere, what the extra brings itself, and nothing that is missing."""
    brought = {name for name, _ in requirements(NAME, [extra])} - {name for name, _ in requirements(NAME, [])}
    owners = importlib.metadata.packages_distributions()
    names = {module for module, of in owners.items() if brought & {_normal(owner) for owner in of}}
    package = importlib.import_module("atproto_session")
    root = Path(package.__file__ or "").parent
    for path in root.rglob("*.py"):
        imported = set(_imported(path))
        if imported & names and not imported & missing:
            parts = path.relative_to(root.parent).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__")


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def build(folder: Path) -> Path:
    """The wheel, made of a copy: what is left of a build would get into the next one."""
    source, wheels = folder / "source", folder / "wheels"
    shutil.copytree(HERE.parent / "atproto_session", source / "atproto_session")
    for name in ("setup.cfg", "pyproject.toml", "README.rst", "LICENSE"):
        shutil.copy(HERE.parent / name, source)
    _pip("wheel", "--no-deps", "--wheel-dir", wheels, source)
    (wheel,) = wheels.iterdir()
    return wheel


def install(wheel: Path, extra: str) -> None:
    """Install the extra alone into an empty environment, and use it there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder)
        python = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        _pip("--python", python, "install", f"{wheel}[{extra}]")
        _run(python, "-P", __file__, extra, cwd=folder)


def _pip(*arguments: str | Path) -> None:
    _run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def _run(*command: str | Path, cwd: str | None = None) -> None:
    """What a program says is of interest only if it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        with ThreadPoolExecutor(4) as pool:
            for extra, _ in zip(extras(), pool.map(lambda extra: install(wheel, extra), extras()), strict=True):
                print(f"{extra} works alone", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        smoke(sys.argv[1])
    else:
        main()
