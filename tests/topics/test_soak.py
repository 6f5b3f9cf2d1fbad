"""A short soak: all that goes wrong, at once."""

from __future__ import annotations

import pytest

from ..soak import Options, main, soak


@pytest.mark.duty(35)
@pytest.mark.parametrize("store", ["sqlite", "json"])
def test_nothing_is_lost_but_by_kills_and_lost_answers(store: str) -> None:
    totals = soak(Options(seconds=7.0, processes=2, threads=4, accounts=6, store=store))
    assert totals.broken == [], str(totals)
    assert totals.lost["our own fault"] == 0, str(totals)
    assert totals.kills > 0, str(totals)
    assert totals.faults.total() > 0, str(totals)
    assert totals.refreshes > 0, str(totals)
    assert totals.counts["served"] > 0, str(totals)
    assert totals.log_ins > 6, str(totals)


def test_the_program_says_what_came_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "0.5", "--processes", "1", "--threads", "1", "--accounts", "1", "--seed", "1"]) == 0
    assert "broken promises   0" in capsys.readouterr().out
