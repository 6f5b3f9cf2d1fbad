"""``manage.py atproto_keygen``"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from typing import Any

from cryptography.fernet import Fernet
from django.core.management.base import BaseCommand

from atproto_session.keys import generate_jwk, thumbprint


class Command(BaseCommand):
    help = "Make a key for a confidential client (a JWK on one line, for KEYS), or one that encrypts the sessions."
    requires_system_checks: list[str] = []  # noqa: RUF012 - as in Django

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--encryption", action="store_true", help="make a key for ENCRYPTION_KEYS instead")

    def handle(self, *args: Any, encryption: bool = False, **options: Any) -> None:
        if encryption:
            self.stdout.write(Fernet.generate_key().decode())
        else:
            jwk = generate_jwk()
            self.stdout.write(json.dumps({**jwk, "kid": thumbprint(jwk)}))
