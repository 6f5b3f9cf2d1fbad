"""``python -m tests.model``: search further than the tests have time for, and say what was explored."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from .search import search
from .world import World

_BOTH, _NOBODY = ("log_out", "log_in"), ()
#: By the number of workers.
WORLDS = {
    2: (
        World(stalls=1),
        World(locks="lease", owners=("log_out",), losses=1, stalls=1),
        World(locks="lease", owners=("log_in",), losses=1, stalls=1),
        World(locks="broken", owners=("log_out",), stalls=1),
        World(locks="broken", owners=("log_in",), stalls=1, is_one_machine=True),
        World(locks="none", owners=("log_out",), pauses=True, stalls=1),
        World(locks="none", owners=("log_in",), pauses=True, stalls=1),
        World(owners=("log_in",), is_login_stale=True, stalls=1),
        World(owners=(), calls=2, stalls=1),
        World(locks="none", owners=(), calls=2, stalls=1, is_one_machine=True),
        World(locks="lease", owners=("log_out",), losses=1, mishaps=1, stalls=1, is_one_machine=True),
    ),
    3: (
        World(3, owners=(), stalls=1),
        World(3, locks="lease", owners=(), losses=1, stalls=0),
        World(3, locks="broken", owners=(), stalls=0),
        World(3, locks="none", owners=(), stalls=1),
        World(3, locks="none", owners=(), stalls=0, is_one_machine=True),
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--workers", type=int, choices=(2, 3), action="append", help="only worlds with so many")
    parser.add_argument("--most", type=int, help="give up on a world after so many states")
    chosen = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)
    failures = 0
    for world in (world for workers in chosen.workers or WORLDS for world in WORLDS[workers]):
        print(world, flush=True)
        began = time.monotonic()
        result = search(world, most=chosen.most)
        print(f"  {result}\n  {time.monotonic() - began:.0f} s", flush=True)
        failures += result.violation is not None
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
