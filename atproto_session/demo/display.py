"""What the demo shows: figures that move while it runs, and tables of what came out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from .figures import Figures, Tokens, percentile

#: Shows the seconds that have passed, the figures and the tokens so far.
Show = Callable[[float, Figures, Tokens], None]


@contextmanager
def display(seconds: float) -> Iterator[Show]:
    """A live table on a terminal, a line a second anywhere else, or where rich is not installed.

    :param seconds: how long the run is to take.
    """
    if sys.stdout.isatty() and find_spec("rich") is not None:
        with _live(seconds) as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _live(seconds: float) -> Iterator[Show]:
    from rich.live import Live
    from rich.table import Table

    with Live(auto_refresh=False, transient=True) as live:

        def show(passed: float, figures: Figures, tokens: Tokens) -> None:
            table = Table.grid(padding=(0, 3))
            table.add_column(style="dim")
            table.add_column(justify="right", min_width=12)
            for name, value in _moving(figures, tokens):
                table.add_row(name, value)
            table.add_row("time left", f"{max(0.0, seconds - passed):.0f} s")
            live.update(table, refresh=True)

        yield show


def _lines() -> Show:
    shown = 0

    def show(passed: float, figures: Figures, tokens: Tokens) -> None:
        nonlocal shown
        if int(passed) > shown:
            shown = int(passed)
            moving = ", ".join(f"{name} {value}" for name, value in _moving(figures, tokens))
            print(f"  {passed:3.0f} s: {moving}", flush=True)

    return show


def _moving(figures: Figures, tokens: Tokens) -> list[tuple[str, str]]:
    return [
        ("requests", f"{figures.served:,}"),
        ("rotations", f"{tokens.rotations}"),
        ("latency p50", milliseconds(percentile(figures.latencies, 0.5))),
        ("latency p99", milliseconds(percentile(figures.latencies, 0.99))),
        ("errors", f"{len(figures.failures)}"),
    ]


def table(rows: list[tuple[str, str]]) -> str:
    """Names on the left, values on the right."""
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {name:<{widths[0]}}  {value:>{widths[1]}}" for name, value in rows)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"
