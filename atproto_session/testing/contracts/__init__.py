"""What every store, its log-ins and every set of locks have to do, as test suites for pytest.

A new store or kind of locks proves itself by a subclass::

    class TestMyStore(StoreContract):
        def make_store(self, tmp_path):
            return MyStore(tmp_path / "sessions")

What other processes can reach subclasses :class:`SharedStoreContract` and :class:`SharedLocksContract` instead, which
ask for an *opener*: a function without arguments that opens the same place each time, and that can be pickled
(``functools.partial(MyStore, path)``), since it is also called in other processes.

Some of it can be looked at from outside only. ``damage``, ``stored_bytes`` and ``open_connections`` of a subclass do
that; a test that lacks them is skipped, and says which.
"""

from ._common import DID, HOSTILE_KEYS, KEYS, make_session
from .locks import LocksContract, SharedLocksContract
from .logins import LoginsContract
from .stores import SharedStoreContract, StoreContract

__all__ = [
    "DID",
    "HOSTILE_KEYS",
    "KEYS",
    "LocksContract",
    "LoginsContract",
    "SharedLocksContract",
    "SharedStoreContract",
    "StoreContract",
    "make_session",
]
