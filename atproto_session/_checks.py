"""What the arguments of public calls have to be. One that is something else is one clear error, which names it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Kinds = type | tuple[type, ...]


def check_kind(name: str, value: object, kinds: Kinds, what: str, *, optional: bool = False) -> None:
    """
    :param what: what ``value`` should be, for people.
    :param optional: it may be ``None``, too.
    :raises TypeError: it is none of ``kinds``.
    """
    if not (isinstance(value, kinds) or (optional and value is None)):
        raise TypeError(f"{name} is {what}{', or None' if optional else ''}, not {_shown(value)}")


def check_texts(*, optional: bool = False, **arguments: object) -> None:
    """
    :raises TypeError: one of them is no string.
    """
    for name, value in arguments.items():
        if not isinstance(value, str):
            check_kind(name, value, str, "a string", optional=optional)


def check_flags(**arguments: object) -> None:
    """
    :raises TypeError: one of them is neither ``True`` nor ``False``.
    """
    for name, value in arguments.items():
        check_kind(name, value, bool, "True or False")


def check_seconds(**arguments: object) -> None:
    """
    :raises TypeError: one of them is no number.
    :raises ValueError: it is not one of seconds: less than 0, or NaN.
    """
    for name, value in arguments.items():
        if isinstance(value, bool):
            raise TypeError(f"{name} is a number of seconds, not bool")
        check_kind(name, value, (int, float), "a number of seconds")
        if not value >= 0:  # type: ignore[operator]
            raise ValueError(f"{name} is a number of seconds, not {value}")


def check_functions(*, optional: bool = False, **arguments: object) -> None:
    """
    :raises TypeError: one of them cannot be called.
    """
    for name, value in arguments.items():
        if not (callable(value) or (optional and value is None)):
            raise TypeError(f"{name} is a function{', or None' if optional else ''}, not {_shown(value)}")


def check_methods(name: str, value: object, methods: tuple[str, ...], what: str) -> None:
    """
    :raises TypeError: ``value`` lacks one of ``methods``, or is only the class of what would have them.
    """
    if isinstance(value, type) or not all(callable(getattr(value, method, None)) for method in methods):
        raise TypeError(f"{name} is {what}, with the methods {', '.join(methods)}; not {_shown(value)}")


def seconds(timeout: float | None, default: float) -> float:
    """How long a caller waits, who said ``timeout``: that long, not at all if it is negative, or ``default``.

    :raises TypeError: it is no number.
    :raises ValueError: it is not a number (NaN).
    """
    if timeout is None:
        return default
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout is a number of seconds, or None, not {_shown(timeout)}")
    if math.isnan(timeout):
        raise ValueError("timeout is a number of seconds, not NaN")
    return max(0.0, timeout)


def refuse_to_pickle(what: str, instead: str) -> Callable[[Any], Any]:
    """A ``__reduce__`` for objects that are of no use in another process.

    :param instead: what to do, which completes "cannot be pickled or copied; ...".
    """

    def __reduce__(self: object) -> Any:
        raise TypeError(f"{what} cannot be pickled or copied; {instead}")

    return __reduce__


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
