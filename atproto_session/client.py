"""The way in: log an account in, take up its session again anywhere, sign it out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

from requests.auth import AuthBase
from urllib3.util import Retry

from ._adapter import HardenedAdapter
from ._flights import Flight, Flights
from ._login import LoginFlow
from ._records import log
from ._signer import Refusals, Signer
from ._terms import Times
from ._threads import check_not_patched_late
from ._upkeep import IDLE, PACE, Account, CleanResult, KeepAliveResult, Upkeep
from ._warm import warm_up
from .discovery import Discovery
from .dpop import NonceCache
from .errors import SessionError, StoreError
from .identity import IdentityResolver, check_did
from .keys import Keyset
from .locks import Locks
from .metadata import ClientMetadata
from .oauth_session import AccountAuth, OAuthSession
from .server import AccountAuthority
from .session import Freshness, Session, SessionDeletedEvent, SessionUpdatedEvent
from .session_getter import SessionGetter
from .stores import EncryptionKeys, SessionStore, complete, is_safe_between_processes, open_store
from .transport import Transport

T = TypeVar("T")

#: How long a log-in that began at a server waits for the account's handle, in seconds.
_HANDLE_WITHIN = 5.0
#: Connections to one server that are kept open while no request uses them.
_IDLE_CONNECTIONS = 64


@dataclass(frozen=True)
class CallbackResult:
    """A log-in that ended well.

    :ivar session: the account, ready to use.
    :ivar state: what the application gave to :meth:`OAuthClient.authorize`.
    :ivar handle: the account's verified handle, or ``None``.
    """

    session: OAuthSession
    state: str | None
    handle: str | None = None


class OAuthClient:
    """An AT Protocol OAuth client: one for an application, shared by all its threads.

    :param metadata: who the application is.
    :param store: where sessions are kept: a URL for :func:`.open_store`, or a store.
    :param keyset: the keys of a confidential client.
    :param locks: by default those of the store.
    :param encryption_keys: Fernet keys, with ``store`` as a URL; see :func:`.open_store`.
    :param allow_plaintext: read records that are not encrypted as well, while encryption is being switched on.
    :param plc_directory: the directory of ``did:plc``.
    :param handle_resolver: a server that resolves handles (``com.atproto.identity.resolveHandle``), or several: asked
        where DNS and HTTPS have no answer; in development instead of them. See :class:`.IdentityResolver`.
    :param allow_http: let servers be plain http on this machine. For development and tests only.
    :param timeout: how long a call waits for a refresh, all told, in seconds.
    :param on_session_updated: called with a :class:`.SessionUpdatedEvent` after this process has stored a session.
    :param on_session_deleted: called with a :class:`.SessionDeletedEvent` after it has deleted one.
    :param freshness: when tokens count as stale.
    :param on_interrupted: see :class:`.SessionGetter`.
    :param times: what bounds a refresh in time; the defaults are for servers on the Internet.
    :param strict: refuse answers without a DPoP nonce, as the AT Protocol says, and not only warn of them once for each
        server. Some servers give none.
    :param trusted_hosts: names, addresses and networks (such as ``"172.16.0.0/12"``) that may be private, for
        development and self-hosting; with ``allow_http`` over http, too.
    :param retries: which requests of an :class:`.OAuthSession` are sent again after a failure, and when; by default
        none. Nothing that spends or asks for tokens is.
    :raises ClientMetadataError: the metadata and the keyset do not fit together.
    :raises SessionError: gevent was told to patch the standard library after this package was imported.
    :raises StoreError: the store cannot be used.
    :raises TypeError: ``retries`` is neither a ``Retry`` nor a number.
    :raises ValueError: ``on_interrupted`` is neither of the two, or an entry of ``trusted_hosts`` is none of the three.
    """

    def __init__(
        self,
        metadata: ClientMetadata,
        *,
        store: str | SessionStore,
        keyset: Keyset | None = None,
        locks: Locks | None = None,
        encryption_keys: EncryptionKeys = (),
        allow_plaintext: bool = False,
        plc_directory: str = "https://plc.directory",
        handle_resolver: str | Sequence[str] | None = None,
        allow_http: bool = False,
        timeout: float = 30.0,
        on_session_updated: Callable[[SessionUpdatedEvent], None] | None = None,
        on_session_deleted: Callable[[SessionDeletedEvent], None] | None = None,
        freshness: Freshness | None = None,
        on_interrupted: Literal["retry", "fail"] = "retry",
        times: Times | None = None,
        strict: bool = False,
        trusted_hosts: Iterable[str] = (),
        retries: Retry | int | None = None,
    ) -> None:
        check_not_patched_late()
        warm_up()
        metadata.check_with_keyset(keyset)
        if encryption_keys and not isinstance(store, str):
            raise StoreError("encryption_keys go with a store that is given as a URL; give them to the store itself")
        if retries is not None and not isinstance(retries, Retry | int):
            raise TypeError(f"retries is a urllib3.util.Retry or a number of tries, not {type(retries).__name__}")
        self.metadata = metadata
        self._keyset = keyset
        self._owns_store = isinstance(store, str)
        self._store = complete(
            open_store(store, encryption_keys=encryption_keys, allow_plaintext=allow_plaintext)
            if isinstance(store, str)
            else store
        )
        if not is_safe_between_processes(self._store, locks):
            log.warning(
                "the sessions in %r are safe between the threads of one process only: give the store a replace(), or "
                "give the client locks that all processes share",
                self._store,
            )
        self._timeout = timeout
        self._allow_http = allow_http
        self._nonces = NonceCache(strict=strict)
        self._refusals = Refusals()
        self._retries = retries
        self._transport = Transport(allow_http=allow_http, trusted_hosts=trusted_hosts)
        self._pool = HardenedAdapter(
            allow_http=allow_http, pool_maxsize=_IDLE_CONNECTIONS, trusted_hosts=self._transport.trusted_hosts
        )
        self._identities = IdentityResolver(
            self._transport, plc_directory=plc_directory, handle_resolver=handle_resolver, allow_http=allow_http
        )
        self._discovery = Discovery(self._transport, allow_http=allow_http)
        self._authority = AccountAuthority(
            self._identities, self._discovery, self._transport, self._nonces, metadata, keyset
        )
        self._logins = LoginFlow(
            metadata=metadata,
            keyset=keyset,
            logins=self._store.logins,
            identities=self._identities,
            discovery=self._discovery,
            authority=self._authority,
        )
        self._flights: Flights[Any] = Flights(thread_ended=getattr(self._store, "thread_ended", None))
        self.sessions = SessionGetter(
            self._store,
            self._authority,
            locks=locks,
            freshness=freshness,
            timeout=timeout,
            on_interrupted=on_interrupted,
            client_id=metadata.client_id,
            times=times,
        )
        self._upkeep = Upkeep(self.sessions, self._store, metadata.client_id, timeout=timeout)
        if on_session_updated is not None:
            self.sessions.on_updated(on_session_updated)
        if on_session_deleted is not None:
            self.sessions.on_deleted(on_session_deleted)

    # Logging in

    def authorize(
        self,
        account: str,
        *,
        scope: str | None = None,
        state: str | None = None,
        redirect_uri: str | None = None,
        prompt: str | None = None,
        ui_locales: str | None = None,
        display: str | None = None,
        login_hint: str | None = None,
        bound_to: str | None = None,
        timeout: float | None = None,
    ) -> str:
        """Begin a log-in and return the URL to send the user's browser to.

        :param account: a handle, a DID, or the URL of a PDS or an authorization server, as people paste them: with
            ``@``, as ``at://`` URI, as the address of a profile's page, in quotes.
        :param scope: which scopes to ask for, separated by spaces; by default all that the metadata has.
        :param state: anything; :meth:`callback` gives it back. It stays here, and is not sent.
        :param redirect_uri: one of the metadata's; by default the first. One on loopback that is registered without a
            port may have any.
        :param prompt: ``"login"``, ``"consent"``, ``"select_account"``, ``"none"`` or ``"create"`` (OpenID Connect Core
            section 3.1.2.1).
        :param ui_locales: languages for the pages, separated by spaces.
        :param display: ``"page"``, ``"popup"``, ``"touch"`` or ``"wap"``.
        :param login_hint: what the server's page shows as the account; by default ``account``, if that is one.
        :param bound_to: a secret of the browser that begins the log-in, from its cookie or session. Only a
            :meth:`callback` with the same secret ends it. A digest of it is stored.
        :param timeout: how long to wait, all told, in seconds; by default the client's.
        :raises IdentityError: the handle or the DID does not resolve.
        :raises DiscoveryError: there is no usable authorization server.
        :raises ClientMetadataError: the scope or the redirect URI is not registered.
        :raises AuthMethodUnsatisfiableError: the server does not take the client's way to authenticate.
        :raises OAuthResponseError: the server refused the request.
        :raises TransportError: the server gave no usable answer.
        :raises StoreError: the log-in could not be stored.
        :raises LockTimeoutError: ``timeout`` is over.
        """
        options = {
            "scope": scope,
            "redirect_uri": redirect_uri,
            "prompt": prompt,
            "ui_locales": ui_locales,
            "display": display,
            "login_hint": login_hint,
        }
        _check_texts(account=account)
        given = {"state": state, "bound_to": bound_to, **options}
        _check_texts(**{name: value for name, value in given.items() if value is not None})
        return self._within(timeout, "the log-in", lambda flight: self._logins.begin(account, options, state, bound_to))

    def callback(
        self,
        params: Mapping[str, Any] | str,
        *,
        session_id: str | None = None,
        bound_to: str | Collection[str] | None = None,
        timeout: float | None = None,
    ) -> CallbackResult:
        """End a log-in with what the browser brought back.

        Once the code has been sent, the log-in goes on to its end, even if ``timeout`` is over: its session is stored.

        :param params: the parameters of the request to the redirect URI, or its whole URL.
        :param session_id: stores the session beside others of the same account.
        :param bound_to: what was given to :meth:`authorize`; or all that this browser may have, where each of its
            log-ins was given a secret of its own. Another browser's log-in is refused before its code is spent.
        :param timeout: how long to wait, all told, in seconds; by default the client's.
        :raises OAuthCallbackError: the parameters belong to no log-in that was begun here, to one that has been ended
            already or was begun by another browser, or say that the user declined.
        :raises ValueError: ``session_id`` is not 1 to 256 printable characters.
        :raises LockTimeoutError: ``timeout`` is over.
        :raises SessionError: the code could not be exchanged, or the tokens are not the account's. Log in again; if the
            error is ``retryable``, nothing was spent, and the same call may succeed.
        """
        _check_session_id(session_id)
        secrets = None if bound_to is None else [bound_to] if isinstance(bound_to, str) else list(bound_to)
        for secret in secrets or ():
            _check_texts(bound_to=secret)

        def work(flight: Flight[CallbackResult]) -> CallbackResult:
            session, login = self._logins.end(params, secrets, flight)
            key = _key_of(session.token_set.sub, session_id)
            self.sessions.set_stored(key, session)
            handle = login.handle if login.did is not None else self._handle_of(session.token_set.sub)
            return CallbackResult(self._open(key, session), login.state, handle)

        return self._within(timeout, "the log-in", work)

    def _handle_of(self, did: str) -> str | None:
        try:
            return self._identities.resolve(did, timeout=_HANDLE_WITHIN).handle
        except SessionError:  # the log-in has succeeded all the same
            return None

    def _within(self, timeout: float | None, what: str, work: Callable[[Flight[T]], T]) -> T:
        """What ``work`` returns, if it does so in time; afterwards it goes on alone."""
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        return self._flights.charter(what, work).wait(deadline)

    # Using and ending sessions

    def restore(
        self, did: str, refresh: Literal["auto"] | bool = "auto", *, session_id: str | None = None
    ) -> OAuthSession:
        """The session of an account that has logged in before, here or on any machine that shares the store.

        :param refresh: see :meth:`.SessionGetter.get_session`, which has the errors as well.
        :raises IdentityError: ``did`` is not a DID (a handle is none).
        :raises ValueError: ``session_id`` is not 1 to 256 printable characters.
        """
        key = _key_of(did, session_id)
        return self._open(key, self.sessions.get_session(key, refresh))

    def auth(self, did: str, *, session_id: str | None = None) -> AuthBase:
        """Authentication as the account, for code that brings a ``requests.Session`` of its own.

        :raises IdentityError: ``did`` is not a DID.
        :raises ValueError: ``session_id`` is not 1 to 256 printable characters.
        """
        return AccountAuth(self._signer(_key_of(did, session_id)), self._pool)

    def revoke(self, did: str, *, session_id: str | None = None) -> None:
        """Delete the session here, and end it at its server. If that cannot be reached, it is deleted all the same.

        :raises IdentityError: ``did`` is not a DID.
        :raises StoreError: the store cannot be written.
        :raises ValueError: ``session_id`` is not 1 to 256 printable characters.
        """
        self.sessions.delete_stored(_key_of(did, session_id), revoke=True)

    # Looking after the store

    def accounts(self) -> Iterator[Account]:
        """Who is stored, in no order: the sessions of all clients that share the store. No token or key is in it.

        A record that cannot be read does not end the walk: its :class:`.Account` has an ``error``. What is stored or
        deleted meanwhile may be in it or not.

        :raises StoreError: the store cannot be walked, or, at the end, has records whose key cannot be told.
        """
        return self._upkeep.accounts()

    def keep_alive(
        self,
        *,
        idle: float = IDLE,
        pace: float = PACE,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        on_result: Callable[[KeepAliveResult], object] | None = None,
    ) -> list[KeepAliveResult]:
        """Refresh the sessions that have not been refreshed for long, before their refresh tokens die of it. To be
        called once a day, or oftener: by cron, a Celery beat or a timer.

        Whose last refresh is longest ago comes first. Each record says when that was, so that what is done is not done
        again by the next call, or by other processes that do this at the same time. An account that fails keeps no
        other from its turn. A server that fails three times in a row is left alone for a while, its accounts with it.
        Sessions of other clients are left alone, and so are those without a refresh token.

        A session does not live longer than its authorization server allows, however often it is refreshed: two weeks
        for public clients.

        :param idle: refresh what was not refreshed for so many seconds; by default five days.
        :param pace: seconds to wait between two accounts.
        :param timeout: how long to go on, all told, in seconds; by default until all are done. What is left is for the
            next call.
        :param cancel: ends it early when set.
        :param on_result: called with each result as soon as it is there.
        :returns: a result for each session that was due and came to its turn, or cannot be read.
        :raises StoreError: the store cannot be walked; or, at the end, it has records whose key cannot be told.
        :raises TypeError: ``idle``, ``pace`` or ``timeout`` is not a number.
        :raises ValueError: it is less than 0, or infinite.
        """
        return self._upkeep.keep_alive(idle=idle, pace=pace, timeout=timeout, cancel=cancel, on_result=on_result)

    def clean(self) -> CleanResult:
        """Delete what nobody can use any more: sessions without a refresh token whose access token has expired, and
        log-ins that were begun more than an hour ago. Listeners are told of the sessions.

        Everything else stays: sessions that may still work, those of other clients, and records that cannot be read,
        which are logged.

        :raises StoreError: the store cannot be walked; or, at the end, it has records whose key cannot be told.
        """
        return self._upkeep.clean()

    def close(self) -> None:
        """Wait for refreshes under way and close the connections; and the store, if it was given as a URL. What would
        need a refresh afterwards raises :class:`.SessionError`."""
        self._flights.close()
        self.sessions.close()
        self._pool.close()
        if self._owns_store:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What a web application serves

    def metadata_document(self) -> dict[str, Any]:
        """The document to serve at ``client_id``, as ``application/json``."""
        return self.metadata.document(self._keyset)

    def jwks(self) -> dict[str, Any]:
        """The public keys, to serve at ``jwks_uri`` if the metadata has one."""
        return {"keys": []} if self._keyset is None else self._keyset.jwks()

    def _signer(self, key: str, session: Session | None = None) -> Signer:
        return Signer(self.sessions, key, self._nonces, timeout=self._timeout, session=session, refusals=self._refusals)

    def _open(self, key: str, session: Session) -> OAuthSession:
        return OAuthSession(self._signer(key, session), self._pool, session, retries=self._retries)


def _key_of(did: str, session_id: str | None) -> str:
    check_did(did)
    _check_session_id(session_id)
    return did if session_id is None else f"{did}#{session_id}"


def _check_session_id(session_id: str | None) -> None:
    if session_id is not None and not (session_id.isprintable() and 0 < len(session_id) <= 256):
        raise ValueError("a session_id is 1 to 256 printable characters")


def _check_texts(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} is a string, not {type(value).__name__}")
