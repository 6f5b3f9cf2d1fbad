"""The documents link to each other by the names of their files, so that their links work wherever reStructuredText is
shown. Here such a link becomes one within the site, and is checked; the lists of the index become its table of
contents; and every example gets its place on a page.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

LINK = re.compile(r"^\* `[^`<]+\s<([\w/]+)\.rst>`__", re.MULTILINE)
SECTION = re.compile(r"^(\S.*)\n-+\n", re.MULTILINE)
LANGUAGES = {".py": "python", ".html": "html+django"}
EXAMPLES = Path(__file__).parent.parent / "examples"
#: Documents outside of this directory, and the pages that show them.
OUTSIDE = {"../README.rst": "index", "../CHANGELOG.rst": "changelog", "../CONTRIBUTING.rst": "contributing"}


class PlainLinks(SphinxTransform):
    """Links to files become links to pages."""

    default_priority = 5

    def apply(self, **options: Any) -> None:
        for link in list(self.document.findall(nodes.reference)):
            target = str(link.get("refuri", ""))
            if target.startswith("examples/"):
                link.replace_self(self.to_page("ref", "example-" + target.removeprefix("examples/"), link))
            elif target.endswith(".rst") and "://" not in target:
                page = OUTSIDE.get(target) or target.removeprefix("docs/").removesuffix(".rst")
                link.replace_self(self.to_page("doc", f"/{page}", link))

    def to_page(self, kind: str, target: str, link: nodes.reference) -> nodes.Node:
        reference = addnodes.pending_xref(
            "", reftype=kind, refdomain="std", refexplicit=True, reftarget=target, refwarn=True, refdoc=self.env.docname
        )
        reference.source, reference.line = link.source or self.document["source"], link.line
        reference += nodes.inline("", link.astext())
        return reference


class Examples(Directive):
    """``.. examples::``: the programs in ``docs/examples``, each under its name."""

    def run(self) -> list[nodes.Node]:
        env = self.state.document.settings.env
        found: list[nodes.Node] = []
        for path in sorted(path for path in EXAMPLES.rglob("*") if path.suffix in LANGUAGES and path.stat().st_size):
            env.note_dependency(str(path))
            name = path.relative_to(EXAMPLES).as_posix()
            label = f"example-{name}"
            section = nodes.section(ids=[nodes.make_id(label)], names=[label])
            section += nodes.title(name, name)
            section += nodes.literal_block("", path.read_text(encoding="utf-8"), language=LANGUAGES[path.suffix])
            self.state.document.note_explicit_target(section)
            found.append(section)
        return found


def table_of_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """What the index lists under a title is also listed under it beside every page."""
    if page != "index":
        return
    pieces = SECTION.split(source[0])
    text = pieces[0]
    for title, section in zip(pieces[1::2], pieces[2::2], strict=True):
        text += f"{title}\n{'-' * len(title)}\n{section.rstrip()}\n\n"
        if pages := LINK.findall(section):
            text += f".. toctree::\n   :hidden:\n   :caption: {title}\n\n"
            text += "".join(f"   {listed}\n" for listed in pages) + "\n"
    source[0] = text


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(PlainLinks)
    app.add_directive("examples", Examples)
    app.connect("source-read", table_of_contents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
