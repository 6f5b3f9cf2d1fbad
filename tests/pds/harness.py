"""The real PDS, accounts on it, the browser that logs them in, and the reference client beside it.

::

    with RealPDS() as pds:
        account = pds.create_account()
        callback_url = pds.authorize(authorization_url, account)
        fault = pds.proxy.arm("/oauth/token", proxy.cut_after())
"""

from __future__ import annotations

import json
import queue
import secrets
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

import requests
import trustme
from requests.cookies import RequestsCookieJar

from atproto_session.testing.network import Account
from tests.pds.install import Installation, ensure_installed
from tests.pds.proxy import FaultProxy
from tests.scenes import GET_SESSION

#: The bound on every wait for something that takes a second.
PATIENCE = 60.0
_HERE = Path(__file__).parent
_API = "/@atproto/oauth-provider/~api"


class HarnessError(Exception):
    """The servers, or the log-in page, did not do what the tests rely on."""


class NodeClientError(Exception):
    """The reference client threw.

    :ivar name: the class of what it threw, for instance ``TokenRefreshError``.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


def ask_reference(**questions: list[Any]) -> dict[str, list[Any]]:
    """What the packages of the reference make of documents and scopes; see ``judge.mjs``."""
    installation = ensure_installed()
    done = subprocess.run(
        [installation.node, _HERE / "judge.mjs", installation.directory],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        check=True,
        env=dict(installation.env),
    )
    answers: dict[str, list[Any]] = json.loads(done.stdout)
    return answers


class RealPDS:
    """A PDS with its PLC directory, behind a :class:`FaultProxy`.

    ``pds_url`` is the proxy's address and at the same time the PDS's own idea of its address, so that it stands in
    every DID document, in the metadata and in every ``htu``: no client can reach the PDS but through the proxy. Only
    the port on which the Node server listens differs (``serve.mjs``).

    :ivar ca: issues the certificates that the PDS trusts when it fetches something, as it trusts the public ones.
    """

    def __init__(self) -> None:
        self.proxy = FaultProxy()
        self.ca = trustme.CA()
        self._folder = tempfile.TemporaryDirectory()
        try:
            certificate = Path(self._folder.name) / "ca.pem"
            self.ca.cert_pem.write_to_path(certificate)
            installation = ensure_installed()
            # Node reads this variable once, when it starts.
            env = {**installation.env, "NODE_EXTRA_CA_CERTS": str(certificate)}
            self._installation = replace(installation, env=env)
            config = {"installation": str(self._installation.directory), "publicPort": self.proxy.port}
            self._node = _NodeProcess(self._installation, "serve.mjs", config)
        except BaseException:
            self.proxy.close()
            self._folder.cleanup()
            raise
        self.pds_url: str = self._node.greeting["pds"]
        self.plc_url: str = self._node.greeting["plc"]
        self.proxy.upstream = self._node.greeting["upstream"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._node.close()
        self.proxy.close()
        self._folder.cleanup()

    def create_account(self, handle: str | None = None) -> Account:
        """A new account; without a ``handle`` (``name.test``), under a random one."""
        handle = handle or f"u{secrets.token_hex(6)}.test"
        password = secrets.token_urlsafe(16)
        response = requests.post(
            f"{self.pds_url}/xrpc/com.atproto.server.createAccount",
            json={"handle": handle, "email": f"{handle.partition('.')[0]}@example.com", "password": password},
            timeout=PATIENCE,
        )
        if response.status_code != 200:
            raise HarnessError(f"createAccount answered {response.status_code}: {response.text[:200]}")
        return Account(response.json()["did"], handle, password)

    def client_options(self) -> dict[str, Any]:
        """The keyword arguments that make an ``OAuthClient`` live here."""
        return {"plc_directory": self.plc_url, "handle_resolver": self.pds_url, "allow_http": True}

    def authorize(self, url: str, account: Account, approve: bool = True) -> str:
        """:meth:`Browser.authorize` in a browser that knows nobody."""
        return Browser(self.pds_url).authorize(url, account, approve)

    @contextmanager
    def token_lifetime(self, seconds: float) -> Iterator[None]:
        """Access tokens issued inside live for ``seconds`` (else for an hour)."""
        before = self._node.request("tokenLifetime", seconds=seconds)["before"]
        try:
            yield
        finally:
            self._node.request("tokenLifetime", seconds=before)

    def route(self, host: str, port: int) -> None:
        """Have the PDS find ``https://host`` at ``port`` of this machine. It verifies the certificate as ever."""
        self._node.request("route", host=host, port=port)

    def forget(self, *urls: str) -> None:
        """Have the PDS fetch these client metadata documents and keys anew when it needs them next. By itself it does
        so ten minutes after it fetched them."""
        self._node.request("forget", urls=urls)

    def age(self, account: Account, *, begun: timedelta, refreshed: timedelta) -> None:
        """Let the account's sessions have begun, and have been refreshed last, that long ago."""
        seconds = {"begun": begun.total_seconds(), "refreshed": refreshed.total_seconds()}
        self._node.request("age", did=account.did, **seconds)

    def node_client(self, client_id: str) -> NodeClient:
        """The reference client, as ``client_id``. Close it."""
        return NodeClient(self._installation, self, client_id)


class Browser:
    """A browser, which remembers who has signed in: the server takes 400 ms for a sign-in, lest its time tell anything.

    :param origin: of the PDS.
    """

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._cookies = RequestsCookieJar()
        self._signed_in: set[str] = set()

    def authorize(self, url: str, account: Account, approve: bool = True) -> str:
        """Sign in at the authorization URL and consent, as a person does, or refuse at once. Returns the callback
        URL."""
        visit = _Visit(self._origin, url, self._cookies)
        if not approve:
            return visit.follow(visit.call("reject", {})["url"])
        if account.did not in self._signed_in:
            credentials = {"username": account.handle, "password": account.password, "locale": "en", "remember": True}
            visit.call("sign-in", credentials)
            self._signed_in.add(account.did)
        return visit.follow(visit.call("consent", {"did": account.did})["url"])


class _Visit:
    """One visit to the authorization page."""

    def __init__(self, origin: str, url: str, cookies: RequestsCookieJar) -> None:
        self._origin = origin
        self._url = url
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.cookies = cookies
        self._navigate(url, {"Sec-Fetch-Site": "none"}, 200)

    def call(self, endpoint: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        headers = {
            "Sec-Fetch-Site": "same-origin",
            "Sec-Fetch-Mode": "same-origin",
            "Sec-Fetch-Dest": "empty",
            "Origin": self._origin,
            "Referer": self._url,
            "x-csrf-token": self._session.cookies.get("csrf-token") or "",
        }
        body: dict[str, Any] = self._send("POST", f"{self._origin}{_API}/{endpoint}", headers, 200, payload).json()
        return body

    def follow(self, url: str) -> str:
        """The address that the page's own redirect at ``url`` leads to; ends the visit."""
        with self._session:
            answer = self._navigate(url, {"Sec-Fetch-Site": "same-origin", "Referer": self._url}, 303)
            return answer.headers["Location"]

    def _navigate(self, url: str, headers: Mapping[str, str], expected: int) -> requests.Response:
        headers = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", **headers}
        return self._send("GET", url, headers, expected)

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], expected: int, payload: Mapping[str, Any] | None = None
    ) -> requests.Response:
        answer = self._session.request(
            method, url, json=payload, headers=headers, allow_redirects=False, timeout=PATIENCE
        )
        if answer.status_code != expected:
            raise HarnessError(f"{urlsplit(url).path} answered {answer.status_code}: {answer.text[:200]}")
        for cookie in self._session.cookies:
            cookie.secure = False  # to a browser, http://localhost is as secure as https; not to Python's cookie jar
        return answer


@dataclass(frozen=True)
class NodeSession:
    """What the reference client says of a session.

    :ivar document: the record that it stored.
    :ivar state: the application's own state, after a callback.
    """

    did: str
    token_info: Mapping[str, Any]
    document: dict[str, Any] = field(repr=False)
    state: str | None = None


class NodeClient:
    """``@atproto/oauth-client-node`` in a process of its own, with stores in its memory. Every method may raise
    :class:`NodeClientError`. A context manager that ends with :meth:`close`.

    :param client_id: a loopback client's, ``http://localhost?redirect_uri=...&scope=...``.
    """

    def __init__(self, installation: Installation, pds: RealPDS, client_id: str) -> None:
        config = {
            "installation": str(installation.directory),
            "clientId": client_id,
            "handleResolver": pds.pds_url,
            "plcDirectoryUrl": pds.plc_url,
        }
        self._node = _NodeProcess(installation, "node_client.mjs", config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._node.close()

    def authorize(self, identifier: str, **options: str) -> str:
        """The authorization URL; ``options`` as the reference client names them (``state``, ``scope``, ...)."""
        url: str = self._node.request("authorize", identifier=identifier, options=options)["url"]
        return url

    def callback(self, url: str) -> NodeSession:
        """End the log-in whose callback URL this is."""
        answer = self._node.request("callback", params=dict(parse_qsl(urlsplit(url).query)))
        return NodeSession(answer["did"], answer["tokenInfo"], answer["document"], answer["state"])

    def restore(self, did: str, refresh: Literal["auto"] | bool = "auto") -> NodeSession:
        answer = self._node.request("restore", did=did, refresh=refresh)
        return NodeSession(answer["did"], answer["tokenInfo"], answer["document"])

    def call(self, did: str, path: str = GET_SESSION) -> tuple[int, str]:
        """GET ``path`` of the account's PDS with its session; the status and the body."""
        answer = self._node.request("call", did=did, path=path)
        return answer["status"], answer["body"]

    def revoke(self, did: str) -> None:
        self._node.request("revoke", did=did)

    def put(self, did: str, document: Mapping[str, Any]) -> None:
        """Put a record in its session store."""
        self._node.request("put", did=did, document=document)

    def sessions(self) -> dict[str, dict[str, Any]]:
        """Its session store, by DID."""
        sessions: dict[str, dict[str, Any]] = self._node.request("documents")["sessions"]
        return sessions

    def states(self) -> dict[str, dict[str, Any]]:
        """Its store of pending log-ins, by the state parameter."""
        states: dict[str, dict[str, Any]] = self._node.request("documents")["states"]
        return states


class _NodeProcess:
    """A script that says one line of JSON when it is ready, then answers each line with a line, and ends when its stdin
    does, so that it cannot outlive the tests.

    :ivar greeting: the first line.
    """

    def __init__(self, installation: Installation, script: str, config: Mapping[str, Any]) -> None:
        self._script = script
        self._turn = threading.Lock()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [installation.node, _HERE / script, json.dumps(config)],
            env={**installation.env, "LOG_ENABLED": "false", "NODE_NO_WARNINGS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"{script}-reader", daemon=True)
        self._reader.start()
        try:
            self.greeting = self._receive()
        except BaseException:
            self.close()
            raise

    def request(self, cmd: str, **args: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with self._turn:
            self._process.stdin.write(json.dumps({"cmd": cmd, **args}) + "\n")
            self._process.stdin.flush()
            answer = self._receive()
        if "error" in answer:
            raise NodeClientError(**answer["error"])
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            # A forked child of the tests may hold the other end of the pipe.
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        self._errors.close()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=PATIENCE)
        except queue.Empty:
            raise HarnessError(f"{self._script} said nothing for {PATIENCE:.0f} seconds{self._last_words()}") from None
        if not line:
            raise HarnessError(f"{self._script} has ended{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _last_words(self) -> str:
        self._errors.seek(0)
        return ":\n" + self._errors.read()[-2000:].decode(errors="replace")
