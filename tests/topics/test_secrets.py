"""A whole life of a confidential client's session, with everything logged: no secret shows anywhere."""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from cryptography.fernet import Fernet

from atproto_session import ClientMetadata, Keyset, OAuthClient, Session, SessionError, SQLiteStore
from atproto_session.keys import generate_jwk
from atproto_session.testing.network import LocalNetwork

from ..scenes import GET_SESSION

CLIENT_ID = "https://app.example.com/client-metadata.json"
REDIRECT_URI = "https://app.example.com/callback"

JWK = generate_jwk()


class Watcher(logging.Handler):
    """Everything that anybody could read, in one place."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(message)s %(exc_text)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(self.format(record))
        self.seen.append(repr(record.args))

    def look_at(self, *things: object) -> None:
        for thing in things:
            self.seen += [repr(thing), str(thing)]

    def look_at_error(self, error: BaseException) -> None:
        self.look_at(error, error.__dict__, error.args)
        self.seen.append("".join(traceback.format_exception(error)))
        self.seen.append(pickle.dumps(error, 0).decode("latin-1"))


class NosyStore(SQLiteStore):
    """Remembers every secret that is stored."""

    def __init__(self, path: Path, secrets: set[str], **options: Any) -> None:
        super().__init__(path, **options)
        self._secrets = secrets
        put = self.logins.put

        def nosy_put(state: str, document: dict[str, Any], expires_at: float) -> None:
            secrets.update((document["verifier"], document["dpop_key"]["d"]))
            put(state, document, expires_at)

        self.logins.put = nosy_put  # type: ignore[method-assign]

    def set(self, key: str, session: Session) -> None:
        self._note(session)
        super().set(key, session)

    def replace(self, key: str, session: Session | None, expected: Any) -> bool:
        if session is not None:
            self._note(session)
        return super().replace(key, session, expected)

    def _note(self, session: Session) -> None:
        self._secrets.update((session.token_set.access_token, session.token_set.refresh_token or "-" * 20))
        self._secrets.add(session.dpop_key["d"])


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    watcher, root = Watcher(), logging.getLogger()
    level = root.level
    root.addHandler(watcher)
    root.setLevel(logging.DEBUG)
    yield watcher
    root.removeHandler(watcher)
    root.setLevel(level)


def test_no_secret_shows_in_a_whole_life(network: LocalNetwork, watcher: Watcher, tmp_path: Path) -> None:
    fernet_key = Fernet.generate_key().decode()
    secrets: set[str] = {JWK["d"], fernet_key}
    keyset = Keyset([JWK])
    metadata = ClientMetadata(
        client_id=CLIENT_ID,
        redirect_uris=(REDIRECT_URI,),
        scope="atproto transition:generic",
        token_endpoint_auth_method="private_key_jwt",
        token_endpoint_auth_signing_alg="ES256",
        jwks=keyset.jwks(),
    )
    network.publish(CLIENT_ID, metadata.document(keyset))
    store = NosyStore(tmp_path / "sessions.db", secrets, encryption_keys=[fernet_key])

    def listener(event: object) -> None:
        watcher.look_at(event)
        raise RuntimeError("a listener that fails")

    client = OAuthClient(
        metadata,
        store=store,
        keyset=keyset,
        on_session_updated=listener,
        on_session_deleted=listener,
        **network.client_options(),
    )
    account = network.create_account()
    secrets.add(account.password)

    def log_in() -> Any:
        callback = network.authorize(client.authorize(account.did, state="mine"), account)
        secrets.add(parse_qs(urlsplit(callback).query)["code"][0])
        return client.callback(callback)

    def fails(act: Callable[[], object]) -> None:
        with pytest.raises(SessionError) as caught:
            act()
        watcher.look_at_error(caught.value)

    # A life without trouble
    result = log_in()
    session = result.session
    network.expire_access_tokens(account.did)
    response = session.get(GET_SESSION)
    assert response.status_code == 200
    requests.get(network.pds_url + GET_SESSION, auth=client.auth(account.did), timeout=10)
    stored = client.sessions.get_session(account.did)
    watcher.look_at(result, session, session.token_info(), client, client.sessions, store, keyset, metadata)
    watcher.look_at(stored, stored.token_set, stored.auth_method, client.metadata_document(), client.jwks())
    watcher.look_at(client._signer(account.did), client._authority, client._nonces, store.logins, store.locks)

    # And one with every kind of it
    trouble: list[tuple[str, dict[str, Any]]] = [
        ("cut_before", {}),
        ("status", {"status": 503}),
        ("html", {"processed": False}),
        ("oauth_error", {"error": "invalid_client", "description": "no", "status": 400}),
        ("redirect", {"to": "https://elsewhere.example.com/"}),
    ]
    for action, options in trouble:
        network.fault("refresh", action, **options)
        fails(lambda: client.restore(account.did, refresh=True))
    for action in ("wrong_sub", "scope_without_atproto", "wrong_token_type", "cut_after"):
        network.fault("refresh", action)
        fails(lambda: client.restore(account.did, refresh=True))
        if action == "cut_after":
            fails(lambda: client.restore(account.did, refresh=True))
        log_in()
    code = generate_jwk()["d"]
    secrets.add(code)
    fails(lambda: client.callback({"state": "unknown", "code": code, "iss": network.issuer}))
    network.fault("token", "cut_after")
    fails(log_in)
    network.reject_access_tokens(account.did)
    fails(lambda: client.restore(account.did).get(GET_SESSION))
    network.accept_access_tokens(account.did)
    log_in().session.sign_out()

    # What lies in the files
    client.close()
    store.close()
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())

    assert len(secrets) > 20
    assert all(len(secret) >= 8 for secret in secrets)
    text = "\n".join(watcher.seen)
    assert "a listener failed" in text, "the log was watched"
    assert account.did in text
    assert [secret[:4] for secret in secrets if secret in text] == []
    assert [secret[:4] for secret in secrets if secret.encode() in files] == []


def test_a_session_hides_what_is_secret_even_in_a_dump_of_its_fields(session: Any, client: OAuthClient) -> None:
    stored = client.sessions.get_session(session.did)
    for thing in (stored, stored.token_set):
        assert stored.token_set.access_token not in repr(thing)
        assert stored.dpop_key["d"] not in repr(thing)
    assert "dpop_key" not in repr(stored)
