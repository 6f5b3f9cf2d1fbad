"""The commands on a real PDS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import requests

from atproto_session.testing.network import Account
from tests.command_line import Shell, Terminal, a_browser, browse, variables
from tests.pds.harness import PATIENCE, RealPDS
from tests.scenes import GET_SESSION

NOTES = "com.example.note"


def test_accounts_of_several_scopes_are_used_and_logged_out(
    real_pds: RealPDS, pds_account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as the client that it granted them to."""
    shell = Shell(real_pds, f"sqlite:///{tmp_path}/place/sessions.db")
    bob = real_pds.create_account()
    for account, scope in ((pds_account, "atproto transition:generic"), (bob, f"repo:{NOTES} atproto")):
        with a_browser(lambda url, account=account: browse(real_pds, url, account), monkeypatch):  # type: ignore[misc]
            shell.output("login", account.handle, "--scope", scope)
    real_pds.proxy.reset()

    assert "2 refreshed, 0 ended, 0 failed." in shell.output("keep-alive", "--idle", "0", "--pace", "0")
    assert len({*real_pds.proxy.refresh_tokens()}) == len(real_pds.proxy.refreshes()) == 2
    for account in (pds_account, bob):
        answer = shell.output("request", "-a", account.handle, "GET", GET_SESSION)
        assert json.loads(answer)["did"] == account.did
    create = ("request", "-a", bob.handle, "POST", "/xrpc/com.atproto.repo.createRecord")
    body = {"repo": bob.did, "collection": NOTES, "record": {"text": "hello"}}
    uri = json.loads(shell.output(*create, input=json.dumps(body)))["uri"]
    place = {"repo": bob.did, "collection": NOTES, "rkey": uri.rpartition("/")[2]}
    url = f"{real_pds.pds_url}/xrpc/com.atproto.repo.getRecord"
    assert requests.get(url, params=place, timeout=PATIENCE).json()["value"]["text"] == "hello"
    said = shell.failure(4, *create, "--json", json.dumps({**body, "collection": "com.example.other"}))
    assert "403" in said
    upload = ("request", "-a", pds_account.did, "POST", "/xrpc/com.atproto.repo.uploadBlob")
    blob = json.loads(shell.output(*upload, "-H", "Content-Type: image/png", input=b"\x89PNG\r\n"))["blob"]
    assert (blob["mimeType"], blob["size"]) == ("image/png", 6)

    doctor = json.loads(shell.output("doctor", "--json"))
    assert {each["level"] for each in doctor} == {"ok"}
    assert any(each["area"] == "clock" and "agrees" in each["text"] for each in doctor)
    assert shell.output("logout", "--all").count(" is logged out.") == 2
    assert real_pds.proxy.count("/oauth/revoke") >= 2


def test_the_address_is_pasted(real_pds: RealPDS, pds_account: Account, tmp_path: Path) -> None:
    env = variables(real_pds, tmp_path)
    with Terminal("login", pds_account.handle, "--no-browser", env=env) as terminal:
        said = terminal.read_until("cannot be opened")
        url = next(word for word in said.split() if "/oauth/authorize" in word)
        terminal.type(real_pds.authorize(url, pds_account) + "\n")
        assert terminal.end() == 0, terminal.said
    assert f"{pds_account.handle} is logged in." in terminal.said
