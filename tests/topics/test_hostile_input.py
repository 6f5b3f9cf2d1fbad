"""Everything that parses, given what it should not be given; ``make fuzz`` tries much more of it."""

from __future__ import annotations

import pytest

from ..fuzz import TARGETS, attack


@pytest.mark.duty(42, 43)
@pytest.mark.parametrize("name", TARGETS)
def test_no_input_is_a_surprise(name: str) -> None:
    assert attack(TARGETS[name], examples=300) > 50
