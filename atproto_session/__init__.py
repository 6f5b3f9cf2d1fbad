"""AT Protocol (Bluesky) OAuth sessions that stay alive across threads, processes and machines."""

from ._terms import Times
from ._upkeep import Account, CleanResult, KeepAliveResult
from .cached_getter import CachedGetter, GetOptions
from .client import CallbackResult, OAuthClient
from .errors import (
    AuthMethodUnsatisfiableError,
    CancelledError,
    ClientMetadataError,
    DiscoveryError,
    IdentityError,
    LockTimeoutError,
    OAuthCallbackError,
    OAuthResponseError,
    RefreshInterruptedError,
    SessionError,
    SessionNotFoundError,
    StoreError,
    TokenInvalidError,
    TokenRefreshError,
    TokenRevokedError,
    TransportError,
)
from .keys import Keyset
from .metadata import ClientMetadata
from .oauth_session import OAuthSession
from .session import (
    ClientAuthMethod,
    Freshness,
    Session,
    SessionDeletedEvent,
    SessionUpdatedEvent,
    TokenInfo,
    TokenSet,
)
from .session_getter import SessionGetter
from .stores import JSONStore, MemoryStore, SQLiteStore, open_store, rotate_encryption

__all__ = [
    "Account",
    "AuthMethodUnsatisfiableError",
    "CachedGetter",
    "CallbackResult",
    "CancelledError",
    "CleanResult",
    "ClientAuthMethod",
    "ClientMetadata",
    "ClientMetadataError",
    "DiscoveryError",
    "Freshness",
    "GetOptions",
    "IdentityError",
    "JSONStore",
    "KeepAliveResult",
    "Keyset",
    "LockTimeoutError",
    "MemoryStore",
    "OAuthCallbackError",
    "OAuthClient",
    "OAuthResponseError",
    "OAuthSession",
    "RefreshInterruptedError",
    "SQLiteStore",
    "Session",
    "SessionDeletedEvent",
    "SessionError",
    "SessionGetter",
    "SessionNotFoundError",
    "SessionUpdatedEvent",
    "StoreError",
    "Times",
    "TokenInfo",
    "TokenInvalidError",
    "TokenRefreshError",
    "TokenRevokedError",
    "TokenSet",
    "TransportError",
    "open_store",
    "rotate_encryption",
]
