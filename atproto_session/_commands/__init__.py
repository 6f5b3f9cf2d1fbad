"""The commands of ``atproto-session``. Needs the extra ``cli``."""

from __future__ import annotations

import click

from . import accounts, doctor, network, request, upkeep
from .frame import Program, place_options

__all__ = ["program"]


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="atproto-session")
@place_options
def program() -> None:
    """AT Protocol (Bluesky) OAuth sessions that stay alive.

    Log an account in once. Scripts on this machine then find it with OAuthClient.for_scripts(), from whatever directory
    they are started.

    \b
    atproto-session login alice.example.com
    atproto-session request GET /xrpc/com.atproto.server.getSession

    The options below may also stand after the command. All but --store are for development.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 an account has to log in, 4 the server refused the request, 5 the
    server failed, 6 failed for now: try again, 130 stopped by Ctrl-C.
    """


for command in (
    *(accounts.login, accounts.list_accounts, accounts.show, accounts.refresh, accounts.logout, request.request),
    *(upkeep.keep_alive, upkeep.clean, upkeep.keygen, upkeep.rotate, doctor.doctor, network.network, network.demo),
):
    program.add_command(command)
