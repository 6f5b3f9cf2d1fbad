"""What programs do whose start is measured: ``imports``, ``dependencies``, ``nothing``, ``first`` (a first signed call)
and ``bare`` (the same with requests alone)."""

import sys
from importlib import import_module

what, *arguments = sys.argv[1:]
if what == "imports":
    import_module("atproto_session")
elif what == "dependencies":
    # What the library is made of, but for dnspython, which it imports when the first handle is looked up.
    for name in ("requests", "urllib3", "idna", "cryptography.hazmat.primitives.asymmetric.ec", "jwt", "filelock"):
        import_module(name)
elif what in ("first", "bare"):
    from . import bench_servers

    bench_servers.lead_there()
    if what == "first":
        from atproto_session import ClientMetadata, OAuthClient

        store, did = arguments
        client = OAuthClient(ClientMetadata.loopback(), store=store, trusted_hosts=["127.0.0.0/8"])
        client.restore(did).get("/xrpc/a.b.c").raise_for_status()
    else:
        import requests

        requests.get(arguments[0], timeout=10).raise_for_status()
