"""Write a post, as the account that ``atproto-session login`` has logged in: ``python post.py "Hello."``"""

import sys
from datetime import UTC, datetime

from atproto_session import OAuthClient

with OAuthClient.for_scripts() as client:
    account = next(client.accounts(), None) or sys.exit("Log in first: atproto-session login HANDLE")
    session = client.restore(account.did)
    post = {"$type": "app.bsky.feed.post", "text": sys.argv[1], "createdAt": datetime.now(UTC).isoformat()}
    body = {"repo": session.did, "collection": "app.bsky.feed.post", "record": post}
    response = session.post("/xrpc/com.atproto.repo.createRecord", json=body, timeout=30)
    response.raise_for_status()
    print(response.json()["uri"])
