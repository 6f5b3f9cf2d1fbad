"""What is wrong is named, with what to do: every fault here is made on purpose."""

from __future__ import annotations

import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import dns.exception
import dns.resolver
import pytest
import trustme
from cryptography.fernet import Fernet

from atproto_session import ClientAuthMethod, ClientMetadata, Keyset, OAuthClient, _scripts
from atproto_session._adapter import Network
from atproto_session._commands import doctor
from atproto_session.keys import generate_jwk
from atproto_session.session import Attempt, Rest, Session
from atproto_session.testing.network import LocalNetwork
from atproto_session.transport import Transport

from .command_line import Shell
from .scenes import log_in

DAY = 86_400.0


class Patient:
    """A store with an account that is logged in, and the doctor."""

    def __init__(self, network: LocalNetwork, place: Path) -> None:
        self.network = network
        self.place = place / "sessions.db"
        self.store = f"sqlite:///{self.place}"
        self.account = network.create_account()
        with self.client() as client:
            log_in(network, client, self.account)
        self.shell = Shell(network, self.store)

    def client(self, **options: Any) -> OAuthClient:
        options = {"store": self.store, "encryption_keys": (), **self.network.client_options(), **options}
        return OAuthClient.for_scripts(**options)

    def change(self, change: Callable[[Session], Session]) -> None:
        with self.client() as client:
            session = client._store.get(self.account.did)
            assert session is not None
            client._store.set(self.account.did, change(session))

    def findings(self, *arguments: str) -> list[dict[str, str]]:
        result = self.shell.run("doctor", "--json", *arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        findings: list[dict[str, str]] = json.loads(result.stdout)
        assert result.exit_code == (1 if any(each["level"] == "wrong" for each in findings) else 0)
        return findings

    def faults(self, *arguments: str, level: str = "wrong") -> list[str]:
        found = [each for each in self.findings(*arguments) if each["level"] == level]
        return [f"{each['area']}: {each['text']} -> {each['remedy']}" for each in found]

    def fault(self, *arguments: str, level: str = "wrong") -> str:
        (fault,) = self.faults(*arguments, level=level)
        return fault


@pytest.fixture
def patient(network: LocalNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Patient:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return Patient(network, tmp_path)


def test_nothing_is_wrong(patient: Patient) -> None:
    said = patient.shell.output("doctor")
    assert said.endswith("Nothing is wrong.\n")
    for area in ("proxies", "store", "files", "locks", f"account {patient.account.did}", "resolver", "metadata"):
        assert f"ok    {area}: " in said
    uses, tokens = patient.network.refresh_token_uses, patient.network.token_requests
    patient.shell.output("doctor")
    assert (patient.network.refresh_token_uses, patient.network.token_requests) == (uses, tokens)


def test_without_a_store_the_rest_is_looked_at(patient: Patient, tmp_path: Path) -> None:
    findings = patient.findings("--store", f"sqlite:///{tmp_path}/none/sessions.db")
    assert [each["remedy"] for each in findings if each["level"] == "note" and each["area"] == "store"] == [
        "atproto-session login HANDLE begins the store"
    ]
    assert "resolver" in {each["area"] for each in findings}
    assert not (tmp_path / "none").exists()


# The store


@pytest.mark.parametrize("side", ["", "-wal", ".locks", ".locks/salt"])
def test_a_file_is_open_to_others(patient: Patient, side: str) -> None:
    path = Path(f"{patient.place}{side}")
    if side == "-wal":
        path.touch()
    path.chmod(0o755 if path.is_dir() else 0o644)
    fault = patient.fault()
    assert f"{path} is open to other users" in fault
    assert f"chmod {700 if path.is_dir() else 600} {path}" in fault
    assert "1 thing is wrong." in patient.shell.run("doctor").stdout


def test_a_file_is_anothers(patient: Patient) -> None:
    if os.geteuid() == 0:
        os.chown(patient.place, 4321, 4321)
        assert "belongs to another user (number 4321)" in patient.fault()


def test_a_directory_is_everybodys(patient: Patient, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert f"chmod o-w {tmp_path}" in patient.fault()
    tmp_path.chmod(0o700)


def test_files_of_a_json_store_are_looked_at(patient: Patient, tmp_path: Path) -> None:
    patient.store = f"json:///{tmp_path}/sessions"
    with patient.client() as client:
        log_in(patient.network, client, patient.account)
    (path,) = (tmp_path / "sessions").rglob("*.json")
    path.chmod(0o640)
    assert f"{path} is open to other users" in patient.fault("--store", patient.store)


def test_the_store_is_something_else(patient: Patient) -> None:
    patient.place.write_bytes(b"something else" * 1000)
    assert "the file of something else, or damaged" in patient.fault()


def test_the_store_cannot_be_written(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"{patient.place.parent} cannot be written to" in patient.fault()


def test_the_disk_is_full(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 4096})())
    assert "is full (4,096 bytes left) -> make room" in patient.fault()


def test_the_disk_is_far_away(patient: Patient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"disk / ext4 rw 0 0\nserver:/home {tmp_path} nfs4 rw 0 0\n")
    assert doctor._file_system_of(Path("/nowhere"), mounts) == "ext4"
    assert doctor._file_system_of(tmp_path / "x", mounts) == "nfs4"
    assert doctor._file_system_of(tmp_path, tmp_path / "none") == ""
    monkeypatch.setattr(doctor, "_file_system_of", lambda path: "nfs4")
    assert "a network file system (nfs4)" in patient.fault()


def test_the_store_is_under_a_file(patient: Patient) -> None:
    assert f"{patient.place} is not a directory" in patient.fault("--store", f"{patient.store}/sessions.db")


@pytest.mark.parametrize(
    ("store", "why"),
    [
        ("memory:", "ends with the command"),
        ("sessions.db", "begins with a scheme"),
        ("sqlite://x.db", "names a store of this kind"),
        ("strange://me:hunter2@host/", "no session store is known"),
    ],
)
def test_the_url_of_the_store_is_wrong(patient: Patient, store: str, why: str) -> None:
    result = patient.shell.run("doctor", "--store", store)
    assert why in result.stdout
    assert "hunter2" not in result.stdout


def test_the_path_of_the_store_is_relative(patient: Patient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    fault = patient.fault("--store", "sqlite:///sessions.db", level="note")
    assert f"({tmp_path}) -> a script that cron starts runs elsewhere" in fault


# Keys and records


def test_the_encryption_key_is_another(patient: Patient) -> None:
    with patient.client(encryption_keys=[Fernet.generate_key()]) as client:
        log_in(patient.network, client, patient.account)
    assert f"there are no encryption_keys: give those that it was written with -> if they are the wrong ones, see "\
           f"{_scripts.ENCRYPTION_KEYS}" in patient.fault()  # fmt: skip
    patient.shell.variables[_scripts.ENCRYPTION_KEYS] = Fernet.generate_key().decode()
    assert "none of the encryption_keys opens it" in patient.fault()
    patient.shell.variables[_scripts.ENCRYPTION_KEYS] = "nonsense"
    fault = patient.fault()
    assert "not a Fernet key" in fault
    assert f"The environment variable {_scripts.ENCRYPTION_KEYS} holds them." in fault
    patient.shell.variables[_scripts.ENCRYPTION_KEYS] = "keyring"
    assert "keyring" in patient.fault()


def test_a_record_is_damaged(patient: Patient) -> None:
    with patient.client() as client:
        client._store._database.write(  # type: ignore[attr-defined]
            lambda connection: connection.execute("UPDATE sessions SET document = ?", (b"nonsense",))
        )
    assert f"it is damaged, or not a record of this library -> restore the store from a backup, or: atproto-session "\
           f"logout {patient.account.did}" in patient.fault()  # fmt: skip


def test_locks_cannot_be_taken(patient: Patient) -> None:
    salt = Path(f"{patient.place}.locks/salt")
    salt.write_bytes(b"short")
    assert any(f"{salt} is damaged" in fault for fault in patient.faults())


def test_another_process_holds_the_lock(patient: Patient) -> None:
    with patient.client() as client, client._store.locks.hold(patient.account.did, timeout=5):
        assert "another process has its lock" in patient.fault(level="note")


@pytest.mark.parametrize("whose", ["the account's", "doctor"])
def test_a_lock_cannot_be_taken(patient: Patient, monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    from atproto_session import StoreError
    from atproto_session.locks import FileLocks

    hold = FileLocks.hold

    def refuse(self: FileLocks, name: str, **options: Any) -> Any:
        if name == (whose if whose == "doctor" else patient.account.did):
            raise StoreError("this lock is broken")
        return hold(self, name, **options)

    monkeypatch.setattr(FileLocks, "hold", refuse)
    assert "this lock is broken" in patient.fault()


@pytest.mark.parametrize(
    ("level", "change", "text"),
    [
        ("note", lambda now: {"attempt": Attempt("1", "x", now, now + 60)}, "a refresh is under way"),
        ("note", lambda now: {"attempt": Attempt("1", "x", now, now - 60)}, "its answer was lost"),
        ("wrong", lambda now: {"rest": Rest(now + 600, 3, "TransportError", "it is down")}, "after: it is down"),
        ("wrong", lambda now: {"refreshed_at": now + 9 * DAY}, "its last refresh lies ahead"),
        ("wrong", lambda now: {"refreshed_at": now - 9 * DAY}, "keep-alive once a day"),
        ("note", lambda now: {"began_at": now - 15 * DAY}, "most servers end it after two weeks"),
        ("note", lambda now: {"client_id": "https://app.example.com/client.json"}, "it belongs to the client https://app"),
    ],
)  # fmt: skip
def test_a_session_is_in_a_bad_state(
    patient: Patient, level: str, change: Callable[[float], dict[str, Any]], text: str
) -> None:
    patient.change(lambda session: replace(session, **change(time.time())))
    assert text in patient.fault(level=level)


def test_a_session_cannot_be_refreshed(patient: Patient) -> None:
    patient.change(lambda session: replace(session, token_set=replace(session.token_set, refresh_token=None)))
    assert "it has no refresh token" in patient.fault(level="note")


def test_confidential_sessions_live_longer(patient: Patient) -> None:
    method = ClientAuthMethod("private_key_jwt", "1")
    patient.change(lambda session: replace(session, auth_method=method, refreshed_at=time.time() - 60 * DAY))
    assert patient.faults() == []


def test_an_account_has_moved(patient: Patient) -> None:
    patient.network.move_account_to_other_issuer(patient.account.did)
    assert "it has moved to the authorization server http://localhost:" in patient.fault()


def test_the_directory_does_not_know_an_account(patient: Patient) -> None:
    patient.network.fault("plc", "status", status=404, times=None)
    assert f"the account {patient.account.did} does not exist" in patient.fault()


def test_only_so_many_accounts_are_looked_at(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_MOST_ACCOUNTS", 0)
    assert "only the first 0" in patient.fault(level="note")


def test_nobody_is_logged_in(patient: Patient) -> None:
    patient.shell.output("logout", patient.account.did)
    assert "nobody is logged in" in patient.fault(level="note")


def test_the_store_breaks_while_it_is_looked_at(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    from atproto_session import SQLiteStore, StoreError

    def fail(self: SQLiteStore) -> Iterator[str]:
        raise StoreError("it broke")

    monkeypatch.setattr(SQLiteStore, "__iter__", fail)
    assert "it broke" in patient.fault()
    get = SQLiteStore.get
    monkeypatch.setattr(SQLiteStore, "__iter__", lambda self: iter([patient.account.did]))
    monkeypatch.setattr(SQLiteStore, "get", lambda self, key: None)
    assert patient.faults() == []
    monkeypatch.setattr(SQLiteStore, "get", get)


# The network


class Clock(BaseHTTPRequestHandler):
    """A server whose clock is off."""

    seconds = 0.0
    says_nothing = False

    def do_GET(self) -> None:
        self.send_response_only(404)
        if not self.says_nothing:
            moment = datetime.fromtimestamp(time.time() + self.seconds, UTC)
            self.send_header("Date", format_datetime(moment, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], context: ssl.SSLContext | None = None) -> Iterator[int]:
    import threading
    from http.server import ThreadingHTTPServer

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("seconds", "fault"),
    [(3600.0, "s behind that of http://localhost"), (-3600.0, "s ahead of that of http://localhost"), (1.0, "")],
)
def test_the_clock_is_off(patient: Patient, seconds: float, fault: str) -> None:
    with serving(type("Off", (Clock,), {"seconds": seconds})) as port:
        directory = f"http://localhost:{port}"
        patient.shell.output("logout", patient.account.did)
        faults = patient.faults("--plc-directory", directory)
    assert len(faults) == (1 if fault else 0)
    assert all(fault in each and "NTP" in each for each in faults)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_a_proxy_is_dead(patient: Patient) -> None:
    url = f"http://me:hunter2@127.0.0.1:{closed_port()}"
    patient.shell.variables |= {"HTTPS_PROXY": url, "NO_PROXY": "localhost"}
    fault = patient.fault()
    assert fault.startswith("proxies: the proxy for https, 127.0.0.1:")
    assert "correct HTTPS_PROXY, or unset it" in fault
    assert "hunter2" not in fault
    with socket.create_server(("127.0.0.1", 0)) as server:
        patient.shell.variables["HTTPS_PROXY"] = f"127.0.0.1:{server.getsockname()[1]}"
        assert patient.faults() == []
    patient.shell.variables["HTTPS_PROXY"] = "http://127.0.0.1:nonsense"
    assert "proxies: " in patient.fault()
    patient.shell.variables["HTTPS_PROXY"] = "socks5://127.0.0.1:1080"
    assert "a SOCKS proxy, which is not supported -> name an HTTP proxy in HTTPS_PROXY" in patient.fault()


def test_the_certificates_are_not_there(patient: Patient) -> None:
    patient.shell.variables["REQUESTS_CA_BUNDLE"] = "/nonexistent/ca.pem"
    assert "certificates: REQUESTS_CA_BUNDLE names /nonexistent/ca.pem" in patient.faults()[0]


def test_the_directory_is_down(patient: Patient) -> None:
    faults = patient.faults("--plc-directory", f"http://localhost:{closed_port()}")
    assert any(fault.startswith("network: ") and "localhost" in fault for fault in faults)
    assert any(f"account {patient.account.did}" in fault and "cannot be refreshed" in fault for fault in faults)


def test_the_handle_resolver_is_down(patient: Patient) -> None:
    fault = patient.fault("--handle-resolver", f"http://localhost:{closed_port()}")
    assert f"correct {_scripts.HANDLE_RESOLVER}, or start what is there" in fault
    assert "plc_directory" in patient.fault("--plc-directory", "nonsense")
    patient.shell.variables[_scripts.ALLOW_HTTP] = None
    assert f"does not use https -> in development, set {_scripts.ALLOW_HTTP}=1" in patient.fault()


def test_a_variable_is_misspelt(patient: Patient) -> None:
    patient.shell.variables["ATPROTO_SESSION_STOR"] = "sqlite:////elsewhere.db"
    assert f"the variable ATPROTO_SESSION_STOR -> is it {_scripts.STORE}?" in patient.fault(level="note")
    assert f"      is it {_scripts.STORE}?\n" in patient.shell.output("doctor")


@pytest.mark.parametrize("error", [None, dns.resolver.NoNameservers, dns.exception.Timeout, OSError])
def test_the_resolver_does_not_answer(
    patient: Patient, error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(self: object, name: str, *args: object, **options: object) -> object:
        raise error or dns.resolver.NXDOMAIN

    monkeypatch.setattr(dns.resolver.Resolver, "resolve", resolve)
    patient.shell.variables[_scripts.HANDLE_RESOLVER] = None
    if error is None:
        assert patient.faults() == []
    else:
        assert "resolver: the DNS does not answer" in patient.fault()
        assert "name servers of this machine" in patient.fault()


def test_a_name_is_not_found(patient: Patient) -> None:
    faults = patient.faults("--plc-directory", "https://nothing.invalid")
    assert any(fault.startswith("resolver: the name nothing.invalid cannot be looked up") for fault in faults)


# The metadata document


CLIENT_ID = "https://app.example.net/client.json"


class Site:
    """A client's site, as an authorization server sees it."""

    def __init__(self) -> None:
        self.documents: dict[str, tuple[int, str, bytes]] = {}
        keyset = Keyset([{**generate_jwk(), "kid": "1"}])
        self.keys = keyset.jwks()
        metadata = ClientMetadata(
            CLIENT_ID,
            ["https://app.example.net/callback"],
            "atproto",
            token_endpoint_auth_method="private_key_jwt",
            jwks_uri="https://app.example.net/jwks.json",
        )
        self.document = metadata.document()
        self.put("/client.json", self.document)
        self.put("/jwks.json", self.keys)

    def put(self, path: str, document: object, status: int = 200, media_type: str = "application/json") -> None:
        self.documents[path] = status, media_type, json.dumps(document).encode()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, patient: Patient) -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, media_type, body = site.documents.get(self.path, (404, "text/plain", b""))
            self.send_response(status)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(body)))
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    ca = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("app.example.net").configure_cert(context)
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    with serving(Handler, context) as port:

        def look_up(host: str, _: int, *args: Any, **options: Any) -> list[tuple[Any, ...]]:
            return socket.getaddrinfo("127.0.0.1", port if host == "app.example.net" else _, *args, **options)

        network = Network(is_allowed=lambda address: True, getaddrinfo=look_up)
        examine = doctor._metadata

        def through(transport: Transport, client_id: str | None) -> Iterator[doctor.Finding]:
            return examine(Transport(ca_bundle=str(tmp_path / "ca.pem"), network=network), client_id)

        monkeypatch.setattr(doctor, "_metadata", through)
        yield site


def test_a_document_can_be_used(site: Site, patient: Patient) -> None:
    assert "a confidential client, scope atproto" in patient.findings("--client-id", CLIENT_ID)[-1]["text"]
    del site.document["jwks_uri"]
    del site.document["token_endpoint_auth_signing_alg"]
    site.put("/client.json", {**site.document, "token_endpoint_auth_method": "none"})
    assert "a public client" in patient.findings("--client-id", CLIENT_ID)[-1]["text"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda site: site.documents.clear(), "answered with status 404 instead of 200"),
        (lambda site: site.put("/client.json", {}, status=302), "answered with status 302 instead of 200"),
        (lambda site: site.put("/client.json", site.document, media_type="text/html"), "text/html instead of"),
        (lambda site: site.put("/client.json", []), "JSON that is not an object"),
        (lambda site: site.put("/client.json", {**site.document, "client_id": CLIENT_ID + "x"}), f"is {CLIENT_ID}x"),
        (lambda site: site.put("/client.json", {**site.document, "scope": "openid"}), "scope: it must hold atproto"),
        (lambda site: site.put("/client.json", {**site.document, "redirect_uris": []}), "redirect_uris: at least one"),
        (lambda site: site.documents.pop("/jwks.json"), "the jwks_uri answered with status 404"),
        (lambda site: site.put("/jwks.json", {"keys": []}), "jwks: it is not a JWKS with at least one key"),
        (lambda site: site.put("/jwks.json", {"keys": [generate_jwk()]}), "jwks: it holds a private key"),
        (
            lambda site: site.put("/client.json", {**site.document, "jwks_uri": "https://10.example.net:1/"}),
            "the jwks_uri: ",
        ),
    ],
)  # fmt: skip
def test_a_document_cannot_be_used(site: Site, patient: Patient, change: Callable[[Site], object], fault: str) -> None:
    change(site)
    assert fault in patient.fault("--client-id", CLIENT_ID)


def test_nobody_serves_the_document(patient: Patient) -> None:
    assert "metadata: " in patient.fault("--client-id", f"http://localhost:{closed_port()}/client.json")
