"""The commands of ``atproto-session``. Needs the extra ``cli``."""

from __future__ import annotations

import click

from .accounts import list_accounts, login, logout, refresh, show
from .doctor import doctor
from .frame import Program, place_options
from .network import demo, network
from .request import request
from .upkeep import clean, keep_alive, keygen, rotate

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

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 an account has to log in, 4 the server refused the request, 5 the
    server failed, 6 failed for now: try again, 130 stopped by Ctrl-C.
    """


for command in (
    *(login, list_accounts, show, refresh, logout, request),
    *(keep_alive, clean, keygen, rotate, doctor, network, demo),
):
    program.add_command(command)
