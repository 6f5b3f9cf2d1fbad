"""``manage.py atproto_keep_alive``"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from atproto_session.contrib.django.conf import get_client
from atproto_session.errors import SessionError


class Command(BaseCommand):
    help = "Refresh the sessions that were not used for long, before they die of it. To be run once a day."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--idle", type=float, metavar="DAYS", default=5.0, help="not refreshed for so many days (5)"
        )
        parser.add_argument("--pace", type=float, metavar="SECONDS", default=0.5, help="between two accounts (0.5)")
        parser.add_argument("--timeout", type=float, metavar="SECONDS", help="stop after so long; the next run goes on")

    def handle(self, *args: Any, idle: float, pace: float, timeout: float | None, **options: Any) -> None:
        try:
            results = get_client().keep_alive(idle=idle * 86400, pace=pace, timeout=timeout)
        except (SessionError, ValueError) as error:
            raise CommandError(str(error)) from error
        for result in results:
            if result.error is not None:
                self.stderr.write(f"{result.did}: {result.outcome}: {result.error}")
        counts = dict.fromkeys(("refreshed", "ended", "failed"), 0)
        for result in results:
            counts[result.outcome] += 1
        self.stdout.write(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
        if counts["failed"]:
            raise CommandError("some sessions could not be refreshed; the next run tries again")
