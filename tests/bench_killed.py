"""A worker that refreshes a session when it is told to, and prints how long that took. It may be killed meanwhile."""

from __future__ import annotations

import sys
import time

from . import bench_servers

bench_servers.lead_there()

from atproto_session import ClientMetadata, OAuthClient  # noqa: E402


def main() -> None:
    store, did = sys.argv[1:]
    with OAuthClient(
        ClientMetadata.loopback(), store=store, plc_directory=bench_servers.DIRECTORY, trusted_hosts=["127.0.0.0/8"]
    ) as client:
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.perf_counter()
        client.restore(did, refresh=True)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
