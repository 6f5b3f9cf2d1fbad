"""``request.atproto``: the account that a browser has logged in with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from django.http import HttpRequest

from ...errors import SessionError, SessionNotFoundError
from ...oauth_session import OAuthSession
from .._web import TOTAL_TIMEOUT
from .conf import get_client

if TYPE_CHECKING:
    from .models import Account

#: In Django's session: the ``session_id`` of each account of this browser, the current one last; and the account that
#: its user has logged in with, if it was one.
_ACCOUNTS, _LOGIN = "_atproto_accounts", "_atproto_login"


class NobodyLoggedInError(SessionNotFoundError):
    """This browser has logged in with no account."""


class BrowserAccounts:
    """The accounts of one browser. Nothing is read before it is asked for, and no request made before one is needed.

    What an :class:`.OAuthSession` has, this has: ``request.atproto.get("/xrpc/...")`` is a request of the current
    account. It is true if there is one. ``request.atproto[did]`` is the session of another account of this browser.
    Where the user is not there any more, or is locked out (``is_active``), there is no account either.

    Only DIDs and random ids are in Django's session; tokens stay in the store.
    """

    def __init__(self, request: HttpRequest) -> None:
        self._request = request
        self._opened: dict[str, OAuthSession] = {}

    @property
    def did(self) -> str | None:
        """The current account, or ``None``."""
        return next(reversed(self._ids), None)

    @property
    def session_id(self) -> str | None:
        """Which of the account's sessions is this browser's. With it, a worker can take it up:
        ``get_client().restore(did, session_id=session_id)``. A log-out ends it, there too."""
        return None if self.did is None else self._ids[self.did]

    @property
    def account(self) -> Account | None:
        """The row of the current account."""
        from .models import Account

        return Account.objects.filter(did=self.did).first() if self.did else None

    @property
    def handle(self) -> str | None:
        """The handle, as it was verified at the log-in; ``None`` if it could not be."""
        account = self.account
        return (account.handle or None) if account else None

    @property
    def session(self) -> OAuthSession:
        """The current account, ready to use; with a ``total_timeout`` of 25 seconds.

        :raises NobodyLoggedInError: there is none.
        :raises SessionNotFoundError: its session is over.
        :raises StoreError: the store cannot be read.
        """
        if self.did is None:
            raise NobodyLoggedInError("nobody has logged in with an account in this browser")
        return self[self.did]

    def __getitem__(self, did: str) -> OAuthSession:
        if did not in self._ids:
            raise NobodyLoggedInError("this browser has not logged in with that account")
        return self._open(did)

    def _open(self, did: str) -> OAuthSession:
        if did not in self._opened:
            opened = get_client().restore(did, refresh=False, session_id=dict(self.items())[did])
            opened.total_timeout = TOTAL_TIMEOUT
            self._opened[did] = opened
        return self._opened[did]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what libraries try of any object
            raise AttributeError(name)
        return getattr(self.session, name)

    def __bool__(self) -> bool:
        return self.did is not None

    def __iter__(self) -> Iterator[str]:
        """The DIDs of this browser's accounts, the current one first."""
        return reversed(list(self._ids))

    def __repr__(self) -> str:
        return f"<BrowserAccounts {list(self)}>"

    def use(self, did: str) -> None:
        """Make another of this browser's accounts the current one.

        :raises NobodyLoggedInError: this browser has not logged in with it.
        """
        if did not in self._ids:
            raise NobodyLoggedInError("this browser has not logged in with that account")
        self.add(did, self._ids[did])

    def is_there(self) -> bool:
        """Whether the session of the current account is still in the store. Costs one look, and no request.

        :raises SessionError: the store cannot be read.
        """
        return self.did is not None and self.is_stored(self.did)

    # For the views and the middleware

    def is_stored(self, did: str) -> bool:
        """Whether the session of an account is still in the store, whoever the user is."""
        try:
            return did in dict(self.items()) and self._open(did) is not None
        except SessionError as error:
            if error.login_required:
                return False
            raise

    def add(self, did: str, session_id: str) -> None:
        """Let ``did`` be the current account."""
        self._write({**self._others(did), did: session_id})
        self._opened.pop(did, None)

    def remove(self, did: str) -> None:
        """Forget an account, without ending its session. If the user has logged in with it, they stay logged in by the
        account that is the current one then."""
        self._write(self._others(did))
        self._opened.pop(did, None)
        if self.login == did:
            self.login = next(reversed(self._others(did)), None)

    def items(self) -> list[tuple[str, str]]:
        """What is in Django's session, whoever the user is."""
        stored = self._request.session.get(_ACCOUNTS, [])
        return [(did, session_id) for did, session_id in stored]

    @property
    def login(self) -> str | None:
        """The account that the user of this browser has logged in with; ``None`` where it was otherwise."""
        return self._request.session.get(_LOGIN)

    @login.setter
    def login(self, did: str | None) -> None:
        if did is not None:
            self._request.session[_LOGIN] = did
        else:
            self._request.session.pop(_LOGIN, None)

    @property
    def _ids(self) -> dict[str, str]:
        user = getattr(self._request, "user", None)
        return dict(self.items()) if user is None or user.is_authenticated else {}

    def _others(self, did: str) -> dict[str, str]:
        return {other: session_id for other, session_id in self.items() if other != did}

    def _write(self, ids: dict[str, str]) -> None:
        # A list: not every serializer of sessions keeps the order of an object.
        self._request.session[_ACCOUNTS] = [list(item) for item in ids.items()]
