"""One authorization server, as a client sees it: pushed authorization requests (RFC 9126), code exchange and refresh
(RFC 6749), revocation (RFC 7009), each with DPoP (RFC 9449) and client authentication."""

from __future__ import annotations

import email.utils
import itertools
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from ._flights import alongside
from ._fork import importing, reset_in_child
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

T = TypeVar("T")

_log = logging.getLogger("atproto_session")

#: How long the answer to a refresh is waited for, in seconds: the refresh token is gone, so its successor is worth it.
ANSWER_WITHIN = 120.0
#: The bound on every other request with all its tries, in seconds.
REPLY_WITHIN = 30.0
#: What is kept of the scopes in an answer, in characters. Permission sets that are expanded need some thousand.
_LONGEST_SCOPE = 16 * 1024
#: And of names in it: no DID is longer (2,048 characters), no type of a token, and no URL that a browser could open.
_LONGEST_NAME = 2049
#: What a thread is called that finds out about a server while another one does.
_ASIDE = "atproto_session lookup"
#: How many do so at a time. A server that is away, and that an account has left, keeps its thread for seconds.
_MOST_ASIDE = 32
#: Longer lives are taken for nonsense, in seconds.
_LONGEST_LIFE = 10 * 365 * 86400.0
#: Nobody is asked to stay away for longer, in seconds. (urllib3 has the same bound.)
_LONGEST_REST = 6 * 3600.0
#: A number of seconds as large as this is a moment since 1970.
_EPOCH = 1e9
#: Clocks that differ by less than this are not worth a word, in seconds.
_CLOCK_TOLERANCE = 5.0
#: What is sent and must not be seen.
_SECRET_PARAMS = ("code", "code_verifier", "refresh_token", "token", "client_assertion", "state")
#: So much of a secret in a row is masked, and is no accident.
_TELLING = 12
#: A shorter text is in too many others.
_SHORTEST_SECRET = 4
#: On top of each other.
_ENCODINGS = 3
#: How much of a server's words is looked at.
_LONGEST_TEXT = 10_000


class AuthorizationServer:
    """The authorization server that ``metadata`` describes, spoken to as ``client``.

    :param nonces: shared by everything that speaks for this client. A strict one has answers without a nonce rejected.
    :param answer_within: how long the answer to a refresh is waited for, in seconds.
    :param reply_within: the bound on every other request, in seconds.
    :param clock: gives the seconds since the epoch.
    """

    def __init__(
        self,
        metadata: ServerMetadata,
        client: ClientMetadata,
        keyset: Keyset | None,
        transport: Transport,
        nonces: NonceCache,
        *,
        answer_within: float = ANSWER_WITHIN,
        reply_within: float = REPLY_WITHIN,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.metadata = metadata
        self._client = client
        self._keyset = keyset
        self._transport = transport
        self._nonces = nonces
        self._answer_within = answer_within
        self._reply_within = reply_within
        self._clock = clock

    def push(self, params: Mapping[str, str], key: Mapping[str, Any], method: ClientAuthMethod) -> str:
        """Push an authorization request and return its ``request_uri``."""
        url = self.metadata.pushed_authorization_request_endpoint
        response = self._post(url, params, key, method)
        request_uri = _object_in(response).get("request_uri")
        if not isinstance(request_uri, str) or not 0 < len(request_uri) <= _LONGEST_NAME:
            raise TransportError(f"{origin(url)} gave no request_uri for the pushed request", sent=True)
        self._nonces.check(_answer_in(response), url)
        return request_uri

    def exchange_code(
        self, code: str, verifier: str, redirect_uri: str, key: Mapping[str, Any], method: ClientAuthMethod
    ) -> TokenSet:
        """Exchange an authorization code for tokens. Who they belong to is yet to be verified; ``aud`` is empty."""
        params = {
            "grant_type": "authorization_code",
            "code": code,
            "code_verifier": verifier,
            "redirect_uri": redirect_uri,
        }
        tokens, response = self._tokens(params, key, method, self._reply_within)
        try:
            self._nonces.check(_answer_in(response), self.metadata.token_endpoint)
        except TransportError:
            with suppress(Exception):  # they are thrown away in any case
                self.revoke(Session(key, method, tokens), method)
            raise
        return tokens

    def refresh(self, session: Session, method: ClientAuthMethod) -> TokenSet:
        """Spend the refresh token of ``session``. Where the answer has none, the old one goes on."""
        spent = session.token_set
        params = {"grant_type": "refresh_token", "refresh_token": spent.refresh_token or ""}
        tokens, response = self._tokens(
            params, session.dpop_key, method, self._answer_within, secrets=(spent.access_token,)
        )
        self._nonces.check(_answer_in(response), self.metadata.token_endpoint, may_refuse=False)
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
        self._post(url, {"token": token, "token_type_hint": hint}, session.dpop_key, method)

    def _tokens(
        self,
        params: Mapping[str, str],
        key: Mapping[str, Any],
        method: ClientAuthMethod,
        within: float,
        secrets: Iterable[str] = (),
    ) -> tuple[TokenSet, Response]:
        url = self.metadata.token_endpoint
        asked_at = self._clock()
        response = self._post(url, params, key, method, within, secrets=secrets, for_tokens=True)
        document = _object_in(response)
        access_token = _text(document, "access_token")
        if access_token is None:
            what = "without an access token" if document else "with something that is not a JSON object"
            raise TransportError(f"{origin(url)} answered {what}", sent=True)
        tokens = TokenSet(
            iss=self.metadata.issuer,
            sub=(_text(document, "sub") or "")[:_LONGEST_NAME],
            aud="",
            scope=self._scope_in(document),
            refresh_token=_text(document, "refresh_token"),
            access_token=access_token,
            token_type=(_text(document, "token_type") or "")[:_LONGEST_NAME],
            expires_at=_expiry(document.get("expires_in"), asked_at),
        )
        return tokens, response

    def _scope_in(self, document: Mapping[str, Any]) -> str:
        """The scopes that were granted, as far as they are kept. What is left out counts as not granted."""
        scope = _text(document, "scope") or ""
        if len(scope) <= _LONGEST_SCOPE:
            return scope
        _log.warning("%s granted more scopes than are kept; the last ones are left out", self.metadata.issuer)
        return f"{'atproto ' if 'atproto' in scope.split() else ''}{scope[:_LONGEST_SCOPE].rpartition(' ')[0]}"

    def _post(
        self,
        url: str,
        params: Mapping[str, str],
        key: Mapping[str, Any],
        method: ClientAuthMethod,
        within: float | None = None,
        *,
        secrets: Iterable[str] = (),
        for_tokens: bool = False,
    ) -> Response:
        """One request, sent once more only if the server wants a nonce: it has not looked at anything else then. Every
        try has a proof and an assertion of its own.

        :param secrets: what must not be seen, beside what is sent.
        :param for_tokens: tokens are the answer, whatever status they come with.
        :raises OAuthResponseError: another answer than a good one.
        """
        deadline = time.monotonic() + (self._reply_within if within is None else within)
        asked_at = self._clock()
        flow = dpop_flow(key, "POST", url, self._nonces, clock=self._clock)
        proof: str | None = next(flow)
        while proof is not None:
            authentication = authentication_params(
                method, self._client, self._keyset, self.metadata.issuer, clock=self._clock
            )
            form = {**params, **authentication}
            hidden = [form[name] for name in _SECRET_PARAMS if name in form] + [proof, *secrets]
            response = self._transport.request(
                "POST",
                url,
                headers={"DPoP": proof, "Accept": "application/json"},
                data=form,
                timeout=max(0.001, deadline - time.monotonic()),
                lenient=True,
            )
            proof = next_proof(flow, _answer_in(response))
        if 200 <= response.status < 300:
            return response
        document = _object_in(response)
        if for_tokens and _text(document, "access_token") and "error" not in document:
            _log.warning("%s answered with tokens and the status %d", origin(url), response.status)
            return response
        raise _error_of(response, url, hidden, clock=(asked_at, self._clock()))


class AccountAuthority:
    """The authorization server that speaks for an account, whichever that is: what :class:`.SessionGetter` refreshes
    and revokes with.

    :ivar answer_within: how long the answer to a refresh is waited for, in seconds.
    """

    def __init__(  # noqa: PLR0917 - what it consists of
        self,
        identities: IdentityResolver,
        discovery: Discovery,
        transport: Transport,
        nonces: NonceCache,
        client: ClientMetadata,
        keyset: Keyset | None,
        *,
        answer_within: float = ANSWER_WITHIN,
        reply_within: float = REPLY_WITHIN,
    ) -> None:
        self._identities = identities
        self._discovery = discovery
        self._transport = transport
        self._nonces = nonces
        self._client = client
        self._keyset = keyset
        self.answer_within = answer_within
        self._reply_within = reply_within
        self.reset_after_fork()
        reset_in_child(self)

    def server(self, issuer: str) -> AuthorizationServer:
        """The authorization server ``issuer``.

        :raises DiscoveryError: it has no usable metadata.
        """
        return AuthorizationServer(
            self._discovery.metadata(issuer),
            self._client,
            self._keyset,
            self._transport,
            self._nonces,
            answer_within=self.answer_within,
            reply_within=self._reply_within,
        )

    def audience(self, did: str, issuer: str, last: str | None = None) -> str:
        """The origin of the account's PDS, after verifying afresh that ``issuer`` is the authority for the account.

        :param last: the PDS of the account as it was. It is asked at the same time as the directory, and nearly always
            is the right one.
        :raises TokenRefreshError: another server is.
        """
        answer_of_last = None if last is None else self._alongside(lambda: self._issuer_of(last))
        pds = self._identities.resolve_did(did).pds
        current = self._issuer_of(pds) if answer_of_last is None or pds != last else answer_of_last()
        if current != issuer:
            raise TokenRefreshError(
                f"the account {did} now belongs to the authorization server {current}, not to {issuer}; log in again"
            )
        return pds

    def _alongside(self, work: Callable[[], T]) -> Callable[[], T]:
        """Begin ``work`` in another thread, or do it when its result is wanted if too much is under way."""
        under_way, mark = self._under_way, object()

        def run() -> T:
            try:
                return work()
            finally:
                under_way.discard(mark)

        # Counted before it begins, so that no more than the bound ever do.
        under_way.add(mark)
        if len(under_way) > _MOST_ASIDE:
            under_way.discard(mark)
            return work
        return alongside(run, _ASIDE)

    def reset_after_fork(self) -> None:
        self._under_way: set[object] = set()

    def _issuer_of(self, pds: str) -> str:
        return self._discovery.authorization_server_of(pds, fresh=True)

    def prepare(self, session: Session) -> Callable[[Session], Session]:
        """See :meth:`.Authority.prepare`."""
        tokens = session.token_set
        find_server: Callable[[], AuthorizationServer] = partial(self.server, tokens.iss)
        if not self._discovery.knows(tokens.iss):
            find_server = self._alongside(find_server)
        aud = self.audience(tokens.sub, tokens.iss, tokens.aud)
        server = find_server()
        method = resolve_stored(session.auth_method, self._client, self._keyset, server.metadata)

        def send(spent: Session) -> Session:
            issued = server.refresh(spent, method)
            return replace(spent, auth_method=method, token_set=replace(issued, aud=aud))

        return send

    def revoke(self, session: Session) -> None:
        """See :meth:`.Authority.revoke`."""
        server = self.server(session.token_set.iss)
        server.revoke(session, resolve_stored(session.auth_method, self._client, self._keyset, server.metadata))


def _answer_in(response: Response) -> Answer:
    return Answer.of(response.status, response.headers, response.body)


def _object_in(response: Response) -> dict[str, Any]:
    """The JSON object of an answer; empty if there is none."""
    try:
        document = response.json()
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


# Errors


def _error_of(response: Response, url: str, hidden: Iterable[str], *, clock: tuple[float, float]) -> OAuthResponseError:
    """The error in an answer.

    :param hidden: secrets that it may echo.
    :param clock: this machine's time when the request was made, and when the answer was there.
    """
    document = _object_in(response)
    code, words = _text(document, "error"), _text(document, "error_description") or _text(document, "message")
    error = None if code is None else printable(masked(code, hidden))
    # The reference server begins with the client's identifier, and ends with the reason.
    description = None if words is None else printable(masked(words, hidden), 300)
    what = " ".join(filter(None, (error, description and f"({description})"))) or "no OAuth error"
    return OAuthResponseError(
        f"{origin(url)} answered {response.status}: {what}{_clock_fault(code, words, response, clock)}",
        status=response.status,
        error=error,
        error_description=description,
        retryable=response.status >= 500
        or response.status in (408, 429)
        or (code == "invalid_client_metadata" and _is_out_of_reach(words or "")),
        retry_after=retry_after(response.status, response.headers),
    )


def masked(text: str, secrets: Iterable[str]) -> str:
    """``text`` with every telling part of the ``secrets`` blacked out, also where it was encoded for a URL, JSON or
    HTML; and cut, if it is very long."""
    parts = {
        secret[start : start + _TELLING]
        for secret in secrets
        for start in range(max(1, len(secret) - _TELLING + 1))
        if len(secret) >= _SHORTEST_SECRET
    }
    shown = plain = _without(parts, text[:_LONGEST_TEXT])
    for _ in range(_ENCODINGS):
        plain = _decoded(plain)
        if (hidden := _without(parts, plain)) != plain:
            shown = plain = hidden
    return shown


def _without(parts: Collection[str], text: str) -> str:
    covered = [False] * len(text)
    for length in {len(part) for part in parts}:
        for start in range(len(text) - length + 1):
            if text[start : start + length] in parts:
                covered[start : start + length] = [True] * length
    runs = itertools.groupby(zip(text, covered, strict=True), key=lambda pair: pair[1])
    return "".join("***" if is_covered else "".join(letter for letter, _ in run) for is_covered, run in runs)


def _decoded(text: str) -> str:
    with importing():
        import html  # it has all names that there are
    plain = html.unescape(unquote(text))
    plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), plain)
    return re.sub(r"\\(.)", r"\1", plain)


#: What the reference server says about client metadata that it could not fetch. If it says nothing further, it was in
#: trouble itself, or waited in vain.
_UNOBTAINED = r'(?s)Unable to obtain (?:client metadata|jwks)\b(?:[^"]*"[^"]*")*(?P<why>.*)'
_PASSING = (
    r"(?i)connection refused|connection error|TLS error|service unavailable|bad gateway|gateway time-?out|"
    r"too many requests|internal server error|request time-?out|time[d ]*out|fetch failed|failed to fetch"
)


def _is_out_of_reach(description: str) -> bool:
    """Whether the server could not reach the client's own site, which may pass. Anything else that is wrong with the
    client's metadata stays wrong."""
    unobtained = re.match(_UNOBTAINED, description)
    return unobtained is not None and (
        not unobtained["why"].strip(" :.") or re.search(_PASSING, unobtained["why"]) is not None
    )


_ABOUT_TIME = r"(?i)\b(?:iat|exp|nbf|expired|future|clock|too old|timestamp)\b"


def _clock_fault(code: str | None, words: str | None, response: Response, clock: tuple[float, float]) -> str:
    """What is to be said of this machine's clock, if a proof or an assertion was refused because of it."""
    if code != "invalid_dpop_proof" and not (code != "invalid_grant" and re.search(_ABOUT_TIME, words or "")):
        return ""
    server = _moment(response.headers.get("Date"))
    if server is None:
        return ""
    ahead, behind = clock[0] - server, server - clock[1]
    if max(ahead, behind) <= _CLOCK_TOLERANCE:
        return ""
    return (
        f"; the clock of this machine is {max(ahead, behind):.0f} s {'ahead of' if ahead > behind else 'behind'} the "
        "server's: set it right"
    )


def _moment(value: str | None) -> float | None:
    """A date of HTTP (RFC 9110 section 5.6.7) in seconds since the epoch."""
    try:
        moment = email.utils.parsedate_to_datetime(value or "")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def retry_after(status: int, headers: Mapping[str, str]) -> float | None:
    """For how many seconds the server asks not to be called: ``Retry-After`` (RFC 9110 section 10.2.3), or, with a 429
    without it, what a ``RateLimit-Reset`` says (a number of seconds, or, as Bluesky sends it, a moment). Six hours at
    most; ``None`` if it does not say."""
    seconds = _seconds(headers.get("Retry-After"))
    if seconds is None and status == 429:
        reset = _seconds(headers.get("RateLimit-Reset") or headers.get("X-RateLimit-Reset"))
        seconds = reset if reset is None or reset < _EPOCH else reset - time.time()
    return None if seconds is None else min(max(seconds, 0.0), _LONGEST_REST)


def _seconds(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        try:
            return float(Retry().parse_retry_after(value or ""))
        except (InvalidHeader, ValueError, OverflowError):
            return None
    return None if math.isnan(number) else number


# Members


def _text(document: Mapping[str, Any], name: str) -> str | None:
    value = document.get(name)
    return value if isinstance(value, str) and value else None


def _expiry(expires_in: object, asked_at: float) -> datetime | None:
    if isinstance(expires_in, str) and expires_in.isdecimal():
        expires_in = float(expires_in)
    if isinstance(expires_in, bool) or not isinstance(expires_in, int | float):
        return None
    if not 0 <= expires_in <= _LONGEST_LIFE:
        return None
    # To the millisecond, as it is stored.
    return datetime.fromtimestamp(int((asked_at + expires_in) * 1000) / 1000, UTC)
