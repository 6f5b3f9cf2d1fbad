"""The Python SDK over one of our sessions, on the local network and on a real PDS: the example of the
documents, and what ends a session."""

from __future__ import annotations

import runpy
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from atproto import exceptions  # type: ignore[import-untyped]

from atproto_session import ClientMetadata, OAuthClient, OAuthSession, TokenRefreshError
from atproto_session.contrib.sdk import Client, SessionEndedError
from tests.network.raw import SCOPE, LoggedIn
from tests.pds.conftest import World
from tests.scenes import store_tokens, stored

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "sdk_client.py"


@pytest.fixture
def sdk(session: OAuthSession) -> Client:
    return Client(session)


def picture(size: int) -> bytes:
    """A grey PNG of ``size`` times ``size`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + b"\x80" * size for _ in range(size)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def logged_in(server: World, tmp_path: Path) -> Iterator[tuple[Client, dict[str, Any]]]:
    """The SDK, and the options of its client."""
    options = {"store": f"sqlite:///{tmp_path}/sessions.db", **server.client_options}
    with OAuthClient(ClientMetadata.loopback(scope=SCOPE), **options) as client:
        callback = server.authorize(client.authorize(server.account.did), server.account)
        yield Client(client.callback(callback).session), options


def test_posts_pictures_likes_and_the_profile(server: World, logged_in: tuple[Client, dict[str, Any]]) -> None:
    sdk, _ = logged_in
    example: dict[str, Any] = runpy.run_path(str(EXAMPLE))
    assert (sdk.me.did, sdk.me.handle) == (server.account.did, server.account.handle)

    post = example["write"](sdk)
    written = sdk.get_post(post.uri.rpartition("/")[2])
    assert (written.value.text, written.cid) == ("Written over OAuth", post.cid)
    assert written.value.facets[0].features[0].uri == "https://atproto.com/specs/oauth"
    example["like_and_take_it_back"](sdk, post)

    shown = example["show"](sdk, picture(20))
    (image,) = sdk.get_post(shown.uri.rpartition("/")[2]).value.embed.images
    assert image.alt == "What is in it"
    where = {"did": sdk.me.did, "cid": image.image.ref.link}
    assert sdk.com.atproto.sync.get_blob(where) == picture(20)

    for words in ("first", "second"):
        example["introduce"](sdk, words)
        profile = sdk.app.bsky.actor.profile.get(sdk.me.did, "self")
        assert profile.value.description == words
    assert sdk.delete_post(post.uri)
    with pytest.raises(exceptions.BadRequestError, match="RecordNotFound"):
        sdk.get_post(post.uri.rpartition("/")[2])


def test_the_example_runs(
    logged_in: tuple[Client, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sdk, options = logged_in
    (tmp_path / "picture.png").write_bytes(picture(4))
    runpy.run_path(str(EXAMPLE))["main"](sdk.me.did, str(tmp_path / "picture.png"), **options)
    assert capsys.readouterr().out.count(f"at://{sdk.me.did}/app.bsky.feed.post/") == 2


def test_a_whole_repository(sdk: Client) -> None:
    sdk.send_post("One of many")
    assert b"One of many" in sdk.com.atproto.sync.get_repo({"did": sdk.me.did})


def test_a_token_that_has_expired_is_refreshed(sdk: Client, client: OAuthClient, session: OAuthSession) -> None:
    before = stored(client, session.did).token_set.access_token
    store_tokens(client, session.did, access_token=before[:-4] + "AAAA")
    assert sdk.send_post("Still here").uri
    assert stored(client, session.did).token_set.access_token != before


def test_a_session_that_was_ended(sdk: Client, client: OAuthClient, session: OAuthSession, by_hand: LoggedIn) -> None:
    by_hand.client.revoke(by_hand.tokens.refresh)
    with pytest.raises(SessionEndedError) as caught:
        sdk.send_post("Too late")
    assert isinstance(caught.value.__cause__, TokenRefreshError)
    assert client.sessions.get_stored(session.did) is None
