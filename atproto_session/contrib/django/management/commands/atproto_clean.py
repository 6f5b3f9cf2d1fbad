"""``manage.py atproto_clean``"""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from atproto_session.contrib.django.conf import get_client
from atproto_session.errors import SessionError


class Command(BaseCommand):
    help = "Delete sessions and log-ins that nobody can use any more."

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            result = get_client().clean()
        except SessionError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"{len(result.sessions)} sessions and {result.logins} log-ins were deleted")
