"""The tables are those of the models."""

from __future__ import annotations

from pathlib import Path

from django.core.management import call_command
from django.db import connections

from . import project


def test_they_are_complete() -> None:
    call_command("makemigrations", "atproto_session", check=True, dry_run=True, verbosity=0)


def test_they_can_be_taken_back(tmp_path: Path) -> None:
    project.use(project.sqlite_in(tmp_path))
    try:
        for target, tables in (([], 3), (["atproto_session", "zero"], 0)):
            call_command("migrate", *target, database=project.OWN, verbosity=0)
            names = connections[project.OWN].introspection.table_names()
            assert len([name for name in names if name.startswith("atproto_session_")]) == tables
    finally:
        project.forget()
