"""One process of ``bench_peers.py``, with one library. Runs where that library is installed, so it imports nothing else
of the tests.

Each function below uses a library as its documentation says, and returns a function that makes one request with what it
was given: each thread calls the first once and the second for each request, unless the library's object is made to be
shared by threads. All that is added is a file, where the library leaves it to the application to keep its tokens.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Call = Callable[[], object]
#: Makes what one thread needs, and tells what is stored in the end.
Peer = tuple[Callable[[], Call], Callable[[], str]]

#: The least of so many rounds is what a request costs: other programs of the machine only ever add to it.
ROUNDS, REQUESTS = 5, 100


class TokenFile:
    """Where the application keeps its tokens: written in one step."""

    def __init__(self, job: Job, first: object) -> None:
        self.path = Path(job["directory"], "fresh.json" if job.get("fresh") else "token.json")
        if not self.path.exists():
            self.write(first)

    def read(self) -> Any:
        return json.loads(self.path.read_text(encoding="utf-8"))

    def write(self, token: object) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
            json.dump(token, file)
        Path(file.name).replace(self.path)


def expiry(job: Job) -> float:
    """When the access token expires, in seconds since the epoch: an hour ago, or an hour from now."""
    return time.time() + (3600.0 if job.get("fresh") else -3600.0)


def check(response: Any) -> None:
    response.raise_for_status()


def ours(job: Job) -> Peer:
    """docs/quickstart.rst and docs/web.rst: one client for a process, a session for each use."""
    from atproto_session import ClientMetadata, OAuthClient

    client = OAuthClient(ClientMetadata.loopback(), store=job["store"], **job["options"])
    path = "/xrpc/com.atproto.server.getSession"
    return lambda: lambda: check(client.restore(job["did"]).get(path)), lambda: ""


def authlib(job: Job) -> Peer:
    """https://docs.authlib.org/en/latest/client/oauth2.html (refresh & auto update token)."""
    from authlib.integrations.requests_client import OAuth2Session

    os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"
    file = TokenFile(job, {**job["token"], "expires_at": int(expiry(job))})

    def update_token(token: dict[str, Any], refresh_token: str | None = None, access_token: str | None = None) -> None:
        file.write(token)

    def make() -> Call:
        session = OAuth2Session(
            "client",
            token=file.read(),
            token_endpoint=f"{job['origin']}/token",
            token_endpoint_auth_method="none",
            update_token=update_token,
        )
        return lambda: check(session.get(f"{job['origin']}/resource"))

    return make, lambda: file.read()["refresh_token"]


def requests_oauthlib(job: Job) -> Peer:
    """https://requests-oauthlib.readthedocs.io/en/latest/oauth2_workflow.html (third: automatic, and updates)."""
    from requests_oauthlib import OAuth2Session

    os.environ["OAUTHLIB_INSECURE_TRANSPORT"] = "1"
    file = TokenFile(job, {**job["token"], "expires_at": expiry(job)})

    def make() -> Call:
        session = OAuth2Session(
            "client",
            token=file.read(),
            auto_refresh_url=f"{job['origin']}/token",
            auto_refresh_kwargs={"client_id": "client"},
            token_updater=file.write,
        )
        return lambda: check(session.get(f"{job['origin']}/resource"))

    return make, lambda: file.read()["refresh_token"]


def google_auth(job: Job) -> Peer:
    """https://googleapis.dev/python/google-auth/latest/user-guide.html (user credentials, AuthorizedSession)."""
    from google.auth.transport.requests import AuthorizedSession
    from google.oauth2.credentials import Credentials

    until = datetime.fromtimestamp(expiry(job), UTC).replace(tzinfo=None)
    first = Credentials(
        job["token"]["access_token"],
        refresh_token=job["token"]["refresh_token"],
        token_uri=f"{job['origin']}/token",
        client_id="client",
        client_secret="secret",
        expiry=until,
    )
    file = TokenFile(job, json.loads(first.to_json()))

    def make() -> Call:
        kept = file.read()
        # Not from_authorized_user_info(), which knows Google's own token endpoint alone.
        credentials = Credentials(
            kept["token"],
            refresh_token=kept["refresh_token"],
            token_uri=kept["token_uri"],
            client_id=kept["client_id"],
            client_secret=kept["client_secret"],
            expiry=datetime.fromisoformat(kept["expiry"].rstrip("Z")),
        )
        session = AuthorizedSession(credentials)

        def call() -> None:
            before = credentials.token
            check(session.get(f"{job['origin']}/resource"))
            if credentials.token != before:
                file.write(json.loads(credentials.to_json()))

        return call

    return make, lambda: file.read()["refresh_token"]


def msal(job: Job) -> Peer:
    """https://github.com/AzureAD/microsoft-authentication-extensions-for-python (PersistedTokenCache), and
    https://msal-python.readthedocs.io/en/latest/#msal.ClientApplication.acquire_token_silent: one application for a
    process. MSAL speaks https only; ``http_client`` leads it to the token endpoint of this run."""
    import requests
    from msal import PublicClientApplication
    from msal_extensions import FilePersistence, PersistedTokenCache

    authority = "https://login.example.com/tenant"
    http = requests.Session()

    class Http:
        def get(self, url: str, **options: Any) -> Any:
            return http.get(url.replace(authority, job["origin"]), **options)

        def post(self, url: str, **options: Any) -> Any:
            return http.post(url.replace(authority, job["origin"]), **options)

        def close(self) -> None:
            http.close()

    path = Path(job["directory"], "fresh.bin" if job.get("fresh") else "token.bin")
    is_first = not path.exists()
    cache = PersistedTokenCache(FilePersistence(str(path)))
    application = PublicClientApplication("client", oidc_authority=authority, token_cache=cache, http_client=Http())
    if is_first:  # what a log-in would have left there
        identity = base64.urlsafe_b64encode(json.dumps({"uid": "alice", "utid": "here"}).encode()).decode()
        claims = {"iss": authority, "sub": "alice", "aud": "client", "exp": time.time() + 3600, "iat": time.time()}
        payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        response = {
            **job["token"],
            "expires_in": int(expiry(job) - time.time()),
            "client_info": identity,
            "id_token": f"e30.{payload}.c2ln",
        }
        cache.add(
            {
                "client_id": "client",
                "scope": ["atproto"],
                "token_endpoint": f"{authority}/token",
                "environment": "login.example.com",
                "response": response,
            }
        )

    def make() -> Call:
        session = requests.Session()

        def call() -> None:
            (account,) = application.get_accounts()
            result = application.acquire_token_silent(["atproto"], account=account)
            if not result or "access_token" not in result:
                raise RuntimeError(f"no token: {result}")
            check(
                session.get(f"{job['origin']}/resource", headers={"Authorization": f"Bearer {result['access_token']}"})
            )

        return call

    def stored() -> str:
        kept = list(cache.search(cache.CredentialType.REFRESH_TOKEN))
        return str(kept[0]["secret"]) if kept else ""

    return make, stored


def botocore(job: Job) -> Peer:
    """https://docs.aws.amazon.com/sdkref/latest/guide/feature-sso-credentials.html (SSO token provider): one session
    and its token for a process; the cache is the one that ``aws sso login`` writes."""
    import requests
    from botocore.session import Session
    from botocore.tokens import SSOTokenProvider
    from botocore.utils import JSONFileCache, SSOTokenLoader

    directory = Path(job["directory"])
    if not (directory / "config").exists():
        (directory / "config").write_text(
            "[default]\nsso_session = here\n"
            "[sso-session here]\nsso_region = us-east-1\nsso_start_url = https://sso.example\n"
        )
    os.environ |= {"AWS_CONFIG_FILE": str(directory / "config"), "AWS_ENDPOINT_URL_SSO_OIDC": job["origin"]}
    cache = JSONFileCache(str(directory / ("fresh" if job.get("fresh") else "cache")))
    loader = SSOTokenLoader(cache=cache)
    until = (datetime.now(UTC) + timedelta(days=30)).strftime("%Y-%m-%dT%H:%M:%SZ")
    token = {
        "accessToken": job["token"]["access_token"],
        "refreshToken": job["token"]["refresh_token"],
        "expiresAt": datetime.fromtimestamp(expiry(job), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "clientId": "client",
        "clientSecret": "secret",
        "registrationExpiresAt": until,
    }
    if not any(directory.glob("cache/*") if not job.get("fresh") else directory.glob("fresh/*")):
        loader.save_token("https://sso.example", token, session_name="here")
    provider = SSOTokenProvider(Session(), cache=cache, profile_name="default")
    deferred = provider.load_token()

    def make() -> Call:
        session = requests.Session()

        def call() -> None:
            token = deferred.get_frozen_token().token
            check(session.get(f"{job['origin']}/resource", headers={"Authorization": f"Bearer {token}"}))

        return call

    return make, lambda: loader("https://sso.example", session_name="here")["refreshToken"]


def atproto(job: Job) -> Peer:
    """https://atproto.blue/en/latest/atproto_client/auth.html (session string): one client for a process."""
    from atproto import Client, Session, SessionEvent

    kept = job["session"]
    first = Session(kept["handle"], kept["did"], kept["accessJwt"], kept["refreshJwt"], job["origin"])
    file = TokenFile(job, first.encode())
    client = Client(base_url=job["origin"])

    @client.on_session_change
    def on_session_change(event: SessionEvent, session: Session) -> None:
        if event in (SessionEvent.CREATE, SessionEvent.REFRESH):
            file.write(session.export() if hasattr(session, "export") else session.encode())

    client.login(session_string=file.read(), fetch_bsky_profile=False)
    return lambda: client.com.atproto.server.get_session, lambda: Session.decode(file.read()).refresh_jwt


def atproto_oauth(job: Job) -> Peer:
    """https://github.com/zzstoatzz/atproto-oauth: a store of the application's, and ``refresh_session`` when the token
    has expired. The package speaks to public addresses only, which is taken out here."""
    import asyncio

    import atproto_oauth
    import httpx
    from atproto_oauth import client as module
    from atproto_oauth.dpop import DPoPManager
    from atproto_oauth.models import OAuthSession
    from atproto_oauth.stores import MemorySessionStore, MemoryStateStore

    class Metadata:
        issuer, token_endpoint = job["origin"], f"{job['origin']}/token"

    async def fetch(url: str) -> Metadata:
        return Metadata()

    module.is_safe_url = lambda url: True
    module.get_hardened_async_client = httpx.AsyncClient
    module.fetch_authserver_metadata_async = fetch
    key = DPoPManager.generate_keypair()
    token = job["token"]
    file = TokenFile(job, {**token, "expires_at": expiry(job)})

    class Store(MemorySessionStore):
        async def save_session(self, session: OAuthSession) -> None:
            file.write(
                {
                    "access_token": session.access_token,
                    "refresh_token": session.refresh_token,
                    "expires_at": 0.0 if session.expires_at is None else session.expires_at.timestamp(),
                }
            )

    def load() -> OAuthSession:
        kept = file.read()
        return OAuthSession(
            did=token["sub"],
            handle="alice.test",
            pds_url=job["origin"],
            authserver_iss=job["origin"],
            access_token=kept["access_token"],
            refresh_token=kept["refresh_token"],
            dpop_private_key=key,
            dpop_authserver_nonce="",
            scope="atproto",
            expires_at=datetime.fromtimestamp(kept["expires_at"], UTC),
        )

    client = atproto_oauth.OAuthClient(
        client_id="http://localhost",
        redirect_uri="http://127.0.0.1/",
        scope="atproto",
        state_store=MemoryStateStore(),
        session_store=Store(),
    )

    async def request() -> None:
        session = load()
        if session.expires_at <= datetime.now(UTC):
            session = await client.refresh_session(session)
        check(await client.make_authenticated_request(session, "GET", f"{job['origin']}/resource"))

    return lambda: lambda: asyncio.run(request()), lambda: file.read()["refresh_token"]


def requests_oauth2client(job: Job) -> Peer:
    """https://guillp.github.io/requests_oauth2client/ (DPoP; automatic renewal): the application keeps the token."""
    import requests
    from requests_oauth2client import DPoPKey, DPoPToken, OAuth2AccessTokenAuth, OAuth2Client

    file = TokenFile(job, {**job["token"], "expires_at": expiry(job)})
    client = OAuth2Client(f"{job['origin']}/token", client_id="client", dpop_bound_access_tokens=True, testing=True)
    key = DPoPKey.generate()

    def make() -> Call:
        kept = file.read()
        token = DPoPToken(
            kept["access_token"],
            refresh_token=kept["refresh_token"],
            expires_at=datetime.fromtimestamp(kept["expires_at"], UTC),
            _dpop_key=key,
        )
        auth = OAuth2AccessTokenAuth(client, token)
        session = requests.Session()
        session.auth = auth

        def call() -> None:
            before = auth.token
            check(session.get(f"{job['origin']}/resource"))
            if auth.token is not before:
                file.write(
                    {
                        "access_token": str(auth.token.access_token),
                        "refresh_token": auth.token.refresh_token,
                        "expires_at": auth.token.expires_at.timestamp(),
                    }
                )

        return call

    return make, lambda: file.read()["refresh_token"]


def cost_of(call: Call) -> float:
    call()
    began = time.process_time()
    for _ in range(REQUESTS):
        call()
    return (time.process_time() - began) / REQUESTS


def main() -> None:
    name, job, distributions = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    make, stored = globals()[name](job)
    calls = [make() for _ in range(1 if job.get("fresh") else job["threads"])]
    versions = {each: metadata.version(each) for each in distributions}
    print(json.dumps({"versions": versions}), flush=True)
    sys.stdin.readline()
    if job.get("fresh"):
        (call,) = calls
        print(json.dumps({"cost": min(cost_of(call) for _ in range(ROUNDS))}))
        return
    errors: list[str] = []
    together = threading.Barrier(len(calls))

    def work(call: Call) -> None:
        together.wait()
        try:
            call()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=partial(work, call)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"failed": len(errors), "errors": errors, "ended": time.time(), "stored": stored()}))


if __name__ == "__main__":
    main()
