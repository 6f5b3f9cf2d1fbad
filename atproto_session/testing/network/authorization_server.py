"""The authorization server: metadata, pushed authorization requests, the token and the revocation endpoint.

Its answers are those of the reference server (``@atproto/oauth-provider``), down to the error descriptions that a
client may come to depend on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .accounts import Directory
from .authorizations import REQUEST_LIFETIME, Authorizations
from .clients import Client, ClientAuth, Clients
from .consent import ConsentPage
from .errors import OAuthError, invalid_client, invalid_grant, invalid_request
from .proofs import CURVES, ProofChecker
from .routes import Route
from .sessions import Check, Grant, IssuedTokens, Ledger
from .wire import Request, Response

#: Marks a token request whose answer shall carry no refresh token; see :mod:`.faults`.
NO_REFRESH_TOKEN = "no_refresh_token"  # noqa: S105 - a marker

#: PKCE verifiers have 43 characters or more (RFC 7636 section 4.1).
_SHORTEST_VERIFIER = 43
_PAR, _TOKEN, _REVOKE, _AUTHORIZE = "/oauth/par", "/oauth/token", "/oauth/revoke", "/oauth/authorize"


@dataclass(frozen=True)
class _Caller:
    """Who sent a request: a client that authenticated, and the key that signed its proof."""

    client: Client
    auth: ClientAuth
    jkt: str


class AuthorizationServer:
    """One issuer.

    :param latency: seconds that the token endpoint takes to think.
    :param stopped: ends that thinking when the network stops.
    """

    def __init__(
        self,
        issuer: str,
        *,
        directory: Directory,
        clients: Clients,
        ledger: Ledger,
        proofs: ProofChecker,
        latency: float,
        stopped: threading.Event,
        clock: Callable[[], float],
    ) -> None:
        self.issuer = issuer
        self.ledger = ledger
        self.nonces = proofs.nonces
        self._directory = directory
        self._clients = clients
        self._proofs = proofs
        self._authorizations = Authorizations(clock)
        self._latency = latency
        self._stopped = stopped
        consent = ConsentPage(issuer, directory, self._authorizations)
        self.routes = (
            Route("GET", "/.well-known/oauth-authorization-server", "as-metadata", self._metadata, self),
            Route("GET", "/oauth/jwks", "jwks", lambda _: Response.of_json({"keys": []}), self),
            Route("GET", _AUTHORIZE, "authorize", consent.show, self),
            Route("POST", _AUTHORIZE, "authorize", consent.decide, self),
            Route("POST", _PAR, "par", self._endpoint(self._push), self),
            Route("POST", _TOKEN, "token", self._endpoint(self._token), self),
            Route("POST", _REVOKE, "revoke", self._endpoint(self._revoke), self),
        )

    def refuse(self, error: OAuthError) -> Response:
        """The error as this server words it."""
        body = {"error": error.error, "error_description": error.description}
        response = Response.of_json(body, error.status)
        if error.status == 401:
            response = response.with_headers(WWW_Authenticate=error.challenge)
        return self._sealed(response)

    def _sealed(self, response: Response) -> Response:
        return response.with_headers(DPoP_Nonce=self.nonces.current(), Cache_Control="no-store", Pragma="no-cache")

    def _endpoint(self, process: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            try:
                return self._sealed(process(request))
            except OAuthError as error:
                return self.refuse(error)

        return answer

    def _metadata(self, request: Request) -> Response:
        issuer = self.issuer
        return Response.of_json(
            {
                "issuer": issuer,
                "authorization_endpoint": issuer + _AUTHORIZE,
                "token_endpoint": issuer + _TOKEN,
                "pushed_authorization_request_endpoint": issuer + _PAR,
                "revocation_endpoint": issuer + _REVOKE,
                "jwks_uri": issuer + "/oauth/jwks",
                "scopes_supported": ["atproto", "transition:email", "transition:generic", "transition:chat.bsky"],
                "response_types_supported": ["code"],
                "response_modes_supported": ["query"],
                "grant_types_supported": ["authorization_code", "refresh_token"],
                "code_challenge_methods_supported": ["S256"],
                "token_endpoint_auth_methods_supported": ["none", "private_key_jwt"],
                "token_endpoint_auth_signing_alg_values_supported": ["ES256"],
                "dpop_signing_alg_values_supported": [*CURVES],
                "authorization_response_iss_parameter_supported": True,
                "require_pushed_authorization_requests": True,
                "request_uri_parameter_supported": True,
                "require_request_uri_registration": True,
                "client_id_metadata_document_supported": True,
            }
        )

    def _push(self, request: Request) -> Response:
        form = _form(request, invalid_client)
        caller = self._authenticate(request, form)
        request_uri = self._authorizations.push(caller.client, caller.auth, caller.jkt, form)
        # Whole seconds that are left, of which the first has begun.
        return Response.of_json({"request_uri": request_uri, "expires_in": int(REQUEST_LIFETIME) - 1}, 201)

    def _token(self, request: Request) -> Response:
        if self._latency:
            self._stopped.wait(self._latency)
        form = _form(request, invalid_grant)
        needed = {"authorization_code": "code", "refresh_token": "refresh_token"}.get(form.get("grant_type", ""))
        if needed is None or not form.get(needed):
            raise invalid_grant("Unsupported grant_type, or its parameter is missing")
        if 0 < len(form.get("code_verifier", "")) < _SHORTEST_VERIFIER:
            raise invalid_grant("code_verifier too short")  # found before the code is looked at, which stays good
        caller = self._authenticate(request, form)
        with_refresh_token = NO_REFRESH_TOKEN not in request.marks
        if needed == "code":
            issued = self._exchange(form, caller, with_refresh_token=with_refresh_token)
        else:
            issued = self.ledger.rotate(
                form["refresh_token"], _may_use(caller), self._audience, with_refresh_token=with_refresh_token
            )
        return Response.of_json(_token_response(issued))

    def _exchange(self, form: Mapping[str, str], caller: _Caller, *, with_refresh_token: bool) -> IssuedTokens:
        authorization = self._authorizations.take(form["code"])
        if authorization is None:
            self.ledger.end_session_of_code(form["code"])
            raise invalid_grant("Invalid code")
        begun = authorization.request
        _check_same(caller, begun.client.id, begun.client_auth, begun.jkt)
        self._authorizations.check_exchange(authorization, form)
        return self.ledger.create(
            did=authorization.did,
            client_id=caller.client.id,
            client_auth=caller.auth,
            jkt=caller.jkt,
            scope=authorization.scope,
            audience=self._audience(authorization.did),
            code=form["code"],
            with_refresh_token=with_refresh_token,
        )

    def _revoke(self, request: Request) -> Response:
        form = _form(request, invalid_request)
        if not form.get("token"):
            raise invalid_request("token is required")
        if "DPoP" not in request.headers:
            return Response.of_json({})  # nobody who could have a session to end
        caller = self._authenticate(request, form)
        try:
            self.ledger.revoke(form["token"], _may_use(caller))
        except OAuthError:
            # RFC 7009 section 2.2: a token that the client cannot revoke is no error that it could handle.
            return Response.of_json({})
        return Response.of_json({})

    def _authenticate(self, request: Request, form: Mapping[str, str]) -> _Caller:
        jkt = self._proofs.check(request)
        client, auth = self._clients.authenticate(form, self.issuer, jkt)
        return _Caller(client, auth, jkt)

    def _audience(self, did: str) -> str:
        return self._directory.home(did).pds


def _form(request: Request, refusal: Callable[[str], OAuthError]) -> dict[str, str]:
    try:
        form = request.form
    except ValueError as error:
        raise refusal(str(error)) from None
    if not form.get("client_id"):
        raise refusal("Client credentials missing")
    return form


def _may_use(caller: _Caller) -> Check:
    def check(grant: Grant) -> None:
        _check_same(caller, grant.client_id, grant.client_auth, grant.jkt)

    return check


def _check_same(caller: _Caller, client_id: str, auth: ClientAuth, jkt: str) -> None:
    """Raise unless the caller is who it was when the log-in began."""
    if caller.client.id != client_id:
        raise invalid_grant("Token was not issued to this client")
    if caller.jkt != jkt:
        raise invalid_grant("DPoP proof does not match the expected JKT")
    # A public client may become confidential, but not the other way round, and no key replaces another.
    if auth.method != "none" and caller.auth != auth:
        raise invalid_grant(
            "The session was initiated with a different key than the client assertion currently used"
            if caller.auth.method == auth.method
            else f"Client authentication method mismatch (expected {auth.method})"
        )


def _token_response(issued: IssuedTokens) -> dict[str, Any]:
    response: dict[str, Any] = {
        "access_token": issued.access_token,
        "token_type": "DPoP",
        "expires_in": int(issued.expires_in),
        "scope": issued.scope,
        "sub": issued.did,
    }
    if issued.refresh_token is not None:
        response["refresh_token"] = issued.refresh_token
    return response
