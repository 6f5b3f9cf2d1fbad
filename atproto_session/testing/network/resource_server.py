"""The PDS: the resource server where an account lives. Its methods tell what they were sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from .accounts import Account, Directory
from .errors import OAuthError
from .proofs import ProofChecker
from .repositories import MethodError, Repositories
from .routes import Route
from .sessions import Grant, Ledger
from .wire import Request, Response


@dataclass(frozen=True)
class Method:
    """A method that was added.

    :ivar answer: is given the request and the account that made it; returns a :class:`.Response`, or what becomes JSON.
    """

    verb: str
    answer: Callable[[Request, Account], object]


class ResourceServer:
    """One PDS.

    :param repositories: what the accounts keep on it.
    :param added: more methods, by NSID. What is put into it later counts as well.
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
        repositories: Repositories,
        added: Mapping[str, Method],
        scheme: Literal["DPoP", "Bearer"] = "DPoP",
    ) -> None:
        self.nonces = proofs.nonces
        self._origin = origin
        self._issuer = issuer
        self._directory = directory
        self._ledger = ledger
        self._proofs = proofs
        self._scheme = scheme
        self._repositories = repositories
        self._added = added
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
            *(
                Route("GET", f"/xrpc/{nsid}", "public", self._public(process), self)
                for nsid, process in repositories.public_methods.items()
            ),
            Route("*", "/xrpc/*", "resource", self._method(self._other), self),
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
            except MethodError as error:
                return self._sealed(error.response)

        return answer

    def _public(self, process: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            try:
                return process(request)
            except MethodError as error:
                return error.response

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

    def _other(self, request: Request, grant: Grant) -> Response:
        nsid = request.path.removeprefix("/xrpc/")
        if (added := self._added.get(nsid)) is not None:
            _check_verb(request, added.verb)
            answer = added.answer(request, self._directory.account(grant.did))
            return answer if isinstance(answer, Response) else Response.of_json(answer)
        if nsid in self._repositories.methods:
            verb, process = self._repositories.methods[nsid]
            _check_verb(request, verb)
            return process(request, grant)
        raise MethodError("Method Not Implemented", "MethodNotImplemented", 501)


def _check_verb(request: Request, verb: str) -> None:
    if request.method != verb:
        raise MethodError(f"Incorrect HTTP method ({request.method}) expected {verb}")


def _without_dpop(scheme: str, token: str) -> Response:
    """The answer to what is no OAuth request at all: there is no challenge in it, and no nonce."""
    if not scheme:
        return Response.of_json({"error": "AuthMissing", "message": "Authentication Required"}, 401)
    problem = "Malformed token" if token else "Malformed authorization header"
    return Response.of_json({"error": "InvalidToken", "message": problem}, 400)
