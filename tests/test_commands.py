"""The commands and their options."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import keyring
import keyring.backend
import keyring.errors
import pytest
import requests
from cryptography.fernet import Fernet

from atproto_session import ClientMetadata, Keyset, OAuthClient, OAuthSession, _scripts, demo
from atproto_session._commands import accounts, callback, frame, program, request
from atproto_session.testing.network import Account, LocalNetwork

from .command_line import (
    PAGE,
    Process,
    Shell,
    Terminal,
    a_browser,
    as_block,
    blocks_of,
    browse,
    commands,
    help_of,
    variables,
)
from .core import SOON, Worker
from .scenes import ECHO, GET_SESSION, log_in, stored

SCOPED = "atproto repo:com.example.note"
CREATE = "/xrpc/com.atproto.repo.createRecord"
GET_RECORD = "/xrpc/com.atproto.repo.getRecord"


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/place/sessions.db"


@pytest.fixture
def shell(network: LocalNetwork, store: str) -> Shell:
    return Shell(network, store)


def client_of(network: LocalNetwork, store: str, **options: Any) -> OAuthClient:
    return OAuthClient.for_scripts(store=store, encryption_keys=(), **network.client_options(), **options)


@pytest.fixture
def alice(network: LocalNetwork, store: str, account: Account) -> Account:
    """Logged in."""
    with client_of(network, store) as client:
        log_in(network, client, account)
    return account


# Help and usage


def test_help_lists_the_commands() -> None:
    said = Shell(None, None).output("--help")
    assert len(program.commands) == 13
    for name in program.commands:
        assert re.search(rf"^  {name} ", said, re.MULTILINE), name
        assert Shell(None, None).output(name, "-h").startswith(f"Usage: atproto-session {name} ")


def test_the_documents_have_every_help_text_and_exit_code() -> None:
    """``python -m tests.command_line`` writes them anew."""
    page = PAGE.read_text(encoding="utf-8")
    assert blocks_of(page) == {name: as_block(help_of(name)) for name in commands()}
    assert re.findall(r"^(\d+)  +\S", page, re.MULTILINE) == [str(int(code)) for code in frame.Exit]
    for name in vars(_scripts).values():
        if isinstance(name, str) and name.startswith("ATPROTO_"):
            assert f"\n``{name}`` " in page


def test_shells_complete() -> None:
    env = {**variables(None, None), "COMP_WORDS": "atproto-session log", "COMP_CWORD": "1"}
    with Process(env={**env, "_ATPROTO_SESSION_COMPLETE": "bash_complete"}) as process:
        assert process.end()[1].splitlines() == ["plain,login", "plain,logout"]
    for line in re.findall(r"_ATPROTO_SESSION_COMPLETE=\w+_source", PAGE.read_text(encoding="utf-8")):
        shell = line.partition("=")[2]
        with Process(env={**env, "_ATPROTO_SESSION_COMPLETE": shell}) as process:
            assert "_ATPROTO_SESSION_COMPLETE" in process.end()[1]


def test_options_reach_the_demo_and_its_code_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[demo.Load] = []

    def run(load: demo.Load) -> int:
        loads.append(load)
        return 1

    monkeypatch.setattr(demo, "run", run)
    shell = Shell(None, None)
    options = ("--seconds", "2.5", "--processes", "3", "--threads", "5", "--store", "json")
    assert shell.run("demo", *options).exit_code == 1
    assert loads == [demo.Load(processes=3, threads=5, seconds=2.5, store="json")]


@pytest.mark.parametrize(
    "arguments",
    [
        *(("demo", option) for option in ("--seconds=0", "--processes=0", "--threads=0", "--store=memory")),
        ("request", "GET", "/", "--json={}", "--data={}"),
        ("request", "GET", "/", "-p", "nonsense"),
        ("request", "GET", "/", "-H", ": x"),
        ("request", "POST", "/", "--json", "nonsense"),
        ("keygen", "--kid", "1", "--for", "encryption"),
        ("keygen", "--keyring"),
        ("keygen", "--keyring", "--for", "encryption", "--output", "x"),
        ("logout", "alice.test", "--all"),
        ("rotate-encryption",),
        ("list", "--store", "memory:"),
        ("login", "alice.test", "--no-browser"),
        ("login", "alice.test", "--session-id", ""),
        ("login", "alice.test", "--session-id", "a\tb"),
        ("list", "--store", ""),
    ],
)
def test_nonsense_is_refused_before_anything_happens(arguments: tuple[str, ...], tmp_path: Path) -> None:
    said = Shell(None, tmp_path).failure(2, *arguments)
    assert said.startswith("Usage: atproto-session ")
    assert list(tmp_path.iterdir()) == []


# Logging in


def test_a_browser_logs_an_account_in(
    shell: Shell, network: LocalNetwork, account: Account, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[requests.Response] = []

    def act(url: str) -> None:
        address = network.authorize(url, account)
        origin, _, query = address.partition("/?")
        for other in ("/favicon.ico", "/", "/?state=x", "/other?" + query, "/?state=x&code=y&iss=z"):
            pages.append(requests.get(origin + other, timeout=SOON))
        pages.append(requests.get(address, timeout=SOON))

    with a_browser(act, monkeypatch):
        result = shell.run("login", "@Alice.test")
    assert result.exit_code == 0, result.output
    assert "alice.test is logged in." in result.stdout
    assert account.did in result.stdout
    assert [page.status_code for page in pages] == [404, 404, 404, 404, 400, 200]
    assert "<h1>alice.test is logged in</h1>" in pages[-1].text
    assert "This is another log-in" in pages[-2].text
    assert pages[-1].headers["Referrer-Policy"] == "no-referrer"
    with client_of(network, store) as client:
        assert client.restore(account.did).get(GET_SESSION).json()["handle"] == "alice.test"
        session = stored(client, account.did)
    secrets = (session.token_set.access_token, session.token_set.refresh_token or "", session.dpop_key["d"])
    assert not any(secret in result.output + pages[-1].text for secret in secrets)


def test_who_declines_is_not_logged_in(
    shell: Shell, network: LocalNetwork, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[requests.Response] = []
    with a_browser(lambda url: pages.append(browse(network, url, account, approve=False)), monkeypatch):
        said = shell.failure(1, "login", account.handle)
    assert "access_denied" in said
    assert (pages[0].status_code, "The log-in has failed" in pages[0].text) == (400, True)


def test_what_was_asked_and_not_granted_is_said(
    shell: Shell, network: LocalNetwork, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(url: str) -> None:
        requests.get(network.authorize(url, account, scope="atproto"), timeout=SOON)

    with a_browser(act, monkeypatch):
        result = shell.run("login", account.handle, "--json", "--session-id", "second")
    assert json.loads(result.stdout) == {
        "did": account.did,
        "handle": "alice.test",
        "session_id": "second",
        "scope": "atproto",
    }
    with a_browser(act, monkeypatch):
        assert "Not granted: transition:generic" in shell.run("login", account.handle).stderr
    listed = json.loads(shell.output("list", "--json"))
    assert [each["session_id"] for each in listed] == [None, "second"]
    assert json.loads(shell.output("show", f"{account.handle}#second", "--json"))["session_id"] == "second"
    assert "say which" in shell.failure(2, "show")


def test_what_nobody_expected_ends_a_log_in(
    shell: Shell, network: LocalNetwork, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(OAuthClient, "callback", fail)
    pages: list[requests.Response] = []
    with a_browser(lambda url: pages.append(browse(network, url, account)), monkeypatch):
        result = shell.run("login", account.handle)
    assert (type(result.exception), str(result.exception)) == (RuntimeError, "a bug")
    assert pages[0].status_code == 500


def test_nobody_comes_back(shell: Shell, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_browser(lambda url: None, monkeypatch):
        assert "within 1 seconds" in shell.failure(6, "login", account.handle, "--timeout", "1")


def test_a_handle_that_is_none_is_an_error_at_once(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_browser(lambda url: None, monkeypatch):
        assert "nobody.test" in shell.failure(1, "login", "nobody.test")
        assert "is not a handle" in shell.failure(1, "login", "no handle")
        assert "atproto" in shell.failure(1, "login", "alice.test", "--scope", "transition:generic")
        assert "scope is not a list" in shell.failure(1, "login", "alice.test", "--scope", " a  b ")


def test_without_a_terminal_and_a_browser_there_is_no_log_in(network: LocalNetwork, tmp_path: Path) -> None:
    env = variables(network, tmp_path)
    with Process("login", "alice.test", env=env) as process:
        code, _, said = process.end()
    assert (code, "neither a browser nor a terminal" in said) == (2, True)
    with Process("login", "alice.test", "--no-browser", env=env) as process:
        code, _, said = process.end()
    assert (code, "no terminal to ask on" in said) == (2, True)
    assert network.par_requests == 0
    assert list(tmp_path.iterdir()) == []


def test_a_process_logs_in_and_other_directories_find_the_account(
    network: LocalNetwork, account: Account, tmp_path: Path
) -> None:
    env = variables(network, tmp_path / "data")
    with Process("login", account.handle, env={**env, "BROWSER": "true %s"}, cwd=tmp_path) as process:
        assert browse(network, process.url(), account).status_code == 200
        code, said, _ = process.end()
    assert (code, "alice.test is logged in." in said) == (0, True)
    place = tmp_path / "data" / "atproto-session"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    with Process("request", "GET", GET_SESSION, env=env, cwd="/") as process:
        assert json.loads(process.end()[1])["did"] == account.did
    script = (
        "from atproto_session import OAuthClient\n"
        "with OAuthClient.for_scripts() as client: print(*(account.did for account in client.accounts()))"
    )
    with Process("-c", script, env=env, program=sys.executable, cwd="/") as process:
        assert process.end()[:2] == (0, f"{account.did}\n")


def test_ctrl_c_ends_a_log_in(network: LocalNetwork, account: Account, tmp_path: Path) -> None:
    with Process("login", account.handle, env={**variables(network, tmp_path), "BROWSER": "true %s"}) as process:
        process.url()
        process.process.send_signal(signal.SIGINT)
        code, said, complained = process.end()
    assert (code, said) == (130, "")
    assert complained.endswith("Stopped.\n")
    assert "Traceback" not in complained


def test_the_address_is_pasted(network: LocalNetwork, account: Account, tmp_path: Path) -> None:
    with Terminal("login", account.handle, "--no-browser", env=variables(network, tmp_path)) as terminal:
        said = terminal.read_until("cannot be opened")
        url = next(word for word in said.split() if "/oauth/authorize" in word)
        terminal.type("\nhttp://127.0.0.1/\n")
        terminal.read_until("Paste the whole address")
        terminal.type(network.authorize(url, account) + "\n")
        assert terminal.end() == 0, terminal.said
    assert "alice.test is logged in." in terminal.said


@pytest.mark.parametrize("way", ["time", "hang up", "ctrl-c"])
def test_no_address_is_pasted(network: LocalNetwork, account: Account, tmp_path: Path, way: str) -> None:
    options = ("--timeout", "1" if way == "time" else "1000")
    with Terminal("login", account.handle, "--no-browser", *options, env=variables(network, tmp_path)) as terminal:
        terminal.read_until("cannot be opened")
        if way == "hang up":
            terminal.hang_up()
        elif way == "ctrl-c":
            terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == {"time": 6, "hang up": 1, "ctrl-c": 130}[way]
    expected = {"time": "no address came", "hang up": "the terminal was closed", "ctrl-c": "Stopped."}
    assert expected[way] in terminal.said
    assert "Traceback" not in terminal.said
    assert "Fatal" not in terminal.said


def test_at_a_terminal_without_a_browser_the_url_is_enough(
    network: LocalNetwork, account: Account, tmp_path: Path
) -> None:
    with Terminal("login", account.handle, env=variables(network, tmp_path)) as terminal:
        said = terminal.read_until("use --no-browser")
        browse(network, next(word for word in said.split() if "/oauth/authorize" in word), account)
        assert terminal.end() == 0, terminal.said


def test_a_terminal_that_cannot_be_read_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def fileno(self) -> int:
            return 10_000

    monkeypatch.setattr(sys, "stdin", Gone())
    with pytest.raises(click.ClickException, match="was closed"):
        accounts._read_line(SOON)


# Accounts


def test_accounts_are_listed_and_shown(shell: Shell, alice: Account, network: LocalNetwork) -> None:
    lines = shell.output("list").splitlines()
    assert lines[0].split()[:2] == ["ACCOUNT", "SERVER"]
    assert lines[1].split()[:2] == [alice.did, network.pds_url]
    for arguments in ((), (alice.handle,), (alice.did,)):
        said = shell.output("show", *arguments)
        assert re.search(rf"^account +{alice.did}$", said, re.MULTILINE)
        assert re.search(r"^handle +alice\.test$", said, re.MULTILINE)
    members = json.loads(shell.output("show", "--json"))
    assert (members["did"], members["handle"], members["expired"]) == (alice.did, "alice.test", False)
    assert network.rotations == 0


def test_no_token_and_no_key_is_printed(shell: Shell, alice: Account, network: LocalNetwork, store: str) -> None:
    said = ""
    secrets: set[str] = set()

    def note_secrets() -> None:
        with client_of(network, store) as client:
            if (session := client.sessions.get_stored(alice.did)) is not None:
                tokens = session.token_set
                secrets.update((tokens.access_token, tokens.refresh_token or "", session.dpop_key["d"]))

    key = Fernet.generate_key().decode()
    for arguments in (
        *(("list",), ("show",), ("refresh",), ("keep-alive", "--idle", "0"), ("clean",), ("doctor",)),
        *(
            ("request", "-i", "GET", GET_SESSION),
            ("request", "GET", "/xrpc/com.example.none"),
            ("logout",),
            ("refresh",),
        ),
    ):
        for more in ((), ("--json",)) if arguments[0] not in ("request", "logout") else ((),):
            note_secrets()
            result = shell.run(*arguments, *more)
            said += result.output
    shell.variables[_scripts.ENCRYPTION_KEYS] = key
    for arguments in (("list",), ("doctor",), ("rotate-encryption",)):
        said += shell.run(*arguments).output
    assert len(secrets) == 1 + 2 * 5  # the log-in, and four refreshes, of which two are by keep-alive
    assert [secret for secret in (*secrets, key) if secret in said] == []


def test_tokens_are_refreshed(shell: Shell, alice: Account, network: LocalNetwork) -> None:
    assert "has new tokens" in shell.output("refresh")
    assert json.loads(shell.output("refresh", alice.handle, "--json"))["did"] == alice.did
    assert network.rotations == 2
    network.revoke_sessions(alice.did)
    said = shell.failure(3, "refresh")
    assert f"atproto-session login {alice.did}" in said
    assert "is not logged in" in shell.failure(3, "show", alice.did)
    assert "is not logged in" in shell.failure(3, "show", f"{alice.did}#two")
    assert "Nobody is logged in" in shell.run("list").stderr


def test_a_server_in_trouble_is_asked_again_later(shell: Shell, alice: Account, network: LocalNetwork) -> None:
    network.fault("refresh", "status", status=503, times=None)
    assert "503" in shell.failure(6, "refresh")
    assert re.search(r"Try again in \d+ seconds\.", shell.failure(6, "refresh"))


def test_sessions_of_other_clients_are_shown_and_left_alone(
    shell: Shell, network: LocalNetwork, account: Account, store: str
) -> None:
    client_id = "https://app.example.com/client.json"
    metadata = ClientMetadata(client_id, ["https://app.example.com/callback"], "atproto")
    network.publish(client_id, metadata.document())
    with OAuthClient(metadata, store=store, **network.client_options()) as client:
        log_in(network, client, account)
    assert json.loads(shell.output("show", "--json"))["client_id"] == client_id
    assert client_id in shell.failure(3, "refresh")
    assert client_id in shell.failure(3, "logout")
    assert shell.output("keep-alive", "--idle", "0") == "0 refreshed, 0 ended, 0 failed.\n"


def test_a_disk_is_full(network: LocalNetwork, alice: Account, store: str, shell: Shell) -> None:
    assert "No such file" in shell.failure(1, "request", "GET", GET_SESSION, "-o", "/nonexistent/file")
    for path in filter(Path.exists, (Path("/dev/full"),)):  # Linux has it
        assert "No space left" in shell.failure(1, "request", "GET", GET_SESSION, "-o", str(path))
        with path.open("w") as full, Process("list", env=variables(network, store), stdout=full) as process:
            code, _, said = process.end()
        assert (code, "No space left" in said, "Traceback" in said) == (1, True, False)


def test_logging_out_ends_the_session(shell: Shell, alice: Account, network: LocalNetwork) -> None:
    other = network.create_account()
    assert "is not logged in" in shell.failure(3, "logout", other.did)
    assert shell.output("logout", "alice.test") == f"{alice.did} is logged out.\n"
    assert network.revocations == 1
    assert "nobody is logged in" in shell.failure(3, "logout")


def test_everybody_is_logged_out(shell: Shell, alice: Account, network: LocalNetwork, store: str) -> None:
    with client_of(network, store, scope=SCOPED) as client:
        log_in(network, client, network.create_account("bob.test"))
        log_in(network, client, alice, session_id="two")
    gone = {"did": alice.did, "session_id": "two"}
    assert json.loads(shell.output("logout", f"{alice.did}#two", "--json")) == [gone]
    assert len(shell.output("logout", "--all").splitlines()) == 2
    assert network.revocations == 3


@pytest.mark.parametrize("command", ["list", "show", "refresh", "logout", "keep-alive", "clean", "request"])
def test_no_command_but_login_makes_a_store(tmp_path: Path, command: str) -> None:
    shell = Shell(None, f"sqlite:///{tmp_path}/typo/sessions.db")
    arguments = ("GET", GET_SESSION) if command == "request" else ()
    said = shell.failure(3, command, *arguments)
    assert f"nothing is at {tmp_path}/typo/sessions.db" in said
    assert "atproto-session login" in said
    assert list(tmp_path.iterdir()) == []


def test_the_store_may_be_named_before_and_after_the_command(alice: Account, network: LocalNetwork, store: str) -> None:
    shell = Shell(None, "sqlite:////nonexistent/sessions.db")
    for arguments in (
        ("--store", store, "list"),
        ("list", "--store", store),
        ("--store=json:///x", "list", "--store", store),
    ):
        assert alice.did in shell.output(*arguments)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sessions.db", "begins with a scheme"),
        ("redis-of-mine://:hunter2@host/", "no session store is known"),
        ("sqlite://relative.db", "sqlite:///relative/path"),
    ],
)
def test_a_store_that_is_none_is_an_error(url: str, message: str) -> None:
    said = Shell(None, url).failure(1, "list")
    assert message in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:////home/me@work/s.db", "sqlite:////home/me@work/s.db"),
        ("postgresql://me:hunter2@db.example.com:5432/x?password=hunter2", "postgresql://db.example.com:5432/x"),
        ("redis://:hunter2@localhost/0", "redis://localhost/0"),
    ],
)
def test_a_store_is_shown_without_its_password(url: str, shown: str) -> None:
    assert frame.without_password(url) == shown


def test_a_file_that_is_no_store_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("nonsense" * 1000)
    (tmp_path / "x.db").chmod(0o600)
    assert "the file of something else" in Shell(None, f"sqlite:///{tmp_path}/x.db").failure(1, "list")


def test_a_record_that_cannot_be_read_is_listed_and_can_be_deleted(
    shell: Shell, alice: Account, network: LocalNetwork, store: str
) -> None:
    with client_of(network, store) as client:
        client._store._database.write(  # type: ignore[attr-defined]
            lambda connection: connection.execute("UPDATE sessions SET document = ?", (b"nonsense",))
        )
    result = shell.run("list")
    assert (result.exit_code, "cannot be read" in result.stderr) == (1, True)
    assert "cannot be read" in shell.failure(1, "show", alice.did)
    assert "cannot be read" in json.loads(shell.run("list", "--json").stdout)[0]["error"]
    assert "cannot be read" in shell.failure(1, "request", "GET", GET_SESSION)
    shell.output("logout", alice.did)
    assert shell.run("list").exit_code == 0


def test_other_scopes_are_another_client_and_the_same_accounts(
    shell: Shell, network: LocalNetwork, alice: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    bob = network.create_account("bob.test")
    with a_browser(lambda url: browse(network, url, bob), monkeypatch):
        shell.output("login", "bob.test", "--scope", "repo:com.example.note atproto")
    listed = {each["did"]: each for each in json.loads(shell.output("list", "--json"))}
    assert listed[bob.did]["client_id"] != listed[alice.did]["client_id"]
    assert json.loads(shell.output("request", "-a", "bob.test", "GET", GET_SESSION))["did"] == bob.did
    shell.output("refresh", "bob.test")
    assert "2 refreshed, 0 ended, 0 failed." in shell.output("keep-alive", "--idle", "0", "--pace", "0")
    shell.output("logout", "bob.test")
    assert network.revocations == 1


# Requests


def test_a_request_is_made_and_its_answer_printed(shell: Shell, alice: Account, tmp_path: Path) -> None:
    answer = json.loads(shell.output("request", "get", ECHO, "-p", "a=1", "-p", "a=2=3", "-H", "X-Note: yes"))
    assert (answer["method"], answer["query"], answer["headers"]["x-note"]) == ("GET", {"a": ["1", "2=3"]}, "yes")
    shell.output("request", "GET", GET_SESSION, "-o", str(tmp_path / "answer"))
    assert json.loads((tmp_path / "answer").read_bytes())["did"] == alice.did
    said = shell.output("request", "-i", "GET", GET_SESSION)
    assert said.startswith("HTTP 200 OK\nContent-Type: application/json\n")
    assert json.loads(said.partition("\n\n")[2])["did"] == alice.did


def test_bodies_are_given_in_any_way(shell: Shell, alice: Account, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(b'{"a": 1}')

    def sent(*arguments: str, input: str | bytes | None = None) -> tuple[int, str | None]:
        answer = json.loads(shell.output("request", "POST", ECHO, *arguments, input=input))
        return answer["length"], answer["headers"].get("content-type")

    as_json, as_bytes = "application/json", "application/octet-stream"
    assert sent(input='{"a": 1}') == (8, as_json)
    assert sent(input=b"\x89PNG") == (4, as_bytes)
    assert sent(input="7") == (1, as_bytes)
    assert sent(input="") == (0, None)
    assert sent("--json", '{"a": 1}', input="not read") == (8, as_json)
    assert sent("--json", "-", input='["a"]') == (5, as_json)
    assert sent("--json", f"@{tmp_path}/body") == (8, as_json)
    assert sent("--data", "text") == (4, as_bytes)
    assert sent("--data", "-", "-H", "content-type: text/plain", input="text") == (4, "text/plain")
    assert "No such file" in shell.failure(1, "request", "POST", ECHO, "--data", "@/nonexistent")
    assert json.loads(shell.output("request", "DELETE", ECHO, input="not read"))["length"] == 0


def test_a_post_is_written_and_read_in_pipes(shell: Shell, alice: Account) -> None:
    record = {"repo": alice.did, "collection": "app.bsky.feed.post", "record": {"text": "hello"}}
    uri = json.loads(shell.output("request", "POST", CREATE, input=json.dumps(record)))["uri"]
    place = ("-p", "repo=alice.test", "-p", "collection=app.bsky.feed.post", "-p", f"rkey={uri.rpartition('/')[2]}")
    assert json.loads(shell.output("request", "GET", GET_RECORD, *place))["value"]["text"] == "hello"


def test_the_exit_code_tells_the_status(shell: Shell, alice: Account, network: LocalNetwork) -> None:
    result = shell.run("request", "GET", GET_RECORD)
    assert (result.exit_code, json.loads(result.stdout)["error"]) == (4, "InvalidRequest")
    assert "answered 400 Bad Request" in result.stderr
    assert shell.run("request", "GET", "/xrpc/com.example.none").exit_code == 5
    network.fault("resource", "cut_before", times=None)
    result = shell.run("request", "GET", GET_SESSION)
    assert (result.exit_code, "the request failed" in result.stderr) == (6, True)
    network.clear_faults()
    for wrong in (
        ("GET", "https://evil.example.com/"),
        ("GET", GET_SESSION, "-H", "X-Snow: \u2603"),
        ("GET", GET_SESSION, "-H", "X-Two: a\nb"),
        ("G\u2603T", GET_SESSION),
        ("GET", "http://[::1"),
    ):
        said = shell.failure(1, "request", *wrong)
        assert said.startswith("Error: "), said
    network.revoke_sessions(alice.did)
    assert shell.run("request", "GET", GET_SESSION).exit_code == 3


def test_at_a_terminal_json_is_laid_out(network: LocalNetwork, alice: Account, store: str) -> None:
    with Terminal("request", "GET", GET_SESSION, env=variables(network, store)) as terminal:
        assert terminal.end() == 0
    assert f'"did": "{alice.did}",\r\n' in terminal.said
    assert request._laid_out(b"no JSON at all") == b"no JSON at all"


def test_a_reader_that_has_seen_enough_ends_the_command(network: LocalNetwork, alice: Account, store: str) -> None:
    reading, writing = os.pipe()
    with Process("list", env=variables(network, store), stdout=writing) as process:
        os.close(writing)
        os.close(reading)
        code, _, said = process.end()
    assert (code, said) == (1, "")


# Keys


def test_keys_are_made(tmp_path: Path) -> None:
    shell = Shell(None, None)
    jwk = json.loads(shell.output("keygen", "--kid", "mine"))
    assert Keyset.from_jwks(jwk).first == jwk["kid"] == "mine"
    assert json.loads(shell.output("keygen"))["kid"]
    Fernet(shell.output("keygen", "--for", "encryption").strip())
    path = tmp_path / "key.json"
    assert shell.output("keygen", "--output", str(path)) == ""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Keyset.from_files(path).first
    assert "is there already" in shell.failure(1, "keygen", "--output", str(path))


@pytest.mark.parametrize("shows", [True, False])
def test_a_key_is_not_printed_on_a_terminal(shows: bool) -> None:
    with Terminal("keygen", *(("--show",) if shows else ()), env=variables(None, None)) as terminal:
        assert terminal.end() == (0 if shows else 2)
    assert ('"d":' in terminal.said) is shows


class Keyring(keyring.backend.KeyringBackend):
    """The system's keyring, in memory."""

    priority = 1

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[tuple[str, str], str] = {}
        self.error = error

    def get_password(self, service: str, username: str) -> str | None:
        if self.error is not None:
            raise self.error
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password


@pytest.fixture
def ring() -> Any:
    before = keyring.get_keyring()
    keyring.set_keyring(ring := Keyring())
    yield ring
    keyring.set_keyring(before)


def test_encryption_is_switched_on_and_its_keys_rotated(
    shell: Shell, alice: Account, ring: Keyring, network: LocalNetwork
) -> None:
    shell.variables[_scripts.ENCRYPTION_KEYS] = "keyring"
    assert "there are none" in shell.failure(1, "list")
    assert "system's keyring" in shell.run("keygen", "--for", "encryption", "--keyring").stderr
    assert "is not encrypted" in shell.run("list").stderr
    assert "1 session is encrypted" in shell.output("rotate-encryption", "--allow-plaintext")
    assert alice.did in shell.output("list")
    assert "rotate-encryption now" in shell.run("keygen", "--for", "encryption", "--keyring").stderr
    old = ring.kept[_scripts.KEYRING_PLACE].split()
    assert len(old) == 2
    assert json.loads(shell.output("rotate-encryption", "--json")) == {"sessions": 1}
    shell.variables[_scripts.ENCRYPTION_KEYS] = f"{old[0]},{old[1]}"
    assert json.loads(shell.output("request", "GET", GET_SESSION))["did"] == alice.did
    shell.variables[_scripts.ENCRYPTION_KEYS] = None
    assert _scripts.ENCRYPTION_KEYS in shell.failure(1, "request", "GET", GET_SESSION)
    shell.variables[_scripts.ENCRYPTION_KEYS] = old[0]
    assert "nothing is at" in shell.failure(3, "rotate-encryption", "--store", "sqlite:////nonexistent/s.db")
    shell.variables[_scripts.ENCRYPTION_KEYS] = "nonsense"
    assert "not a Fernet key" in shell.failure(1, "list")


def test_a_keyring_that_cannot_be_used_is_an_error(shell: Shell, alice: Account, ring: Keyring) -> None:
    ring.error = keyring.errors.KeyringLocked("locked")
    shell.variables[_scripts.ENCRYPTION_KEYS] = "keyring"
    assert "KeyringLocked" in shell.failure(1, "list")
    assert "KeyringLocked" in shell.failure(1, "keygen", "--for", "encryption", "--keyring")


def test_the_keyring_is_an_extra(shell: Shell, alice: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    shell.variables[_scripts.ENCRYPTION_KEYS] = "keyring"
    assert "atproto-session[keyring]" in shell.failure(1, "list")
    assert "atproto-session[keyring]" in shell.failure(1, "keygen", "--for", "encryption", "--keyring")


# Upkeep


def test_idle_sessions_are_kept_alive(shell: Shell, alice: Account, network: LocalNetwork) -> None:
    assert shell.output("keep-alive") == "0 refreshed, 0 ended, 0 failed.\n"
    assert json.loads(shell.output("keep-alive", "--idle", "0", "--json")) == {
        "did": alice.did,
        "session_id": None,
        "outcome": "refreshed",
        "error": None,
    }
    network.fault("refresh", "status", status=503)
    result = shell.run("keep-alive", "--idle", "0")
    assert (result.exit_code, "503" in result.stderr) == (6, True)
    network.revoke_sessions(alice.did)
    result = shell.run("keep-alive", "--idle", "0")
    assert result.exit_code in (3, 6)


def test_ctrl_c_loses_no_refresh(network: LocalNetwork, alice: Account, store: str) -> None:
    """The command ends when the answer that is under way is stored."""
    fault = network.fault("refresh", "hold")
    with Process("keep-alive", "--idle", "0", env=variables(network, store)) as process:
        assert fault.fired.wait(SOON)
        process.process.send_signal(signal.SIGINT)
        assert process.process.poll() is None
        fault.release.set()
        code, _, said = process.end()
    assert (code, "Stopped." in said) == (130, True)
    with client_of(network, store) as client:
        info = network.session_of(stored(client, alice.did).token_set.refresh_token or "")
    assert info is not None
    assert (network.rotations, info.current) == (1, True)


def test_the_progress_is_shown_at_a_terminal(network: LocalNetwork, alice: Account, store: str) -> None:
    env = {**variables(network, store), "TERM": "xterm"}
    with Terminal("keep-alive", "--idle", "0", env=env) as terminal:
        assert terminal.end() == 0
    assert "100%" in terminal.said
    assert "1 refreshed, 0 ended, 0 failed." in terminal.said


def test_what_nobody_can_use_is_deleted(
    shell: Shell, alice: Account, network: LocalNetwork, store: str, expire: Callable[[OAuthClient, str], None]
) -> None:
    assert shell.output("clean") == "0 sessions and 0 log-ins deleted.\n"
    with client_of(network, store) as client:
        client._store.logins.put("old", {}, 1.0)
        expire(client, alice.did)
    assert json.loads(shell.output("clean", "--json")) == {"sessions": [alice.did], "logins": 1}
    with client_of(network, store) as client:
        log_in(network, client, alice)
        expire(client, alice.did)
    assert shell.output("clean") == f"{alice.did} was deleted.\n1 session and 0 log-ins deleted.\n"


@pytest.fixture
def expire() -> Callable[[OAuthClient, str], None]:
    from datetime import UTC, datetime, timedelta

    from .scenes import store_tokens

    def work(client: OAuthClient, key: str) -> None:
        store_tokens(client, key, refresh_token=None, expires_at=datetime.now(UTC) - timedelta(hours=1))

    return work


# The local network


def test_a_network_runs_until_it_is_stopped(tmp_path: Path) -> None:
    env = variables(None, f"sqlite:///{tmp_path}/sessions.db")
    with Process("network", "--account", "alice.test", "--account", "bob.test", "--json", env=env) as server:
        assert server.process.stdout is not None
        said = json.loads(server.process.stdout.readline())
        assert [each["handle"] for each in said["accounts"]] == ["alice.test", "bob.test"]
        bob = Account(said["accounts"][1]["did"], "bob.test", said["accounts"][1]["password"])
        own = LocalNetwork()  # plays the browser
        with Process("login", "bob.test", env={**env, **said["env"], "BROWSER": "true %s"}) as process:
            assert browse(own, process.url(), bob).status_code == 200
            assert process.end()[0] == 0
        own.stop()
        server.process.send_signal(signal.SIGINT)
        code, _, said_last = server.end()
    assert (code, "The network has ended." in said_last) == (0, True)


def test_a_network_says_how_to_use_it() -> None:
    with Process("network", env=variables(None, None)) as process:
        assert process.process.stdout is not None
        lines = [process.process.stdout.readline() for _ in range(5)]
        process.process.send_signal(signal.SIGINT)
        assert process.end()[0] == 0
    assert re.fullmatch(r"# alice\.test, password \S+, did:plc:\w+\n", lines[0])
    assert [line.partition("=")[0] for line in lines[1:4]] == [
        f"export {name}" for name in (_scripts.PLC_DIRECTORY, _scripts.HANDLE_RESOLVER, _scripts.ALLOW_HTTP)
    ]


def test_a_network_has_accounts_under_test_only() -> None:
    assert "under .test" in Shell(None, None).failure(1, "network", "--account", "alice.example.com")


# The server that the browser comes back to


def test_a_browser_that_hangs_up_is_no_news(session: OAuthSession) -> None:
    server = callback.CallbackServer(lambda address: pytest.fail("it was called"))
    with server:
        import socket

        with socket.create_connection(("127.0.0.1", int(server.redirect_uri.split(":")[2][:-1]))) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
        waiting = Worker(lambda: server.wait(0.01))
        assert waiting.outcome() is None
