"""As :mod:`tests.worker`, over the sessions in a database of Django's. The setup has the ``database``."""

from __future__ import annotations

import json
import sys

from atproto_session import ClientMetadata, OAuthClient

from ..contrib.django.project import open_django_store
from ..worker import carry_out


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    store = open_django_store(setup["database"])
    with OAuthClient(ClientMetadata.loopback(), store=store, **setup["options"]) as client:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            print(json.dumps(carry_out(client, setup["did"], json.loads(line))), flush=True)
    store.close()


if __name__ == "__main__":
    main()
