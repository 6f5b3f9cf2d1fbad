"""What the authorization server has issued: sessions, their tokens, and the rules of rotation.

A refresh token works once. To show one that was used before ends the session, and so does any other mistake that
is found after the token was looked up. One lock makes every step atomic: of two simultaneous uses, one is the first.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from .clients import ClientAuth
from .errors import OAuthError, invalid_grant, invalid_token

DAY = 86_400.0
#: Seconds that a refresh token and a session last, by client authentication method.
REFRESH_LIFETIME = {"none": 14 * DAY, "private_key_jwt": 90 * DAY}
SESSION_LIFETIME = {"none": 14 * DAY, "private_key_jwt": 730 * DAY}


@dataclass
class Grant:
    """One session. Changed under the ledger's lock only."""

    did: str
    client_id: str
    client_auth: ClientAuth
    jkt: str
    scope: str
    created_at: float
    updated_at: float
    access_token: str = field(default="", repr=False)
    refresh_token: str | None = field(default=None, repr=False)
    ended: bool = False


@dataclass
class _AccessToken:
    grant: Grant
    audience: str
    expires_at: float


@dataclass(frozen=True)
class IssuedTokens:
    """The content of a token response."""

    did: str
    scope: str
    access_token: str = field(repr=False)
    refresh_token: str | None = field(repr=False)
    expires_in: float


@dataclass(frozen=True)
class SessionInfo:
    """What tests may ask about the session that a token belongs to.

    :ivar revoked: the session is gone, for whatever reason.
    :ivar current: the token is the latest of its kind, and the session is alive.
    """

    did: str
    client_id: str
    scope: str
    revoked: bool
    current: bool


#: Checks that a request may use a grant; raises :class:`OAuthError` if not.
Check = Callable[[Grant], None]


class Ledger:
    """The sessions of one issuer. Safe to share between threads.

    :param outliving: access tokens live until they expire, whatever happens to their session (an entryway's), instead
        of dying with the next rotation (a PDS's).
    """

    def __init__(self, *, lifetime: float, outliving: bool, clock: Callable[[], float]) -> None:
        self._lifetime = lifetime
        self._outliving = outliving
        self._clock = clock
        self._access: dict[str, _AccessToken] = {}
        self._refresh: dict[str, Grant] = {}
        self._codes: dict[str, Grant] = {}
        self._refused: set[str] = set()
        self._lock = threading.RLock()
        self.refresh_token_uses: Counter[str] = Counter()
        self.rotations = 0
        self.replays = 0
        self.revocations = 0

    def create(
        self,
        *,
        did: str,
        client_id: str,
        client_auth: ClientAuth,
        jkt: str,
        scope: str,
        audience: str,
        code: str,
        with_refresh_token: bool = True,
    ) -> IssuedTokens:
        """Begin a session."""
        now = self._clock()
        grant = Grant(did, client_id, client_auth, jkt, scope, now, now)
        with self._lock:
            self._codes[code] = grant
            return self._issue(grant, audience, now, with_refresh_token=with_refresh_token)

    def end_session_of_code(self, code: str) -> None:
        """A code came a second time: the session that it began is not to be trusted (RFC 6749 section 4.1.2)."""
        with self._lock:
            if (grant := self._codes.get(code)) is not None:
                grant.ended = True

    def rotate(
        self, token: str, check: Check, audience_of: Callable[[str], str], *, with_refresh_token: bool = True
    ) -> IssuedTokens:
        """Use a refresh token. Without ``with_refresh_token`` it stays valid and has no successor.

        :param audience_of: the PDS of an account.
        :raises OAuthError: ``invalid_grant``; or what ``check`` raises, after which the session is gone.
        """
        with self._lock:
            self.refresh_token_uses[token] += 1
            grant = self._refresh.get(token)
            spent = grant is not None and grant.refresh_token != token
            self.replays += spent
            if grant is None or grant.ended:
                raise invalid_grant("Invalid refresh token")
            if spent:
                grant.ended = True
                raise invalid_grant("Refresh token replayed")
            try:
                check(grant)
                now = self._clock()
                self._check_age(grant, now)
            except OAuthError:
                grant.ended = True
                raise
            self.rotations += with_refresh_token
            return self._issue(grant, audience_of(grant.did), now, with_refresh_token=with_refresh_token)

    def revoke(self, token: str, check: Check) -> None:
        """End the session of a token (RFC 7009). An unknown token, or an access token that a rotation has replaced,
        ends nothing.

        :raises OAuthError: what ``check`` raises.
        """
        with self._lock:
            grant = self._refresh.get(token)
            if grant is None and token in self._access and self._access[token].grant.access_token == token:
                grant = self._access[token].grant
            if grant is None or grant.ended:
                return
            check(grant)
            grant.ended = True
            self.revocations += 1

    def verify(self, token: str, jkt: str, audience: str) -> Grant:
        """The session of an access token that is good at this PDS.

        :param jkt: the thumbprint of the key that the request proved.
        :raises OAuthError: ``invalid_token``.
        """
        with self._lock:
            access = self._access.get(token)
            if access is None:
                raise invalid_token("Malformed token")
            if access.expires_at <= self._clock():
                raise invalid_token('"exp" claim timestamp check failed')
            if access.grant.jkt != jkt:
                raise invalid_token("Invalid DPoP key binding")
            replaced = access.grant.ended or access.grant.access_token != token
            if access.grant.did in self._refused or (replaced and not self._outliving):
                raise invalid_token("Invalid token")
            if access.audience != audience:
                raise invalid_token("Invalid audience")
            return access.grant

    def expire_access_tokens(self, did: str) -> None:
        with self._lock:
            for access in self._access.values():
                if access.grant.did == did:
                    access.expires_at = self._clock()

    def refuse_access_tokens(self, did: str, refuse: bool) -> None:
        with self._lock:
            (self._refused.add if refuse else self._refused.discard)(did)

    def end_sessions(self, did: str) -> None:
        with self._lock:
            for access in self._access.values():
                if access.grant.did == did:
                    access.grant.ended = True

    def info(self, token: str) -> SessionInfo | None:
        with self._lock:
            grant = self._refresh.get(token)
            if grant is None:
                if token not in self._access:
                    return None
                grant = self._access[token].grant
            current = not grant.ended and token in (grant.refresh_token, grant.access_token)
            return SessionInfo(grant.did, grant.client_id, grant.scope, revoked=grant.ended, current=current)

    def uses(self) -> Counter[str]:
        with self._lock:
            return self.refresh_token_uses.copy()

    def _check_age(self, grant: Grant, now: float) -> None:
        method = grant.client_auth.method
        if now - grant.created_at > SESSION_LIFETIME[method]:
            raise invalid_grant("Session expired")
        if now - grant.updated_at > REFRESH_LIFETIME[method]:
            raise invalid_grant("Refresh token expired")

    def _issue(self, grant: Grant, audience: str, now: float, *, with_refresh_token: bool) -> IssuedTokens:
        grant.access_token = f"acc-{secrets.token_urlsafe(32)}"
        grant.updated_at = now
        self._access[grant.access_token] = _AccessToken(grant, audience, now + self._lifetime)
        refresh_token = None
        if with_refresh_token:
            grant.refresh_token = refresh_token = f"ref-{secrets.token_urlsafe(32)}"
            self._refresh[refresh_token] = grant
        return IssuedTokens(grant.did, grant.scope, grant.access_token, refresh_token, self._lifetime)
