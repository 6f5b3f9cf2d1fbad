"""One of the processes that refresh many accounts whose tokens expire within a minute. Prints what its requests waited.

Every process walks over all accounts, as the workers of an application do, in 8 threads.
"""

from __future__ import annotations

import json
import sys
import threading
import time

from . import bench_servers

bench_servers.lead_there()

from atproto_session import ClientMetadata, OAuthClient  # noqa: E402

THREADS = 8


def main() -> None:
    store, accounts, seconds = json.loads(sys.argv[1])
    waits: list[float] = []
    failures: list[str] = []
    with OAuthClient(
        ClientMetadata.loopback(),
        store=store,
        plc_directory=bench_servers.DIRECTORY,
        trusted_hosts=["127.0.0.0/8"],
    ) as client:
        print("ready", flush=True)
        end = float(sys.stdin.readline()) + seconds

        def work(number: int) -> None:
            # Each thread has its share of the accounts, and takes them up at an even pace, again and again.
            mine = range(number, accounts, THREADS)
            while time.time() < end:
                for account in mine:
                    began = time.perf_counter()
                    try:
                        client.restore(bench_servers.did_of(account)).get("/xrpc/a.b.c").raise_for_status()
                    except Exception as error:
                        failures.append(f"{type(error).__name__}: {error}")
                    waits.append(time.perf_counter() - began)
                    time.sleep(0.05)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    waits.sort()
    print(json.dumps({"requests": len(waits), "longest": waits[-1], "failures": failures[:5]}), flush=True)


if __name__ == "__main__":
    main()
