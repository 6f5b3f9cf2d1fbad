"""Logging an account in: from a handle to a URL for the browser, and from what the browser brings back to a session."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from ._flights import Flight
from .client_auth import negotiate
from .discovery import Discovery
from .dpop import challenge_of, generate_verifier
from .errors import OAuthCallbackError, SessionError, StoreError, TokenRefreshError, TransportError, printable
from .identity import IdentityResolver, check_did
from .keys import Keyset, generate_jwk
from .metadata import ClientMetadata
from .server import AccountAuthority, AuthorizationServer
from .session import ClientAuthMethod, Session, fault_in
from .stores import Logins

#: How long a log-in may take, in seconds.
_LOGIN_WITHIN = 3600.0


@dataclass(frozen=True)
class PendingLogin:
    """A log-in that has begun, for the time until the browser comes back.

    :ivar did: the account, or ``None`` if the log-in began at a server.
    :ivar handle: its verified handle, if it has one.
    :ivar verifier: the PKCE code verifier (RFC 7636).
    :ivar dpop_key: the private JWK that the tokens will be bound to (RFC 9449).
    :ivar state: the application's own, which comes back from :meth:`.OAuthClient.callback`.
    :ivar bound_to: a digest of the secret of the browser that began the log-in, if the application gave one.
    :ivar expires_at: seconds since the epoch.
    """

    issuer: str
    did: str | None
    handle: str | None
    verifier: str = field(repr=False)
    dpop_key: Mapping[str, Any] = field(repr=False)
    method: str
    kid: str | None
    redirect_uri: str
    scope: str
    state: str | None = field(repr=False)
    bound_to: str | None = field(repr=False)
    expires_at: float

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> PendingLogin:
        """
        :raises StoreError: ``document`` is not one of a log-in.
        """
        texts = ("issuer", "verifier", "method", "redirect_uri", "scope")
        is_complete = {each.name for each in fields(cls)} <= set(document) and (
            all(isinstance(document[name], str) for name in texts)
            and isinstance(document["dpop_key"], dict)
            and isinstance(document["expires_at"], int | float)
        )
        if not is_complete:
            raise StoreError("the record of this log-in cannot be read; begin the log-in again")
        return cls(**{each.name: document[each.name] for each in fields(cls)})


class LoginFlow:
    """The log-ins of one client.

    :param logins: where they are kept meanwhile.
    """

    def __init__(
        self,
        *,
        metadata: ClientMetadata,
        keyset: Keyset | None,
        logins: Logins,
        identities: IdentityResolver,
        discovery: Discovery,
        authority: AccountAuthority,
    ) -> None:
        self._metadata = metadata
        self._keyset = keyset
        self._logins = logins
        self._identities = identities
        self._discovery = discovery
        self._authority = authority

    def begin(self, account: str, options: Mapping[str, str | None], state: str | None, bound_to: str | None) -> str:
        """The URL for the browser. ``options`` are the parameters of the pushed request that the application chose."""
        redirect_uri = self._metadata.check_redirect_uri(options.get("redirect_uri") or self._metadata.redirect_uris[0])
        scope = self._metadata.check_scope(options.get("scope") or self._metadata.scope)
        kind, name = self._identities.parse(account)
        if kind == "server":
            did, handle, hint, issuer = None, None, None, self._discovery.from_server_url(name)
        else:
            identity = self._identities.resolve(name)
            did, handle, hint = identity.did, identity.handle, name
            issuer = self._discovery.authorization_server_of(identity.pds)
        server = self._authority.server(issuer)
        method = negotiate(self._metadata, self._keyset, server.metadata)
        ticket, login = (
            secrets.token_urlsafe(24),
            PendingLogin(
                issuer=issuer,
                did=did,
                handle=handle,
                verifier=generate_verifier(),
                dpop_key=generate_jwk(),
                method=method.method,
                kid=method.kid,
                redirect_uri=redirect_uri,
                scope=scope,
                state=state,
                bound_to=None if bound_to is None else _digest(bound_to),
                expires_at=time.time() + _LOGIN_WITHIN,
            ),
        )
        params = {
            **options,
            "response_type": "code",
            "code_challenge": challenge_of(login.verifier),
            "code_challenge_method": "S256",
            "state": ticket,
            "redirect_uri": redirect_uri,
            "scope": scope,
            "login_hint": options.get("login_hint") or hint,
        }
        self._keep(ticket, login)
        try:
            pushed = {name: value for name, value in params.items() if value is not None}
            request_uri = server.push(pushed, login.dpop_key, method)
        except BaseException:
            self._logins.take(ticket)
            raise
        endpoint = server.metadata.authorization_endpoint
        query = urlencode({"client_id": self._metadata.client_id, "request_uri": request_uri})
        return f"{endpoint}{'&' if urlsplit(endpoint).query else '?'}{query}"

    def end(
        self, params: Mapping[str, Any] | str, bound_to: Sequence[str] | None, flight: Flight[Any]
    ) -> tuple[Session, PendingLogin]:
        """The session that the log-in brought, not stored yet. Everything that can be checked is, before the code is
        spent; from then on ``flight`` is committed."""
        given = _params_of(params)
        ticket = given.get("state")
        document = self._logins.take(ticket) if ticket else None
        if ticket is None or document is None:
            if "error" in given and not ticket:  # some servers lose the state when they refuse
                raise OAuthCallbackError(f"the log-in failed: {_said(given)}", params=given)
            raise OAuthCallbackError(
                "this log-in was not begun here, took longer than an hour, or has been ended already; begin it again",
                params=given,
            )
        login = PendingLogin.read(document)

        def refuse(why: str) -> OAuthCallbackError:
            return OAuthCallbackError(f"the log-in failed: {why}", params=given, state=login.state)

        code = _code_in(given, login, bound_to, refuse)
        try:
            server = self._authority.server(login.issuer)
            if login.did is not None:
                self._authority.audience(login.did, login.issuer)
            flight.commit()
        except TokenRefreshError as error:
            raise refuse(str(error)) from error
        except SessionError as error:
            if error.retryable:  # nothing is spent: the browser may come again
                self._keep(ticket, login)
            raise
        try:
            session = self._exchange(code, login, server, refuse)
        except TransportError as error:
            error.retryable = not error.sent
            if not error.sent:
                self._keep(ticket, login)
            raise
        except SessionError as error:
            error.retryable = False  # the code is spent; a new log-in may succeed
            raise
        return session, login

    def _keep(self, ticket: str, login: PendingLogin) -> None:
        self._logins.put(ticket, asdict(login), login.expires_at)

    def _exchange(
        self, code: str, login: PendingLogin, server: AuthorizationServer, refuse: Callable[[str], OAuthCallbackError]
    ) -> Session:
        method = ClientAuthMethod("private_key_jwt" if login.method == "private_key_jwt" else "none", login.kid)
        tokens = server.exchange_code(code, login.verifier, login.redirect_uri, login.dpop_key, method)
        session = Session(login.dpop_key, method, tokens, client_id=self._metadata.client_id)
        # Nothing of the answer is trusted before it is known to be of the account that began the log-in, or, if that
        # was begun at a server, of one that this server speaks for.
        fault = fault_in(tokens, login.did or tokens.sub)
        try:
            aud = "" if fault else self._authority.audience(check_did(tokens.sub), tokens.iss)
        except TokenRefreshError as error:
            fault = str(error)
        except BaseException:
            self._revoke(session)
            raise
        if fault is not None:
            self._revoke(session)
            raise refuse(f"the server issued {fault}")
        return replace(session, token_set=replace(tokens, aud=aud))

    def _revoke(self, session: Session) -> None:
        with contextlib.suppress(Exception):  # the log-in has failed in any case
            self._authority.revoke(session)


def _code_in(
    given: Mapping[str, str],
    login: PendingLogin,
    bound_to: Sequence[str] | None,
    refuse: Callable[[str], OAuthCallbackError],
) -> str:
    """The code, if the answer is the one to this log-in (RFC 6749 section 4.1.2, RFC 9207)."""
    if not _is_bound(login, bound_to):
        raise refuse("another browser has begun it; begin it again in this one")
    iss = given.get("iss")
    if iss != login.issuer and not (iss is None and "error" in given):
        raise refuse("the answer does not come from the server that was asked")
    if "error" in given:
        raise refuse(_said(given))
    if "response" in given:
        raise refuse("the answer is a JWT (JARM), which is not supported")
    code = given.get("code")
    if not code:
        raise refuse("the answer has no code")
    return code


def _is_bound(login: PendingLogin, bound_to: Sequence[str] | None) -> bool:
    if login.bound_to is None or bound_to is None:
        return login.bound_to is None and bound_to is None
    return any(hmac.compare_digest(_digest(secret), login.bound_to) for secret in bound_to)


def _said(given: Mapping[str, str]) -> str:
    said = printable(given["error"])
    description = given.get("error_description")
    return f"{said} ({printable(description)})" if description else said


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _params_of(params: Mapping[str, Any] | str) -> dict[str, str]:
    """The parameters, each given once (RFC 6749 section 3.1)."""
    if isinstance(params, str):
        try:
            query = urlsplit(params).query or (params if "=" in params and "://" not in params else "")
            pairs: Iterable[tuple[str, Any]] = parse_qsl(query.removeprefix("?"), max_num_fields=100)
        except ValueError as error:
            raise OAuthCallbackError("the redirect URL cannot be read") from error
    elif isinstance(params, Mapping):
        pairs = [
            (name, value)
            for name, values in params.items()
            for value in (values if isinstance(values, list | tuple) else [values])
        ]
    else:
        raise TypeError(
            f"callback() takes the parameters of the request as a mapping, or its URL as a string; not "
            f"{type(params).__name__}"
        )
    given: dict[str, str] = {}
    for name, value in pairs:
        if name in given:
            raise OAuthCallbackError("a parameter of the callback is given more than once")
        given[str(name)] = str(value)
    return given
