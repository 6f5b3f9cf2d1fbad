"""The command that finds out what is wrong, and says what to do."""

from __future__ import annotations

import difflib
import os
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import click
import dns.exception
import dns.resolver

from .. import _scripts
from .._urls import origin
from ..client import OAuthClient
from ..errors import (
    ClientMetadataError,
    DiscoveryError,
    IdentityError,
    LockTimeoutError,
    SessionError,
    StoreError,
    TransportError,
    printable,
)
from ..locks._places import check_parent, check_private
from ..metadata import ClientMetadata
from ..session import Session
from ..stores import FullStore
from ..transport import Transport, UnusableResponse
from .frame import (
    Exit,
    given_options,
    json_option,
    moment,
    place_of,
    place_options,
    say_json,
    store_url,
    told,
    without_password,
)

#: By how much clocks may differ, in seconds. The reference server takes proofs that are 10 seconds old.
_CLOCK_TOLERANCE = 5.0
#: Below this, a disk counts as full, in bytes.
_LEAST_FREE = 10 * 1024 * 1024
_MOST_ACCOUNTS = 100
_MOST_SERVERS = 10
_MOST_FILES = 1000
_DAY = 86_400.0
_PUBLIC_SESSION = 14 * _DAY
_REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "afs", "ceph", "glusterfs", "davfs"})


@dataclass(frozen=True)
class Finding:
    """
    :ivar level: ``"ok"``; ``"note"``, worth knowing; ``"wrong"``, something does not work.
    :ivar remedy: what to do about it; empty where the text says so already.
    """

    area: str
    level: Literal["ok", "note", "wrong"]
    text: str
    remedy: str = ""


@click.command()
@click.option(
    "--client-id",
    metavar="URL",
    help="Look at the metadata document of a client on the web, as an authorization server would.",
)
@json_option
@place_options
def doctor(client_id: str | None, as_json: bool) -> None:
    """Find out what is wrong, and say what to do.

    It looks at the store, its files and locks; at every account; at this machine's clock, proxies and resolver; at the
    servers of the accounts; and at the client's metadata. Nothing is changed, and no token is spent.

    The exit code is 0 if nothing is wrong, and otherwise 1.
    """
    findings: list[Finding] = []
    for finding in _examine(client_id):
        findings.append(finding)
        if not as_json:
            _say(finding)
    wrong = sum(finding.level == "wrong" for finding in findings)
    if as_json:
        say_json([asdict(finding) for finding in findings])
    else:
        click.echo("Nothing is wrong." if not wrong else f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong.")
    click.get_current_context().exit(Exit.FAILED if wrong else Exit.DONE)


def _say(finding: Finding) -> None:
    mark, colour = {"ok": ("ok   ", "green"), "note": ("note ", "yellow"), "wrong": ("WRONG", "red")}[finding.level]
    click.echo(f"{click.style(mark, fg=colour)} {finding.area}: {finding.text}")
    if finding.remedy:
        click.echo(f"      {finding.remedy}")


def _examine(client_id: str | None) -> Iterator[Finding]:
    yield from _environment()
    yield from _proxies()
    with ExitStack() as stack:
        client = yield from _open(stack)
        servers: set[str] = set()
        if client is not None:
            yield from _locks(client._store)
            yield from _records(client, servers)
        options = {**_scripts.network_options(), **given_options(), "store": "memory:", "encryption_keys": ()}
        try:
            asking = client or stack.enter_context(OAuthClient.for_scripts(**options))
        except ClientMetadataError as error:
            remedy = f"in development, set {_scripts.ALLOW_HTTP}=1" if "does not use https" in str(error) else ""
            yield Finding("network", "wrong", str(error), remedy)
            return
        yield from _resolver(asking, options)
        yield from _servers(asking, servers, options)
        yield from _metadata(asking._transport, client_id)


def _environment() -> Iterator[Finding]:
    """Variables that are misspelt: they have no effect."""
    for name in os.environ:
        if name.startswith("ATPROTO_SESSION_") and name not in _scripts.VARIABLES:
            near = difflib.get_close_matches(name, _scripts.VARIABLES, n=1, cutoff=0.0)[0]
            yield Finding("environment", "note", f"nothing reads the variable {printable(name)}", f"is it {near}?")


# The store


def _open(stack: ExitStack) -> Any:
    """The client, if its store can be opened."""
    try:
        url = store_url()
        keys = _scripts.encryption_keys()
        place = place_of(url)
    except (StoreError, click.UsageError) as error:
        yield Finding("store", "wrong", getattr(error, "message", str(error)))
        return None
    yield Finding("store", "ok", f"{without_password(url)}, {'encrypted' if keys else 'not encrypted'}")
    if place is not None:
        if not place.is_absolute():
            text = f"the path is relative to the current directory ({Path.cwd()})"
            yield Finding("store", "note", text, "a script that cron starts runs elsewhere: give an absolute path")
        faults = list(_files(place.absolute()))
        yield from faults
        if not place.exists():
            yield Finding("store", "note", "nobody has logged in yet", "atproto-session login HANDLE begins the store")
            return None
        if any(fault.level == "wrong" for fault in faults):
            return None
    try:
        client = OAuthClient.for_scripts(**{**given_options(), "store": url})
        stack.callback(client.close)
        # Writing is tried with what nobody misses.
        ticket = f"doctor-{os.getpid()}-{time.time_ns()}"
        client._store.logins.put(ticket, {}, time.time() + 60)
        client._store.logins.take(ticket)
    except ClientMetadataError:  # of the network, which is looked at later
        return None
    except SessionError as error:
        yield Finding("store", "wrong", *told(error).split("\n", 1))
        return None
    yield Finding("store", "ok", "it can be read and written")
    return client


def _files(place: Path) -> Iterator[Finding]:
    """Owners and modes of the store, its locks, and the directory that it is in."""
    beside = place.parent
    while not beside.exists():
        beside = beside.parent
    if not beside.is_dir():
        yield Finding("files", "wrong", f"{beside} is not a directory", "name another place")
        return
    try:
        check_parent(beside)
    except StoreError as error:
        yield Finding("files", "wrong", str(error))
    sides = [Path(f"{place}{side}") for side in ("", "-wal", "-shm", "-journal", ".locks")]
    inside = list(islice(place.rglob("*"), _MOST_FILES)) if place.is_dir() else []
    checked = 0
    for path in (*sides, sides[-1] / "salt", *inside):
        try:
            check_private(path)
            checked += 1
        except (FileNotFoundError, NotADirectoryError):
            continue
        except StoreError as error:
            yield Finding("files", "wrong", str(error))
    if not os.access(beside, os.W_OK):
        yield Finding("files", "wrong", f"{beside} cannot be written to", "run as its owner, or name another place")
    if (free := shutil.disk_usage(beside).free) < _LEAST_FREE:
        yield Finding("files", "wrong", f"the disk of {beside} is full ({free:,} bytes left)", "make room on it")
    if (kind := _file_system_of(beside)) in _REMOTE:
        yield Finding(
            "files", "wrong", f"{beside} is on a network file system ({kind}), where locks are not reliable",
            "name a place on a disk of this machine",
        )  # fmt: skip
    if checked:
        yield Finding("files", "ok", f"{checked} files and directories are this user's alone")


def _file_system_of(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of file system that ``path`` is on, where that can be told."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    real = path.resolve()
    found = [(len(point), kind) for _, point, kind, *_ in lines if real.is_relative_to(point)]
    return max(found, default=(0, ""))[1]


# Locks and records


def _locks(store: FullStore) -> Iterator[Finding]:
    try:
        with store.locks.hold("doctor", timeout=2.0):
            pass
    except SessionError as error:
        yield Finding("locks", "wrong", str(error))
    else:
        yield Finding("locks", "ok", "a lock can be taken")


def _records(client: OAuthClient, servers: set[str]) -> Iterator[Finding]:
    count = 0
    try:
        for key in client._store:
            count += 1
            if count > _MOST_ACCOUNTS:
                yield Finding("accounts", "note", f"only the first {_MOST_ACCOUNTS} were looked at")
                break
            yield from _record(client, key, servers)
    except StoreError as error:
        yield Finding("accounts", "wrong", str(error))
    if not count:
        yield Finding("accounts", "note", "nobody is logged in", "atproto-session login HANDLE")


def _record(client: OAuthClient, key: str, servers: set[str]) -> Iterator[Finding]:
    shown = printable(key)
    area = f"account {shown}"
    try:
        session = client._store.get(key)
    except StoreError as error:
        remedy = f"if they are the wrong ones, see {_scripts.ENCRYPTION_KEYS}" if "encryption_keys" in str(error) else (
            f"restore the store from a backup, or: atproto-session logout {shown}"
        )  # fmt: skip
        yield Finding(area, "wrong", str(error), remedy)
        return
    if session is None:  # logged out since
        return
    servers.update((session.token_set.aud, session.token_set.iss))
    try:
        with client._store.locks.hold(key, timeout=0.0):
            pass
    except LockTimeoutError:
        text = "another process has its lock: it refreshes, or stands still"
        yield Finding(area, "note", text, "if that lasts for minutes, look for a process of yours that has stopped")
    except SessionError as error:
        yield Finding(area, "wrong", str(error))
    faults = list(_state(client, session, f"atproto-session login {session.token_set.sub}"))
    yield from (Finding(area, level, text, remedy) for level, text, remedy in faults)
    yield from _home(client, area, session)


def _state(client: OAuthClient, session: Session, log_in: str) -> Iterator[tuple[Literal["note", "wrong"], str, str]]:
    now = time.time()
    if session.attempt is not None and not session.attempt.is_over and session.attempt.answer_by > now:
        yield "note", "a refresh is under way, or was cut off a moment ago", ""
    elif session.attempt is not None:
        yield "note", "a refresh was sent and its answer was lost", "the next use finds out whether it still works"
    if session.rest is not None and session.rest.until > now:
        left = session.rest.until - now
        text = f"its server is left alone for {left:.0f} s, after: {printable(session.rest.message, 300)}"
        yield "wrong", text, "it is tried again by itself"
    is_mine = client._upkeep._getter_of(session) is not None
    if not is_mine:
        yield "note", f"it belongs to the client {printable(session.client_id or '', 200)}", "only that one can use it"
    if session.token_set.refresh_token is None:
        yield "note", "it has no refresh token", f"when it has expired: {log_in}"
    last = session.refreshed_at or session.began_at
    if last is not None and last - now > _DAY:
        yield "wrong", f"its last refresh lies ahead, at {_time(last)}", "a clock was wrong, or is: set it right"
    elif session.auth_method is not None and session.auth_method.method == "none":
        if session.began_at is not None and now - session.began_at > _PUBLIC_SESSION:
            yield "note", f"it began on {_time(session.began_at)}: most servers end it after two weeks", log_in
        if last is not None and now - last > _PUBLIC_SESSION / 2:
            text = f"it was last refreshed on {_time(last)}: after two weeks its refresh token dies"
            yield "wrong", text, "run atproto-session keep-alive once a day"


def _time(seconds: float) -> str:
    from datetime import UTC, datetime

    return moment(datetime.fromtimestamp(seconds, UTC))


def _home(client: OAuthClient, area: str, session: Session) -> Iterator[Finding]:
    """Whether the account still lives where its session was got."""
    tokens = session.token_set
    try:
        pds = client._identities.resolve_did(tokens.sub).pds
        issuer = client._discovery.authorization_server_of(pds, fresh=True)
        client._discovery.metadata(issuer, fresh=True)
    except (IdentityError, DiscoveryError) as error:
        yield Finding(area, "wrong", str(error), "without that, it cannot be refreshed" if error.retryable else "")
        return
    if issuer != tokens.iss:
        text = f"it has moved to the authorization server {printable(issuer)}, from {printable(tokens.iss)}"
        yield Finding(area, "wrong", text, f"atproto-session login {tokens.sub}")
        return
    yield Finding(area, "ok", f"lives at {printable(pds)}")


# The network


def _proxies() -> Iterator[Finding]:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if (bundle := os.environ.get(name)) and not Path(bundle).exists():
            text = f"{name} names {printable(bundle, 300)}, which is not there"
            yield Finding("certificates", "wrong", text, "no https server can be reached: correct it, or unset it")
    proxies = {scheme: url for scheme, url in urllib.request.getproxies().items() if scheme in ("http", "https", "all")}
    if not proxies:
        yield Finding("proxies", "ok", "none")
    for scheme, url in proxies.items():
        if url.lower().startswith("socks"):
            text = f"the proxy for {scheme} is a SOCKS proxy, which is not supported"
            yield Finding("proxies", "wrong", text, f"name an HTTP proxy in {scheme.upper()}_PROXY, or unset it")
            continue
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
            with socket.create_connection((host, port), timeout=5.0):
                pass
        except (OSError, ValueError) as error:
            shown = f"the proxy for {scheme}, {printable(_without_password(url))}, cannot be reached ({error})"
            yield Finding("proxies", "wrong", shown, f"correct {scheme.upper()}_PROXY, or unset it")
        else:
            yield Finding("proxies", "ok", f"{scheme} goes through {host}:{port}, which can be reached")


def _without_password(url: str) -> str:
    return url.rpartition("@")[2]


def _resolver(client: OAuthClient, options: dict[str, Any]) -> Iterator[Finding]:
    directory = options.get("plc_directory", "https://plc.directory")
    host = urlsplit(directory).hostname or ""
    try:
        client._transport._network.getaddrinfo(host, 443)
    except OSError as error:
        remedy = "look at this machine's network and its resolver (/etc/resolv.conf)"
        yield Finding("resolver", "wrong", f"the name {printable(host)} cannot be looked up ({error})", remedy)
    else:
        yield Finding("resolver", "ok", f"{printable(host)} is found")
    if options.get("handle_resolver"):
        yield from _handle_resolver(client, str(options["handle_resolver"]))
        return
    try:
        (client._identities._dns_resolver or dns.resolver.Resolver()).resolve(f"_atproto.{host}", "TXT", lifetime=4.0)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        pass  # an answer, too
    except (dns.exception.DNSException, OSError) as error:
        text = f"the DNS does not answer ({type(error).__name__}): handles are looked up by HTTPS alone"
        yield Finding("resolver", "wrong", text, "look at the name servers of this machine, or set a handle resolver")
        return
    yield Finding("resolver", "ok", "the DNS answers")


def _handle_resolver(client: OAuthClient, url: str) -> Iterator[Finding]:
    query = f"{url.rstrip('/')}/xrpc/com.atproto.identity.resolveHandle?handle=doctor.test"
    try:
        client._transport.request("GET", query)
    except TransportError as error:
        remedy = f"correct {_scripts.HANDLE_RESOLVER}, or start what is there"
        yield Finding("resolver", "wrong", f"the handle resolver: {error}", remedy)
    else:
        yield Finding("resolver", "ok", f"the handle resolver {printable(url)} answers")


def _servers(client: OAuthClient, servers: set[str], options: dict[str, Any]) -> Iterator[Finding]:
    """What the clocks of servers say."""
    directory = options.get("plc_directory", "https://plc.directory")
    for server in sorted({origin(directory), *servers})[:_MOST_SERVERS]:
        before = time.time()
        try:
            answer = client._transport.request("GET", f"{server}/")
        except TransportError as error:
            yield Finding("network", "wrong", str(error), "look at the network, and whether the server is up")
            continue
        after = time.time()
        yield Finding("network", "ok", f"{printable(server)} answers")
        try:
            theirs = parsedate_to_datetime(answer.headers.get("Date", "")).timestamp()
        except ValueError:
            yield Finding("clock", "ok", f"{printable(server)} does not say what time it is")
            continue
        ahead, behind = before - theirs - 1, theirs - after
        if max(ahead, behind) <= _CLOCK_TOLERANCE:
            yield Finding("clock", "ok", f"agrees with that of {printable(server)}")
            continue
        way = "ahead of" if ahead > behind else "behind"
        text = f"this machine's clock is {max(ahead, behind):.0f} s {way} that of {printable(server)}"
        yield Finding("clock", "wrong", text, "set it right, with NTP for example: servers refuse proofs that are off")


# The client's metadata


def _metadata(transport: Transport, client_id: str | None) -> Iterator[Finding]:
    if client_id is None:
        yield Finding("metadata", "ok", "a loopback client, whose document nobody fetches")
        return
    remedy = "every authorization server fetches it: no log-in works until that is right"
    try:
        document = transport.get_json(client_id)
    except (TransportError, UnusableResponse) as error:
        answered = isinstance(error, UnusableResponse)
        text = f"{printable(client_id, 200)} answered {error}" if answered else str(error)
        yield Finding("metadata", "wrong", text, remedy)
        return
    if document.get("client_id") != client_id:
        said = printable(str(document.get("client_id")), 200)
        text = f"the document at {printable(client_id, 200)} says that its client_id is {said}"
        yield Finding("metadata", "wrong", text, "the two have to be the same, to the letter")
        return
    try:
        metadata = ClientMetadata.from_document(document)
        if metadata.jwks_uri is not None:
            inline = {name: value for name, value in document.items() if name != "jwks_uri"}
            ClientMetadata.from_document({**inline, "jwks": transport.get_json(metadata.jwks_uri)})
    except ClientMetadataError as error:
        yield Finding("metadata", "wrong", str(error), remedy)
    except (TransportError, UnusableResponse) as error:
        text = f"the jwks_uri answered {error}" if isinstance(error, UnusableResponse) else f"the jwks_uri: {error}"
        yield Finding("metadata", "wrong", text, remedy)
    else:
        kind = "confidential" if metadata.is_confidential else "public"
        yield Finding("metadata", "ok", f"an authorization server can use it: a {kind} client, scope {metadata.scope}")
