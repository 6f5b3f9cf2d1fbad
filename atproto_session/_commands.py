"""The commands of ``atproto-session``. Needs the extra ``cli``."""

from __future__ import annotations

import sys
from typing import Literal

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="atproto-session")
def program() -> None:
    """AT Protocol (Bluesky) OAuth sessions that stay alive."""


@program.command()
@click.option("--seconds", type=click.FloatRange(min=0.5), default=30.0, show_default=True, help="How long it runs.")
@click.option("--processes", type=click.IntRange(1, 64), default=4, show_default=True, help="Worker processes.")
@click.option("--threads", type=click.IntRange(1, 64), default=8, show_default=True, help="Threads of each process.")
@click.option("--store", type=click.Choice(["sqlite", "json"]), default="sqlite", show_default=True)
def demo(seconds: float, processes: int, threads: int, store: Literal["sqlite", "json"]) -> None:
    """Let many processes and threads share one account, with locks and then without.

    Everything happens on this machine: a small AT Protocol network is started for it.
    """
    from .demo import Load, run

    sys.exit(run(Load(processes, threads, seconds, store)))
