"""What scopes permit, by the rules of the AT Protocol permission specification (atproto.com/specs/permission), and for
the ``transition:`` scopes of the AT Protocol OAuth profile as the reference PDS has it.

A scope is ``resource[:positional][?name=value&...]``: the positional value is another way to write one parameter, and
a parameter may be given several times where several values make sense. What breaks the rules permits nothing.
"""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote

_NSID = (
    r"[a-zA-Z](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)+"
    r"\.[a-zA-Z][a-zA-Z0-9]{0,62}"
)
_LONGEST_NSID = 317
_SERVICE = (
    r"did:(?:plc:[a-z2-7]{24}|web:(?:localhost(?:%3A[0-9]{1,5})?|(?P<host>[A-Za-z0-9._-]+)))"
    r"#(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})+"
)
_ENDS_IN_A_NUMBER = r"(?:.*\.)?(?:[0-9]+|0[xX][0-9a-fA-F]*)\.?"
_MEDIA_RANGE = r"\*/\*|[^/ ]+/\*|[^/* ]+/[^/* ]+"


def _is_nsid(text: str) -> bool:
    return len(text) <= _LONGEST_NSID and re.fullmatch(_NSID, text) is not None


def _is_nsid_or_all(text: str) -> bool:
    return text == "*" or _is_nsid(text)


def _is_service(text: str) -> bool:
    """Whether ``text`` is the DID of an account or a server with the name of a service, as in
    ``did:web:api.example.com#appview``."""
    match = re.fullmatch(_SERVICE, text)
    if match is None or not re.fullmatch(_ENDS_IN_A_NUMBER, match["host"] or ""):
        return match is not None
    try:
        return bool(socket.inet_aton(match["host"].removesuffix(".")))  # as browsers read it, short forms included
    except OSError:
        return False


def _is_service_or_all(text: str) -> bool:
    return text == "*" or _is_service(text)


def _is_media_range(text: str) -> bool:
    return re.fullmatch(_MEDIA_RANGE, text) is not None


def _covers_all(value: str, asked: str) -> bool:
    return value in ("*", asked)


def _covers_itself(value: str, asked: str) -> bool:
    return value == asked


def _covers_action(value: str, asked: str) -> bool:
    return value in ("manage", asked)


def _covers_media(value: str, asked: str) -> bool:
    return value in ("*/*", asked) or (value.endswith("/*") and asked.startswith(value[:-1]))


class _Parameter(NamedTuple):
    """
    :ivar is_valid: whether a value may stand for it.
    :ivar covers: whether a granted value (the first) permits one that is asked for.
    :ivar has_many: whether it may be given several times.
    :ivar default: its values where it is left out; without them it may not be.
    """

    is_valid: Callable[[str], bool]
    covers: Callable[[str, str], bool] = _covers_itself
    has_many: bool = False
    default: tuple[str, ...] | None = None


_REPO_ACTIONS = ("create", "update", "delete")
#: By resource, its parameters; the first is the positional one.
_RESOURCES: dict[str, dict[str, _Parameter]] = {
    "repo": {
        "collection": _Parameter(_is_nsid_or_all, _covers_all, has_many=True),
        "action": _Parameter(_REPO_ACTIONS.__contains__, has_many=True, default=_REPO_ACTIONS),
    },
    "rpc": {
        "lxm": _Parameter(_is_nsid_or_all, _covers_all, has_many=True),
        "aud": _Parameter(_is_service_or_all, _covers_all),
    },
    "blob": {"accept": _Parameter(_is_media_range, _covers_media, has_many=True)},
    "account": {
        "attr": _Parameter(("email", "repo", "status").__contains__),
        "action": _Parameter(("read", "manage").__contains__, _covers_action, has_many=True, default=("read",)),
    },
    "identity": {"attr": _Parameter(("handle", "*").__contains__, _covers_all)},
    # No permission itself: it stands for those of a permission set.
    "include": {"nsid": _Parameter(_is_nsid), "aud": _Parameter(_is_service, default=())},
}
_Values = Mapping[str, tuple[str, ...]]


class _Scope(NamedTuple):
    resource: str
    values: _Values


def permits(granted: str, scope: str) -> bool:
    """Whether the scopes ``granted`` permit all that ``scope`` names.

    :param granted: scopes, separated by spaces.
    :param scope: one scope, or several, separated by spaces: then all have to be permitted. A wildcard asks for
        everything that it stands for, and an action that is left out for all that the scope has without it.
    :raises TypeError: one of them is no string.
    """
    _check_texts(granted=granted, scope=scope)
    tokens = frozenset(granted.split())
    known = [each for each in map(_parse, tokens) if each is not None]
    asked = scope.split()
    return bool(asked) and all(_is_permitted(tokens, known, each) for each in asked)


def missing(granted: str, asked: str) -> list[str]:
    """Which of the scopes ``asked`` have not been granted. An ``include:`` counts as granted if anything is that its
    permission set may hold: nobody but the server knows what it does hold.

    :raises TypeError: one of them is no string.
    """
    _check_texts(granted=granted, asked=asked)
    tokens = frozenset(granted.split())
    known = [each for each in map(_parse, tokens) if each is not None]
    return [
        scope
        for scope in asked.split()
        if not (scope in tokens or _is_permitted(tokens, known, scope) or _is_expanded(known, scope))
    ]


def expand(include: str, permission_set: Mapping[str, Any]) -> list[str]:
    """The scopes that a server makes of ``include``, an ``include:`` scope, if ``permission_set`` is the main
    definition of the lexicon that it names. To ask for them: ``all(map(token_info.permits, expand(...)))``.

    Of a set, only ``repo`` and ``rpc`` permissions count, below the set's own namespace.

    :raises ValueError: ``include`` is no ``include:`` scope, or ``permission_set`` is no permission set.
    """
    scope = _parse(include) if isinstance(include, str) else None
    if scope is None or scope.resource != "include":
        raise ValueError("include is no include: scope, such as include:com.example.authBasic")
    permissions = permission_set.get("permissions") if isinstance(permission_set, Mapping) else None
    if not isinstance(permissions, list | tuple) or not all(isinstance(each, Mapping) for each in permissions):
        raise ValueError('permission_set is no permission set: its "permissions" are not a list of objects')
    included = (_included(scope, permission) for permission in permissions)
    return [_format(each) for each in included if each is not None]


def _check_texts(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise TypeError(
                f"{name} is a string, such as 'repo:app.bsky.feed.post?action=create', not {type(value).__name__}"
            )


def _is_permitted(tokens: frozenset[str], known: Iterable[_Scope], scope: str) -> bool:
    asked = _parse(scope)
    if asked is None:  # a name that means something to others, as atproto does, or nothing
        return scope in tokens and _resource_of(scope) not in _RESOURCES
    if asked.resource == "include":
        return asked in known
    same = [each.values for each in known if each.resource == asked.resource]
    parameters = _RESOURCES[asked.resource]
    # Each single thing that is asked for may be permitted by another scope.
    return all(
        _is_transitional(tokens, asked.resource, single)
        or any(
            all(any(parameters[name].covers(value, single[name]) for value in values[name]) for name in parameters)
            for values in same
        )
        for single in (dict(zip(parameters, each, strict=True)) for each in itertools.product(*asked.values.values()))
    )


def _is_transitional(tokens: frozenset[str], resource: str, asked: Mapping[str, str]) -> bool:
    """Whether one of the ``transition:`` scopes permits it."""
    if resource == "account":
        return "transition:email" in tokens and asked == {"attr": "email", "action": "read"}
    if resource == "rpc" and asked["lxm"].startswith("chat.bsky."):
        return "transition:chat.bsky" in tokens
    return "transition:generic" in tokens and resource in ("repo", "blob", "rpc")


def _resource_of(scope: str) -> str:
    return re.split("[:?]", scope, maxsplit=1)[0]


def _parse(scope: str) -> _Scope | None:
    """The permission that ``scope`` is, or ``None``."""
    path, _, query = scope.partition("?")
    resource, colon, positional = path.partition(":")
    if resource not in _RESOURCES:
        return None
    given: dict[str, list[Any]] = {}
    # Both parts are decoded as URLs are: the first strictly, the second as a form.
    for name, value in parse_qsl(query.removeprefix("?"), keep_blank_values=True):
        given.setdefault(name, []).append(value)
    if colon:
        try:
            value = unquote(positional, errors="strict")
        except UnicodeDecodeError:
            return None
        name = next(iter(_RESOURCES[resource]))
        if name in given or re.search("%(?![0-9a-fA-F]{2})", positional):
            return None
        given[name] = [value]
    return _checked(resource, given)


def _checked(resource: str, given: Mapping[str, list[Any]]) -> _Scope | None:
    parameters = _RESOURCES[resource]
    if not parameters.keys() >= given.keys():
        return None
    values: dict[str, tuple[str, ...]] = {}
    for name, parameter in parameters.items():
        if name not in given:
            if parameter.default is None:
                return None
            values[name] = parameter.default
            continue
        values[name] = tuple(given[name])
        if len(values[name]) != 1 and not (parameter.has_many and values[name]):
            return None
        if not all(isinstance(value, str) and parameter.is_valid(value) for value in values[name]):
            return None
    if resource == "rpc" and values["aud"] == ("*",) and "*" in values["lxm"]:
        return None  # any method of any service is more than a scope may say
    return _Scope(resource, values)


def _included(include: _Scope, permission: Mapping[str, Any]) -> _Scope | None:
    """The permission that an entry of a permission set gives, or ``None``."""
    resource = permission.get("resource")
    given = {name: value for name, value in permission.items() if name not in ("type", "resource")}
    if resource not in ("repo", "rpc") or (resource == "rpc" and given.get("aud", "*") != "*"):
        return None
    if resource == "rpc" and given.get("inheritAud") is True and "aud" not in given and include.values["aud"]:
        del given["inheritAud"]
        given["aud"] = include.values["aud"][0]
    lists: dict[str, list[Any]] = {}
    for name, value in given.items():
        has_many = name in _RESOURCES[resource] and _RESOURCES[resource][name].has_many
        if isinstance(value, list) is not has_many:
            return None
        lists[name] = value if has_many else [value]
    scope = _checked(resource, lists)
    return scope if scope is not None and _may_include(include, scope) else None


def _is_expanded(known: Iterable[_Scope], scope: str) -> bool:
    include = _parse(scope)
    return include is not None and include.resource == "include" and any(_may_include(include, each) for each in known)


def _may_include(include: _Scope, scope: _Scope) -> bool:
    """Whether ``scope`` is one that the permission set of ``include`` can hold: below its own namespace."""
    names = scope.values.get("collection") or scope.values.get("lxm") or ()
    namespace = include.values["nsid"][0].rpartition(".")[0] + "."
    return bool(names) and all(name.startswith(namespace) for name in names)


def _format(scope: _Scope) -> str:
    parameters = _RESOURCES[scope.resource]
    text, query = scope.resource, []
    for position, (name, values) in enumerate(scope.values.items()):
        encoded = [quote(value, safe=":/,@*") for value in dict.fromkeys(values)]
        if position == 0 and len(encoded) == 1:
            text += f":{encoded[0]}"
        elif set(values) != set(parameters[name].default or ()):
            query += [f"{name}={value}" for value in encoded]
    return f"{text}?{'&'.join(query)}" if query else text
