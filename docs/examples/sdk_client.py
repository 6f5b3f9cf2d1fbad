"""The Python SDK over an OAuth session: posts, pictures, likes, the profile.

``python sdk_client.py did:plc:... picture.png`` goes on with a session that is stored, as after ``script.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from atproto import client_utils, exceptions, models

from atproto_session import ClientMetadata, OAuthClient
from atproto_session.contrib.sdk import Client


def write(sdk: Client) -> Any:
    text = client_utils.TextBuilder().text("Written over ").link("OAuth", "https://atproto.com/specs/oauth")
    return sdk.send_post(text)


def show(sdk: Client, picture: bytes) -> Any:
    return sdk.send_image("A picture", image=picture, image_alt="What is in it")


def like_and_take_it_back(sdk: Client, post: Any) -> None:
    like = sdk.like(post.uri, post.cid)
    sdk.unlike(like.uri)


def introduce(sdk: Client, description: str) -> Any:
    """Change one thing in the profile and leave the rest."""
    where = {"repo": sdk.me.did, "collection": models.ids.AppBskyActorProfile, "rkey": "self"}
    try:
        found = sdk.com.atproto.repo.get_record(where)
    except exceptions.BadRequestError:  # there is none yet
        profile, cid = models.AppBskyActorProfile.Record(), None
    else:
        profile, cid = found.value, found.cid
    profile.description = description
    return sdk.com.atproto.repo.put_record({**where, "record": profile, "swap_record": cid})


def main(did: str, picture: str, **options: Any) -> None:
    options = {"store": "sqlite:///sessions.db", **options}
    with OAuthClient(ClientMetadata.loopback(scope="atproto transition:generic"), **options) as oauth:
        sdk = Client(oauth.restore(did))
        post = write(sdk)
        like_and_take_it_back(sdk, post)
        print(post.uri, "and", show(sdk, Path(picture).read_bytes()).uri)
        introduce(sdk, "I log in with OAuth.")


if __name__ == "__main__":
    main(*sys.argv[1:])
