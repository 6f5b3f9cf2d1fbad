"""The extra ``sdk`` alone: a post on the local network."""

from atproto_session import ClientMetadata, OAuthClient
from atproto_session.contrib.sdk import Client
from atproto_session.testing.network import LocalNetwork

with LocalNetwork() as network:
    account = network.create_account("alice.test")
    metadata = ClientMetadata.loopback(scope="atproto transition:generic")
    with OAuthClient(metadata, store="memory:", **network.client_options()) as client:
        session = client.callback(network.authorize(client.authorize(account.did), account)).session
        post = Client(session).send_post("Hello")
if not post.uri.startswith(f"at://{account.did}/app.bsky.feed.post/"):
    raise SystemExit(f"no post: {post}")
