"""Sessions in Redis or Valkey, for any number of machines."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import ReadOnlyError, RedisClusterException, RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from .._fork import close_at_end
from ..errors import StoreError, printable
from ..locks.redis import RedisLocks, unusable
from ._rows import RowStore
from .codec import Codec, EncryptionKeys

# KEYS: the record. ARGV: what is expected to be there, and what is to be there; an empty text stands for nothing.
_EXCHANGE = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
if ARGV[2] == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], ARGV[2]) end
return 1
"""
#: So many names are asked for at a time.
_PAGE = 1000
#: What redis-py is told where a URL does not, in seconds: a server that does not answer keeps nobody for ever.
_DEFAULTS: dict[str, Any] = {"socket_timeout": 10.0, "socket_connect_timeout": 10.0}
#: And that a command is sent once. (A client of a cluster has to try again, to find out where a key is.)
# A connection is closed after each of these errors: after a failover, one may lead to what is a replica now.
_CLOSING = (redis.ConnectionError, redis.TimeoutError, TimeoutError, ReadOnlyError)
_ONCE: dict[str, Any] = {"retry": Retry(NoBackoff(), 0, _CLOSING), "max_connections": 10_000}
#: How long replicas are waited for, in milliseconds.
_REPLICAS_WITHIN = 2000
_ERRORS = (RedisError, RedisClusterException, OSError)
_ALIASES = {"valkey": "redis", "valkeys": "rediss", "redis+unix": "unix", "valkey+unix": "unix"}
_SCHEMES = "redis://, rediss://, redis+unix:///path, redis+sentinel:// and redis+cluster://, or rediss+... with TLS"


class RedisStore(RowStore):
    """Sessions in Redis 6.2 or later, or Valkey: a key for each session, and one for each pending log-in, which Redis
    itself removes when its time is over.

    Redis has to be told to keep what it has; see "Redis" in the documentation of stores.

    :param client: a URL, or a ``redis.Redis`` or ``redis.RedisCluster``, which is not closed with the store.
    :param prefix: what the names of all keys begin with: two applications in one database have two. A URL may say it
        as ``?prefix=``.
    :param replicas: a write counts as done when so many replicas have it (``WAIT``); with fewer it is a StoreError,
        before a token is spent for it. A URL may say it as ``?replicas=``. Not for a cluster.
    :param encryption_keys: see :func:`.open_store`.
    :param allow_plaintext: see :func:`.open_store`.
    :raises StoreError: the URL cannot be understood, or the server cannot be used.
    """

    def __init__(
        self,
        client: Any,
        *,
        prefix: str = "atproto:",
        replicas: int = 0,
        encryption_keys: EncryptionKeys = (),
        allow_plaintext: bool = False,
    ) -> None:
        codec = Codec(encryption_keys, allow_plaintext=allow_plaintext)
        is_own = isinstance(client, str)
        if is_own:
            place = _place_of(client)
            client = place.client
            prefix = prefix if place.prefix is None else place.prefix
            replicas = replicas if place.replicas is None else place.replicas
        self._server = server = _Server(client, prefix, replicas, is_own=is_own)
        server.check()
        super().__init__(_RedisRows(server), _RedisLogins(server), RedisLocks(client, prefix=prefix), codec)

    @classmethod
    def from_url(cls, url: str, *, encryption_keys: EncryptionKeys = (), allow_plaintext: bool = False) -> RedisStore:
        """The store that ``redis://host:6379/0`` names; see the documentation of stores for all that a URL can say."""
        return cls(url, encryption_keys=encryption_keys, allow_plaintext=allow_plaintext)

    def __repr__(self) -> str:
        return f"RedisStore(prefix={self._server.prefix!r})"


class _Server:
    """A client and where its keys are. Every failure is a StoreError."""

    def __init__(self, client: Any, prefix: str, replicas: int, *, is_own: bool) -> None:
        self.client = client
        self.prefix = prefix
        self._replicas = replicas
        self._is_own = is_own
        self._is_closed = False
        close_at_end(self)

    def check(self) -> None:
        try:
            self.call(self.client.ping)
        except TypeError as error:  # of the first connection
            raise StoreError(
                f"the URL of the store has an option that redis-py does not know ({printable(str(error))})"
            ) from None

    def call(self, command: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self._is_closed:
            raise StoreError("the store is closed")
        try:
            return command(*arguments, **options)
        except _ERRORS as error:
            raise _failure(error) from error

    def write(self, command: str, *arguments: Any, **options: Any) -> Any:
        if not self._replicas:
            return self.call(getattr(self.client, command), *arguments, **options)
        # WAIT is about what was written by its own connection.
        with self.call(self.client.client) as one:
            result = self.call(getattr(one, command), *arguments, **options)
            have = self.call(one.wait, self._replicas, _REPLICAS_WITHIN)
        if have < self._replicas:
            raise StoreError(f"{have} of {self._replicas} replicas of Redis have what was written", retryable=True)
        return result

    def exchange(self, name: bytes, expected: bytes, data: bytes) -> bool:
        return bool(self.write("eval", _EXCHANGE, 1, name, expected, data))

    def read(self, name: bytes) -> bytes | None:
        data = self.call(self.client.get, name)
        return data.encode("utf-8", "replace") if isinstance(data, str) else data

    def name_of(self, kind: str, key: str) -> bytes:
        return f"{self.prefix}{kind}:{key}".encode("utf-8", "surrogatepass")

    def close(self) -> None:
        self._is_closed = True
        self.close_idle()

    def close_idle(self) -> None:
        if self._is_own:
            self.client.close()


class _RedisRows:
    def __init__(self, server: _Server) -> None:
        self._server = server
        self.close = server.close

    def read(self, key: str) -> bytes | None:
        return self._server.read(self._name_of(key))

    def put(self, key: str, data: bytes) -> None:
        self._server.write("set", self._name_of(key), data)

    def insert(self, key: str, data: bytes) -> bool:
        return self._server.exchange(self._name_of(key), b"", data)

    def update(self, key: str, data: bytes, expected: bytes) -> bool:
        return self._server.exchange(self._name_of(key), expected, data)

    def delete(self, key: str, expected: bytes | None = None) -> bool:
        if expected is None:
            return bool(self._server.write("delete", self._name_of(key)))
        return self._server.exchange(self._name_of(key), expected, b"")

    def clear(self) -> None:
        for key in self.keys():
            self.delete(key)

    def keys(self) -> Iterator[str]:
        """Redis may name one twice that is there while it makes room for more."""
        start = self._name_of("")
        pattern = re.sub(rb"([\\*?\[\]^-])", rb"\\\1", start) + b"*"
        names = self._server.call(self._server.client.scan_iter, match=pattern, count=_PAGE)
        while (name := self._server.call(next, names, None)) is not None:
            name = name.encode("utf-8", "surrogatepass") if isinstance(name, str) else name
            yield name[len(start) :].decode("utf-8", "surrogatepass")

    def _name_of(self, key: str) -> bytes:
        return self._server.name_of("session", key)


class _RedisLogins:
    def __init__(self, server: _Server) -> None:
        self._server = server

    def read(self, state: str) -> bytes | None:
        return self._server.read(self._name_of(state))

    def put(self, state: str, data: bytes, expires_at: float) -> None:
        # By how long, not until when: the clocks of this machine and of Redis may differ.
        if (lasts := expires_at - time.time()) > 0:
            self._server.write("set", self._name_of(state), data, px=max(1, round(lasts * 1000)))

    def delete(self, state: str, expected: bytes) -> bool:
        return self._server.exchange(self._name_of(state), expected, b"")

    def sweep(self, now: float) -> None:
        """Redis does so by itself."""

    def _name_of(self, state: str) -> bytes:
        return self._server.name_of("login", state)


def _failure(error: Exception) -> StoreError:
    return unusable(error, "the session store")


# URLs


class _Place(NamedTuple):
    client: Any
    prefix: str | None
    replicas: int | None


def _place_of(url: str) -> _Place:
    """What a URL names.

    :raises StoreError: it cannot be understood. The message does not hold it.
    """
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        prefix, replicas = options.pop("prefix", None), int(options.pop("replicas", 0)) or None
        scheme, _, how = _ALIASES.get(parts.scheme, parts.scheme).partition("+")
        parts = parts._replace(scheme=_ALIASES.get(scheme, scheme), query=urlencode(options))
        if how == "cluster" and replicas:
            raise ValueError("replicas are not waited for in a cluster")  # noqa: TRY301 - as all that is wrong
        client = _MAKERS[how](parts)
    except (ValueError, TypeError, KeyError) as error:
        # Not chained: the message may show any part of the URL, its password among them.
        raise StoreError(
            f"the URL of a store in Redis begins with {_SCHEMES}; this one cannot be understood "
            f"({type(error).__name__})"
        ) from None
    except _ERRORS as error:  # the client of a cluster has a look at it when it is made
        raise _failure(error) from error
    return _Place(client, prefix, replicas)


def _text_of(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc}{parts.path}?{parts.query}"


def _server_of(parts: SplitResult) -> Any:
    of_network = {} if parts.scheme == "unix" else {"socket_keepalive": True}
    return redis.Redis.from_url(_text_of(parts), **_DEFAULTS, **of_network, **_ONCE)


def _cluster_of(parts: SplitResult) -> Any:
    return redis.RedisCluster.from_url(_text_of(parts), **_DEFAULTS)


def _sentinel_of(parts: SplitResult) -> Any:
    """``redis+sentinel://user:password@host:26379,host:26379/service/0``: the credentials are those of the server; the
    sentinels' own are ``?sentinel_username=`` and ``?sentinel_password=``."""
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    service, _, database = parts.path.strip("/").partition("/")
    options = dict(parse_qsl(parts.query))
    of_sentinels: dict[str, Any] = {
        name: options.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in options
    }
    # The rest of the options are understood as in every other URL.
    shared = _DEFAULTS | parse_url(  # type: ignore[no-untyped-call]
        f"{parts.scheme}:///{database}?{urlencode(options)}"
    )
    if shared.pop("connection_class", None) is not None:
        shared["ssl"] = True
    sentinels = [(host, int(port or 26379)) for host, _, port in (one.partition(":") for one in hosts.split(","))]
    own = {"username": unquote(user) or None, "password": unquote(password) or None}
    without_database = {name: value for name, value in shared.items() if name != "db"}
    sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
        sentinels, sentinel_kwargs=without_database | of_sentinels | _ONCE, **shared, **own, **_ONCE
    )
    return sentinel.master_for(service)


_MAKERS: dict[str, Callable[[SplitResult], Any]] = {"": _server_of, "cluster": _cluster_of, "sentinel": _sentinel_of}
