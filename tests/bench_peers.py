"""What other libraries do with one expired session, beside this one: ``make bench-peers``.

Four processes with eight threads each share a session whose access token has expired. All threads make a request at the
same moment. The session's rules are those of the local network (``atproto_session.testing.network``): a refresh token
works once, and to send it again ends the session. Each library speaks its own protocol; :class:`Front` translates.

How each library is used is in ``bench_peer_worker.py``, with a link to the documentation that says so.
"""

from __future__ import annotations

import argparse
import base64
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from atproto_session import ClientMetadata, OAuthClient
from atproto_session.testing.network import LocalNetwork
from atproto_session.testing.network.clients import ClientAuth
from atproto_session.testing.network.errors import OAuthError
from atproto_session.testing.network.sessions import IssuedTokens, Ledger
from atproto_session.testing.network.wire import Listener, Request, Response

from .bench import write

ROOT = Path(__file__).parent.parent
PROCESSES, THREADS, LATENCY = 4, 8, 0.15
DID = "did:plc:" + "a" * 24


@dataclass(frozen=True)
class Peer:
    """
    :ivar worker: what the worker calls it.
    :ivar distributions: whose versions are shown.
    """

    worker: str
    name: str
    distributions: tuple[str, ...]


PEERS = [
    Peer("ours", "atproto-session", ("atproto-session",)),
    Peer("authlib", "Authlib", ("Authlib",)),
    Peer("requests_oauthlib", "requests-oauthlib", ("requests-oauthlib",)),
    Peer("google_auth", "google-auth", ("google-auth",)),
    Peer("msal", "msal + msal-extensions", ("msal", "msal-extensions")),
    Peer("botocore", "botocore (SSO)", ("botocore",)),
    Peer("atproto", "atproto", ("atproto",)),
    Peer("atproto_oauth", "atproto-oauth", ("atproto-oauth",)),
    Peer("requests_oauth2client", "requests_oauth2client", ("requests_oauth2client",)),
]


@dataclass(frozen=True)
class Outcome:
    """
    :ivar refreshes: how many refresh requests there were; one is right.
    :ivar failed: how many of the requests failed.
    :ivar alive: whether what is stored afterwards can be refreshed.
    :ivar cost: CPU seconds of a request with a fresh token, over loopback.
    """

    peer: str
    versions: str
    refreshes: int
    failed: int
    alive: bool
    cost: float


class Front:
    """A token endpoint and a resource, in the words of each library, over one ledger of the local network."""

    def __init__(self) -> None:
        self.ledger = Ledger(lifetime=3600.0, outliving=False, clock=time.time)
        self.refreshes = 0
        self._listener = Listener(self._respond)
        self.origin = self._listener.origin
        self._listener.start()

    def close(self) -> None:
        self._listener.stop()

    def begin_session(self) -> IssuedTokens:
        return self.ledger.create(
            did=DID, client_id="client", client_auth=ClientAuth("none"), jkt="", scope="atproto", audience="", code="x"
        )

    def _respond(self, request: Request) -> Response:
        try:
            if request.method == "POST":
                return self._refresh(request)
            if request.path.endswith("openid-configuration"):
                issuer = "https://login.example.com/tenant"  # see msal() in the worker
                return Response.of_json(
                    {
                        "issuer": issuer,
                        "authorization_endpoint": f"{issuer}/authorize",
                        "token_endpoint": f"{issuer}/token",
                    }
                )
            return self._resource(request)
        except OAuthError as error:
            document = {"error": error.error, "error_description": error.description, "message": error.description}
            return Response.of_json(document, 400)

    def _refresh(self, request: Request) -> Response:
        time.sleep(LATENCY)
        self.refreshes += 1
        if request.path.endswith("refreshSession"):
            return Response.of_json(session_document(self._rotate(opaque(bearer(request)))))
        if request.headers.get_content_type() == "application/json":
            issued = self._rotate(json.loads(request.body)["refreshToken"])
            return Response.of_json(
                {
                    "accessToken": issued.access_token,
                    "refreshToken": issued.refresh_token,
                    "tokenType": "Bearer",
                    "expiresIn": int(issued.expires_in),
                }
            )
        token_type = "DPoP" if "DPoP" in request.headers else "Bearer"
        return Response.of_json(token_document(self._rotate(request.form["refresh_token"]), token_type))

    def _rotate(self, token: str) -> IssuedTokens:
        return self.ledger.rotate(token, lambda grant: None, lambda did: "")

    def _resource(self, request: Request) -> Response:
        info = self.ledger.info(opaque(bearer(request)))
        if info is None or not info.current:
            return Response.of_json({"error": "invalid_token"}, 401).with_headers(
                WWW_Authenticate='Bearer error="invalid_token"'
            )
        return Response.of_json({"active": True, "did": DID, "handle": "alice.test"})


def bearer(request: Request) -> str:
    return str(request.headers.get("Authorization", " ")).partition(" ")[2]


def token_document(issued: IssuedTokens, token_type: str = "Bearer") -> dict[str, Any]:
    return {
        "access_token": issued.access_token,
        "refresh_token": issued.refresh_token,
        "token_type": token_type,
        "expires_in": int(issued.expires_in),
        "scope": issued.scope,
        "sub": DID,
    }


def session_document(issued: IssuedTokens, lifetime: float = 3600.0) -> dict[str, Any]:
    """What ``com.atproto.server.refreshSession`` answers."""
    return {
        "did": DID,
        "handle": "alice.test",
        "accessJwt": as_jwt(issued.access_token, lifetime),
        "refreshJwt": as_jwt(str(issued.refresh_token), 90 * 86400.0),
    }


def as_jwt(token: str, lifetime: float) -> str:
    """A JWT that carries ``token``. Nobody looks at its signature."""
    now = int(time.time())
    claims = {"jti": token, "sub": DID, "scope": "com.atproto.access", "iat": now, "exp": int(now + lifetime)}
    parts = (json.dumps(part).encode() for part in ({"typ": "at+jwt", "alg": "HS256"}, claims))
    return ".".join([*(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts), "c2ln"])


def opaque(token: str) -> str:
    """The token in a JWT, or the token itself."""
    if token.count(".") != 2:
        return token
    payload = token.split(".")[1]
    return str(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["jti"])


def run(peer: Peer, python: str) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="atproto-session-peers-") as directory:
        if peer.worker == "ours":
            return run_ours(peer, python, directory)
        front = Front()
        try:
            issued = front.begin_session()
            job = {
                "origin": front.origin,
                "directory": directory,
                "threads": THREADS,
                "token": token_document(issued),
                "session": session_document(issued, lifetime=-60.0),
            }
            said, versions = run_workers(peer, python, job)
            stored = opaque(said[-1]["stored"])
            info = front.ledger.info(stored)
            refreshes = front.refreshes
            alive = info is not None and info.current
            failed = sum(each["failed"] for each in said)
            front.ledger = Ledger(lifetime=3600.0, outliving=False, clock=time.time)
            issued = front.begin_session()
            job |= {"token": token_document(issued), "session": session_document(issued), "fresh": True}
            return Outcome(peer.name, versions, refreshes, failed, alive, cost_of(peer, python, job))
        finally:
            front.close()


def run_ours(peer: Peer, python: str, directory: str) -> Outcome:
    with LocalNetwork(access_token_lifetime=3600.0, latency=LATENCY) as network:
        account = network.create_account()
        store = f"sqlite:///{directory}/sessions.db"
        options = network.client_options()
        with OAuthClient(ClientMetadata.loopback(), store=store, **options) as client:
            url = network.authorize(client.authorize(account.did), account)
            client.callback(url).session.get("/xrpc/com.atproto.server.getSession")
            network.expire_access_tokens(account.did)
            before = network.token_requests
            job: dict[str, Any] = {"store": store, "options": options, "did": account.did, "threads": THREADS}
            said, versions = run_workers(peer, python, job)
            stored = client.restore(account.did, refresh=False)._signer.getter.get_stored(account.did)
            info = None if stored is None else network.session_of(stored.token_set.access_token)
            refreshes = network.token_requests - before
        failed = sum(each["failed"] for each in said)
        cost = cost_of(peer, python, job | {"fresh": True})
        return Outcome(peer.name, versions, refreshes, failed, info is not None and info.current, cost)


def run_workers(peer: Peer, python: str, job: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """What the workers say, the one that was last to end last; and the versions."""
    processes = [start(peer, python, job)]
    versions = json.loads(hear(processes[0]))["versions"]  # it has left the session where the others find it
    processes += [start(peer, python, job) for _ in range(PROCESSES - 1)]
    for process in processes[1:]:
        hear(process)
    for process in processes:
        print("go", file=process.stdin, flush=True)
    said = [outcome_of(process) for process in processes]
    said.sort(key=lambda each: each["ended"])
    for each in said:
        for error in each["errors"][:1]:
            print(f"    {peer.name}: {error[:150]}")
    return said, ", ".join(versions[name] for name in peer.distributions)


def outcome_of(process: subprocess.Popen[str], line: str | None = None) -> Any:
    said, complaints = process.communicate(line, timeout=120)
    if process.returncode != 0:
        raise RuntimeError(complaints[-2000:])
    return json.loads(said)


def cost_of(peer: Peer, python: str, job: dict[str, Any]) -> float:
    process = start(peer, python, job)
    hear(process)
    return float(outcome_of(process, "go\n")["cost"])


def start(peer: Peer, python: str, job: dict[str, Any]) -> subprocess.Popen[str]:
    command = [python, str(ROOT / "tests" / "bench_peer_worker.py"), peer.worker, json.dumps(job)]
    command += [json.dumps(peer.distributions)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def hear(process: subprocess.Popen[str]) -> str:
    if process.stdout is None:
        raise RuntimeError("the worker has no output")
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(process.communicate()[1][-2000:])
    return line


# Table and picture


def table(outcomes: list[Outcome]) -> str:
    rows = [
        (
            f"{outcome.peer} {outcome.versions}",
            str(outcome.refreshes),
            f"{outcome.failed} of {PROCESSES * THREADS}",
            "alive" if outcome.alive else "dead",
            f"{outcome.cost * 1e6:,.0f}",
        )
        for outcome in outcomes
    ]
    titles = ("Library", "Refreshes sent", "Requests failed", "Session afterwards", "CPU of a request, us")
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles))]
    line = " ".join("=" * width for width in widths)
    lines = [" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (titles, *rows)]
    return "\n".join([line, lines[0].rstrip(), line, *(text.rstrip() for text in lines[1:]), line])


def draw(outcomes: list[Outcome], path: Path) -> None:
    matplotlib = import_module("matplotlib")  # of the extra "docs"
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "atproto-session"
    pyplot = import_module("matplotlib.pyplot")
    shown = outcomes[::-1]
    chart, axes = pyplot.subplots(figsize=(9, 0.45 * len(shown) + 1), layout="constrained")
    colors = ["#228833" if outcome.alive else "#cc3311" for outcome in shown]
    bars = axes.barh([outcome.peer for outcome in shown], [outcome.refreshes for outcome in shown], color=colors)
    axes.bar_label(bars, labels=[f" {one.refreshes}, {'alive' if one.alive else 'dead'}" for one in shown])
    axes.set_xlabel(f"refresh requests of {PROCESSES} processes x {THREADS} threads; one is right")
    axes.set_xlim(0, 1.15 * max(outcome.refreshes for outcome in shown))
    chart.savefig(path, metadata={"Date": None})
    pyplot.close(chart)


def main() -> int:
    parser = argparse.ArgumentParser(description="What other libraries do with one expired session.")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the other libraries")
    parser.add_argument("--docs", type=Path, help="where peers.rst, peers.json and peers.svg are")
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    outcomes = []
    for peer in PEERS:
        if not options.only or peer.worker in options.only:
            outcomes.append(run(peer, options.python))
    print(table(outcomes))
    if options.docs is not None:
        write(options.docs / "peers.rst", table(outcomes), f"with Python {platform.python_version()}")
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "outcomes": [vars(outcome) for outcome in outcomes],
        }
        (options.docs / "peers.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draw(outcomes, options.docs / "peers.svg")
    ours = outcomes[0]
    return int(ours.refreshes != 1 or ours.failed > 0 or not ours.alive)


if __name__ == "__main__":
    sys.exit(main())
