"""Log-in with an AT Protocol account for Flask. Needs the extra ``flask``.

::

    app = Flask(__name__)
    app.config.update(SECRET_KEY=..., ATPROTO_SCOPE="atproto transition:generic")
    ATProto(app)

    @app.get("/")
    @login_required
    def home():
        return current_account.session.get("/xrpc/com.atproto.server.getSession").json()

The settings are those of :class:`.Settings`, each with ``ATPROTO_`` in front. The pages are those of a blueprint that
is called ``atproto``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cached_property, wraps
from http import HTTPStatus
from pathlib import Path
from typing import Any, ParamSpec, cast
from urllib.parse import urlsplit

import requests
from blinker import Namespace
from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    current_app,
    g,
    jsonify,
    make_response,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from werkzeug.local import LocalProxy
from werkzeug.urls import iri_to_uri

from ..client import OAuthClient
from ..errors import SessionError, printable
from ..oauth_session import OAuthSession
from . import _web
from ._web import Problem, Settings

__all__ = [
    "ATProto",
    "Account",
    "current_account",
    "logged_in",
    "logged_out",
    "login_required",
    "session_over",
]

P = ParamSpec("P")

log = logging.getLogger("atproto_session")

_signals = Namespace()
#: Sent by the application with ``account``, an :class:`Account`, and ``handle``, when somebody has logged in.
logged_in = _signals.signal("atproto-logged-in")
#: Sent by the application with ``did``, when somebody has logged out.
logged_out = _signals.signal("atproto-logged-out")
#: Sent by the application with ``did`` and ``error``, when the session of the browser that is answered turns out to be
#: over.
session_over = _signals.signal("atproto-session-over")

#: Where the ids of a browser's session are, in Flask's own session and in ``app.config`` and ``app.extensions``.
_KEY = "atproto"
_SETTING = "ATPROTO_"
#: How long to look for a handle, in seconds.
_HANDLE_WITHIN = 5.0


class Account:
    """The account that is logged in in a browser. False, with ``did`` ``None``, if there is none.

    :ivar did: its DID.
    :ivar session_id: which of the account's sessions is this browser's. It and the DID are what a task in the
        background needs: ``client.restore(did, session_id=session_id)``.
    """

    def __init__(
        self, extension: ATProto, did: str | None, session_id: str | None, opened: OAuthSession | None
    ) -> None:
        self.did = did
        self.session_id = session_id
        self._extension = extension
        self._session = opened

    def __bool__(self) -> bool:
        return self.did is not None

    @property
    def session(self) -> OAuthSession:
        """The account, ready to use; with a ``total_timeout`` of 25 seconds. Nobody is logged in: the request ends, and
        the browser is sent to the log-in."""
        if self._session is None:
            abort(self._extension.ask_to_log_in())
        return self._session

    @cached_property
    def handle(self) -> str | None:
        """The account's handle as it is now, verified; ``None`` if it has none, or it cannot be looked up. What is
        known of it is used for five minutes."""
        if self.did is None:
            return None
        try:
            return self._extension.client._identities.resolve(self.did, timeout=_HANDLE_WITHIN).handle
        except SessionError as error:
            log.warning("the handle of %s could not be looked up: %s", self.did, error)
            return None

    def __repr__(self) -> str:
        return f"<Account {self.did}>"


class ATProto:
    """The extension. Nothing is opened or read before it is needed, so that an application can be imported, and its
    workers be forked, without keys and without a store.

    :param app: as with :meth:`init_app`.
    """

    def __init__(self, app: Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give ``app`` the blueprint ``atproto``, handlers for the errors of this library and of requests, and
        ``current_account`` in its templates.

        In production (``ATPROTO_PUBLIC_URL``) Flask's session cookie is made ``Secure``; always, unless the application
        says otherwise, ``SameSite=Lax``.

        :raises ClientMetadataError: ``ATPROTO_PREFIX`` is no path.
        """
        prefix = Settings.read({"PREFIX": app.config.get("ATPROTO_PREFIX")}, _called).prefix
        app.extensions[_KEY] = _State(app, prefix)
        app.register_blueprint(_blueprint(), url_prefix=prefix)
        app.register_error_handler(SessionError, self._answer)
        app.register_error_handler(requests.RequestException, self._answer)
        app.context_processor(lambda: {"current_account": current_account})
        if app.config.get("ATPROTO_PUBLIC_URL"):
            app.config["SESSION_COOKIE_SECURE"] = True
        if app.config.get("SESSION_COOKIE_SAMESITE") is None:
            app.config["SESSION_COOKIE_SAMESITE"] = "Lax"

    @property
    def client(self) -> OAuthClient:
        """The client of the current application, made when it is first needed.

        :raises ClientMetadataError: a setting is wrong.
        :raises StoreError: the store cannot be used.
        """
        return _state().client

    @property
    def settings(self) -> Settings:
        """The settings of the current application, read when they are first needed.

        :raises ClientMetadataError: one is wrong.
        """
        return _state().settings

    def ask_to_log_in(self) -> Response:
        """What answers a browser that has to log in first: it is sent to the log-in, and comes back to this page. Who
        asks for JSON is answered 401."""
        if _wants_json():
            return _as_json(Problem(HTTPStatus.UNAUTHORIZED, "login_required", "Please log in."))
        target = _here() if request.method in ("GET", "HEAD") else None
        return _see_other(url_for("atproto.login", next=target))

    def begin_login(self, account: str, next: str | None = None, **options: Any) -> Response:
        """Begin a log-in in a view of your own, for instance with other scopes than usual, or to make an account. The
        view answers a POST of a form in a page of the application; pages of others are refused.

        :param account: a handle, a DID, or the URL of a server.
        :param next: the path to go to afterwards.
        :param options: those of :meth:`.OAuthClient.authorize`: ``scope``, ``prompt`` and so on.
        :return: what sends the browser on.
        :raises SessionError: see :meth:`.OAuthClient.authorize`.
        :raises RuntimeError: Flask has no ``SECRET_KEY``.
        """
        _refuse_foreign_pages()
        if (moved := _moved_for_login(account, next)) is not None:
            return moved
        if current_app.session_interface.is_null_session(session):
            raise RuntimeError("to remember who is logged in, Flask needs a SECRET_KEY")
        login = _web.begin_login(
            self.settings, self.client, account, own=_own_origin(), cookies=request.cookies, next=next, **options
        )
        response = _see_other(login.url)
        response.set_cookie(**login.ticket.cookie)
        return _without_cookies(response, login.stale)

    def _answer(self, error: Exception) -> Response:
        """The error handler."""
        did, session_id = _ids()
        if _web.is_over(error, did, session_id):
            log.info("the session of %s in this browser is over: %s", did, error)
            g.pop(_KEY, None)
            session_over.send(_app(), did=did, error=error)
            return self.ask_to_log_in()
        problem = _web.problem_of(error)
        if problem is None:
            raise error
        _log_answer(error, problem)
        if _wants_json():
            return _as_json(problem)
        return _page(problem, "atproto/problem.html")


class _State:
    """What an application has of this."""

    def __init__(self, app: Flask, prefix: str) -> None:
        self._app = app
        self._prefix = prefix
        self._clients: dict[str, OAuthClient] = {}

    @cached_property
    def settings(self) -> Settings:
        config: Mapping[str, Any] = self._app.config
        given = {name.removeprefix(_SETTING): value for name, value in config.items() if name.startswith(_SETTING)}
        place = Path(self._app.instance_path, "atproto.db")
        return Settings.read({**given, "PREFIX": self._prefix}, _called, store=f"sqlite:///{place}")

    @property
    def client(self) -> OAuthClient:
        client = self._clients.get(_KEY)
        if client is None:
            made = self.settings.open_client()
            client = self._clients.setdefault(_KEY, made)
            if client is not made:  # another thread was faster
                made.close()
        return client


def _called(name: str) -> str:
    return f"{_SETTING}{name}"


def _app() -> Flask:
    """The application itself, as signals are sent by it."""
    return cast(Flask, current_app._get_current_object())  # type: ignore[attr-defined]


def _state() -> _State:
    state: _State | None = current_app.extensions.get(_KEY)
    if state is None:
        raise RuntimeError("this application has no ATProto: call ATProto(app), or init_app(app)")
    return state


# Who is logged in


def _ids() -> tuple[str | None, str | None]:
    """The DID and the ``session_id`` in the browser's cookie."""
    ids = session.get(_KEY)
    did, session_id = ids if isinstance(ids, list) and len(ids) == 2 else (None, None)
    return did, session_id


def _account() -> Account:
    if _KEY not in g:
        g.atproto = _load(*_ids())
    return cast(Account, g.atproto)


def _load(did: str | None, session_id: str | None) -> Account:
    """The account, if its session is still there: a cookie that was copied opens nothing after the log-out."""
    extension = ATProto()
    if did is None:
        return Account(extension, None, None, None)
    try:
        opened = extension.client.restore(did, refresh=False, session_id=session_id)
    except SessionError as error:
        if not error.login_required:
            raise
        # The cookie is left as it is: this may be an old request, and a new cookie be on its way.
        return Account(extension, None, None, None)
    opened.total_timeout = _web.TOTAL_TIMEOUT
    return Account(extension, did, session_id, opened)


#: The :class:`Account` of the browser that is being answered. The first use reads the store, and makes no request.
current_account: Account = LocalProxy(_account)  # type: ignore[assignment]


def login_required(view: Callable[P, Any]) -> Callable[P, Any]:
    """Have a view answer those only who are logged in. All others are sent to the log-in, and come back; who asks for
    JSON is answered 401."""

    @wraps(view)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Any:
        if request.method != "OPTIONS" and not current_account:
            return ATProto().ask_to_log_in()
        return current_app.ensure_sync(view)(*args, **kwargs)

    return checked


# Pages


def _blueprint() -> Blueprint:
    blueprint = Blueprint("atproto", __name__, template_folder="flask_templates")
    blueprint.get(_web.LOGIN, endpoint="login")(_show_login)
    blueprint.post(_web.LOGIN, endpoint="begin")(_begin)
    blueprint.get(_web.CALLBACK, endpoint="callback")(_callback)
    blueprint.post(_web.LOGOUT, endpoint="logout")(_log_out)
    blueprint.get(_web.METADATA, endpoint="metadata")(lambda: _document(_state().settings.metadata_document()))
    blueprint.get(_web.JWKS, endpoint="jwks")(lambda: _document(_state().settings.jwks()))
    return blueprint


def _show_login() -> Response:
    moved = _moved_for_login(request.args.get("account"), request.args.get("next"))
    return moved or _login_page(None, request.args.get("account", ""), request.args.get("next"))


def _begin() -> Response:
    _refuse_foreign_pages()
    account, target = request.form.get("account", "").strip(), request.form.get("next")
    if not account:
        return _login_page(_web.NO_ACCOUNT, account, target)
    try:
        return ATProto().begin_login(account, target)
    except SessionError as error:
        return _login_page(_problem_of_login(error), account, target)


def _callback() -> Response:
    if request.method == "HEAD":  # which would spend the code
        abort(HTTPStatus.METHOD_NOT_ALLOWED)
    state = _state()
    ended = _web.end_login(state.settings, state.client, request.args.to_dict(flat=False), request.cookies)
    if isinstance(ended, _web.FailedLogin):
        return _without_cookies(_login_page(_problem_of_login(ended.error), "", ended.next), ended.stale)
    opened, before = ended.result.session, _ids()
    _remember(opened.did, ended.session_id)
    # A session that is kept on the server gets another id: the one it had may be known to somebody. Flask-Session does
    # that only if there is something in it.
    if (regenerate := getattr(current_app.session_interface, "regenerate", None)) is not None:
        regenerate(session)
    opened.total_timeout = _web.TOTAL_TIMEOUT
    g.atproto = Account(ATProto(), opened.did, ended.session_id, opened)
    try:
        logged_in.send(_app(), account=g.atproto, handle=ended.result.handle)
    except BaseException:  # a receiver does not want this account
        _remember(*before)
        _end(opened.did, ended.session_id)
        raise
    try:
        _end(*before)
    except SessionError:
        log.exception("the session that this browser had before is still there")
    return _without_cookies(_see_other(ended.next or _root()), ended.stale)


def _remember(did: str | None, session_id: str | None) -> None:
    """Put the ids into the browser's cookie, or take them out of it."""
    g.pop(_KEY, None)
    if did is None:
        session.pop(_KEY, None)
    else:
        session[_KEY] = [did, session_id]


def _log_out() -> Response:
    _refuse_foreign_pages()
    did, session_id = _ids()
    _remember(None, None)
    _end(did, session_id)
    if did is not None:
        logged_out.send(_app(), did=did)
    return _see_other(_web.safe_next(request.form.get("next")) or _root())


def _end(did: str | None, session_id: str | None) -> None:
    """End a session that no browser has any more; a cookie that was copied opens nothing from here on."""
    if did is None:
        return
    try:
        _state().client.revoke(did, session_id=session_id, timeout=_web.END_WITHIN)
    except SessionError as error:
        if not error.login_required:  # it is not there, or another client's
            raise


def _document(document: dict[str, Any]) -> Response:
    """What authorization servers fetch. It needs no store, no session and no request."""
    response = jsonify(document)
    response.headers["Cache-Control"] = "public, max-age=60"
    return response


def _refuse_foreign_pages() -> None:
    if _web.is_foreign(request.headers, _state().settings.origins(_own_origin())):
        log.warning("a page of somebody else has sent a form to %s", request.path)
        problem = Problem(HTTPStatus.FORBIDDEN, "foreign_page", "This form was sent by a page of another site.")
        page = _as_json(problem) if _wants_json() else _page(problem, "atproto/problem.html")
        abort(page)
    # Flask-WTF has checked its token already, unless WTF_CSRF_CHECK_DEFAULT leaves that to the views.
    csrf = current_app.extensions.get("csrf")
    if csrf is not None and current_app.config.get("WTF_CSRF_ENABLED") and not g.get("csrf_valid"):
        csrf.protect()


def _moved_for_login(account: str | None, target: str | None) -> Response | None:
    """Sends the browser to the host that the log-in comes back to, if that is another one: there its cookies are."""
    origin = _state().settings.origin_for_login(_own_origin(), request.script_root)
    if origin is None:
        return None
    return _see_other(origin + url_for("atproto.login", account=account or None, next=_web.safe_next(target)))


def _login_page(problem: Problem | None, account: str, target: object) -> Response:
    if problem is not None and _wants_json():
        return _as_json(problem)
    values = {"atproto_account": account, "atproto_next": _web.safe_next(target)}
    return _page(problem, "atproto/login.html", **values)


def _problem_of_login(error: SessionError) -> Problem:
    """
    :raises SessionError: it is the application's own fault.
    """
    problem = _web.problem_of_login(error)
    if problem is None:
        raise error
    _log_answer(error, problem)
    return problem


# Answers


def _own_origin() -> str:
    return request.host_url.rstrip("/")


def _root() -> str:
    return f"{request.script_root}/"


def _here() -> str:
    """This page's address, as a path."""
    parts = urlsplit(iri_to_uri(request.url))
    return parts.path + (f"?{parts.query}" if parts.query else "")


def _wants_json() -> bool:
    return _web.wants_json(request.headers.get("Accept", ""), request.headers.get("Content-Type", ""))


def _log_answer(error: Exception, problem: Problem) -> None:
    # Without the query: that of the callback holds the code.
    log.warning(
        "%s %s was answered with %d: %s",
        request.method,
        printable(request.path),
        problem.status,
        error,
        exc_info=error if problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR else None,
    )


def _as_json(problem: Problem) -> Response:
    response = jsonify(error=problem.error, message=problem.message)
    return _finish(response, problem)


def _page(problem: Problem | None, template: str, **values: Any) -> Response:
    response = make_response(render_template(template, problem=problem, **values))
    # No page of somebody else shows this one in a frame, and leads people to press its buttons.
    response.headers["Content-Security-Policy"] = "frame-ancestors 'none'"
    return _finish(response, problem)


def _finish(response: Response, problem: Problem | None) -> Response:
    response.headers["Cache-Control"] = "no-store"
    if problem is not None:
        response.status_code = problem.status
        if problem.retry_after is not None:
            response.headers["Retry-After"] = str(problem.retry_after)
    return response


def _see_other(url: str) -> Response:
    response = cast(Response, redirect(url, HTTPStatus.SEE_OTHER))
    response.headers["Cache-Control"] = "no-store"
    return response


def _without_cookies(response: Response, names: list[str]) -> Response:
    secure = not _state().settings.is_development
    for name in names:
        response.delete_cookie(name, secure=secure, httponly=True, samesite="Lax")
    return response
