"""The URLs of stores that are files."""

from __future__ import annotations

from ..errors import StoreError, printable


def path_in(url: str) -> str:
    """The path in a URL, written as SQLAlchemy writes it: three slashes and a relative path, or four in all for an
    absolute one.

    :raises StoreError: there is none.
    """
    scheme, _, rest = url.partition(":")
    path = rest.removeprefix("///")
    if path == rest or not path:
        scheme = printable(scheme, 20)
        raise StoreError(f"{scheme}:///relative/path or {scheme}:////absolute/path names a store of this kind")
    return path
