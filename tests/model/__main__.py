"""``python -m tests.model``: search as far as asked, and say what was found."""

from __future__ import annotations

import argparse
import sys
import time

from .protocol import Protocol
from .search import search


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--calls", type=int, default=1, help="of each worker, one after the other")
    parser.add_argument("--lease", action="store_true", help="under a lock that ends with its time")
    parser.add_argument("--forgetful", action="store_true", help="the lease ends early, or the lock is broken, once")
    parser.add_argument("--owner", nargs="*", choices=("log_out", "log_in"), default=("log_out", "log_in"))
    parser.add_argument("--without", nargs="*", default=(), help="mechanisms to take out; see tests/model/protocol.py")
    parser.add_argument("--most", type=int, help="give up after so many states")
    chosen = parser.parse_args(argv)
    protocol = Protocol(
        workers=chosen.workers,
        calls=chosen.calls,
        lease=chosen.lease,
        forgetful=chosen.forgetful,
        owner=tuple(chosen.owner),
        without=frozenset(chosen.without),
    )
    began = time.monotonic()
    result = search(protocol, most=chosen.most)
    print(f"{result}\n{time.monotonic() - began:.1f} s")
    return 0 if result.violation is None else 1


if __name__ == "__main__":
    sys.exit(main())
