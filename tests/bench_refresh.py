"""What a refresh over https costs when everything is warm, against the least that it can cost. Prints JSON.

The least: one POST on a new connection with a shared TLS context, the two documents on connections that were kept, two
signatures, three durable writes.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from . import bench_servers

bench_servers.lead_there()

import os  # noqa: E402

import urllib3  # noqa: E402
from cryptography.hazmat.primitives import hashes  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from urllib3.util.ssl_ import create_urllib3_context  # noqa: E402

from atproto_session import ClientAuthMethod, ClientMetadata, Keyset, OAuthClient, Session, TokenSet  # noqa: E402
from atproto_session.keys import generate_jwk  # noqa: E402

ISSUER = bench_servers.server_of(0, 1)
DID = bench_servers.did_of(0)


def confidential() -> tuple[ClientMetadata, Keyset]:
    keyset = Keyset.generate()
    at = f"https://app.{bench_servers.DOMAIN}"
    metadata = ClientMetadata(
        client_id=f"{at}/client-metadata.json",
        redirect_uris=[f"{at}/callback"],
        jwks_uri=f"{at}/jwks.json",
        token_endpoint_auth_method="private_key_jwt",
        token_endpoint_auth_signing_alg="ES256",
    )
    return metadata, keyset


def refreshing(directory: Path) -> tuple[OAuthClient, Callable[[], object]]:
    metadata, keyset = confidential()
    client = OAuthClient(
        metadata,
        keyset=keyset,
        store=f"sqlite:///{directory}/ours.db",
        plc_directory=bench_servers.DIRECTORY,
        trusted_hosts=["127.0.0.0/8"],
    )
    method = ClientAuthMethod("private_key_jwt", keyset.first)
    tokens = TokenSet(ISSUER, DID, ISSUER, "atproto", f"{DID}~first", "first")
    client.sessions.set_stored(DID, Session(generate_jwk(), method, tokens))
    return client, lambda: client.restore(DID, refresh=True)


def least(directory: Path) -> Callable[[], object]:
    context = create_urllib3_context()
    context.load_verify_locations(cafile=os.environ["REQUESTS_CA_BUNDLE"])
    kept = urllib3.PoolManager(ssl_context=context)
    key, signature = ec.generate_private_key(ec.SECP256R1()), ec.ECDSA(hashes.SHA256())
    database = sqlite3.connect(directory / "least.db", isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE sessions (key TEXT PRIMARY KEY NOT NULL, document BLOB NOT NULL)")
    spent = f"{DID}~least"
    host = ISSUER.removeprefix("https://")

    def refresh() -> None:
        nonlocal spent
        for url in (f"{bench_servers.DIRECTORY}/{DID}", f"{ISSUER}/.well-known/oauth-protected-resource"):
            json.loads(kept.request("GET", url).data)
        fields = {"grant_type": "refresh_token", "refresh_token": spent, "client_assertion": "a" * 400}
        headers = {"DPoP": "p" * 400, "Connection": "close"}
        for _ in range(2):
            key.sign(b"x" * 300, signature)
        with closing(urllib3.HTTPSConnectionPool(host, ssl_context=context)) as pool:
            answer: dict[str, Any] = json.loads(
                pool.request_encode_body("POST", "/oauth/token", fields, headers, encode_multipart=False).data
            )
        spent = answer["refresh_token"]
        for _ in range(3):
            database.execute("BEGIN IMMEDIATE")
            database.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?)", (DID, json.dumps(answer) * 2))
            database.execute("COMMIT")

    return refresh


def cpu(work: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times


def main() -> None:
    turns = int(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="atproto-session-bench-") as directory:
        client, ours = refreshing(Path(directory))
        bare = least(Path(directory))
        with client:
            cpu(ours, 3), cpu(bare, 3)
            print(json.dumps([[cpu(ours, 10), cpu(bare, 10)] for _ in range(turns)]))


if __name__ == "__main__":
    main()
