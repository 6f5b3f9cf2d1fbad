"""The PDS: the resource server where an account lives. Its methods tell what they were sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

from .accounts import Directory
from .errors import OAuthError
from .proofs import ProofChecker
from .routes import Route
from .sessions import Grant, Ledger
from .wire import Request, Response


class ResourceServer:
    """One PDS.

    :param ledger: that of the authorization server that speaks for it.
    :param scheme: of the challenge that follows a refused token.
    """

    def __init__(
        self,
        origin: str,
        issuer: str,
        *,
        directory: Directory,
        ledger: Ledger,
        proofs: ProofChecker,
        scheme: Literal["DPoP", "Bearer"] = "DPoP",
    ) -> None:
        self.nonces = proofs.nonces
        self._origin = origin
        self._issuer = issuer
        self._directory = directory
        self._ledger = ledger
        self._proofs = proofs
        self._scheme = scheme
        self.routes = (
            Route("GET", "/.well-known/oauth-protected-resource", "protected-resource", self._metadata, self),
            Route(
                "GET",
                "/xrpc/com.atproto.identity.resolveHandle",
                "resolve-handle",
                directory.answer_resolve_handle,
                self,
            ),
            Route("GET", "/xrpc/com.atproto.server.getSession", "resource", self._method(self._get_session), self),
            Route("*", "/xrpc/app.test.echo", "resource", self._method(self._echo), self),
            Route("*", "/xrpc/app.test.redirect", "resource", self._method(self._redirect), self),
            Route("*", "/xrpc/app.test.scoped", "resource", self._method(self._scoped), self),
            Route("*", "/xrpc/*", "resource", self._method(self._unknown), self),
        )

    def refuse(self, error: OAuthError) -> Response:
        """The error as this server words it: a 401 with a challenge (RFC 9449 section 7.1)."""
        body = {"error": error.error, "message": error.description}
        scheme = self._scheme if error.error == "invalid_token" else "DPoP"
        response = Response.of_json(body, 401)
        return self._sealed(response.with_headers(WWW_Authenticate=error.challenge_of(scheme)))

    def _sealed(self, response: Response) -> Response:
        return response.with_headers(DPoP_Nonce=self.nonces.current())

    def _method(self, process: Callable[[Request, Grant], Response]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "dpop" or not token:
                return _without_dpop(scheme, token)
            try:
                grant = self._ledger.verify(token, self._proofs.check(request, token), self._origin)
                return self._sealed(process(request, grant))
            except OAuthError as error:
                return self.refuse(error)

        return answer

    def _metadata(self, request: Request) -> Response:
        return Response.of_json(
            {
                "resource": self._origin,
                "authorization_servers": [self._issuer],
                "scopes_supported": [],
                "bearer_methods_supported": ["header"],
                "resource_documentation": "https://atproto.com",
            }
        )

    def _get_session(self, request: Request, grant: Grant) -> Response:
        return Response.of_json({"did": grant.did, "handle": self._directory.account(grant.did).handle, "active": True})

    def _echo(self, request: Request, grant: Grant) -> Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        headers["authorization"] = headers["authorization"].partition(" ")[0]
        return Response.of_json(
            {
                "did": grant.did,
                "method": request.method,
                "query": request.parameters,
                "headers": headers,
                "length": len(request.body),
                "sha256": hashlib.sha256(request.body).hexdigest(),
            }
        )

    def _redirect(self, request: Request, grant: Grant) -> Response:
        parameters = request.parameters
        status = int(parameters.get("status", ["302"])[0])
        return Response(status, headers={"Location": parameters.get("to", ["/"])[0]})

    def _scoped(self, request: Request, grant: Grant) -> Response:
        scope = request.parameters.get("scope", ["transition:generic"])[0]
        if scope in grant.scope.split():
            return Response.of_json({"scope": grant.scope})
        return Response.of_json({"error": "ScopeMissingError", "message": f'Missing required scope "{scope}"'}, 403)

    def _unknown(self, request: Request, grant: Grant) -> Response:
        return Response.of_json({"error": "MethodNotImplemented", "message": "Method Not Implemented"}, 501)


def _without_dpop(scheme: str, token: str) -> Response:
    """The answer to what is no OAuth request at all: there is no challenge in it, and no nonce."""
    if not scheme:
        return Response.of_json({"error": "AuthMissing", "message": "Authentication Required"}, 401)
    problem = "Malformed token" if token else "Malformed authorization header"
    return Response.of_json({"error": "InvalidToken", "message": problem}, 400)
