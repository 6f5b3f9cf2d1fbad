"""The command line: ``atproto-session``, or ``python -m atproto_session``. The commands are in :mod:`.commands`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command in ``argv``, by default the one that this program was called with, and exit with its code."""
    if None in map(find_spec, ("click", "rich", "platformdirs")):
        sys.exit("The command line needs an extra: pip install 'atproto-session[cli]'")
    from ._commands import program

    sys.exit(program.main(argv, prog_name="atproto-session"))
