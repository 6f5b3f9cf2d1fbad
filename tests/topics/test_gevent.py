"""gevent: patched first it works, patched late it is found out at once, and nothing that waits stops the hub."""

from __future__ import annotations

from pathlib import Path

from atproto_session.testing.network import LocalNetwork

from ..processes import Program
from ..scenes import Scene


def test_patched_first_it_works(network: LocalNetwork, tmp_path: Path) -> None:
    scene = Scene(network, f"sqlite:///{tmp_path}/sessions.db")
    network.expire_access_tokens(scene.did)
    # A tracer that knows threads alone has nothing to look for there.
    with Program("programs.gevent_scene", is_measured=False) as program:
        program.say({**scene.setup, "directory": str(tmp_path)})
        assert program.hear() == {"database": 5, "lock": 5}, "what waits stops the hub"
        assert program.hear() == [scene.account.handle]
    assert network.rotations == 1
    scene.close()


def test_patched_late_it_is_said_at_once(network: LocalNetwork, tmp_path: Path) -> None:
    scene = Scene(network, f"sqlite:///{tmp_path}/sessions.db")
    with Program("programs.gevent_scene", "late", is_measured=False) as program:
        program.say(scene.setup)
        for said in program.hear():
            assert "call gevent.monkey.patch_all() before anything else is imported" in said
    assert network.rotations == 0
    scene.close()


def test_patched_in_part_it_is_said_at_once() -> None:
    with Program("programs.gevent_scene", "part", is_measured=False) as program:
        program.say({})
        (said,) = program.hear()
        assert "call gevent.monkey.patch_all() as it is" in said
