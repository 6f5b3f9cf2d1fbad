"""Everything that Python would import at its first use, imported at once.

A process that forks while another thread imports something leaves a child in which that import never ends. So nothing
is left to import once there is a client, but what is seldom needed and costs much: that is imported where a fork waits
for it (:func:`._fork.importing`).
"""

from __future__ import annotations

import codecs
import functools

from .dpop import proof
from .keys import generate_jwk

#: Encodings of host names, and of answers that are in none that was asked for.
_ENCODINGS = (
    *("idna", "punycode", "ascii", "latin-1"),
    *("utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be", "utf-32-le"),
)


@functools.cache
def warm_up() -> None:
    """Do once what imports something when it is done for the first time."""
    proof(generate_jwk(), "GET", "https://pds.example.com/")
    for encoding in _ENCODINGS:
        codecs.lookup(encoding)
