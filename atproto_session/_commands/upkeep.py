"""The commands that look after a store: keys, encryption, sessions that are idle or useless."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from .. import _scripts
from .._upkeep import KeepAliveResult
from ..errors import printable
from ..keys import Keyset, generate_jwk
from ..stores import open_store, rotate_encryption
from .frame import (
    Exit,
    Failed,
    is_terminal,
    json_option,
    key_of,
    opened_client,
    place_of,
    place_options,
    say_json,
    store_url,
)


@click.command()
@click.option(
    "--for",
    "purpose",
    type=click.Choice(["client", "encryption"]),
    default="client",
    show_default=True,
    help="For a confidential client to authenticate with, or to encrypt a store with.",
)
@click.option("--kid", help="The name of a client's key; by default its thumbprint.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write it to a new file, for its owner alone.")
@click.option("--keyring", "in_keyring", is_flag=True, help="Keep an encryption key in the system's keyring.")
@click.option("--show", is_flag=True, help="Print it although this is a terminal.")
def keygen(purpose: str, kid: str | None, output: str | None, in_keyring: bool, show: bool) -> None:
    """Make a private key.

    For a confidential client: an ES256 key as a JWK, for Keyset.from_files() or Keyset.from_env(). For encryption: a
    Fernet key, for ATPROTO_SESSION_ENCRYPTION_KEYS or encryption_keys=.

    The key is not printed on a terminal, unless --show says so: pipe it, or name a file.
    """
    if kid is not None and purpose != "client":
        raise click.UsageError("--kid is for a client's key")
    if in_keyring and (purpose != "encryption" or output is not None):
        raise click.UsageError("--keyring goes with --for encryption, and without --output")
    key = _new_key(purpose, kid)
    if in_keyring:
        _keep_in_keyring(key)
    elif output is not None:
        _write_new(Path(output), key)
        click.echo(f"The key is in {output}.", err=True)
    elif is_terminal(sys.stdout) and not show:
        raise click.UsageError("a private key does not belong on a screen: use --output FILE, a pipe, or --show")
    else:
        click.echo(key)


def _new_key(purpose: str, kid: str | None) -> str:
    if purpose == "client":
        jwk = generate_jwk()
        if kid is not None:
            jwk["kid"] = kid
        return json.dumps({**jwk, "kid": Keyset([jwk]).first, "alg": "ES256", "use": "sig"})
    from cryptography.fernet import Fernet

    return Fernet.generate_key().decode()


def _write_new(path: Path, key: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Failed(f"{path} is there already, and may hold a key that is in use: name another file") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{key}\n")


def _keep_in_keyring(key: str) -> None:
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        raise Failed("the system's keyring takes a package: pip install 'atproto-session[keyring]'") from None
    try:
        kept = keyring.get_password(*_scripts.KEYRING_PLACE)
        # The new key encrypts; those from before still open what is there.
        keyring.set_password(*_scripts.KEYRING_PLACE, " ".join(filter(None, (key, kept))))
    except KeyringError as error:
        raise Failed(f"the system's keyring cannot be used: {type(error).__name__}") from None
    click.echo(f"The key is in the system's keyring. Set {_scripts.ENCRYPTION_KEYS}=keyring to use it.", err=True)
    if kept:
        click.echo("The keys from before are still there: run atproto-session rotate-encryption now.", err=True)


@click.command("rotate-encryption")
@click.option("--allow-plaintext", is_flag=True, help="Read records that are not encrypted yet, and encrypt them.")
@json_option
@place_options
def rotate(allow_plaintext: bool, as_json: bool) -> None:
    """Encrypt every session again, with the first of the encryption keys.

    The keys are in ATPROTO_SESSION_ENCRYPTION_KEYS, separated by spaces: the first encrypts, all of them open. Put the
    new key in front, run this, and take the old one out an hour later. Workers may go on meanwhile.

    To switch encryption on: set the variable, and run this with --allow-plaintext.
    """
    keys = _scripts.encryption_keys()
    if not keys:
        raise click.UsageError(f"there are no keys in {_scripts.ENCRYPTION_KEYS}; atproto-session keygen makes one")
    url = store_url()
    place = place_of(url)
    if place is not None and not place.exists():
        raise Failed(f"nothing is at {printable(str(place.absolute()), 300)}", Exit.LOG_IN)
    with ExitStack() as stack:
        store = open_store(url, encryption_keys=keys, allow_plaintext=allow_plaintext)
        stack.callback(store.close)
        count = rotate_encryption(store)
    if as_json:
        say_json({"sessions": count})
    else:
        click.echo(f"{_counted(count, 'session is', 'sessions are')} encrypted with the first key.")


@click.command("keep-alive")
@click.option(
    "--idle",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    help="Days without a refresh until it is due.",
)
@click.option("--pace", type=click.FloatRange(min=0), default=0.5, show_default=True, help="Seconds between accounts.")
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds for all; what is left is for the next time.")
@json_option
@place_options
def keep_alive(idle: float, pace: float, timeout: float | None, as_json: bool) -> None:
    """Refresh the sessions that have been idle for days.

    A refresh token that is not used for two weeks dies, and its session with it. Run this once a day, by cron for
    example. It does only what is due.

    The exit code is 0 if all went well, 3 if an account has to log in again, 6 if something failed that may work the
    next time.
    """
    results: list[KeepAliveResult] = []
    with opened_client() as client, ExitStack() as stack:
        advance = _progress(stack)

        def tell(result: KeepAliveResult) -> None:
            advance(result)
            key = printable(key_of(result.did, result.session_id))
            if as_json:
                error = None if result.error is None else str(result.error)
                say_json(
                    {"did": result.did, "session_id": result.session_id, "outcome": result.outcome, "error": error}
                )
            elif result.error is not None:
                click.echo(f"{key} {result.outcome}: {result.error}", err=True)

        results += client.keep_alive(idle=idle * 86_400, pace=pace, timeout=timeout, on_result=tell)
    outcomes = [result.outcome for result in results]
    if not as_json:
        click.echo(f"{outcomes.count('refreshed')} refreshed, {outcomes.count('ended')} ended, "
                   f"{outcomes.count('failed')} failed.")  # fmt: skip
    code = Exit.LOG_IN if "ended" in outcomes else Exit.TRY_AGAIN if "failed" in outcomes else Exit.DONE
    click.get_current_context().exit(code)


def _progress(stack: ExitStack) -> Any:
    """A function that shows a result on a progress bar, if there is a terminal to show it on."""
    if not is_terminal(sys.stderr):
        return lambda result: None
    from rich.console import Console
    from rich.progress import Progress

    bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
    task = bar.add_task("Keeping alive", total=None)
    done = 0

    def advance(result: KeepAliveResult) -> None:
        nonlocal done
        done += 1
        bar.update(task, completed=done, total=done + result.left, description=printable(result.did, 40))

    return advance


@click.command()
@json_option
@place_options
def clean(as_json: bool) -> None:
    """Delete what nobody can use any more.

    That is sessions that have expired and have no refresh token, and log-ins that were begun more than an hour ago.
    Sessions that may still work stay, and so does what cannot be read.
    """
    with opened_client() as client:
        result = client.clean()
    keys = [key_of(each.did, each.session_id) for each in result.sessions]
    if as_json:
        say_json({"sessions": keys, "logins": result.logins})
        return
    for key in keys:
        click.echo(f"{printable(key)} was deleted.")
    click.echo(
        f"{_counted(len(keys), 'session', 'sessions')} and {_counted(result.logins, 'log-in', 'log-ins')} deleted."
    )


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
