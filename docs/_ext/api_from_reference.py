"""The page ``api`` has what the page ``reference`` lists, in its order and under its titles: ``.. names::`` stands for
all of it, each with its docstring."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from sphinx.application import Sphinx

import atproto_session

REFERENCE = Path(__file__).parent.parent / "reference.rst"
SECTION = re.compile(r"^(\S.*)\n-+\n", re.MULTILINE)
TERM = re.compile(r"^``(\w+)``\n    \S", re.MULTILINE)


def kind_of(name: str) -> str:
    thing = getattr(atproto_session, name)
    if not inspect.isclass(thing):
        return "function"
    return "exception" if issubclass(thing, Exception) else "class"


def listed_names() -> str:
    _, *pieces = SECTION.split(REFERENCE.read_text(encoding="utf-8"))
    text = ""
    for title, section in zip(pieces[::2], pieces[1::2], strict=True):
        if names := TERM.findall(section):
            text += f"{title}\n{'-' * len(title)}\n\n"
            text += "".join(f".. auto{kind_of(name)}:: {name}\n\n" for name in names)
    return text


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    if page == "api":
        app.env.note_dependency(str(REFERENCE), docname=page)
        source[0] = source[0].replace(".. names::\n", listed_names())


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
