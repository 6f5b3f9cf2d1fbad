"""A session store of one's own, for one process: over anything that is a mapping of text to bytes."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

from atproto_session import Session
from atproto_session.stores.codec import Codec, EncryptionKeys


class ItemStore:
    def __init__(self, items: MutableMapping[str, bytes], *, encryption_keys: EncryptionKeys = ()) -> None:
        self._items = items
        self._codec = Codec(encryption_keys)

    def get(self, key: str) -> Session | None:
        data = self._items.get(key)
        return None if data is None else self._codec.decode(key, data)

    def set(self, key: str, session: Session) -> None:
        self._items[key] = self._codec.encode(key, session)

    def delete(self, key: str) -> None:
        self._items.pop(key, None)

    # The rest is for those who look through the store; refreshing does without.

    def clear(self) -> None:
        self._items.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._items))
