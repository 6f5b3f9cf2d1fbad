"""The consent page: where an account's owner logs in and approves or denies what a client asks for.

Plain HTML, one form, no script. Everything on it that came from outside is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from urllib.parse import urlencode, urlsplit, urlunsplit

from .accounts import Directory
from .authorizations import AuthorizationRequest, Authorizations
from .errors import OAuthError, invalid_request
from .wire import Request, Response

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

_STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 26rem; margin: 3rem auto; padding: 0 1rem }
input[type=text], input[type=password] { display: block; width: 100%; box-sizing: border-box; padding: .4rem }
label { display: block; margin: .6rem 0 } button { padding: .4rem 1rem } [role=alert] { color: #b00020 }
"""


class ConsentPage:
    """The authorization endpoint."""

    def __init__(self, issuer: str, directory: Directory, authorizations: Authorizations) -> None:
        self._issuer = issuer
        self._directory = directory
        self._authorizations = authorizations

    def show(self, request: Request) -> Response:
        """``GET``: the page, for ``client_id`` and ``request_uri`` in the query."""
        parameters = {name: values[0] for name, values in request.parameters.items()}
        try:
            pending = self._find(parameters)
        except OAuthError as error:
            return _error_page(error)
        if pending.prompt == "none":
            self._authorizations.deny(parameters["request_uri"], pending.client.id)
            return self._redirect(pending, error="login_required", error_description="Login is required")
        return _page(pending, parameters["request_uri"], identifier=pending.login_hint)

    def decide(self, request: Request) -> Response:
        """``POST``: the filled-in form. Fields: ``client_id``, ``request_uri``, ``decision`` (``approve`` or ``deny``),
        ``identifier``, ``password``, and ``scope``, once for each scope that is granted (all, if there is none)."""
        parameters = Request(method="GET", origin="", path="", query=request.body.decode("utf-8")).parameters
        form = {name: values[0] for name, values in parameters.items()}
        try:
            pending = self._find(form)
            request_uri = form["request_uri"]
            if form.get("decision") != "approve":
                self._authorizations.deny(request_uri, pending.client.id)
                return self._redirect(pending, error="access_denied", error_description="The user rejected the request")
            identifier = form.get("identifier", "").strip().removeprefix("@")
            account = self._directory.log_in(identifier, form.get("password", ""))
            if account is None or self._directory.home(account.did).issuer != self._issuer:
                return _page(pending, request_uri, identifier=identifier, problem="Invalid identifier or password")
            scope = _granted(pending, parameters.get("scope", ()))
            code = self._authorizations.approve(request_uri, pending.client.id, account.did, scope)
        except OAuthError as error:
            return _error_page(error)
        return self._redirect(pending, code=code)

    def _find(self, form: dict[str, str]) -> AuthorizationRequest:
        if "request_uri" not in form:
            raise invalid_request("A pushed authorization request is required")
        return self._authorizations.find(form["request_uri"], form.get("client_id", ""))

    def _redirect(self, pending: AuthorizationRequest, **answer: str) -> Response:
        target = urlsplit(pending.redirect_uri)
        answer = {"iss": self._issuer, "state": pending.state, **answer}
        query = "&".join(filter(None, [target.query, urlencode(answer)]))
        return Response(303, headers={**_HEADERS, "Location": urlunsplit(target._replace(query=query))})


def _granted(pending: AuthorizationRequest, ticked: Iterable[str]) -> str:
    asked, wanted = pending.scope.split(), set(" ".join(ticked).split())
    if not wanted <= set(asked):
        raise invalid_request("A scope was granted that the client did not ask for")
    return " ".join(scope for scope in asked if not wanted or scope in wanted or scope == "atproto")


def _page(pending: AuthorizationRequest, request_uri: str, *, identifier: str, problem: str = "") -> Response:
    scopes = "".join(
        f'<label><input type="checkbox" name="scope" value="{escape(scope)}" checked> {escape(scope)}</label>'
        for scope in pending.scope.split()
    )
    return _html(
        f"""<h1>Log in</h1>
<p><strong>{escape(pending.client.id)}</strong> asks for access to your account.</p>
{_alert(problem)}<form method="post" action="/oauth/authorize">
<input type="hidden" name="client_id" value="{escape(pending.client.id)}">
<input type="hidden" name="request_uri" value="{escape(request_uri)}">
<label>Handle or DID <input type="text" name="identifier" value="{escape(identifier)}" autocomplete="username"></label>
<label>Password <input type="password" name="password" autocomplete="current-password"></label>
<fieldset><legend>Scopes</legend>{scopes}</fieldset>
<p><button name="decision" value="approve">Approve</button> <button name="decision" value="deny">Deny</button></p>
</form>""",
        200 if not problem else 401,
    )


def _error_page(error: OAuthError) -> Response:
    return _html(f"<h1>This log-in cannot go on</h1>\n{_alert(error.description)}", error.status)


def _alert(problem: str) -> str:
    return f'<p role="alert">{escape(problem)}</p>\n' if problem else ""


def _html(body: str, status: int) -> Response:
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Log in: local AT Protocol network</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>
<body>{body}</body></html>
"""
    response = Response.of_text(text, status, "text/html; charset=utf-8")
    return Response(status, response.body, {**response.headers, **_HEADERS})
