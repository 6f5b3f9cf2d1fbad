"""Errors, as the servers of the local network word them."""

from __future__ import annotations

import pytest

from atproto_session.testing.network import errors
from atproto_session.testing.network.errors import OAuthError


def test_a_challenge_names_the_error_and_leaves_out_what_it_would_have_to_escape() -> None:
    start = 'DPoP algs="ES256 ES256K", error="invalid_token"'
    assert errors.invalid_token("Invalid token").challenge == f'{start}, error_description="Invalid token"'
    assert errors.invalid_token('"exp" is over').challenge == start
    assert errors.invalid_token('"exp" is over').challenge_of("Bearer") == 'Bearer error="invalid_token"'


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.invalid_request("x"), 400),
        (errors.invalid_client("x"), 400),
        (errors.invalid_grant("x"), 400),
        (errors.invalid_scope("x"), 400),
        (errors.use_nonce(), 400),
        (errors.invalid_token("x"), 401),
        (errors.invalid_proof("x"), 401),
    ],
    ids=lambda value: value.error if isinstance(value, OAuthError) else None,
)
def test_each_has_its_status(error: OAuthError, status: int) -> None:
    assert error.status == status
    assert str(error) == f"{error.error}: {error.description}"
