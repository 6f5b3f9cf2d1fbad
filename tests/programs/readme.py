"""Runs the code of the README, word for word, in a network of its own: what it is given is the code and the options
that make a client live there. It says where the library came from, and then what the code says."""

from __future__ import annotations

import json
import sys
from typing import Any

import atproto_session


def main(code: str, handle: str, options: dict[str, Any]) -> None:
    class Client(atproto_session.OAuthClient):
        def __init__(self, metadata: atproto_session.ClientMetadata, **own: Any) -> None:
            super().__init__(metadata, **own, **options)

        def authorize(self, account: str, **own: Any) -> str:
            return super().authorize(account.replace("alice.example.com", handle), **own)

    setattr(atproto_session, "OAuthClient", Client)  # noqa: B010 - which mypy takes for a type
    print(atproto_session.__file__, flush=True)
    exec(compile(code, "README.rst", "exec"), {})


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main(*json.loads(sys.argv[1]))
