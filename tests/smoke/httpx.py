"""The extra ``httpx`` alone: a request over a session of the local network."""

from atproto_session import ClientMetadata, OAuthClient
from atproto_session.contrib.httpx import Client
from atproto_session.testing.network import LocalNetwork

with LocalNetwork() as network:
    account = network.create_account("alice.test")
    with OAuthClient(ClientMetadata.loopback(), store="memory:", **network.client_options()) as client:
        session = client.callback(network.authorize(client.authorize(account.did), account)).session
        with Client(session) as http:
            answer = http.get("/xrpc/com.atproto.server.getSession").json()
if answer["handle"] != "alice.test":
    raise SystemExit(f"another account: {answer}")
