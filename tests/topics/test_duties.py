"""Every duty has a proof, and the document says which."""

from __future__ import annotations

from ..duties import DOCUMENT, DUTIES, proofs, table


def test_every_duty_has_a_test_and_every_mark_a_duty() -> None:
    assert sorted(proofs()) == sorted(DUTIES) == list(range(1, 45))


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == table(), "run: python -m tests.duties"
