"""For tests of a project: its pages on a :class:`.LocalNetwork`, and people who log in there.

::

    class HomeTest(TestCase):
        def test_home(self):
            with local_network() as network:
                log_in(self.client, network, network.create_account("alice.test"))
                self.assertContains(self.client.get("/"), "alice.test")

What is logged in here is real: accounts, tokens and refreshes. In a ``TestCase``, the sessions are in the transaction
of the test, and gone when it ends; with SQLite they are in memory as all the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.test import Client, override_settings
from django.urls import reverse

from ...testing.network import Account, LocalNetwork
from .conf import NAME

#: Where a client for development is.
_HOST = "127.0.0.1"


@contextmanager
def local_network(network: LocalNetwork | None = None, **options: Any) -> Iterator[LocalNetwork]:
    """In this block, the accounts of the project are those of a local network, and its client is one for development.

    :param network: by default a new one.
    :param options: more arguments of :class:`.OAuthClient`.
    """
    with ExitStack() as clean_up:
        network = network or clean_up.enter_context(LocalNetwork())
        given = getattr(settings, NAME, {})
        changed = {
            **given,
            "PUBLIC_URL": None,
            "OPTIONS": {**given.get("OPTIONS", {}), **network.client_options(), **options},
        }
        clean_up.enter_context(override_settings(**{NAME: changed}, ALLOWED_HOSTS=["*"]))
        yield network


def log_in(
    client: Client, network: LocalNetwork, account: Account, *, next: str = "", link: bool = False, approve: bool = True
) -> Any:
    """Log ``account`` in, in the browser that ``client`` is. Returns the response of the callback.

    :param next: where to go then.
    :param link: to the user who is logged in there.
    :param approve: ``False`` for somebody who thinks better of it.
    """
    page = reverse("atproto:link" if link else "atproto:login")
    begun = client.post(page, {"account": account.handle, "next": next}, SERVER_NAME=_HOST)
    if begun.status_code != 302:
        raise AssertionError(f"the log-in did not begin: {begun.status_code} {begun.content[:500]!r}")
    back = urlsplit(network.authorize(begun["Location"], account, approve=approve))
    return client.get(f"{back.path}?{back.query}", SERVER_NAME=_HOST)
