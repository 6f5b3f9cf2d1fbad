from __future__ import annotations

from django.test import TestCase

from atproto_session.contrib.django.test import local_network, log_in


class HomeTest(TestCase):
    def test_who_is_logged_in_is_greeted(self) -> None:
        with local_network() as network:
            alice = network.create_account("alice.test")
            self.assertRedirects(self.client.get("/"), "/atproto/login?next=/")
            self.assertRedirects(log_in(self.client, network, alice), "/")
            self.assertContains(self.client.get("/"), "Hello, alice.test.")

    def test_after_the_access_token_has_expired(self) -> None:
        with local_network() as network:
            alice = network.create_account()
            log_in(self.client, network, alice)
            network.expire_access_tokens(alice.did)
            self.assertContains(self.client.get("/"), "Hello")
