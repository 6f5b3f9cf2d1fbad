"""Log-in and log-out as values: what they ask of the world, in which order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atproto_session import LockTimeoutError, SessionNotFoundError, StoreError, TokenRefreshError, TokenRevokedError
from atproto_session import _steps as s
from atproto_session._records import check_client, end, found, log_in, log_out

from .core import DID, OTHER_KEY, make_session, make_tokens
from .test_refresh import World

OVER = TokenRevokedError("signed out")


def carry_out(world: World, protocol: s.Protocol[None]) -> list[str]:
    try:
        step = next(protocol)
        while True:
            try:
                outcome = world.do(step)
            except Exception as error:
                step = protocol.throw(error)
            else:
                step = protocol.send(outcome)
    except StopIteration:
        return world.names()


def test_a_log_in_ends_the_grant_that_it_replaces() -> None:
    old, new = make_session(client_id="me"), make_session(7, dpop_key=OTHER_KEY, client_id="me")
    world = World(old)
    assert carry_out(world, log_in(DID, new)) == ["Lock", "Read", "Replace", "Tell", "Unlock", "HandOut", "Revoke"]
    assert world.record is not None
    assert world.record.token_set == new.token_set
    assert world.record.began_at == world.record.refreshed_at == world.now
    assert world.asked[-1] == s.Revoke(old)


@pytest.mark.parametrize(
    "old", [make_session(client_id="another"), make_session()], ids=["another client's", "the same grant"]
)
def test_a_log_in_that_ends_no_other_grant(old: object) -> None:
    new = make_session(7, client_id="me")
    world = World(old)  # type: ignore[arg-type]
    assert "Revoke" not in carry_out(world, log_in(DID, new))


def test_a_log_in_replaces_what_cannot_be_read_and_needs_no_lock() -> None:
    world = World(None, Read=iter([StoreError("damaged")]), Lock=iter([LockTimeoutError("taken")]))
    assert carry_out(world, log_in(DID, make_session())) == ["Lock", "Read", "Overwrite", "Tell", "Unlock", "HandOut"]


def test_a_log_in_that_another_comes_before_looks_again() -> None:
    other = make_session(5, dpop_key=OTHER_KEY)

    def another(world: World) -> bool:
        world.record = other
        return False

    world = World(None, Replace=iter([another]))
    names = carry_out(world, log_in(DID, make_session()))
    assert names == ["Lock", "Read", "Replace", "Read", "Replace", "Tell", "Unlock", "HandOut", "Revoke"]
    assert world.asked[-1] == s.Revoke(other)


def test_a_log_out_of_another_clients_session_is_refused() -> None:
    session = make_session(client_id="another")
    world = World(session)
    with pytest.raises(TokenRefreshError, match=r"another.*me"):
        carry_out(world, log_out(DID, OVER, "me", revoke=True))
    assert world.record == session


def test_a_log_out_of_nothing_tells_nobody() -> None:
    names = carry_out(World(None), log_out(DID, OVER, None, revoke=True))
    assert names == ["Lock", "Commit", "Read", "Unlock", "HandOut"]


def test_what_is_ended_here_is_ended_there_and_nothing_newer() -> None:
    session = make_session()
    world = World(session)
    assert carry_out(world, end(DID, session, OVER))[-1] == "Revoke"
    assert world.record is None
    newer = make_session(2)
    world = World(newer)
    assert "Revoke" not in carry_out(world, end(DID, session, OVER))
    assert world.record is newer


def test_a_session_of_another_account_is_none_of_this_one() -> None:
    with pytest.raises(SessionNotFoundError, match="another account"):
        found("did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", make_session())
    with pytest.raises(SessionNotFoundError, match="log in first"):
        found(DID, None)
    session = replace(make_session(), token_set=make_tokens())
    assert found(f"{DID}#one", session) is session


def test_a_session_that_no_client_is_recorded_for_is_everybodys() -> None:
    check_client(DID, make_session(), "me")
    check_client(DID, make_session(client_id="me"), None)
    check_client(DID, make_session(client_id="me"), "me")
