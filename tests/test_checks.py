"""What public calls make of arguments of the wrong kind: one clear error that names the argument."""

from __future__ import annotations

import inspect
import json
import os
import pickle
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import atproto_session
from atproto_session import (
    CachedGetter,
    ClientAuthMethod,
    ClientMetadata,
    ClientMetadataError,
    Freshness,
    JSONStore,
    Keyset,
    MemoryStore,
    OAuthClient,
    Session,
    SessionError,
    SessionGetter,
    SQLiteStore,
    StoreError,
    Times,
    TokenInfo,
    TokenSet,
    open_store,
    rotate_encryption,
)
from atproto_session.keys import generate_jwk

from .core import DID, KEY, FakeAuthority, make_session, make_tokens


class Other:
    """Nothing that anybody would expect."""


WRONG: dict[str, Any] = {
    "nothing": None,
    "bytes": b"x",
    "a list": ["x"],
    "an empty list": [],
    "a number": 7,
    "a fraction": 1.5,
    "less than nothing": -1,
    "not a number": float("nan"),
    "yes": True,
    "a mapping": {"a": 1},
    "a string": "x",
    "an empty string": "",
    "half a character": "\ud800",
    "a path": Path("no/such/place"),
    "a home": "~/sessions.db",
    "an object": Other(),
    "a class": Other,
    "a date": datetime(2026, 1, 1),
}
TEXTS = {"a string", "an empty string", "half a character", "a home"}
LISTS = {"a list", "an empty list", "a mapping"}
NUMBERS = {"a number", "a fraction", "less than nothing"}
PEM = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "get": (),
    "set": (make_session(),),
    "replace": (make_session(), None),
    "delete": (),
}


def store_of(kind: str) -> Any:
    if kind == "memory":
        return MemoryStore()
    return JSONStore("json") if kind == "json" else SQLiteStore("sqlite.db")


def client(**options: Any) -> OAuthClient:
    return OAuthClient(**{"metadata": ClientMetadata.loopback(), "store": "memory:", **options})


def getter(**options: Any) -> SessionGetter:
    return SessionGetter(**{"store": MemoryStore(), "authority": FakeAuthority(), **options})


def cached(**options: Any) -> CachedGetter[int]:
    return CachedGetter(**{"getter": lambda key, options, stored: 1, "store": MemoryStore(), **options})


def metadata(**members: Any) -> ClientMetadata:
    known = {"client_id": "https://app.example.com/m.json", "redirect_uris": ["https://app.example.com/cb"]}
    return ClientMetadata(**{**known, **members})


def tokens(**members: Any) -> TokenSet:
    known = {"iss": "i", "sub": DID, "aud": "a", "scope": "atproto", "refresh_token": "r", "access_token": "a"}
    return TokenSet(**{**known, **members})


def session(**members: Any) -> Session:
    return Session(**{"dpop_key": KEY, "auth_method": None, "token_set": make_tokens(), **members})


#: By call and argument: what takes the argument, and what of ``WRONG`` is good enough for it.
CALLS: dict[str, tuple[Callable[[Any], object], set[str]]] = {
    "OAuthClient metadata": (lambda value: client(metadata=value), set()),
    "OAuthClient store": (lambda value: client(store=value), {"a mapping"}),
    "OAuthClient keyset": (lambda value: client(keyset=value), {"nothing"}),
    "OAuthClient locks": (lambda value: client(locks=value), {"nothing"}),
    "OAuthClient encryption_keys": (
        lambda value: client(store="sqlite:///sessions.db", encryption_keys=value),
        {"an empty list"},
    ),
    "OAuthClient allow_plaintext": (lambda value: client(allow_plaintext=value), {"yes"}),
    "OAuthClient plc_directory": (lambda value: client(plc_directory=value), set()),
    "OAuthClient handle_resolver": (lambda value: client(handle_resolver=value), {"nothing", "an empty list"}),
    "OAuthClient allow_http": (lambda value: client(allow_http=value), {"yes"}),
    "OAuthClient timeout": (lambda value: client(timeout=value), {"a number", "a fraction"}),
    "OAuthClient on_session_updated": (lambda value: client(on_session_updated=value), {"nothing", "a class"}),
    "OAuthClient on_session_deleted": (lambda value: client(on_session_deleted=value), {"nothing", "a class"}),
    "OAuthClient freshness": (lambda value: client(freshness=value), {"nothing"}),
    "OAuthClient on_interrupted": (lambda value: client(on_interrupted=value), set()),
    "OAuthClient times": (lambda value: client(times=value), {"nothing"}),
    "OAuthClient strict": (lambda value: client(strict=value), {"yes"}),
    "OAuthClient trusted_hosts": (
        lambda value: client(trusted_hosts=value),
        {"a list", "an empty list", "a mapping"},
    ),
    "OAuthClient retries": (lambda value: client(retries=value), {"nothing", "a number", "less than nothing", "yes"}),
    "authorize account": (lambda value: client().authorize(value), TEXTS),
    "authorize scope": (lambda value: client().authorize("x.test", scope=value), {"nothing", "an empty string"}),
    "authorize redirect_uri": (
        lambda value: client().authorize("x.test", redirect_uri=value),
        {"nothing", "an empty string"},
    ),
    **{
        f"authorize {name}": (
            lambda value, name=name: client().authorize("x.test", **{name: value}),  # type: ignore[misc]
            {"nothing", "a string", "an empty string", "a home", *extra},
        )
        for name, extra in {
            "prompt": set(),
            "ui_locales": set(),
            "display": set(),
            "login_hint": set(),
            "state": {"half a character"},
            "bound_to": {"half a character"},
        }.items()
    },
    "authorize timeout": (lambda value: client().authorize("x.test", timeout=value), {"nothing", *NUMBERS}),
    "callback params": (lambda value: client().callback(value), {*TEXTS, "a mapping"}),
    "callback session_id": (lambda value: client().callback("?code=1", session_id=value), {"nothing", *TEXTS}),
    "callback bound_to": (lambda value: client().callback("?code=1", bound_to=value), {"nothing", *TEXTS, *LISTS}),
    "callback timeout": (lambda value: client().callback("?code=1", timeout=value), {"nothing", *NUMBERS}),
    "for_scripts scope": (lambda value: OAuthClient.for_scripts(scope=value, store="memory:"), TEXTS),
    "keep_alive idle": (lambda value: client().keep_alive(idle=value), NUMBERS),
    "keep_alive pace": (lambda value: client().keep_alive(pace=value), NUMBERS),
    "keep_alive timeout": (lambda value: client().keep_alive(timeout=value), {"nothing", *NUMBERS}),
    "keep_alive cancel": (lambda value: client().keep_alive(cancel=value), {"nothing"}),
    "keep_alive on_result": (lambda value: client().keep_alive(on_result=value), {"nothing", "a class"}),
    "restore did": (lambda value: client().restore(value), TEXTS),
    "restore refresh": (lambda value: client().restore(DID, value), {"yes"}),
    "restore session_id": (lambda value: client().restore(DID, session_id=value), {"nothing", *TEXTS}),
    "auth did": (lambda value: client().auth(value), TEXTS),
    "auth session_id": (lambda value: client().auth(DID, session_id=value), {"nothing", *TEXTS}),
    "revoke did": (lambda value: client().revoke(value), TEXTS),
    "revoke session_id": (lambda value: client().revoke(DID, session_id=value), {"nothing", *TEXTS}),
    "revoke timeout": (lambda value: client().revoke(DID, timeout=value), {"nothing", *NUMBERS}),
    "permits scope": (lambda value: TokenInfo(None, None, "", "", "", "").permits(value), TEXTS),
    "ClientMetadata client_id": (lambda value: metadata(client_id=value), set()),
    "ClientMetadata redirect_uris": (lambda value: metadata(redirect_uris=value), set()),
    "ClientMetadata scope": (lambda value: metadata(scope=value), set()),
    "ClientMetadata application_type": (lambda value: metadata(application_type=value), set()),
    "ClientMetadata client_name": (lambda value: metadata(client_name=value), {"nothing", *TEXTS}),
    **{
        f"ClientMetadata {name}": (lambda value, name=name: metadata(**{name: value}), {"nothing"})  # type: ignore[misc]
        for name in (
            *("client_uri", "logo_uri", "tos_uri", "policy_uri", "token_endpoint_auth_signing_alg"),
            *("jwks_uri", "jwks"),
        )
    },
    "ClientMetadata token_endpoint_auth_method": (lambda value: metadata(token_endpoint_auth_method=value), set()),
    "ClientMetadata grant_types": (lambda value: metadata(grant_types=value), set()),
    "ClientMetadata response_types": (lambda value: metadata(response_types=value), set()),
    "ClientMetadata dpop_bound_access_tokens": (lambda value: metadata(dpop_bound_access_tokens=value), {"yes"}),
    "ClientMetadata.loopback scope": (lambda value: ClientMetadata.loopback(scope=value), set()),
    "ClientMetadata.loopback redirect_uris": (lambda value: ClientMetadata.loopback(redirect_uris=value), set()),
    "ClientMetadata.from_document document": (ClientMetadata.from_document, set()),
    "ClientMetadata.document keyset": (lambda value: metadata().document(value), {"nothing"}),
    "ClientMetadata.check_with_keyset keyset": (lambda value: metadata().check_with_keyset(value), {"nothing"}),
    "ClientMetadata.check_redirect_uri redirect_uri": (lambda value: metadata().check_redirect_uri(value), set()),
    "ClientMetadata.check_scope scope": (lambda value: metadata().check_scope(value), set()),
    "Keyset keys": (Keyset, {"a list"}),
    "Keyset.of keys": (Keyset.of, {*TEXTS, "bytes", "a list", "an empty list", "a mapping"}),
    "Keyset.generate n": (Keyset.generate, {"a number", "yes"}),
    "Keyset.from_jwks jwks": (Keyset.from_jwks, {*TEXTS, "bytes", "a path", "a mapping"}),
    "Keyset.from_pem pem": (Keyset.from_pem, {*TEXTS, "bytes", "a path", "a mapping"}),
    "Keyset.from_pem kid": (lambda value: Keyset.from_pem(PEM, value), {"nothing", *TEXTS}),
    "Keyset.from_pem password": (lambda value: Keyset.from_pem(PEM, None, value), {"nothing", "an empty string"}),
    "Keyset.from_env name": (Keyset.from_env, {*TEXTS, "bytes", "a path", "a mapping"}),
    "Keyset.from_files path": (Keyset.from_files, {*TEXTS, "bytes", "a path", "a mapping"}),
    "SessionGetter store": (lambda value: getter(store=value), {"a mapping"}),
    "SessionGetter authority": (lambda value: getter(authority=value), set()),
    "SessionGetter locks": (lambda value: getter(locks=value), {"nothing"}),
    "SessionGetter freshness": (lambda value: getter(freshness=value), {"nothing"}),
    "SessionGetter timeout": (lambda value: getter(timeout=value), {"a number", "a fraction"}),
    "SessionGetter on_interrupted": (lambda value: getter(on_interrupted=value), set()),
    "SessionGetter client_id": (lambda value: getter(client_id=value), {"nothing", *TEXTS}),
    "SessionGetter times": (lambda value: getter(times=value), {"nothing"}),
    "get_session sub": (lambda value: getter().get_session(value), TEXTS),
    "get_session refresh": (lambda value: getter().get_session(DID, value), {"yes"}),
    "get_session rejected": (lambda value: getter().get_session(DID, rejected=value), {"nothing", *TEXTS}),
    "get_session timeout": (lambda value: getter().get_session(DID, timeout=value), {"nothing", *NUMBERS}),
    "get_session cancel": (lambda value: getter().get_session(DID, cancel=value), {"nothing"}),
    "get_stored sub": (lambda value: getter().get_stored(value), TEXTS),
    "set_stored sub": (lambda value: getter().set_stored(value, make_session()), TEXTS),
    "set_stored session": (lambda value: getter().set_stored(DID, value), set()),
    "set_stored stored": (
        lambda value: getter().set_stored(DID, make_session(), stored=value),
        {"nothing", "a class"},
    ),
    "delete_stored sub": (lambda value: getter().delete_stored(value), TEXTS),
    "delete_stored cause": (lambda value: getter().delete_stored(DID, value), {"nothing"}),
    "delete_stored revoke": (lambda value: getter().delete_stored(DID, revoke=value), {"yes"}),
    "delete_stored timeout": (lambda value: getter().delete_stored(DID, timeout=value), {"nothing", *NUMBERS}),
    "delete_unusable sub": (lambda value: getter().delete_unusable(value, make_session(), SessionError("x")), TEXTS),
    "delete_unusable session": (lambda value: getter().delete_unusable(DID, value, SessionError("x")), set()),
    "delete_unusable cause": (lambda value: getter().delete_unusable(DID, make_session(), value), set()),
    "end_grant session": (lambda value: getter().end_grant(value), set()),
    "delete_rejected sub": (lambda value: getter().delete_rejected(value, make_session(), SessionError("x")), TEXTS),
    "delete_rejected session": (lambda value: getter().delete_rejected(DID, value, SessionError("x")), set()),
    "delete_rejected cause": (lambda value: getter().delete_rejected(DID, make_session(), value), set()),
    "on_updated listener": (lambda value: getter().on_updated(value), {"a class"}),
    "on_deleted listener": (lambda value: getter().on_deleted(value), {"a class"}),
    "CachedGetter getter": (lambda value: cached(getter=value), {"a class"}),
    "CachedGetter store": (lambda value: cached(store=value), set()),
    "CachedGetter locks": (lambda value: cached(locks=value), {"nothing"}),
    **{
        f"CachedGetter {name}": (lambda value, name=name: cached(**{name: value}), {"nothing", "a class"})  # type: ignore[misc]
        for name in ("is_stale", "on_store_error", "delete_on_error")
    },
    "CachedGetter timeout": (lambda value: cached(timeout=value), {"a number", "a fraction"}),
    "CachedGetter share_failures": (lambda value: cached(share_failures=value), {"yes"}),
    "CachedGetter.get key": (lambda value: cached().get(value), TEXTS),
    "CachedGetter.get no_cache": (lambda value: cached().get("a", no_cache=value), {"yes"}),
    "CachedGetter.get allow_stale": (lambda value: cached().get("a", allow_stale=value), {"yes"}),
    "CachedGetter.get timeout": (lambda value: cached().get("a", timeout=value), {"nothing", *NUMBERS}),
    "CachedGetter.get cancel": (lambda value: cached().get("a", cancel=value), {"nothing"}),
    "open_store URL": (open_store, set()),
    "open_store encryption_keys": (
        lambda value: open_store("json:///sessions", encryption_keys=value),
        {"an empty list"},
    ),
    "open_store allow_plaintext": (lambda value: open_store("json:///sessions", allow_plaintext=value), {"yes"}),
    "JSONStore directory": (JSONStore, {"a string", "a path"}),
    "SQLiteStore path": (SQLiteStore, {"a string", "a path", "an empty string"}),
    "SQLiteStore busy_timeout": (lambda value: SQLiteStore("s.db", busy_timeout=value), {"a number", "a fraction"}),
    "MemoryStore max_entries": (MemoryStore, {"nothing", "a number", "yes"}),
    **{
        f"{kind} {method} key": (
            lambda value, kind=kind, method=method: getattr(store_of(kind), method)(value, *ARGUMENTS[method]),  # type: ignore[misc]
            TEXTS,
        )
        for kind in ("memory", "json", "sqlite")
        for method in ("get", "set", "replace", "delete")
    },
    **{
        f"{kind} {method} {name}": (
            lambda value, kind=kind, call=call: call(store_of(kind), value),  # type: ignore[misc]
            good,
        )
        for kind in ("json", "sqlite")
        for method, name, call, good in (
            ("set", "session", lambda store, value: store.set(DID, value), set()),
            ("replace", "session", lambda store, value: store.replace(DID, value, None), {"nothing"}),
            ("replace", "expected", lambda store, value: store.replace(DID, make_session(), value), {"nothing"}),
        )
    },
    "rotate_encryption store": (rotate_encryption, set()),
    "rotate_encryption locks": (lambda value: rotate_encryption(store_of("memory"), locks=value), {"nothing"}),
    "rotate_encryption timeout": (
        lambda value: rotate_encryption(store_of("memory"), timeout=value),
        {"a number", "a fraction"},
    ),
    **{
        f"TokenSet {name}": (lambda value, name=name: tokens(**{name: value}), TEXTS)  # type: ignore[misc]
        for name in ("iss", "sub", "aud", "scope", "access_token", "token_type")
    },
    "TokenSet refresh_token": (lambda value: tokens(refresh_token=value), {"nothing", *TEXTS}),
    "TokenSet expires_at": (lambda value: tokens(expires_at=value), {"nothing"}),
    "Session dpop_key": (lambda value: session(dpop_key=value), {"a mapping"}),
    "Session auth_method": (lambda value: session(auth_method=value), {"nothing"}),
    "Session token_set": (lambda value: session(token_set=value), set()),
    "ClientAuthMethod method": (ClientAuthMethod, set()),
    "ClientAuthMethod kid": (lambda value: ClientAuthMethod("none", value), {"nothing", *TEXTS}),
    "Freshness margin": (lambda value: Freshness(margin=value), {"a number", "a fraction"}),
    "Freshness jitter": (lambda value: Freshness(jitter=value), {"a number", "a fraction"}),
    "Freshness clock": (lambda value: Freshness(clock=value), {"a class"}),
    "Freshness random": (lambda value: Freshness(random=value), {"a class"}),
    **{
        f"Times {name}": (lambda value, name=name: Times(**{name: value}), {"a number", "a fraction"})  # type: ignore[misc]
        for name in vars(Times())
    },
}


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_of_the_wrong_kind_is_named(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.chdir(tmp_path)
    do, good = CALLS[call]
    name = call.split(" ")[-1].lower()
    for kind, value in WRONG.items():
        try:
            do(value)
        except SessionError as error:
            message = str(error)
        except (TypeError, ValueError) as error:
            message = "" if isinstance(error, UnicodeError) else str(error)
        else:
            assert kind in good, f"{kind} is taken"
            continue
        assert kind in good or name in message.lower(), f"{kind}: {message}"
        assert len(message) < 600


def test_every_public_call_is_tried() -> None:
    """Every parameter of what is exported, apart from events and errors, which are made here and not by users."""
    made_here = {
        "Account",
        "CallbackResult",
        "CleanResult",
        "KeepAliveResult",
        "GetOptions",
        "OAuthSession",
        "SessionDeletedEvent",
        "SessionUpdatedEvent",
        "TokenInfo",
    }
    # open_store() calls the first; the others take what this library has made.
    of_records = {"from_url", "is_stale", "is_expired", "seconds_left"}
    of_records |= {"has_same_tokens", "has_same_server", "is_same_grant"}
    tried = {word for call in CALLS for word in call.replace(".", " ").split(" ")}
    missing = []
    for name in atproto_session.__all__:
        thing = getattr(atproto_session, name)
        if name in made_here or (inspect.isclass(thing) and issubclass(thing, Exception)):
            continue
        if name not in tried:
            missing.append(name)
        if inspect.isclass(thing):
            own = {each: value for each, value in vars(thing).items() if not each.startswith("_")}
            methods = [each for each, value in own.items() if isinstance(value, FunctionType | classmethod)]
            taking = [each for each in methods if set(inspect.signature(getattr(thing, each)).parameters) - {"self"}]
            missing += [f"{name}.{each}" for each in taking if each not in {*tried, *of_records}]
    assert missing == []


@pytest.mark.parametrize(
    ("thing", "instead"),
    [
        (client, "make one in each process"),
        (getter, "make one in each process"),
        (cached, "make one in each process"),
        (Keyset.generate, "have each process read the keys"),
        (lambda: client().auth(DID), "call it again"),
        (MemoryStore, "which each of them opens"),
        (lambda: store_of("json"), "open it in each process"),
        (lambda: store_of("sqlite"), "open it in each process"),
    ],
)
def test_what_belongs_to_its_process_says_what_to_send_instead(
    thing: Callable[[], object], instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=instead):
        pickle.dumps(thing())


def test_the_home_of_a_user_is_known_to_shells_only() -> None:
    with pytest.raises(ClientMetadataError, match=r"os\.path\.expanduser"):
        Keyset.from_files("~/key.pem")
    with pytest.raises(StoreError, match=r"os\.path\.expanduser"):
        JSONStore("~/sessions")


def test_the_path_of_a_key_may_be_bytes(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    path.write_text(json.dumps(generate_jwk()))
    assert len(Keyset.from_files(os.fsencode(path))) == 1  # type: ignore[arg-type]
