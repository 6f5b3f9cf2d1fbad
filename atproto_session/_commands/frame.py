"""What all commands share: exit codes, where the store is, the client, which account is meant, output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click
import requests

from .. import _scripts
from ..client import OAuthClient, _check_session_id
from ..errors import SessionError, StoreError, printable
from ..stores._urls import path_in

F = TypeVar("F", bound=Callable[..., Any])

#: Where the options that say where things are leave what they were given.
_GIVEN = "atproto_session.given"


class Exit(IntEnum):
    """How a command ends."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    LOG_IN = 3
    REFUSED = 4
    SERVER_FAILED = 5
    TRY_AGAIN = 6
    STOPPED = 130


class Failed(click.ClickException):
    """The command cannot do what it should."""

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc] # click reads it from the instance


class Program(click.Group):
    """A group of commands whose errors have the exit codes of :class:`Exit`."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SessionError as error:
            raise Failed(told(error), code_of(error)) from error
        except requests.RequestException as error:
            # What cannot even be sent (a header, a URL) is a ValueError, too.
            code = Exit.FAILED if isinstance(error, ValueError) else Exit.TRY_AGAIN
            raise Failed(f"the request failed: {printable(str(error), 300)}", code) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # whoever reads has seen enough; click ends quietly
                raise
            raise Failed(printable(str(error), 300)) from error
        except KeyboardInterrupt:
            click.echo("\nStopped.", err=True)
            ctx.exit(Exit.STOPPED)


def code_of(error: SessionError) -> Exit:
    if error.login_required:
        return Exit.LOG_IN
    return Exit.TRY_AGAIN if error.retryable else Exit.FAILED


def told(error: SessionError) -> str:
    """What an error says, and what to do about it here."""
    hint = ""
    if error.login_required:
        hint = f"\nLog in with: atproto-session login {error.did or 'HANDLE'}"
    elif isinstance(error, StoreError) and "encryption_keys" in str(error):
        hint = f"\nThe environment variable {_scripts.ENCRYPTION_KEYS} holds them."
    elif error.retry_after:
        hint = f"\nTry again in {error.retry_after:.0f} seconds."
    return f"{error}{hint}"


# Where things are


def _remember(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    if value == "":
        raise click.BadParameter("it is empty", ctx, parameter)
    if value:
        ctx.meta.setdefault(_GIVEN, {})[parameter.name] = value


def place_options(command: F) -> F:
    """The options that say where the sessions and the servers are. They may stand before a command's name and after;
    those for development are listed in the help of the whole program alone."""
    is_program = command.__name__ == "program"
    for name, metavar, text, is_listed in (
        ("--allow-http", None, f"Let servers be plain http on this machine. [{_scripts.ALLOW_HTTP}]", is_program),
        ("--handle-resolver", "URL", f"A server that resolves handles. [{_scripts.HANDLE_RESOLVER}]", is_program),
        ("--plc-directory", "URL", f"The directory of did:plc. [{_scripts.PLC_DIRECTORY}]", is_program),
        (
            "--store",
            "URL",
            "Where the sessions are, such as sqlite:////home/me/sessions.db (four slashes begin an absolute path). "
            f"By default a file in your own data directory. [{_scripts.STORE}]",
            True,
        ),
    ):
        option = click.option(
            name,
            metavar=metavar,
            is_flag=metavar is None,
            help=text,
            hidden=not is_listed,
            expose_value=False,
            callback=_remember,
        )
        command = option(command)
    return command


def given_options() -> dict[str, Any]:
    """What the options of :func:`place_options` were given, as :meth:`.OAuthClient.for_scripts` takes it."""
    return dict(click.get_current_context().meta.get(_GIVEN, {}))


def store_url() -> str:
    """Where the sessions are: ``--store``, the environment, or the usual place."""
    url: str = given_options().get("store") or _scripts.store_url()
    if url.partition(":")[0] == "memory":
        raise click.UsageError("a store in memory ends with the command: name one that stays, such as sqlite:///...")
    return url


def shown_url() -> str:
    """:func:`store_url` as it may be shown: what is no file has passwords in its URL."""
    return without_password(store_url())


def without_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme in ("sqlite", "json"):
        return printable(url, 300)
    return printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}", 300)


def place_of(url: str) -> Path | None:
    """The file or the directory that a store is, if it is one."""
    return Path(path_in(url)) if url.partition(":")[0] in ("sqlite", "json") else None


@contextmanager
def opened_client(scope: str | None = None, *, makes_store: bool = False, **options: Any) -> Iterator[OAuthClient]:
    """The client of the command line, which is also that of scripts.

    :param makes_store: whether the command may begin a store where there is none.
    """
    url = store_url()
    place = place_of(url)
    if not makes_store and place is not None and not place.exists():
        raise Failed(
            f"there are no accounts: nothing is at {printable(str(place.absolute()), 300)}\n"
            "Log in with: atproto-session login HANDLE; or name the right place with --store",
            Exit.LOG_IN,
        )
    options = {**given_options(), "store": url, **options}
    with OAuthClient.for_scripts(scope=scope or _scripts.SCOPE, **options) as client:
        yield client


# Which account


def find_account(client: OAuthClient, account: str | None) -> tuple[str, str | None]:
    """The DID and the ``session_id`` that a person means by a handle, a DID, or either with ``#session_id``; or by
    nothing, if only one is stored."""
    if account is None:
        keys = [key_of(each.did, each.session_id) for each in client.accounts()]
        if not keys:
            raise Failed("nobody is logged in\nLog in with: atproto-session login HANDLE", Exit.LOG_IN)
        if len(keys) > 1:
            some = ", ".join(printable(key) for key in sorted(keys)[:5]) + (", ..." if len(keys) > 5 else "")
            raise click.UsageError(f"{len(keys)} accounts are logged in: say which ({some})")
        account = keys[0]
    name, _, session_id = account.partition("#")
    check_session_id(session_id or None)
    return did_of(client, name), session_id or None


def did_of(client: OAuthClient, account: str) -> str:
    kind, name = client._identities.parse(account)
    return name if kind == "did" else client._identities.resolve(name).did


def check_session_id(session_id: str | None) -> None:
    try:
        _check_session_id(session_id)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def key_of(did: str, session_id: str | None) -> str:
    return did if session_id is None else f"{did}#{session_id}"


# Output

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def say_json(value: object) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, default=_to_json))


def _to_json(value: object) -> str:
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else str(value)


def moment(when: datetime | None) -> str:
    """A time as people read it, in this machine's time zone."""
    return "?" if when is None else when.astimezone().strftime("%Y-%m-%d %H:%M")


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows of text in columns. Nothing is cut or wrapped: the lines are for pipes as well."""
    shown = [[printable(cell, 300) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join(lines)


def is_terminal(stream: Any) -> bool:
    return bool(stream is not None and stream.isatty())


def has_terminal() -> bool:
    """Whether a person can answer."""
    return is_terminal(sys.stdin)
