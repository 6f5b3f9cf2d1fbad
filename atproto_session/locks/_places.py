"""Places on the disk that belong to this user alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import StoreError, printable

#: Others that may do this to a file or a directory have it in their hands.
_BY_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def path_of(argument: str, value: object) -> Path:
    """The path that was given as ``argument``, made absolute.

    :raises StoreError: it is none.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise StoreError(f"{argument} is a path, written as text or as a pathlib.Path, not as {type(value).__name__}")
    try:
        is_possible = bool(path) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_possible = False
    if not is_possible:
        raise StoreError(f"{argument} is a path, which is not empty and has no character U+0000 or half a character")
    if path.startswith("~"):
        raise StoreError(
            f"{argument} begins with ~, which only a shell replaces: give the whole path; os.path.expanduser() makes it"
        )
    return Path(path).absolute()


def make_private(directory: Path) -> None:
    """Make ``directory`` where it is missing, and its parents, all for their owner alone: ``Path.mkdir`` makes the
    parents for everybody.

    :raises StoreError: it was there, and somebody else may use it.
    """
    make_missing(directory)
    check_private(directory)


def make_missing(directory: Path) -> None:
    """As :func:`make_private`, but for a directory that may hold other things besides."""
    if not directory.is_dir():
        make_missing(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)


def check_private(path: Path) -> None:
    """
    :raises OSError: there is nothing at ``path``.
    :raises StoreError: somebody else may read or change what is there, or may have put it there.
    """
    if not hasattr(os, "geteuid"):  # Windows has owners and permissions of another kind
        return
    status = path.lstat()  # a link counts as what it is
    shown = printable(str(path), 300)
    if stat.S_ISDIR(status.st_mode):
        kind, mode = "a directory", "700"
    elif stat.S_ISREG(status.st_mode):
        kind, mode = "a file", "600"
    else:
        raise StoreError(
            f"{shown} is a link, or something else that is neither a file nor a directory: remove it, or name the "
            "place that it leads to"
        )
    # What root has put there, root has put there: against root there is no protection.
    if status.st_uid not in (os.geteuid(), 0):
        raise StoreError(
            f"{shown} belongs to another user (number {status.st_uid}); it needs {kind} that this user may write to "
            "and nobody else: run as that user, or name another place"
        )
    if status.st_mode & _BY_OTHERS:
        raise StoreError(
            f"{shown} is open to other users (mode {stat.S_IMODE(status.st_mode):o}); it needs {kind} that this user "
            f"may write to and nobody else: chmod {mode} {shown}"
        )


def check_parent(directory: Path) -> None:
    """
    :raises StoreError: everybody may replace what is in ``directory``. In a directory like ``/tmp`` they may not.
    """
    mode = directory.stat().st_mode
    if hasattr(os, "geteuid") and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        shown = printable(str(directory), 300)
        raise StoreError(
            f"in {shown} every user may replace files (mode {stat.S_IMODE(mode):o}); it needs a directory that this "
            f"user may write to and others may not: chmod o-w {shown}"
        )
