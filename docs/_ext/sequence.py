"""``.. sequence::`` draws who sends what to whom, from a text. Each line of it is one of these::

    one = First name; other = Second name     the columns, from left to right
    one -> other: what is sent                an arrow; --> for an answer
    one: what it does by itself               a box
    one x: what goes wrong                    the same, as trouble
    == a title of its own ==                  a line across

The picture is SVG within the page, in the colours of the page, so that it is dark where the page is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive, directives
from sphinx.application import Sphinx

WIDTH, STEP, LINE, TOP = 760, 46, 17, 58
ARROW = re.compile(r"(\w+) (--?>) (\w+): (.+)")
BOX = re.compile(r"(\w+)( x)?: (.+)")
TITLE = re.compile(r"== (.+) ==")


def wrapped(text: str, room: int) -> list[str]:
    """``text`` in lines of at most ``room`` letters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) + 1 > room:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


@dataclass
class Picture:
    """An SVG picture that grows downwards."""

    columns: dict[str, float]
    parts: list[str] = field(default_factory=list)
    y: float = TOP + 26

    def text(self, x: float, y: float, lines: list[str], kind: str = "", anchor: str = "middle") -> None:
        for number, line in enumerate(lines):
            place = f'x="{x:.0f}" y="{y + number * LINE:.0f}" text-anchor="{anchor}"'
            self.parts.append(f'<text class="{kind}" {place}>{escape(line)}</text>')

    def title(self, text: str) -> None:
        self.y += 10
        self.parts.append(f'<line class="rule" x1="8" x2="{WIDTH - 8}" y1="{self.y:.0f}" y2="{self.y:.0f}"/>')
        self.text(12, self.y + 20, [text], "title", "start")
        self.y += 44

    def arrow(self, start: str, kind: str, end: str, text: str) -> None:
        x1, x2 = self.columns[start], self.columns[end]
        lines = wrapped(text, max(20, int(abs(x2 - x1) / 7.2)))
        self.text((x1 + x2) / 2, self.y, lines)
        y = self.y + len(lines) * LINE - 8
        tip = 5 if x2 > x1 else -5
        dashes = ' stroke-dasharray="5 4"' if kind == "-->" else ""
        self.parts.append(f'<line class="arrow" x1="{x1:.0f}" x2="{x2 - tip:.0f}" y1="{y}" y2="{y}"{dashes}/>')
        self.parts.append(f'<path class="tip" d="M{x2:.0f} {y} l{-2 * tip} -5 v10 z"/>')
        self.y = y + 28

    def box(self, column: str, text: str, trouble: bool) -> None:
        lines = wrapped(text, 28)
        width = max(len(line) for line in lines) * 7.3 + 20
        x = min(max(self.columns[column] - width / 2, 4), WIDTH - width - 4)
        height = len(lines) * LINE + 12
        kind = "box trouble" if trouble else "box"
        self.parts.append(
            f'<rect class="{kind}" x="{x:.0f}" y="{self.y - 16:.0f}" width="{width:.0f}" height="{height}" rx="5"/>'
        )
        self.text(x + width / 2, self.y + 2, lines)
        self.y += height + 4


def draw(text: str, label: str) -> str:
    """The picture as SVG.

    :raises ValueError: a line is none of the five kinds.
    """
    first, *lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    names = dict(column.strip().split(" = ", 1) for column in first.split(";"))
    gap = WIDTH / len(names)
    picture = Picture({name: gap * (number + 0.5) for number, name in enumerate(names)})
    for line in lines:
        if match := TITLE.fullmatch(line):
            picture.title(match[1])
        elif match := ARROW.fullmatch(line):
            picture.arrow(match[1], match[2], match[3], match[4])
        elif match := BOX.fullmatch(line):
            picture.box(match[1], match[3], bool(match[2]))
        else:
            raise ValueError(f"not understood: {line}")
    height = picture.y + 4
    heads = Picture(picture.columns)
    for name, x in picture.columns.items():
        shown = wrapped(names[name], 18)
        heads.parts.append(f'<line class="life" x1="{x:.0f}" x2="{x:.0f}" y1="{TOP - 6}" y2="{height:.0f}"/>')
        heads.parts.append(
            f'<rect class="head" x="{x - gap / 2 + 6:.0f}" y="4" width="{gap - 12:.0f}" height="46" rx="6"/>'
        )
        heads.text(x, 32 if len(shown) == 1 else 23, shown, "name")
    inside = "\n".join(heads.parts + picture.parts)
    return (
        f'<svg class="sequence" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">\n{inside}\n</svg>'
    )


class Sequence(Directive):
    """The picture of the text below it."""

    has_content = True
    option_spec: ClassVar[dict[str, object]] = {"label": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        text = "\n".join(self.content)
        label = self.options.get("label", "")
        try:
            picture = draw(text, label)
        except (KeyError, ValueError) as error:
            raise self.error(f"the sequence cannot be drawn: {error}") from error
        # It may be wider than a phone's screen, and scrolls there.
        return [nodes.raw("", f'<div class="sequence-frame" tabindex="0">{picture}</div>', format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("sequence", Sequence)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
