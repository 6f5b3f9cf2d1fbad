"""Sessions that the workers of many machines share, in Redis or in a database."""

from __future__ import annotations

from sqlalchemy import Engine, MetaData, Table

from atproto_session import ClientMetadata, OAuthClient
from atproto_session.stores.redis import RedisStore
from atproto_session.stores.sql import SQLStore, define_tables

METADATA = MetaData()  # that of the application, from which Alembic makes its migrations
SESSIONS, LOGINS = define_tables(METADATA)


def open_client(url: str) -> OAuthClient:
    """``redis://:password@host:6379/0``, ``postgresql://user:password@host/app`` or ``mysql://...``."""
    return OAuthClient(ClientMetadata.loopback(), store=url)


def open_with_engine(engine: Engine) -> OAuthClient:
    """The tables are there: a migration has made them."""
    return OAuthClient(ClientMetadata.loopback(), store=SQLStore(engine, create_tables=False))


def open_with_replica(url: str) -> OAuthClient:
    """What is written counts when a replica of Redis has it, too."""
    return OAuthClient(ClientMetadata.loopback(), store=RedisStore(url, prefix="app:", replicas=1))


def tables() -> list[Table]:
    return [SESSIONS, LOGINS]
