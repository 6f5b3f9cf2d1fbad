"""The records: what a session is, when it is fresh, and the document it is stored as.

The stored document is the one that ``@atproto/oauth-client-node`` stores, so that a session saved by either library is
restored by the other::

    {"dpopJwk": {...}, "authMethod": {...}, "tokenSet": {...}, "atprotoSession": {...}}

The last member is this library's own: the attempt that a refresh leaves before it sends a request, and the times.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, NoReturn

from . import permissions
from ._checks import check_functions, check_kind, check_seconds, check_texts

#: Documents with a higher version were written by a later release, which may mean something else by them.
DOCUMENT_VERSION = 1
_OWN_MEMBER = "atprotoSession"
#: In characters. Servers take 8 to 64 KiB of headers in all.
_LONGEST_TOKEN = 64 * 1024


@dataclass(frozen=True)
class TokenSet:
    """What the authorization server issued (RFC 6749 section 5.1 with the AT Protocol profile). Immutable.

    :ivar iss: the authorization server's issuer.
    :ivar sub: the account's DID.
    :ivar aud: the origin of the account's PDS, where the access token is used.
    :ivar scope: the scopes that were granted, separated by spaces.
    :ivar refresh_token: works once; ``None`` if the server gave none.
    :ivar expires_at: when the access token expires, an aware ``datetime``, or ``None`` if the server did not say.
    :raises ValueError: ``expires_at`` has no time zone.
    :raises TypeError: a member is of another kind than it has to be; the message names it.
    """

    iss: str
    sub: str
    aud: str
    scope: str
    refresh_token: str | None = field(repr=False)
    access_token: str = field(repr=False)
    token_type: str = "DPoP"  # noqa: S105 - a scheme's name
    expires_at: datetime | None = None

    def __post_init__(self) -> None:
        check_texts(
            iss=self.iss,
            sub=self.sub,
            aud=self.aud,
            scope=self.scope,
            access_token=self.access_token,
            token_type=self.token_type,
        )
        check_texts(refresh_token=self.refresh_token, optional=True)
        check_kind("expires_at", self.expires_at, datetime, "an aware datetime", optional=True)
        if self.expires_at is not None and self.expires_at.tzinfo is None:
            raise ValueError("expires_at must carry a time zone; a local time without one means nothing elsewhere")

    def has_same_tokens(self, other: TokenSet) -> bool:
        """Whether both hold the same tokens, whatever else is recorded with them."""
        return self.access_token == other.access_token and self.refresh_token == other.refresh_token


@dataclass(frozen=True)
class ClientAuthMethod:
    """How the client authenticates for one session: ``"none"``, or ``"private_key_jwt"`` (RFC 7523) with the key
    ``kid``. A session keeps the method and the key that it began with.

    :raises ValueError: ``method`` is neither of the two.
    :raises TypeError: ``kid`` is no string.
    """

    method: Literal["none", "private_key_jwt"]
    kid: str | None = None

    def __post_init__(self) -> None:
        check_texts(kid=self.kid, optional=True)
        if self.method not in ("none", "private_key_jwt"):
            raise ValueError('method is "none" or "private_key_jwt"')


@dataclass(frozen=True)
class Attempt:
    """The trace of a refresh request that may have left and whose answer has not been stored. Never holds a token.

    :ivar id: tells this attempt from every other.
    :ivar by: the worker that made it: its host, its machine's boot and namespaces, its process and when that was
        started.
    :ivar started_at: when, seconds since the epoch.
    :ivar answer_by: until when its answer can still come, seconds since the epoch. A worker that waits for an answer
        moves it on.
    :ivar answers_lost: how many attempts on the same refresh token ended without an answer before this one.
    :ivar lock: the lock under which it was made (:attr:`.Hold.lock`).
    :ivar is_over: its worker has given up; no answer will come.
    """

    id: str
    by: str
    started_at: float
    answer_by: float
    answers_lost: int = 0
    lock: str = ""
    is_over: bool = False


@dataclass(frozen=True)
class Rest:
    """A refresh failed, and the server is left alone for a while.

    :ivar until: for how long, seconds since the epoch.
    :ivar failures: how many refreshes have failed one after the other.
    :ivar error: the name of the error's class.
    :ivar message: its text, which holds no secret.
    :ivar details: its attributes: strings, numbers, booleans and ``None``.
    """

    until: float
    failures: int
    error: str
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)


class ReadOnly(dict[str, Any]):
    """A JSON object that cannot be changed, since it is shared with others that read the session."""

    def _refuse(self, *args: object, **names: object) -> NoReturn:
        raise TypeError("the key of a session cannot be changed; dict(key) is a copy of it")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy is its owner's


@dataclass(frozen=True)
class Session:
    """One account's session. Immutable: a refresh makes a new one.

    :ivar dpop_key: the private ES256 JWK that the tokens are bound to (RFC 9449). A log-in makes a new one, a refresh
        keeps it, so two records with the same key belong to the same grant.
    :ivar auth_method: how the client authenticates, or ``None`` in documents from before that was recorded.
    :ivar attempt: a refresh that may have been sent and is not accounted for, or ``None``.
    :ivar rest: why, and until when, the authorization server is not asked again, or ``None``.
    :ivar client_id: the client that got the session, and the only one that can refresh it; ``None`` where that was not
        recorded (``@atproto/oauth-client-node`` does not).
    :ivar began_at: when the account logged in, seconds since the epoch, where known.
    :ivar refreshed_at: when the tokens were stored, seconds since the epoch, where known.
    :ivar after_lost_answer: the refresh that brought these tokens followed one whose answer was lost. Should the server
        come to that other request only now, it will take it for a replay.
    :raises TypeError: a member is of another kind than it has to be; the message names it.
    """

    dpop_key: Mapping[str, Any] = field(repr=False)
    auth_method: ClientAuthMethod | None
    token_set: TokenSet
    attempt: Attempt | None = None
    rest: Rest | None = None
    client_id: str | None = None
    began_at: float | None = None
    refreshed_at: float | None = None
    after_lost_answer: bool = False

    def __post_init__(self) -> None:
        check_kind("dpop_key", self.dpop_key, Mapping, "a JWK, as a mapping")
        check_kind("auth_method", self.auth_method, ClientAuthMethod, "a ClientAuthMethod", optional=True)
        check_kind("token_set", self.token_set, TokenSet, "a TokenSet")
        if type(self.dpop_key) is not ReadOnly:
            object.__setattr__(self, "dpop_key", ReadOnly(self.dpop_key))

    def has_same_server(self, other: Session) -> bool:
        """Whether both are refreshed by the same authorization server, in the same way."""
        return self.token_set.iss == other.token_set.iss and self.auth_method == other.auth_method

    def is_same_grant(self, other: Session) -> bool:
        """Whether both come from the same log-in."""
        return all(self.dpop_key.get(name) == other.dpop_key.get(name) for name in ("crv", "x", "y"))


@dataclass(frozen=True)
class TokenInfo:
    """What may be shown of a session's tokens.

    :ivar expired: whether the access token has expired, or ``None`` if the server did not say when it does.
    :ivar scope: the scopes that were granted, separated by spaces. They may be fewer than were asked for.
    """

    expires_at: datetime | None
    expired: bool | None
    scope: str
    iss: str
    aud: str
    sub: str

    def permits(self, scope: str) -> bool:
        """Whether the account has granted what ``scope`` names, by the rules of the AT Protocol permission
        specification. No request is made: the account's server has the last word.

        ``repo:app.bsky.feed.post?action=create``, ``rpc:com.example.getFeed?aud=did:web:api.example.com%23feeds``,
        ``blob:image/png``, ``account:email``, ``identity:handle`` and the like are also granted by wider scopes, and by
        the ``transition:`` scopes that stand for them. Any other name is granted only as such. What breaks the rules is
        never granted.

        Servers write the permissions of an ``include:`` scope into the granted scopes in its place, as the reference
        server does. Ask for those. What an ``include:`` that a server has left as it is holds cannot be known here: it
        permits itself, and nothing else. :func:`.permissions.expand` lists what a permission set holds.

        :param scope: one scope, or several, separated by spaces: then all have to be granted. A wildcard asks for all
            that it stands for; ``repo:app.bsky.feed.post`` asks for all three actions.
        :raises TypeError: ``scope`` is no string.
        """
        return permissions.permits(self.scope, scope)


@dataclass(frozen=True)
class SessionUpdatedEvent:
    """A session was stored. ``sub`` is the key it is stored under (the DID, or ``did#session_id``)."""

    sub: str
    dpop_key: Mapping[str, Any] = field(repr=False)
    auth_method: ClientAuthMethod | None
    token_set: TokenSet


@dataclass(frozen=True)
class SessionDeletedEvent:
    """A session was deleted. ``sub`` is the key it was stored under, ``cause`` the error that says why."""

    sub: str
    cause: BaseException


@dataclass(frozen=True)
class Freshness:
    """When a token set is worth refreshing.

    *Stale* is an access token with less than ``margin`` seconds left plus a random part of up to ``jitter`` seconds,
    drawn anew for every check so that many workers do not all turn to the server in the same instant. A token set
    without ``expires_at`` is never stale. *Expired* is one whose time has come.

    :raises TypeError: ``margin`` or ``jitter`` is no number, or ``clock`` or ``random`` no function.
    :raises ValueError: ``margin`` or ``jitter`` is less than 0.
    """

    margin: float = 10.0
    jitter: float = 30.0
    clock: Callable[[], float] = time.time
    random: Callable[[], float] = random.random

    def __post_init__(self) -> None:
        check_seconds(margin=self.margin, jitter=self.jitter)
        check_functions(clock=self.clock, random=self.random)

    def is_stale(self, token_set: TokenSet) -> bool:
        """Whether the access token is worth refreshing."""
        left = self.seconds_left(token_set)
        # The random number is drawn only where it can decide: most reads are of tokens with a long life ahead.
        if left is None or left >= self.margin + self.jitter:
            return False
        return left < self.margin or left < self.margin + self.jitter * self.random()

    def is_expired(self, token_set: TokenSet) -> bool:
        """Whether the access token's time has come; ``False`` where the server did not say when it does."""
        left = self.seconds_left(token_set)
        return left is not None and left <= 0

    def seconds_left(self, token_set: TokenSet) -> float | None:
        """How long the access token still lives; ``None`` where the server did not say."""
        return None if token_set.expires_at is None else token_set.expires_at.timestamp() - self.clock()


def subject_of(key: str) -> str:
    """The DID in a storage key, which is a DID or ``did#session_id``."""
    return key.partition("#")[0]


def fault_in(tokens: TokenSet, sub: str) -> str | None:
    """Why newly issued tokens must not be used for the account ``sub``, if so (AT Protocol OAuth, "tokens and session
    lifetime": every token response names the account, has the scope ``atproto`` and is bound by DPoP)."""
    if tokens.sub != sub:
        return "tokens of another account"
    if "atproto" not in tokens.scope.split():
        return "tokens without the scope atproto"
    if tokens.token_type.lower() != "dpop":
        return "tokens that are not bound to its key"
    if not all(is_token(token) for token in (tokens.access_token, tokens.refresh_token or "")):
        return "tokens that no header can carry"
    return None


def is_token(text: str) -> bool:
    """Whether ``text`` has only characters that a token may have (RFC 6749 appendix A.12), and not more of them than
    any server would take in a header."""
    return len(text) <= _LONGEST_TOKEN and text.isascii() and text.isprintable()


# The stored document


def to_document(key: str, session: Session) -> dict[str, Any]:
    """The JSON object that ``session`` is stored as."""
    tokens = session.token_set
    token_set = {
        "iss": tokens.iss,
        "sub": tokens.sub,
        "aud": tokens.aud,
        "scope": tokens.scope,
        "refresh_token": tokens.refresh_token,
        "access_token": tokens.access_token,
        "token_type": tokens.token_type,
        "expires_at": None if tokens.expires_at is None else _to_iso(tokens.expires_at),
    }
    attempt, rest = session.attempt, session.rest
    own = {
        "version": DOCUMENT_VERSION,
        "key": key,
        "clientId": session.client_id,
        "beganAt": session.began_at,
        "refreshedAt": session.refreshed_at,
        "afterLostAnswer": session.after_lost_answer or None,
        "attempt": attempt
        and {
            "id": attempt.id,
            "by": attempt.by,
            "startedAt": attempt.started_at,
            "answerBy": attempt.answer_by,
            "answersLost": attempt.answers_lost,
            "lock": attempt.lock,
            "isOver": attempt.is_over,
        },
        "rest": rest
        and {
            "until": rest.until,
            "failures": rest.failures,
            "error": rest.error,
            "message": rest.message,
            "details": dict(rest.details),
        },
    }
    document: dict[str, Any] = {"dpopJwk": dict(session.dpop_key)}
    if (method := session.auth_method) is not None:
        document["authMethod"] = {"method": method.method} | ({} if method.kid is None else {"kid": method.kid})
    document["tokenSet"] = {name: value for name, value in token_set.items() if value is not None}
    document[_OWN_MEMBER] = {name: value for name, value in own.items() if value is not None}
    return document


def from_document(key: str, document: object) -> Session:
    """The session in a stored document.

    :raises ValueError: the document is not a session's, is another key's, or was written by a later release. The
        message names the member at fault and never holds a value.
    """
    members = _mapping(document, "the document")
    own = _mapping(members.get(_OWN_MEMBER, {}), _OWN_MEMBER)
    if (_number(own, "version") or 0) > DOCUMENT_VERSION:
        raise ValueError("it was written by a later release of this library; upgrade this worker")
    if own.get("key", key) != key:
        raise ValueError("it is the record of another key")
    tokens = _mapping(members.get("tokenSet"), "tokenSet")
    expires_at = tokens.get("expires_at")
    return Session(
        dpop_key=_mapping(members.get("dpopJwk"), "dpopJwk"),
        auth_method=_auth_method(members.get("authMethod")),
        token_set=TokenSet(
            iss=_text(tokens, "iss"),
            sub=_text(tokens, "sub"),
            aud=_text(tokens, "aud"),
            scope=_text(tokens, "scope"),
            refresh_token=None if tokens.get("refresh_token") is None else _token(tokens, "refresh_token"),
            access_token=_token(tokens, "access_token"),
            token_type=_text(tokens, "token_type"),
            expires_at=None if expires_at is None else _from_iso(expires_at),
        ),
        attempt=_attempt(own.get("attempt")),
        rest=_rest(own.get("rest")),
        client_id=None if own.get("clientId") is None else _text(own, "clientId"),
        began_at=_number(own, "beganAt"),
        refreshed_at=_number(own, "refreshedAt"),
        after_lost_answer=own.get("afterLostAnswer") is True,
    )


def _auth_method(value: object) -> ClientAuthMethod | None:
    if value is None or value == "legacy":
        return None
    members = _mapping(value, "authMethod")
    method = members.get("method")
    if method == "none":
        return ClientAuthMethod("none")
    if method == "private_key_jwt":
        return ClientAuthMethod("private_key_jwt", _text(members, "kid"))
    raise ValueError("authMethod names no method that is known here")


def _attempt(value: object) -> Attempt | None:
    if value is None:
        return None
    members = _mapping(value, "attempt")
    return Attempt(
        id=_text(members, "id"),
        by=_text(members, "by"),
        started_at=_number(members, "startedAt") or 0.0,
        answer_by=_number(members, "answerBy") or 0.0,
        answers_lost=int(_number(members, "answersLost") or 0),
        lock=_text(members, "lock") if members.get("lock") else "",
        is_over=members.get("isOver") is True,
    )


def _rest(value: object) -> Rest | None:
    if value is None:
        return None
    members = _mapping(value, "rest")
    return Rest(
        until=_number(members, "until") or 0.0,
        failures=int(_number(members, "failures") or 0),
        error=_text(members, "error"),
        message=_text(members, "message"),
        details=_mapping(members.get("details", {}), "details"),
    )


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object")  # noqa: TRY004 - bad data, not a bad call
    return value


def _text(members: Mapping[str, Any], name: str) -> str:
    value = members.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is missing or not a string")
    return value


def _token(members: Mapping[str, Any], name: str) -> str:
    token = _text(members, name)
    if not is_token(token):
        raise ValueError(f"{name} has characters that no token has")
    return token


def _number(members: Mapping[str, Any], name: str) -> float | None:
    value = members.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is not a number")  # noqa: TRY004 - bad data, not a bad call
    try:
        number = float(value)
    except OverflowError:  # JSON has no bound on integers
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is not a finite number")
    return number


def _to_iso(moment: datetime) -> str:
    # Milliseconds and a Z, as JavaScript's Date.toISOString writes it.
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _from_iso(value: object) -> datetime:
    if not isinstance(value, str):
        raise ValueError("expires_at is not a date")  # noqa: TRY004 - bad data, not a bad call
    try:
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("expires_at is not a date") from None
