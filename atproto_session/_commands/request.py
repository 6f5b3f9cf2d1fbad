"""The command that makes one request, for pipes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import requests

from ..errors import printable
from .frame import Exit, Failed, find_account, is_terminal, opened_client, place_options

_WITHOUT_BODY = ("GET", "HEAD", "DELETE", "OPTIONS")
_PIECE = 64 * 1024


@click.command()
@click.argument("method")
@click.argument("path")
@click.option("-a", "--account", help="A handle or a DID. May be left out where only one account is logged in.")
@click.option("-p", "--param", "params", metavar="NAME=VALUE", multiple=True, help="A parameter of the query.")
@click.option("-H", "--header", "headers", metavar="NAME:VALUE", multiple=True, help="A header.")
@click.option("-j", "--json", "json_body", metavar="JSON", help="The body, as JSON. @FILE reads a file, - the input.")
@click.option("-d", "--data", metavar="TEXT", help="The body, as it is. @FILE reads a file, - the input.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the answer to a file.")
@click.option("-i", "--include", is_flag=True, help="Print the status and the headers of the answer, too.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Seconds for all of it."
)
@place_options
def request(
    *,
    method: str,
    path: str,
    account: str | None,
    params: tuple[str, ...],
    headers: tuple[str, ...],
    json_body: str | None,
    data: str | None,
    output: str | None,
    include: bool,
    timeout: float,
) -> None:
    """Make a request as an account, and print the answer.

    PATH is a path on the account's server, such as /xrpc/com.atproto.server.getSession. The request is signed; tokens
    that have expired are replaced.

    The body is that of --json or --data. A POST without either takes what is piped in: as JSON if it is JSON.

    The exit code is 0 if the status is below 400; 4 if the server refused (400 to 499), 5 if it failed (500 or more).
    The answer is printed in any case.

    \b
    atproto-session request GET /xrpc/com.atproto.repo.listRecords \\
        -p repo=alice.example.com -p collection=app.bsky.feed.post | jq .records
    """
    if json_body is not None and data is not None:
        raise click.UsageError("either --json or --data")
    method = method.upper()
    sent = dict(_split(header, ":", "-H takes NAME:VALUE") for header in headers)
    query = [_split(param, "=", "-p takes NAME=VALUE") for param in params]
    body, media_type = _body(method, json_body, data)
    if media_type is not None and not any(name.lower() == "content-type" for name in sent):
        sent["Content-Type"] = media_type
    with opened_client() as client:
        did, session_id = find_account(client, account)
        session = client.restore(did, session_id=session_id)
        session.total_timeout = timeout
        try:
            response = session.request(method, path, params=query, headers=sent, data=body, stream=True)
        except requests.RequestException:
            raise
        except UnicodeError:
            raise Failed("a header or a parameter has letters that HTTP cannot carry") from None
        except ValueError as error:
            raise Failed(f"that is no request: {printable(str(error), 300)}") from None
        with response:
            _print(response, output, include=include)
    if response.status_code >= 400:
        code = Exit.REFUSED if response.status_code < 500 else Exit.SERVER_FAILED
        raise Failed(f"the server answered {response.status_code} {printable(response.reason or '')}", code)


def _print(response: requests.Response, output: str | None, *, include: bool) -> None:
    if include:
        head = [f"HTTP {response.status_code} {response.reason}"]
        head += [f"{name}: {value}" for name, value in response.headers.items()]
        click.echo("\n".join(printable(line, 1000) for line in [*head, ""]))
    with click.open_file(output or "-", "wb") as file:
        is_json = response.headers.get("Content-Type", "").partition(";")[0] == "application/json"
        if is_json and output is None and is_terminal(sys.stdout):
            file.write(_laid_out(response.content))
        else:
            for piece in response.iter_content(_PIECE):
                file.write(piece)


def _laid_out(body: bytes) -> bytes:
    """JSON as people read it."""
    try:
        return json.dumps(json.loads(body), indent=2, ensure_ascii=False).encode() + b"\n"
    except ValueError:  # the server calls it JSON
        return body


def _split(text: str, mark: str, usage: str) -> tuple[str, str]:
    name, found, value = text.partition(mark)
    if not found or not name.strip():
        raise click.UsageError(usage)
    return name.strip(), value.strip() if mark == ":" else value


def _body(method: str, json_body: str | None, data: str | None) -> tuple[bytes | None, str | None]:
    """The body, and its media type as far as that can be told."""
    if json_body is not None:
        body = _read(json_body)
        if not _is_json(body):
            raise click.UsageError("what --json was given is not JSON")
        return body, "application/json"
    if data is not None:
        body = _read(data)
    elif method in _WITHOUT_BODY or is_terminal(sys.stdin):
        return None, None
    else:
        body = sys.stdin.buffer.read()
    if not body:
        return None, None
    return body, "application/json" if _is_json(body) else "application/octet-stream"


def _read(value: str) -> bytes:
    if value == "-":
        return sys.stdin.buffer.read()
    if value.startswith("@"):
        return Path(value[1:]).read_bytes()
    return value.encode()


def _is_json(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body), dict | list)
    except ValueError:
        return False
