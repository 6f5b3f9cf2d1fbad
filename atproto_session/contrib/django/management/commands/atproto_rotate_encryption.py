"""``manage.py atproto_rotate_encryption``"""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from atproto_session.contrib.django.conf import get_store
from atproto_session.errors import SessionError
from atproto_session.stores import rotate_encryption


class Command(BaseCommand):
    help = "Encrypt all sessions anew, with the first of ENCRYPTION_KEYS. Workers may go on meanwhile."

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            written = rotate_encryption(get_store())
        except SessionError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"{written} sessions were encrypted")
