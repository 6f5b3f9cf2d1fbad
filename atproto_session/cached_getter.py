"""A getter with a cache that never does the same work twice at a time: look, lock, look again, fetch, store.

It serves what is expensive to get: server metadata, identities, and what a program has of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ._checks import (
    check_flags,
    check_functions,
    check_methods,
    check_seconds,
    check_texts,
    refuse_to_pickle,
    seconds,
)
from ._flights import Flight, Flights
from .errors import CancelledError, LockTimeoutError, SessionError, StoreError, printable
from .locks import Locks, ThreadLocks

V = TypeVar("V")

_log = logging.getLogger("atproto_session")


class Cache(Protocol[V]):
    """Where a :class:`CachedGetter` keeps its values: any store, :class:`.MemoryStore` for one."""

    def get(self, key: str, /) -> V | None: ...
    def set(self, key: str, value: V, /) -> None: ...
    def delete(self, key: str, /) -> None: ...


@dataclass(frozen=True)
class GetOptions:
    """What the caller of :meth:`CachedGetter.get` asked for, for the getter to see."""

    no_cache: bool = False
    allow_stale: bool = False
    timeout: float | None = None
    cancel: threading.Event | None = None


class CachedGetter(Generic[V]):
    """Values by key: from the store while they are good, otherwise fetched by at most one caller at a time.

    :param getter: ``getter(key, options, stored_value)`` returns a new value. It runs in a thread of its own, and what
        it returns is stored even if the caller has given up.
    :param store: anything with ``get``, ``set`` and ``delete``.
    :param locks: by default those of the store, or locks between the threads of this process.
    :param is_stale: ``is_stale(key, value)`` says that a stored value has to be fetched again. Default: never.
    :param on_store_error: ``on_store_error(error, key, value)`` is told that a fetched value could not be stored; what
        it raises reaches the caller. Default: log it and return the value.
    :param delete_on_error: ``delete_on_error(error, key, stored_value)`` says whether an error of the getter means that
        the stored value has to go. Default: no.
    :param timeout: how long a caller waits by default, in seconds.
    :param share_failures: the error of a failed fetch reaches all who waited for it. Without it, the others try for
        themselves, one after the other. The end of the program does not wait for such a fetch.
    :raises TypeError: an argument is of another kind than it has to be; the message names it.
    """

    __reduce__ = refuse_to_pickle("a CachedGetter", "make one in each process")

    def __init__(
        self,
        getter: Callable[[str, GetOptions, V | None], V],
        store: Cache[V],
        *,
        locks: Locks | None = None,
        is_stale: Callable[[str, V], bool] | None = None,
        on_store_error: Callable[[Exception, str, V], None] | None = None,
        delete_on_error: Callable[[Exception, str, V | None], bool] | None = None,
        timeout: float = 30.0,
        share_failures: bool = False,
    ) -> None:
        check_functions(getter=getter)
        check_methods("store", store, ("get", "set", "delete"), "a store, such as MemoryStore()")
        if locks is not None:
            check_methods("locks", locks, ("hold",), "a set of locks, such as ThreadLocks()")
        check_functions(
            is_stale=is_stale, on_store_error=on_store_error, delete_on_error=delete_on_error, optional=True
        )
        check_seconds(timeout=timeout)
        check_flags(share_failures=share_failures)
        self._cache = store
        if locks is None:
            locks = getattr(store, "locks", None)
        self._locks: Locks = ThreadLocks() if locks is None else locks
        self._timeout = timeout
        self._share_failures = share_failures
        self._flights: Flights[V] = Flights(most=64)
        self._getter = getter
        self._is_stale = is_stale or (lambda key, value: False)
        self._on_store_error = on_store_error or _log_store_error
        self._delete_on_error = delete_on_error or (lambda error, key, stored: False)

    def get(
        self,
        key: str,
        *,
        no_cache: bool = False,
        allow_stale: bool = False,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
    ) -> V:
        """The value for ``key``. One that is stored and good is returned at once: no lock is taken.

        :param no_cache: only a value fetched by this call, or by one that was under way.
        :param allow_stale: a stored value, however old.
        :param timeout: seconds to wait at most; the fetch itself is not cut short by it.
        :param cancel: ends the waiting early when set.
        :raises LockTimeoutError: the value was not there in time.
        :raises CancelledError: ``cancel`` was set.
        :raises StoreError: the store cannot be read.
        """

        def is_good(value: V | None) -> bool:
            return value is not None and not no_cache and (allow_stale or not self._is_stale(key, value))

        check_texts(key=key)
        check_flags(no_cache=no_cache, allow_stale=allow_stale)
        if cancel is not None:
            check_methods("cancel", cancel, ("is_set", "wait"), "a threading.Event")
        deadline = time.monotonic() + seconds(timeout, self._timeout)
        stored = self._cache.get(key)
        if is_good(stored):
            return stored  # type: ignore[return-value]  # a good value is a V
        options = GetOptions(no_cache, allow_stale, timeout, cancel)

        def work(flight: Flight[V]) -> V:
            with self._lock(flight, deadline):
                stored = self._cache.get(key)
                if is_good(stored):
                    return stored  # type: ignore[return-value]  # a good value is a V
                if not self._share_failures:
                    flight.commit()
                flight.has_fetched = True
                return self._fetch(key, options, stored)

        while True:
            flight, is_mine = self._flights.board(key, work, deadline=deadline)
            try:
                value = flight.wait(deadline, cancel)
            except Exception as error:
                is_shared = self._share_failures and not isinstance(error, CancelledError)
                if is_mine or is_shared or not flight.landed.is_set():
                    raise
            else:
                # To have been fetched is enough: otherwise what is stale at once would be fetched by one caller after
                # the other.
                if is_mine or flight.has_fetched:
                    return value
            stored = self._cache.get(key)
            if is_good(stored):
                return stored  # type: ignore[return-value]  # a good value is a V
            if time.monotonic() >= deadline:
                raise LockTimeoutError(f"{printable(key)} was not ready in time")

    def close(self) -> None:
        """Wait until nothing is being fetched. Nothing is fetched afterwards: what needs that raises
        :class:`.SessionError`."""
        self._flights.close()

    @contextmanager
    def _lock(self, flight: Flight[V], deadline: float) -> Iterator[None]:
        """The lock of the key. Locks may be the user's own: what goes wrong with them is a StoreError, and no reason to
        lose what was done under them."""
        with ExitStack() as stack:
            timeout = max(0.0, deadline - time.monotonic())
            try:
                stack.enter_context(self._locks.hold(flight.key, timeout=timeout, cancel=flight.cancel))
            except SessionError:
                raise
            except Exception as error:
                raise StoreError(
                    f"the lock of {printable(flight.key)} cannot be used: {type(error).__name__}"
                ) from error
            try:
                yield
            finally:
                try:
                    stack.close()
                except Exception as error:  # noqa: BLE001
                    _log.warning("the lock of %s was not released: %s", printable(flight.key), type(error).__name__)

    def _fetch(self, key: str, options: GetOptions, stored: V | None) -> V:
        try:
            value = self._getter(key, options, stored)
        except Exception as error:
            if self._delete_on_error(error, key, stored):
                self._cache.delete(key)
            raise
        try:
            self._cache.set(key, value)
        except Exception as error:  # noqa: BLE001 - a store may raise anything, and the caller decides
            self._on_store_error(error, key, value)
        return value


def _log_store_error(error: Exception, key: str, value: object) -> None:
    _log.warning("the value for %s could not be stored: %s", key, error)
