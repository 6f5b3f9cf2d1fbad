"""The commands that need no account: the local network to develop against, and the demonstration."""

from __future__ import annotations

import shlex
import sys
import time
from typing import Literal

import click

from .. import _scripts
from .frame import Failed, json_option, say_json


@click.command()
@click.option(
    "--account",
    "handles",
    metavar="HANDLE",
    multiple=True,
    default=["alice.test"],
    show_default=True,
    help="Make an account of this handle, under .test. May be given several times.",
)
@click.option(
    "--token-lifetime",
    type=click.FloatRange(min=1),
    default=3600.0,
    show_default=True,
    help="Seconds that an access token lives.",
)
@json_option
def network(handles: tuple[str, ...], token_lifetime: float, as_json: bool) -> None:
    """Run a small AT Protocol network on this machine, to develop against.

    It is a directory, a PDS and an authorization server, as strict as the real ones: refresh tokens work once, and
    log-ins go through a page where the account's owner agrees. Accounts can write and read records and blobs. All is
    kept in memory, and gone when it ends (Ctrl-C).

    It prints its accounts with their passwords, and environment variables. In a shell that has those, the commands and
    OAuthClient.for_scripts() use this network. Name another store there, too, so that its accounts do not come among
    your own:

    \b
    export ATPROTO_SESSION_STORE=sqlite:////tmp/network.db
    atproto-session login alice.test

    To give it methods of your own, run it from Python: LocalNetwork.add_method().
    """
    try:
        _run(handles, token_lifetime, as_json)
    except KeyboardInterrupt:
        click.echo("\nThe network has ended.", err=True)


def _run(handles: tuple[str, ...], token_lifetime: float, as_json: bool) -> None:
    from ..testing.network import LocalNetwork

    with LocalNetwork(access_token_lifetime=token_lifetime) as local:
        try:
            accounts = [local.create_account(handle) for handle in handles]
        except ValueError as error:
            raise Failed(str(error)) from None
        options = local.client_options()
        variables = {
            _scripts.PLC_DIRECTORY: options["plc_directory"],
            _scripts.HANDLE_RESOLVER: options["handle_resolver"],
            _scripts.ALLOW_HTTP: "1",
        }
        if as_json:
            people = [{"handle": each.handle, "did": each.did, "password": each.password} for each in accounts]
            say_json({"accounts": people, "env": variables, "pds": local.pds_url})
        else:
            for account in accounts:
                click.echo(f"# {account.handle}, password {account.password}, {account.did}")
            for name, value in variables.items():
                click.echo(f"export {name}={shlex.quote(value)}")
            click.echo(f"# The network runs at {local.pds_url} until Ctrl-C.")
        sys.stdout.flush()
        while True:
            time.sleep(0.5)  # in pieces: on Windows, Ctrl-C does not end a wait


@click.command()
@click.option("--seconds", type=click.FloatRange(min=0.5), default=30.0, show_default=True, help="How long it runs.")
@click.option("--processes", type=click.IntRange(1, 64), default=4, show_default=True, help="Worker processes.")
@click.option("--threads", type=click.IntRange(1, 64), default=8, show_default=True, help="Threads of each process.")
@click.option("--store", type=click.Choice(["sqlite", "json"]), default="sqlite", show_default=True)
def demo(seconds: float, processes: int, threads: int, store: Literal["sqlite", "json"]) -> None:
    """Let many processes and threads share one account, with locks and then without.

    Everything happens on this machine: a small AT Protocol network is started for it.
    """
    from ..demo import Load, run

    sys.exit(run(Load(processes, threads, seconds, store)))
