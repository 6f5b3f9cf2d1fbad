"""Log-ins under way: pushed requests that wait for a decision, and codes that wait to be exchanged."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .clients import Client, ClientAuth
from .errors import OAuthError, invalid_grant, invalid_request, invalid_scope

#: How long a pushed request and a code last, in seconds.
REQUEST_LIFETIME = 300.0
CODE_LIFETIME = 300.0

_URI_PREFIX = "urn:ietf:params:oauth:request_uri:"
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
_LOGIN_HINT = re.compile(
    r"did:[a-z]+:[A-Za-z0-9._:%-]+|(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z](?:[a-z0-9-]*[a-z0-9])?"
)


@dataclass(frozen=True)
class AuthorizationRequest:
    """A request that passed the pushed authorization request endpoint.

    :ivar jkt: the thumbprint of the DPoP key that the tokens will be bound to.
    """

    client: Client
    client_auth: ClientAuth
    jkt: str
    redirect_uri: str
    scope: str
    state: str = field(repr=False)
    code_challenge: str = field(repr=False)
    login_hint: str
    prompt: str
    expires_at: float


@dataclass(frozen=True)
class Authorization:
    """A request that an account's owner has agreed to."""

    request: AuthorizationRequest
    did: str
    scope: str
    expires_at: float


class Authorizations:
    """Safe to share between threads."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests: dict[str, AuthorizationRequest] = {}
        self._codes: dict[str, Authorization] = {}
        self._lock = threading.Lock()

    def push(self, client: Client, client_auth: ClientAuth, jkt: str, form: Mapping[str, str]) -> str:
        """Check a request and keep it. Returns its ``request_uri`` (RFC 9126).

        :raises OAuthError: a parameter is wrong.
        """
        request = AuthorizationRequest(
            client=client,
            client_auth=client_auth,
            jkt=jkt,
            redirect_uri=_redirect_uri(client, form),
            scope=_scope(client, form),
            state=_required(form, "state"),
            code_challenge=_code_challenge(form),
            login_hint=_login_hint(form),
            prompt=_prompt(client, form),
            expires_at=self._clock() + REQUEST_LIFETIME,
        )
        if _required(form, "response_type") != "code":
            raise OAuthError("unsupported_response_type", 'Only response_type "code" is supported')
        if form.get("response_mode", "query") != "query":
            raise invalid_request("Unsupported response_mode")
        request_uri = f"{_URI_PREFIX}req-{secrets.token_hex(16)}"
        with self._lock:
            self._requests[request_uri] = request
        return request_uri

    def find(self, request_uri: str, client_id: str) -> AuthorizationRequest:
        """A request that waits for its decision.

        :raises OAuthError: there is none, it has expired, or it is another client's.
        """
        with self._lock:
            return self._find(request_uri, client_id)

    def _find(self, request_uri: str, client_id: str) -> AuthorizationRequest:
        request = self._requests.get(request_uri)
        if request is None:
            raise invalid_request("Unknown request_uri")
        if request.expires_at < self._clock():
            del self._requests[request_uri]
            raise invalid_request("This request has expired")
        if request.client.id != client_id:
            del self._requests[request_uri]
            raise invalid_request("This request was initiated for another client")
        return request

    def approve(self, request_uri: str, client_id: str, did: str, scope: str) -> str:
        """Decide a request in favour of the client. Returns the code.

        :raises OAuthError: as :meth:`find`; a request is decided once.
        """
        code = f"cod-{secrets.token_urlsafe(32)}"
        with self._lock:
            request = self._find(request_uri, client_id)
            del self._requests[request_uri]
            self._codes[code] = Authorization(request, did, scope, self._clock() + CODE_LIFETIME)
        return code

    def deny(self, request_uri: str, client_id: str) -> None:
        with self._lock:
            self._find(request_uri, client_id)
            del self._requests[request_uri]

    def take(self, code: str) -> Authorization | None:
        """What a code stands for. Works once, whatever becomes of the exchange."""
        with self._lock:
            return self._codes.pop(code, None)

    def check_exchange(self, authorization: Authorization, form: Mapping[str, str]) -> None:
        """Check that the client that exchanges the code began the log-in (RFC 7636 section 4.6).

        :raises OAuthError: ``invalid_grant``.
        """
        request = authorization.request
        if authorization.expires_at < self._clock():
            raise invalid_grant("This code has expired")
        if form.get("redirect_uri") != request.redirect_uri:
            raise invalid_grant("The redirect_uri parameter must match the one used in the authorization request")
        verifier = form.get("code_verifier")
        if verifier is None:
            raise invalid_grant("code_verifier is required")
        digest = hashlib.sha256(verifier.encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if not hmac.compare_digest(challenge, request.code_challenge):
            raise invalid_grant("Invalid code_verifier")


def _required(form: Mapping[str, str], name: str) -> str:
    if not form.get(name):
        raise invalid_request(f"{name} is required")
    return form[name]


def _redirect_uri(client: Client, form: Mapping[str, str]) -> str:
    uri = _required(form, "redirect_uri")
    if not client.allows_redirect(uri):
        raise invalid_request("Invalid redirect_uri: it is not registered for this client")
    return uri


def _scope(client: Client, form: Mapping[str, str]) -> str:
    scopes = list(dict.fromkeys(form.get("scope", "").split()))
    if undeclared := [scope for scope in scopes if scope not in client.scopes]:
        raise invalid_scope(f'Scope "{undeclared[0]}" is not declared in the client metadata')
    if "atproto" not in scopes:
        raise invalid_scope('The "atproto" scope is required')
    return " ".join(scopes)


def _code_challenge(form: Mapping[str, str]) -> str:
    if "code_challenge" not in form:
        raise invalid_request("Use of PKCE is required")
    if form.get("code_challenge_method") != "S256":
        raise invalid_request('atproto requires use of "S256" code_challenge_method')
    if not _CHALLENGE.fullmatch(form["code_challenge"]):
        raise invalid_request("Invalid code_challenge")
    return form["code_challenge"]


def _login_hint(form: Mapping[str, str]) -> str:
    hint = form.get("login_hint", "")
    if hint and not _LOGIN_HINT.fullmatch(hint if hint.startswith("did:") else hint.lower()):
        raise invalid_request("Invalid login_hint: neither a handle nor a DID")
    return hint


def _prompt(client: Client, form: Mapping[str, str]) -> str:
    prompt = form.get("prompt", "")
    if prompt not in ("", "none", "login", "consent", "select_account", "create"):
        raise invalid_request("Unsupported prompt")
    if prompt == "none" and client.auth_method == "none":
        raise invalid_request("Public clients are not allowed to use silent-sign-on")
    return prompt
