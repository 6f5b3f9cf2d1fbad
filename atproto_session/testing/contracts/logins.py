"""What log-ins that have begun have to do."""

from __future__ import annotations

from typing import Any

from ...stores import Logins
from ._common import EARLIER, LATER, at_once


class LoginsContract:
    """What :class:`.Logins` do. A subclass has the fixture ``logins``, which is empty at first."""

    def test_a_login_is_taken_once(self, logins: Logins) -> None:
        login = {"verifier": "v", "nested": {"list": [1, None, True, "ü"]}}
        logins.put("state", login, LATER)
        logins.put("other", {}, LATER)
        assert logins.take("State") is None
        assert logins.take("state") == login
        assert logins.take("state") is None
        assert logins.take("other") == {}

    def test_an_expired_login_is_gone(self, logins: Logins) -> None:
        logins.put("old", {"verifier": "v"}, EARLIER)
        assert logins.take("old") is None
        for number in range(200):
            logins.put(f"old-{number}", {"verifier": "v"}, EARLIER)
        logins.put("new", {"verifier": "w"}, LATER)
        assert logins.take("new") == {"verifier": "w"}
        assert logins.take("old-199") is None

    def test_what_has_expired_can_be_purged(self, logins: Logins) -> None:
        purge = getattr(logins, "purge", lambda: 0)
        purge()
        logins.put("new", {"verifier": "w"}, LATER)
        logins.put("old", {"verifier": "v"}, EARLIER)
        assert purge() in (0, 1), "0 where they expire by themselves"
        assert purge() == 0
        assert logins.take("new") == {"verifier": "w"}

    def test_of_many_threads_one_takes_a_login(self, logins: Logins) -> None:
        for lap in range(10):
            state = f"state-{lap}"
            logins.put(state, {"lap": lap}, LATER)

            def take(name: str, state: str = state) -> dict[str, Any] | None:
                return logins.take(state)

            taken = at_once(take, "abcdefgh")
            assert [login for login in taken if login is not None] == [{"lap": lap}]
