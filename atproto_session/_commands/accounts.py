"""The commands about accounts: logging in and out, and what there is."""

from __future__ import annotations

import io
import queue
import sys
import threading
import time
import webbrowser
from datetime import UTC, datetime
from typing import Any

import click

from .._scripts import SCOPE
from ..client import CallbackResult
from ..errors import StoreError, printable
from .callback import CallbackServer, LogIn, Stranger
from .frame import (
    Exit,
    Failed,
    check_session_id,
    columns,
    find_account,
    has_terminal,
    json_option,
    key_of,
    moment,
    opened_client,
    place_options,
    say_json,
    shown_url,
    told,
)

account_argument = click.argument("account", required=False)


@click.command()
@click.argument("account", metavar="HANDLE")
@click.option("--scope", default=SCOPE, show_default=True, help="What to ask the account for, separated by spaces.")
@click.option("--no-browser", is_flag=True, help="Print the URL, and take the address that a browser ends at.")
@click.option("--session-id", metavar="NAME", help="Store the session beside others of the same account.")
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=300.0, show_default=True, help="Seconds to wait for the browser."
)
@json_option
@place_options
def login(*, account: str, scope: str, no_browser: bool, session_id: str | None, timeout: float, as_json: bool) -> None:
    """Log an account in.

    HANDLE is the account's handle, such as alice.example.com; its DID; or the URL of a server.

    A browser opens at the account's server, where its owner agrees. It comes back to a small web server that runs on
    this machine meanwhile. Where a browser cannot do that, as over SSH, use --no-browser: it prints the URL, which any
    browser can open, and takes the address of the page that this ends at. The page itself cannot be opened.

    Scripts on this machine then find the account with OAuthClient.for_scripts().
    """
    check_session_id(session_id)
    if no_browser and not has_terminal():
        raise click.UsageError("--no-browser asks for an address, and there is no terminal to ask on")
    if not no_browser and not has_terminal() and not _has_browser():
        raise click.UsageError("there is neither a browser nor a terminal here: log in at a terminal, once")
    with opened_client(scope, makes_store=True) as client:
        log_in = LogIn(client, session_id)
        if no_browser:
            result = _by_hand(log_in, account, scope, timeout)
        else:
            result = _by_browser(log_in, account, scope, timeout)
        granted = result.session.token_info(refresh=False).scope
        if as_json:
            say_json({"did": result.session.did, "handle": result.handle, "session_id": session_id, "scope": granted})
            return
        click.echo(f"{result.handle or result.session.did} is logged in.")
        click.echo(f"  DID    {result.session.did}\n  scope  {printable(granted, 300)}\n  store  {shown_url()}")
        missing = set(scope.split()) - set(granted.split())
        if missing:
            click.echo(f"Not granted: {printable(' '.join(sorted(missing)), 300)}", err=True)


def _has_browser() -> bool:
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


def _by_browser(log_in: LogIn, account: str, scope: str, timeout: float) -> CallbackResult:
    with CallbackServer(log_in.end) as server:
        url = log_in.begin(account, scope, server.redirect_uri)
        click.echo(f"Log in at\n\n  {url}\n", err=True)
        if _has_browser():
            # In a thread: one that runs in the terminal comes back when it is closed.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        else:
            click.echo("There is no browser here. If it is on another machine, use --no-browser.", err=True)
        result = server.wait(timeout)
    if result is None:
        raise Failed(f"nobody came back from the browser within {timeout:.0f} seconds", Exit.TRY_AGAIN)
    return result


def _by_hand(log_in: LogIn, account: str, scope: str, timeout: float) -> CallbackResult:
    click.echo(f"Open this URL in any browser:\n\n  {log_in.begin(account, scope)}\n", err=True)
    click.echo("Then paste the address that the browser ends at (the page itself cannot be opened):", err=True)
    deadline = time.monotonic() + timeout
    for line in iter(lambda: _read_line(deadline - time.monotonic()), None):
        if not line.strip():
            continue
        try:
            return log_in.end(line.strip())
        except Stranger as error:
            click.echo(f"{error}\nPaste the whole address, with http:// and what follows the question mark:", err=True)
    raise Failed(f"no address came within {timeout:.0f} seconds", Exit.TRY_AGAIN)


def _read_line(seconds: float) -> str | None:
    """A line from the terminal; ``None`` if none comes in time.

    :raises Failed: the terminal is gone.
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        # Unbuffered: a thread in the midst of a buffered read would keep the program from ending.
        try:
            lines.put(io.FileIO(sys.stdin.fileno(), closefd=False).readline())
        except OSError:
            lines.put(b"")

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=min(left, 0.5))  # in pieces: on Windows, Ctrl-C does not end a wait
        except queue.Empty:
            continue
        if not line:
            raise Failed("the terminal was closed before an address came")
        return line.decode("utf-8", "replace")
    return None


@click.command("list")
@json_option
@place_options
def list_accounts(as_json: bool) -> None:
    """Say who is logged in.

    Nothing is asked of any server. A record that cannot be read is listed with the reason, and the exit code is 1.
    """
    with opened_client() as client:
        accounts = sorted(client.accounts(), key=lambda each: (each.did, each.session_id or ""))
    broken = [(key_of(each.did, each.session_id), each.error) for each in accounts if each.error is not None]
    if as_json:
        say_json([_members(each) for each in accounts])
    elif not accounts:
        click.echo("Nobody is logged in.", err=True)
    else:
        rows = [("ACCOUNT", "SERVER", "LOGGED IN", "REFRESHED", "SCOPE")]
        rows += [
            (key_of(each.did, each.session_id), each.aud, moment(each.began_at), moment(each.refreshed_at), each.scope)
            for each in accounts
            if each.error is None
        ]
        click.echo(columns(rows))
        for key, error in broken:
            click.echo(f"{printable(key)}: {told(error)}", err=True)
    if broken:
        click.get_current_context().exit(Exit.FAILED)


def _members(account: Any) -> dict[str, Any]:
    names = ("did", "session_id", "iss", "aud", "scope", "client_id", "began_at", "refreshed_at", "expires_at")
    members = {name: getattr(account, name) or None for name in names}
    return members | ({"error": str(account.error)} if account.error is not None else {})


@click.command()
@account_argument
@json_option
@place_options
def show(account: str | None, as_json: bool) -> None:
    """Show what is known of an account.

    ACCOUNT is a handle, a DID, or either with #NAME for a session that was stored with --session-id. It may be left out
    where only one account is logged in. No token is shown. Nothing is refreshed.
    """
    with opened_client() as client:
        did, session_id = find_account(client, account)
        stored = next((each for each in client.accounts() if (each.did, each.session_id) == (did, session_id)), None)
        if stored is None:
            raise _nobody(did, session_id)
        if stored.error is not None:
            raise stored.error
        is_expired = stored.expires_at is not None and stored.expires_at <= datetime.now(UTC)
        members = _members(stored) | {"handle": client._handle_of(did), "expired": is_expired}
    if as_json:
        say_json(members)
        return
    shown = [
        ("account", key_of(did, session_id)),
        ("handle", members["handle"] or "none that can be verified now"),
        ("server", stored.aud),
        ("issuer", stored.iss),
        ("scope", stored.scope),
        ("logged in", moment(stored.began_at)),
        ("refreshed", moment(stored.refreshed_at)),
        ("access token", f"{'expired' if is_expired else 'expires'} {moment(stored.expires_at)}"),
        ("client", stored.client_id or "?"),
        ("store", shown_url()),
    ]
    click.echo(columns(shown))


@click.command()
@account_argument
@json_option
@place_options
def refresh(account: str | None, as_json: bool) -> None:
    """Get new tokens for an account now.

    Sessions are refreshed by themselves when they are used: this is for trying whether it works.
    """
    with opened_client() as client:
        did, session_id = find_account(client, account)
        info = client.restore(did, refresh=True, session_id=session_id).token_info(refresh=False)
    if as_json:
        say_json({"did": did, "session_id": session_id, "expires_at": info.expires_at, "scope": info.scope})
    else:
        click.echo(f"{key_of(did, session_id)} has new tokens. The access token expires {moment(info.expires_at)}.")


@click.command()
@account_argument
@click.option("--all", "everybody", is_flag=True, help="Every account of the store.")
@json_option
@place_options
def logout(account: str | None, everybody: bool, as_json: bool) -> None:
    """End the session of an account, here and at its server.

    If the server cannot be reached, the session is deleted here all the same.
    """
    if everybody and account is not None:
        raise click.UsageError("either an account or --all")
    with opened_client() as client:
        if everybody:
            whom = [(each.did, each.session_id) for each in client.accounts()]
        else:
            whom = [find_account(client, account)]
            _check_stored(client, key_of(*whom[0]))
        for did, session_id in whom:
            client.revoke(did, session_id=session_id)
            if not as_json:
                click.echo(f"{key_of(did, session_id)} is logged out.")
    if as_json:
        say_json([{"did": did, "session_id": session_id} for did, session_id in whom])


def _check_stored(client: Any, key: str) -> None:
    try:
        if client.sessions.get_stored(key) is not None:
            return
    except StoreError:  # what cannot be read can be deleted
        return
    raise _nobody(*key.split("#", 1))


def _nobody(did: str, session_id: str | None = None) -> Failed:
    message = f"{printable(key_of(did, session_id))} is not logged in\nLog in with: atproto-session login {did}"
    return Failed(message, Exit.LOG_IN)
