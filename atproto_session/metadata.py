"""The client metadata document: what a client says of itself, and the rules it is held to.

An AT Protocol client is registered nowhere. Its ``client_id`` is the https URL of a JSON document that authorization
servers fetch (draft-ietf-oauth-client-id-metadata-document, with the AT Protocol OAuth profile on top). A client in
development has no such URL: its ``client_id`` is ``http://localhost`` with the few things that may vary in its query.

Everything is checked when a :class:`ClientMetadata` is made, so that a mistake shows at the start of the program and
not as a refused log-in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

from ._urls import check_url, origin
from .errors import ClientMetadataError, printable
from .keys import Keyset
from .permissions import permits

_SCOPE_TOKEN = r"[\x21\x23-\x5b\x5d-\x7e]+"  # noqa: S105 - RFC 6749 section 3.3 calls it that
_SCOPE = re.compile(f"{_SCOPE_TOKEN}(?: {_SCOPE_TOKEN})*")

_LOOPBACK_CLIENT_ID = re.compile(r"http://localhost/?(?:\?(?P<query>[!\"$-~]*))?")
#: What an authorization server assumes where the client_id says nothing.
_LOOPBACK_SCOPE = "atproto"
_LOOPBACK_REDIRECT_URIS = ("http://127.0.0.1/", "http://[::1]/")

#: What a served document must say. That of a development client is never served: its client_id says it all.
_NEEDED: tuple[str, ...] = (
    "client_id",
    "redirect_uris",
    "scope",
    "token_endpoint_auth_method",
    "grant_types",
    "response_types",
    "dpop_bound_access_tokens",
)
# Top-level domains that are nobody's (RFC 6761 and RFC 6762); authorization servers refuse them.
_RESERVED_DOMAINS = frozenset({"test", "local", "localhost", "invalid", "example"})
_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
#: By ``kty`` and ``crv``: the members that a public key has (RFC 7518 section 6, RFC 8037), and what it can sign with.
_KEY_KINDS: dict[tuple[object, object], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("RSA", None): (("n", "e"), ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
    ("EC", "P-256"): (("x", "y"), ("ES256",)),
    ("EC", "P-384"): (("x", "y"), ("ES384",)),
    ("EC", "P-521"): (("x", "y"), ("ES512",)),
    ("EC", "secp256k1"): (("x", "y"), ("ES256K",)),
    ("OKP", "Ed25519"): (("x",), ("EdDSA",)),
    ("OKP", "Ed448"): (("x",), ("EdDSA",)),
}
_RESPONSE_TYPES = frozenset(
    {
        *("code", "token", "none", "id_token"),
        *("code id_token token", "code id_token", "code token", "id_token token"),
    }
)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _never(value: object) -> bool:
    return False


#: Members that are not used here, and what authorization servers accept for them.
_ELSEWHERE: dict[str, Callable[[Any], bool]] = {
    "default_max_age": _never,
    "userinfo_signed_response_alg": _never,
    "userinfo_encrypted_response_alg": _never,
    "id_token_signed_response_alg": _never,
    "authorization_encrypted_response_enc": _never,
    "authorization_encrypted_response_alg": _is_text,
    "authorization_signed_response_alg": _is_text,
    "request_object_signing_alg": _is_text,
    "subject_type": lambda value: value == "public",
    "require_auth_time": lambda value: isinstance(value, bool),
    "tls_client_certificate_bound_access_tokens": lambda value: value is False,
    "authorization_details_types": lambda value: value == [],
    "contacts": lambda value: isinstance(value, list) and all(map(_is_address, value)),
}


def _is_address(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[^@\s]+@[^@\s.]+(?:\.[^@\s.]+)+", value) is not None


def parse_scope(text: str) -> tuple[str, ...]:
    """The scopes in ``text``, in order, each once (RFC 6749 section 3.3).

    :raises ValueError: ``text`` is not a list of scopes separated by single spaces.
    """
    if not isinstance(text, str) or not _SCOPE.fullmatch(text):
        raise ValueError("scope is not a list of scopes separated by single spaces")
    return tuple(dict.fromkeys(text.split(" ")))


def is_subset(scope: str, of: str) -> bool:
    """Whether every scope in ``scope`` is also one in ``of``. The order does not matter.

    :raises ValueError: one of them is not a list of scopes separated by single spaces.
    """
    return set(parse_scope(scope)) <= set(parse_scope(of))


@dataclass(frozen=True)
class ClientMetadata:
    """What the client says of itself (RFC 7591 section 2 with the AT Protocol profile). Immutable.

    A public client needs ``client_id`` and ``redirect_uris``. A confidential client says ``private_key_jwt`` for its
    ``token_endpoint_auth_method`` and has a :class:`~atproto_session.keys.Keyset`, whose public part is published in
    the document unless ``jwks_uri`` says that it is elsewhere. A client in development is made by :meth:`loopback`.

    :ivar client_id: the https URL that the document is served at; or that of a development client, which settles
        ``redirect_uris``, ``scope`` and ``application_type``.
    :ivar redirect_uris: where log-ins may return to, at least one.
    :ivar scope: every scope that may ever be asked for, separated by spaces, ``atproto`` among them.
    :ivar application_type: ``"web"`` or ``"native"``.
    :ivar client_uri: the client's home page: same origin as ``client_id``, and its path a parent of that one's.
    :ivar token_endpoint_auth_method: ``"none"`` or, for a confidential client, ``"private_key_jwt"``.
    :ivar token_endpoint_auth_signing_alg: ``"ES256"`` for a confidential client (also if left out), or ``None``.
    :ivar jwks_uri: where the client's public keys are, if they are not in the document.
    :ivar jwks: the client's public keys, if they are to be other than those of its keyset.
    :raises ClientMetadataError: a rule is broken; ``field`` says where.
    """

    client_id: str
    redirect_uris: Sequence[str] = ()
    scope: str = _LOOPBACK_SCOPE
    application_type: Literal["web", "native"] = "web"
    client_name: str | None = None
    client_uri: str | None = None
    logo_uri: str | None = None
    tos_uri: str | None = None
    policy_uri: str | None = None
    token_endpoint_auth_method: Literal["none", "private_key_jwt"] = "none"  # noqa: S105 - a method's name
    token_endpoint_auth_signing_alg: str | None = None
    jwks_uri: str | None = None
    jwks: Mapping[str, Any] | None = field(default=None, hash=False)
    grant_types: Sequence[str] = ("authorization_code", "refresh_token")
    response_types: Sequence[str] = ("code",)
    dpop_bound_access_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("redirect_uris", "grant_types", "response_types"):
            self._set(name, _text_tuple(getattr(self, name), name))
        for name, value in (("client_id", self.client_id), ("client_name", self.client_name)):
            if not isinstance(value, str) and not (name == "client_name" and value is None):
                raise _wrong(name, "it is not a string")
        _check_registered_scope(self.scope)
        if self.is_loopback:
            self._adopt_loopback()
        else:
            _check_client_id(self.client_id)
        self._check_grant()
        self._check_authentication()
        self._check_pages()
        if not self.redirect_uris:
            raise _wrong("redirect_uris", "at least one is needed")
        for uri in self.redirect_uris:
            self._check_registered_uri(uri)

    @classmethod
    def loopback(cls, scope: str = _LOOPBACK_SCOPE, redirect_uris: Sequence[str] = _LOOPBACK_REDIRECT_URIS) -> Self:
        """A client for development, which needs no web server: public, native, its ``client_id`` made here.

        :param redirect_uris: http URLs on ``127.0.0.1`` or ``[::1]``. Without a port, any port will do; the path must
            match.
        """
        registered = _text_tuple(redirect_uris, "redirect_uris")
        if not registered:
            raise _wrong("redirect_uris", "at least one is needed")
        _check_registered_scope(scope)
        # Byte for byte as the other implementations of the protocol do it: sessions belong to this client_id, and are
        # shared with them.
        query = [] if scope == _LOOPBACK_SCOPE else [("scope", scope)]
        if set(registered) != set(_LOOPBACK_REDIRECT_URIS):
            query += [("redirect_uri", uri) for uri in registered]
        encoded = urlencode(query, safe="*").replace("~", "%7E")  # as the URL Standard has it, not RFC 3986
        return cls("http://localhost" + (f"?{encoded}" if query else ""))

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """The metadata in a client metadata document, as parsed from JSON. Members not known here are left out, unless
        authorization servers refuse them.

        :raises ClientMetadataError: a rule is broken, or a member is missing for which a server would assume something
            that does not work here.
        """
        if not isinstance(document, Mapping):
            raise ClientMetadataError("a client metadata document is a JSON object")
        known = {f.name: document[f.name] for f in fields(cls) if f.name in document}
        for name in (*known, *_ELSEWHERE):
            if name in document and document[name] is None:
                raise _wrong(name, "it is null, which authorization servers refuse; leave it out")
        for name, is_accepted in _ELSEWHERE.items():
            if name in document and not is_accepted(document[name]):
                raise _wrong(name, "authorization servers refuse it; leave it out")
        needed = _NEEDED[:1] if str(known.get("client_id")).startswith("http://") else _NEEDED
        if known.get("token_endpoint_auth_method") == "private_key_jwt":
            needed += ("token_endpoint_auth_signing_alg", *(() if "jwks_uri" in known else ("jwks",)))
        for name in needed:
            if name not in known:
                raise _wrong(name, "the document does not have it")
        return cls(**known)

    @property
    def is_confidential(self) -> bool:
        """Whether the client authenticates with a key of its own."""
        return self.token_endpoint_auth_method == "private_key_jwt"  # noqa: S105 - a method's name

    @property
    def is_loopback(self) -> bool:
        """Whether this is a development client, whose document nobody fetches."""
        return self.client_id.startswith("http://")

    def document(self, keyset: Keyset | None = None) -> dict[str, Any]:
        """The document to serve at ``client_id``: status 200, ``application/json``, no redirect.

        :param keyset: the keys of a confidential client; their public parts go into the document unless it has
            ``jwks_uri`` or ``jwks``.
        :raises ClientMetadataError: the keyset does not go with the metadata, or is needed and missing.
        """
        self._check_is_keyset(keyset)
        if keyset is not None:
            self.check_with_keyset(keyset)
        members = ((f.name, getattr(self, f.name)) for f in fields(self))
        document = {n: list(value) if isinstance(value, tuple) else value for n, value in members if value is not None}
        if self.jwks is not None:
            document["jwks"] = {"keys": [dict(key) for key in self.jwks["keys"]]}
        elif self.is_confidential and self.jwks_uri is None:
            if keyset is None:
                raise _wrong("jwks", "a confidential client publishes its keys: give the keyset")
            document["jwks"] = keyset.jwks()
        return document

    def check_with_keyset(self, keyset: Keyset | None) -> None:
        """Check that the client has the keys it needs, and none that it would not use.

        :raises ClientMetadataError: it is confidential without a keyset, or public with one, or signs with a key that
            its own ``jwks`` does not publish.
        """
        self._check_is_keyset(keyset)
        if self.is_confidential and keyset is None:
            raise _wrong("keyset", "a client that authenticates with private_key_jwt needs one")
        if self.is_loopback and keyset is not None:
            raise _wrong("keyset", "a loopback client is public and has no keys: leave the keyset out in development")
        if not self.is_confidential and keyset is not None:
            raise _wrong("keyset", "it is not used unless token_endpoint_auth_method is private_key_jwt")
        if keyset is None or self.jwks is None:
            return
        published = {key["kid"]: (key.get("x"), key.get("y")) for key in self.jwks["keys"]}
        for key in keyset.jwks()["keys"]:
            if published.get(key["kid"]) != (key["x"], key["y"]):
                raise _wrong("jwks", f"the key {printable(key['kid'])} of the keyset is not published in it")

    def check_redirect_uri(self, uri: str) -> str:
        """``uri``, if a log-in may return there. A loopback URI registered without a port stands for every port
        (RFC 8252 section 7.3); all else must match exactly.

        :raises ClientMetadataError: ``uri`` is not registered.
        """
        if not isinstance(uri, str):
            raise _wrong("redirect_uri", "it is not a string")
        if uri in self.redirect_uris:
            return uri
        with suppress(ValueError):
            check_url(uri, allow_http=True)
            if uri.startswith("http://") and any(
                _is_same_but_for_port(registered, uri) for registered in self.redirect_uris
            ):
                return uri
        shown = ", ".join(printable(registered) for registered in self.redirect_uris[:5])
        raise _wrong("redirect_uri", f"it is not one of those in the client metadata ({shown})")

    def check_scope(self, scope: str) -> str:
        """``scope``, each of its scopes once, if a log-in may ask for it: they are registered, or permit no more than
        those that are.

        :raises ClientMetadataError: it lacks ``atproto``, or holds a scope that is not registered.
        """
        asked = _parsed_scope(scope)
        for token in asked:
            if token not in self.scope.split(" ") and not permits(self.scope, token):
                raise _wrong("scope", f"{printable(token)} is not among the scopes of the client metadata")
        return " ".join(asked)

    @staticmethod
    def _check_is_keyset(keyset: object) -> None:
        if not isinstance(keyset, Keyset | None):
            raise _wrong("keyset", f"it is a Keyset, such as Keyset.from_env(...), not {type(keyset).__name__}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _adopt_loopback(self) -> None:
        # The server knows a development client by its client_id alone; whatever else is said here must agree.
        scope, redirect_uris = _parse_loopback(self.client_id)
        if self.scope != _LOOPBACK_SCOPE and set(self.scope.split(" ")) != set(scope.split(" ")):
            raise _wrong("scope", "client_id stands for another; make it with ClientMetadata.loopback(scope=...)")
        if self.redirect_uris and set(self.redirect_uris) != set(redirect_uris):
            raise _wrong("redirect_uris", "client_id stands for others; make it with ClientMetadata.loopback()")
        self._set("scope", scope)
        self._set("redirect_uris", redirect_uris)
        self._set("application_type", "native")

    def _check_grant(self) -> None:
        if self.application_type not in ("web", "native"):
            raise _wrong("application_type", "it is neither web nor native")
        if sorted(self.grant_types) not in (["authorization_code"], ["authorization_code", "refresh_token"]):
            raise _wrong("grant_types", "it must be authorization_code and, for sessions that last, refresh_token")
        if "code" not in self.response_types or not set(self.response_types) <= _RESPONSE_TYPES:
            raise _wrong("response_types", "it must hold code, and nothing that is no response type")
        if self.dpop_bound_access_tokens is not True:
            raise _wrong("dpop_bound_access_tokens", "it must be true")

    def _check_authentication(self) -> None:
        if self.token_endpoint_auth_method not in ("none", "private_key_jwt"):
            raise _wrong("token_endpoint_auth_method", "it must be none or private_key_jwt")
        if self.jwks is not None and self.jwks_uri is not None:
            raise _wrong("jwks", "there may be jwks or jwks_uri, not both")
        if self.jwks is not None:
            self._set("jwks", _checked_jwks(self.jwks))
        if not self.is_confidential:
            if self.token_endpoint_auth_signing_alg is not None:
                raise _wrong(
                    "token_endpoint_auth_signing_alg",
                    "a client whose token_endpoint_auth_method is none does not have it",
                )
            return
        if self.application_type == "native":
            # Whatever ships to users is no secret (RFC 8252 section 8.5), and the reference server refuses it.
            raise _wrong("token_endpoint_auth_method", "a native client is public: it must be none")
        if self.token_endpoint_auth_signing_alg not in (None, "ES256"):
            raise _wrong("token_endpoint_auth_signing_alg", "it must be ES256")
        self._set("token_endpoint_auth_signing_alg", "ES256")

    def _check_pages(self) -> None:
        for name in ("logo_uri", "tos_uri", "policy_uri"):
            if (value := getattr(self, name)) is not None:
                _check_page(name, value, reserved=frozenset({"local"}))
        if self.jwks_uri is not None:
            _check_public_url("jwks_uri", self.jwks_uri)
        if self.client_uri is not None:
            _check_page("client_uri", self.client_uri, reserved=_RESERVED_DOMAINS)
        if self.client_uri is not None:
            ours, home = urlsplit(self.client_id), urlsplit(self.client_uri)
            if origin(self.client_uri) != origin(self.client_id):
                raise _wrong("client_uri", "it must have the same origin as client_id")
            if home.path != ours.path and not ours.path.startswith(home.path.removesuffix("/") + "/"):
                raise _wrong("client_uri", "its path must be a parent of the path of client_id")

    def _check_registered_uri(self, uri: str) -> None:
        name, is_native = "redirect_uris", self.application_type == "native"
        scheme = uri.partition(":")[0]
        if scheme == "http":
            try:
                check_url(uri, allow_http=True)
            except ValueError as error:
                raise _wrong(name, f"one {error}; http is for 127.0.0.1 and [::1] only") from None
            if urlsplit(uri).hostname == "localhost":
                raise _wrong(name, "write 127.0.0.1 or [::1] for localhost (RFC 8252 section 8.3)")
            if not is_native:
                raise _wrong(name, "a web client returns to https; only a native one may return to the loopback")
        elif self.is_loopback:
            raise _wrong(name, "a development client returns to http://127.0.0.1 or http://[::1]")
        elif scheme == "https":
            _check_public_url(name, uri)
            if urlsplit(uri).port == 443:
                raise _wrong(name, "the port of https is left out where it is 443")
            if is_native and origin(uri) != origin(self.client_id):
                raise _wrong(name, "a native client returns to https only on the origin of its client_id")
        elif not is_native:
            raise _wrong(name, "a web client returns to https")
        else:
            own = ".".join(reversed((urlsplit(self.client_id).hostname or "").split(".")))
            if not re.fullmatch(rf"{re.escape(own)}:/(?!/)[!-~]*", uri) or "#" in uri:
                raise _wrong(name, f"the scheme of a native client is that of its client_id, as in {own}:/callback")


def _wrong(name: str, problem: str) -> ClientMetadataError:
    return ClientMetadataError(f"{name}: {problem}", field=name)


def _text_tuple(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise _wrong(name, "it is not a list of strings")
    return tuple(value)


def _parsed_scope(scope: str) -> tuple[str, ...]:
    try:
        scopes = parse_scope(scope)
    except ValueError as error:
        raise ClientMetadataError(str(error), field="scope") from None
    if "atproto" not in scopes:
        raise _wrong("scope", "it must hold atproto")
    return scopes


def _checked_scope(scope: str) -> tuple[str, ...]:
    scopes = _parsed_scope(scope)
    if "transition:chat.bsky" in scopes and "transition:generic" not in scopes:
        raise _wrong("scope", "transition:chat.bsky needs transition:generic")
    return scopes


def _check_registered_scope(scope: str) -> None:
    if len(_checked_scope(scope)) != len(scope.split(" ")):
        raise _wrong("scope", "it holds a scope twice, which authorization servers refuse")


def _checked_jwks(jwks: object) -> dict[str, Any]:
    keys = jwks.get("keys") if isinstance(jwks, Mapping) else None
    if not isinstance(keys, list | tuple) or not keys or not all(isinstance(key, Mapping) for key in keys):
        raise _wrong("jwks", "it is not a JWKS with at least one key")
    kids: set[str] = set()
    for key in keys:
        if not _PRIVATE_MEMBERS.isdisjoint(key):
            raise _wrong("jwks", "it holds a private key; publish the public parts only, as Keyset.jwks() gives them")
        kid = key.get("kid")
        if not isinstance(kid, str) or not kid or kid in kids:
            raise _wrong("jwks", "every key needs a kid of its own")
        kids.add(kid)
        if (problem := _problem_of_key(key)) is not None:
            raise _wrong("jwks", f"authorization servers do not take the key {printable(kid)}: {problem}")
    return {"keys": [dict(key) for key in keys]}


def _problem_of_key(key: Mapping[str, Any]) -> str | None:
    """Why a public key is not one that a client can sign with (RFC 7517 section 4), or ``None``."""
    kind = key.get("kty"), key.get("crv")
    if not all(isinstance(text, str | None) for text in kind) or kind not in _KEY_KINDS:
        return "its kty and crv are of no kind that is known"
    members, algorithms = _KEY_KINDS[kind]
    if not all(isinstance(key.get(member), str) and key[member] for member in members):
        return f"it lacks {' or '.join(members)}"
    if "alg" in key and key["alg"] not in algorithms:
        return f"its alg is not {' or '.join(algorithms)}"
    if key.get("use", "sig") != "sig":
        return "its use is not sig"
    if key.get("key_ops", ["verify"]) != ["verify"]:
        return "its key_ops are not verify alone, which is all that a public key can do"
    return None


# URLs


def _check_page(name: str, url: object, *, reserved: Collection[str]) -> None:
    """A link for people. It may have a fragment."""
    _check_public_url(name, url.replace("#", "?", 1) if isinstance(url, str) else url, reserved=reserved)


def _check_public_url(name: str, url: object, *, reserved: Collection[str] = _RESERVED_DOMAINS) -> None:
    try:
        # There are hosts with an underscore in their names, and servers accept them.
        check_url(url.replace("_", "x") if isinstance(url, str) else url)
    except ValueError as error:
        raise _wrong(name, f"it {error}") from None
    host = urlsplit(str(url)).hostname or ""
    if not str(url).startswith("https://"):
        raise _wrong(name, "it must begin with https://, in lower case")
    if host.rpartition(".")[2] in reserved:
        raise _wrong(name, f"{printable(host)} is under a reserved domain, which no authorization server accepts")


def _check_client_id(client_id: str) -> None:
    _check_public_url("client_id", client_id)
    path = urlsplit(client_id).path
    if not client_id.startswith(origin(client_id) + "/") or urlsplit(client_id).port is not None:
        raise _wrong("client_id", "it must be https://, a host in lower case without a port, and a path")
    if path.endswith("/"):
        raise _wrong("client_id", "it needs a path such as /client-metadata.json, without a slash at its end")
    if not {".", ".."}.isdisjoint(path.lower().replace("%2e", ".").split("/")):
        raise _wrong("client_id", "its path must not have dot segments")


def _parse_loopback(client_id: str) -> tuple[str, tuple[str, ...]]:
    """The scope and the redirect URIs that a development client's ``client_id`` stands for."""
    match = _LOOPBACK_CLIENT_ID.fullmatch(client_id)
    if match is None:
        hint = "port and path go into the redirect_uris of ClientMetadata.loopback()"
        raise _wrong("client_id", f"it must be an https URL, or in development http://localhost alone; {hint}")
    scopes: list[str] = []
    redirect_uris: list[str] = []
    for name, value in parse_qsl(match["query"] or "", keep_blank_values=True):
        if name not in ("scope", "redirect_uri"):
            raise _wrong("client_id", f"only scope and redirect_uri may be in its query, not {printable(name)}")
        (scopes if name == "scope" else redirect_uris).append(value)
    scope = " ".join(scopes) if scopes else _LOOPBACK_SCOPE
    if len(scopes) > 1 or " ".join(_checked_scope(scope)) != scope:
        raise _wrong("client_id", "its scope, and every scope in it, may be there only once")
    return scope, tuple(redirect_uris) or _LOOPBACK_REDIRECT_URIS


def _is_same_but_for_port(registered: str, uri: str) -> bool:
    ours, theirs = urlsplit(registered), urlsplit(uri)
    return (
        ours.scheme == theirs.scheme == "http"
        and ours.hostname == theirs.hostname
        and ours.port in (None, theirs.port)
        and (ours.path or "/", ours.query) == (theirs.path or "/", theirs.query)
    )
