"""One authorization server, as a client sees it: pushed authorization requests (RFC 9126), code exchange and refresh
(RFC 6749), revocation (RFC 7009), each with DPoP (RFC 9449) and client authentication."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from ._urls import origin
from .client_auth import authentication_params, resolve_stored
from .discovery import Discovery, ServerMetadata
from .dpop import Answer, NonceCache, dpop_flow, next_proof
from .errors import OAuthResponseError, TokenRefreshError, TransportError, printable
from .identity import IdentityResolver
from .keys import Keyset
from .metadata import ClientMetadata
from .session import ClientAuthMethod, Session, TokenSet
from .transport import Response, Transport

#: The bound on one token request with all its tries, in seconds.
ANSWER_WITHIN = 20.0
#: Longer lives are taken for nonsense, in seconds.
_LONGEST_LIFE = 10 * 365 * 86400.0


class AuthorizationServer:
    """The authorization server that ``metadata`` describes, spoken to as ``client``.

    :param nonces: shared by everything that speaks for this client.
    """

    def __init__(
        self,
        metadata: ServerMetadata,
        client: ClientMetadata,
        keyset: Keyset | None,
        transport: Transport,
        nonces: NonceCache,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.metadata = metadata
        self._client = client
        self._keyset = keyset
        self._transport = transport
        self._nonces = nonces
        self._clock = clock

    def push(self, params: Mapping[str, str], key: Mapping[str, Any], method: ClientAuthMethod) -> str:
        """Push an authorization request and return its ``request_uri``."""
        url = self.metadata.pushed_authorization_request_endpoint
        response = self._post(url, params, key, method)
        _check_nonce(response, url)
        document = _document(response, url)
        request_uri = document.get("request_uri")
        if not isinstance(request_uri, str) or not request_uri:
            raise TransportError(f"{origin(url)} gave no request_uri for the pushed request", sent=True)
        return request_uri

    def exchange(
        self, code: str, verifier: str, redirect_uri: str, key: Mapping[str, Any], method: ClientAuthMethod
    ) -> TokenSet:
        """Exchange an authorization code for tokens. Who they belong to is yet to be verified; ``aud`` is empty."""
        params = {
            "grant_type": "authorization_code",
            "code": code,
            "code_verifier": verifier,
            "redirect_uri": redirect_uri,
        }
        tokens, response = self._tokens(params, key, method)
        try:
            _check_nonce(response, self.metadata.token_endpoint)
        except TransportError:
            with suppress(Exception):  # they are thrown away in any case
                self.revoke(Session(key, method, tokens), method)
            raise
        return tokens

    def refresh(self, session: Session, method: ClientAuthMethod) -> TokenSet:
        """Spend the refresh token of ``session``. Where the answer has none, the old one goes on."""
        spent = session.token_set
        params = {"grant_type": "refresh_token", "refresh_token": spent.refresh_token or ""}
        tokens, _ = self._tokens(params, session.dpop_key, method)
        return replace(tokens, aud=spent.aud, refresh_token=tokens.refresh_token or spent.refresh_token)

    def revoke(self, session: Session, method: ClientAuthMethod) -> None:
        """End the grant of ``session``, if the server offers that at all."""
        url = self.metadata.revocation_endpoint
        if url is None:
            return
        # Either token ends the grant, but an access token from before a rotation ends nothing, silently.
        tokens = session.token_set
        hint, token = (
            ("access_token", tokens.access_token)
            if tokens.refresh_token is None
            else ("refresh_token", tokens.refresh_token)
        )
        response = self._post(url, {"token": token, "token_type_hint": hint}, session.dpop_key, method)
        if not 200 <= response.status < 300:
            raise _error_of(response, url)

    def _tokens(
        self, params: Mapping[str, str], key: Mapping[str, Any], method: ClientAuthMethod
    ) -> tuple[TokenSet, Response]:
        url = self.metadata.token_endpoint
        asked_at = self._clock()
        response = self._post(url, params, key, method)
        document = _document(response, url)
        access_token = _text(document, "access_token")
        if access_token is None:
            raise TransportError(f"{origin(url)} answered without an access token", sent=True)
        tokens = TokenSet(
            iss=self.metadata.issuer,
            sub=_text(document, "sub") or "",
            aud="",
            scope=_text(document, "scope") or "",
            refresh_token=_text(document, "refresh_token"),
            access_token=access_token,
            token_type=_text(document, "token_type") or "",
            expires_at=_expiry(document.get("expires_in"), asked_at),
        )
        return tokens, response

    def _post(self, url: str, params: Mapping[str, str], key: Mapping[str, Any], method: ClientAuthMethod) -> Response:
        """One request, sent once more only if the server wants a nonce: it has not looked at anything else then. Every
        try has a proof and an assertion of its own."""
        deadline = time.monotonic() + ANSWER_WITHIN
        flow = dpop_flow(key, "POST", url, self._nonces, clock=self._clock)
        proof: str | None = next(flow)
        while proof is not None:
            authentication = authentication_params(
                method, self._client, self._keyset, self.metadata.issuer, clock=self._clock
            )
            response = self._transport.request(
                "POST",
                url,
                headers={"DPoP": proof, "Accept": "application/json"},
                data={**params, **authentication},
                timeout=max(0.001, deadline - time.monotonic()),
            )
            answer = Answer.of(response.status, response.headers, response.body)
            proof = next_proof(flow, answer)
        return response


class AccountAuthority:
    """Whatever authorization server speaks for an account: what :class:`.SessionGetter` refreshes and revokes with."""

    answer_within = ANSWER_WITHIN

    def __init__(
        self,
        identities: IdentityResolver,
        discovery: Discovery,
        server_of: Callable[[ServerMetadata], AuthorizationServer],
        client: ClientMetadata,
        keyset: Keyset | None,
    ) -> None:
        self._identities = identities
        self._discovery = discovery
        self._server_of = server_of
        self._client = client
        self._keyset = keyset

    def audience(self, did: str, issuer: str) -> str:
        """The origin of the account's PDS, after verifying afresh that ``issuer`` is the authority for the account.

        :raises TokenRefreshError: another server is.
        """
        pds = self._identities.resolve_did(did).pds
        current = self._discovery.authorization_server_of(pds, fresh=True)
        if current != issuer:
            raise TokenRefreshError(
                f"the account {did} now belongs to the authorization server {current}, not to {issuer}; log in again"
            )
        return pds

    def prepare(self, session: Session) -> Callable[[Session], Session]:
        """See :meth:`.Authority.prepare`."""
        tokens = session.token_set
        aud = self.audience(tokens.sub, tokens.iss)
        server = self._server_of(self._discovery.metadata(tokens.iss))
        method = resolve_stored(session.auth_method, self._client, self._keyset, server.metadata)

        def send(spent: Session) -> Session:
            issued = server.refresh(spent, method)
            return replace(spent, auth_method=method, token_set=replace(issued, aud=aud))

        return send

    def revoke(self, session: Session) -> None:
        """See :meth:`.Authority.revoke`."""
        server = self._server_of(self._discovery.metadata(session.token_set.iss))
        server.revoke(session, resolve_stored(session.auth_method, self._client, self._keyset, server.metadata))


def _check_nonce(response: Response, url: str) -> None:
    if response.status < 300 and Answer.of(response.status, response.headers, response.body).nonce is None:
        raise TransportError(
            f"{origin(url)} answered without a DPoP nonce, so it may not have checked the proof", sent=True
        )


def _document(response: Response, url: str) -> dict[str, Any]:
    """The JSON object of a successful answer."""
    if not 200 <= response.status < 300:
        raise _error_of(response, url)
    document = _object_in(response)
    if document is None:
        raise TransportError(f"{origin(url)} answered with something that is not a JSON object", sent=True)
    return document


def _error_of(response: Response, url: str) -> OAuthResponseError:
    document = _object_in(response) or {}
    error, description = _text(document, "error"), _text(document, "error_description")
    error = None if error is None else printable(error)
    # The reference server begins with the client's identifier, and ends with the reason.
    description = None if description is None else printable(description, 300)
    what = " ".join(filter(None, (error, description and f"({description})"))) or "no OAuth error"
    return OAuthResponseError(
        f"{origin(url)} answered {response.status}: {what}",
        status=response.status,
        error=error,
        error_description=description,
        # The last is what the reference server says while the application's own site is away.
        retryable=response.status >= 500 or response.status in (408, 429) or error == "invalid_client_metadata",
        retry_after=_retry_after(response.headers.get("Retry-After")),
    )


def _object_in(response: Response) -> dict[str, Any] | None:
    try:
        document = response.json()
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _text(document: Mapping[str, Any], name: str) -> str | None:
    value = document.get(name)
    return value if isinstance(value, str) and value else None


def _expiry(expires_in: object, asked_at: float) -> datetime | None:
    if isinstance(expires_in, bool) or not isinstance(expires_in, int | float):
        return None
    if not 0 <= expires_in <= _LONGEST_LIFE:
        return None
    # To the millisecond, as it is stored.
    return datetime.fromtimestamp(int((asked_at + expires_in) * 1000) / 1000, UTC)


def _retry_after(value: str | None) -> float | None:
    """``Retry-After`` in seconds (RFC 9110 section 10.2.3: a number of seconds or a date)."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value.strip()[:9])
    try:
        moment = email.utils.parsedate_to_datetime(value)
        return max(0.0, moment.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
