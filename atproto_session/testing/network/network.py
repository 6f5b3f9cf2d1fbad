"""The local network itself: it puts the servers together and gives tests their handles on them."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from html import unescape
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qs, urlencode, urlsplit

from .accounts import Account, Directory, Home
from .authorization_server import AuthorizationServer
from .clients import Clients
from .faults import Fault, Faults
from .nonces import Nonces
from .proofs import ProofChecker
from .repositories import Repositories
from .resource_server import Method, ResourceServer
from .routes import Route, endpoints_of, find_route
from .sessions import Ledger, SessionInfo
from .wire import Listener, Request, Response


class LocalNetwork:
    """A PLC directory, a PDS and an authorization server on loopback, in this process. A context manager.

    ::

        with LocalNetwork() as network:
            account = network.create_account("alice.test")
            client = OAuthClient(ClientMetadata.loopback(), store="memory:", **network.client_options())
            callback = network.authorize(client.authorize(account.handle), account)
            session = client.callback(callback).session

    Its servers may be used from any process; the methods that change or count something work in the process that made
    it, so fork workers after the accounts are there.

    :param access_token_lifetime: seconds.
    :param entryway: whether the authorization server has an origin of its own. Its access tokens then live until they
        expire, even if their session is gone; those of a PDS die when the refresh token is rotated.
    :param nonce_lifetime: seconds until another DPoP nonce is handed out; each is accepted for three times that long.
    :param latency: seconds that the token endpoint takes to think before it processes a request.
    :param challenge_scheme: of the ``WWW-Authenticate`` header that follows a refused access token.
    :param clock: seconds since the epoch; decides about every lifetime.
    """

    def __init__(
        self,
        *,
        access_token_lifetime: float = 3600.0,
        entryway: bool = False,
        nonce_lifetime: float = 60.0,
        latency: float = 0.0,
        challenge_scheme: Literal["DPoP", "Bearer"] = "DPoP",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._access_token_lifetime = access_token_lifetime
        self._entryway = entryway
        self._nonce_lifetime = nonce_lifetime
        self._latency = latency
        self._challenge_scheme = challenge_scheme
        self._clock = clock
        self._directory = Directory()
        self._repositories = Repositories(self._directory, clock)
        self._methods: dict[str, Method] = {}
        self._clients = Clients(clock)
        self._faults = Faults()
        self._listeners: list[Listener] = []
        self._issuers: dict[str, AuthorizationServer] = {}
        self._proofs: list[ProofChecker] = []
        self._requests: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._running = False
        self._stopped = threading.Event()
        self.plc_url = self._open(lambda _: [Route("GET", "/did:*", "plc", self._directory.answer_did_document)])
        self._home = self._open_pds_with_issuer(apart=entryway)

    # Life

    def start(self) -> LocalNetwork:
        """Begin to answer. Returns itself."""
        for listener in self._listeners:
            listener.start()
        self._running = True
        return self

    def stop(self) -> None:
        """Let go of everything that is held, close every connection, and end. It cannot be started again."""
        self._stopped.set()
        self._faults.clear()
        for listener in self._listeners:
            listener.stop()
        self._running = False

    def __enter__(self) -> LocalNetwork:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def pds_url(self) -> str:
        """The origin of the PDS where accounts are created."""
        return self._home.pds

    @property
    def issuer(self) -> str:
        """The issuer that speaks for that PDS: the same origin, unless there is an entryway."""
        return self._home.issuer

    def client_options(self) -> dict[str, Any]:
        """The keyword arguments that make an ``OAuthClient`` live in this network."""
        return {"plc_directory": self.plc_url, "handle_resolver": self.pds_url, "allow_http": True}

    # Accounts

    def create_account(self, handle: str | None = None) -> Account:
        """Make an account at :attr:`pds_url`. Handles end in ``.test``; without one, it gets the next that is free.

        :raises ValueError: the handle is malformed or taken.
        """
        return self._directory.create(handle, self._home)

    def change_handle(self, did: str, handle: str, *, resolves: bool = True) -> None:
        """Give an account another handle. Without ``resolves``, its DID document claims the handle in vain."""
        self._directory.change_handle(did, handle, resolves=resolves)

    def move_account(self, did: str) -> str:
        """Move an account to another PDS of the same issuer. Returns the URL of that PDS, the only one that accepts
        the account's tokens issued from now on; the old one refuses them."""
        issuer = self._directory.home(did).issuer
        home = Home(self._open_pds(issuer), issuer)
        self._directory.move(did, home)
        return home.pds

    def move_account_to_other_issuer(self, did: str) -> str:
        """Move an account to a PDS of another issuer, which knows nothing of its sessions. Returns the URL of that PDS.
        The old issuer still honours them, so that a test can tell whether a client turned to it."""
        home = self._open_pds_with_issuer(apart=self._entryway)
        self._directory.move(did, home)
        return home.pds

    def add_method(
        self, nsid: str, answer: Callable[[Request, Account], object], *, verb: Literal["GET", "POST"] = "GET"
    ) -> None:
        """Let every PDS have one more method, or another one of that name. Its caller needs a token, as for all others.
        There are ``com.atproto.server.getSession``, ``com.atproto.repo.createRecord``, ``putRecord``, ``deleteRecord``,
        ``getRecord``, ``listRecords`` and ``uploadBlob``, ``com.atproto.sync.getBlob``, and ``app.test.echo``.

        ::

            def get_timeline(request: Request, account: Account) -> object:
                return {"feed": []}

            network.add_method("app.bsky.feed.getTimeline", get_timeline)

        :param nsid: its name.
        :param answer: called with the request, which is :class:`.Request`, and the account that made it, in a thread of
            the request's. Returns what becomes the JSON of the answer, or a :class:`.Response`; or raises
            :exc:`.MethodError`.
        :param verb: ``"POST"`` for a procedure.
        """
        self._methods[nsid] = Method(verb, answer)

    # The browser

    def authorize(self, url: str, account: Account, approve: bool = True, scope: str | None = None) -> str:
        """Play the browser: open ``url``, log in as ``account``, approve or deny. Returns the callback URL.

        :param scope: the scopes to grant, if fewer than asked.
        :raises ValueError: the authorization server does not go on with the log-in.
        """
        target = urlsplit(url)
        form = {name: values[0] for name, values in parse_qs(target.query).items()}
        form |= {"identifier": account.did, "password": account.password, "decision": "approve" if approve else "deny"}
        if scope is not None:
            form["scope"] = scope
        connection = http.client.HTTPConnection(target.netloc, timeout=30)
        try:
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST", target.path, urlencode(form), headers)
            response = connection.getresponse()
            page = response.read().decode("utf-8")
        finally:
            connection.close()
        location = response.getheader("Location")
        if location is None:
            alert = re.search(r'<p role="alert">(.*?)</p>', page, re.DOTALL)
            problem = unescape(alert[1]) if alert else "no reason given"
            raise ValueError(f"the authorization server answered {response.status}: {problem}")
        return location

    def publish(self, url: str, document: object, content_type: str = "application/json") -> None:
        """Put a client metadata document or a JWKS where the authorization servers find it. Nothing is fetched from
        the real web. JSON is made of anything but ``bytes``."""
        self._clients.publish(url, document, content_type)

    # Mischief

    def fault(self, endpoint: str, action: str, *, times: int | None = 1, after: int = 0, **options: Any) -> Fault:
        """Let something go wrong; :mod:`.faults` lists the endpoints, and the actions with their options.

        :param times: how many requests it happens to; ``None`` for all.
        :param after: how many requests it lets pass first.
        """
        return self._faults.set(endpoint, action, times=times, after=after, options=options)

    def clear_faults(self) -> None:
        """Let everything go right again, and let go of what is held."""
        self._faults.clear()

    def expire_access_tokens(self, did: str) -> None:
        """Let the time of every access token that the account has come now. Its sessions live on."""
        for server in self._servers():
            server.ledger.expire_access_tokens(did)

    def reject_access_tokens(self, did: str) -> None:
        """Refuse every access token of the account, new ones included, until :meth:`accept_access_tokens`."""
        for server in self._servers():
            server.ledger.refuse_access_tokens(did, True)

    def accept_access_tokens(self, did: str) -> None:
        """Undo :meth:`reject_access_tokens`."""
        for server in self._servers():
            server.ledger.refuse_access_tokens(did, False)

    def revoke_sessions(self, did: str) -> None:
        """End the account's sessions, as its owner might on the server's own pages."""
        for server in self._servers():
            server.ledger.end_sessions(did)

    def rotate_nonces(self) -> None:
        """Make every DPoP nonce handed out so far stale."""
        with self._lock:
            proofs = list(self._proofs)
        for checker in proofs:
            checker.nonces.rotate()

    # What was seen

    @property
    def refresh_token_uses(self) -> Counter[str]:
        """How often each refresh token was used: in requests that passed every check of proof and client, whether the
        token was good or not. No token of a correct client is here twice."""
        return sum((server.ledger.uses() for server in self._servers()), Counter())

    @property
    def rotations(self) -> int:
        """How many refreshes succeeded."""
        return sum(server.ledger.rotations for server in self._servers())

    @property
    def replays(self) -> int:
        """How often a refresh token came that had been used before."""
        return sum(server.ledger.replays for server in self._servers())

    @property
    def revocations(self) -> int:
        """How many sessions ended because a client revoked a token."""
        return sum(server.ledger.revocations for server in self._servers())

    @property
    def token_requests(self) -> int:
        """Requests to the token endpoint, those without a good nonce included."""
        return self._count("token")

    @property
    def par_requests(self) -> int:
        """Requests to the pushed authorization request endpoint, those without a good nonce included."""
        return self._count("par")

    @property
    def resource_requests(self) -> int:
        """Requests to methods of a PDS that need a token."""
        return self._count("resource")

    def requests(self, path: str) -> int:
        """How many requests came for this path, at any of the servers."""
        with self._lock:
            return sum(count for (_, seen), count in self._requests.items() if seen == path)

    def session_of(self, token: str) -> SessionInfo | None:
        """The session that an access or refresh token belongs to, old tokens included; ``None`` if it is unknown."""
        found = (server.ledger.info(token) for server in self._servers())
        return next((info for info in found if info is not None), None)

    # Construction

    def _open(self, routes_at: Callable[[str], list[Route]]) -> str:
        """Start a server. ``routes_at`` makes its routes, given its origin."""
        routes: list[Route] = []

        def respond(request: Request) -> Response:
            route = find_route(routes, request)
            with self._lock:
                endpoint = route.endpoint if isinstance(route, Route) else ""
                self._requests[endpoint, request.path] += 1
            if isinstance(route, Response):
                return route
            return self._faults.answer(endpoints_of(route, request), route, request)

        listener = Listener(respond)
        routes.extend(routes_at(listener.origin))
        self._listeners.append(listener)
        if self._running:
            listener.start()
        return listener.origin

    def _open_pds(self, issuer: str) -> str:
        return self._open(lambda origin: self._pds_routes(origin, issuer, self._proof_checker()))

    def _open_pds_with_issuer(self, *, apart: bool) -> Home:
        if apart:
            issuer = self._open(lambda origin: self._issuer_routes(origin, self._proof_checker()))
            return Home(self._open_pds(issuer), issuer)

        def routes_at(origin: str) -> list[Route]:
            proofs = self._proof_checker()
            return self._issuer_routes(origin, proofs) + self._pds_routes(origin, origin, proofs)

        origin = self._open(routes_at)
        return Home(origin, origin)

    def _issuer_routes(self, issuer: str, proofs: ProofChecker) -> list[Route]:
        server = AuthorizationServer(
            issuer,
            directory=self._directory,
            clients=self._clients,
            ledger=Ledger(lifetime=self._access_token_lifetime, outliving=self._entryway, clock=self._clock),
            proofs=proofs,
            latency=self._latency,
            stopped=self._stopped,
            clock=self._clock,
        )
        with self._lock:
            self._issuers[issuer] = server
        return list(server.routes)

    def _pds_routes(self, origin: str, issuer: str, proofs: ProofChecker) -> list[Route]:
        with self._lock:
            ledger = self._issuers[issuer].ledger
        server = ResourceServer(
            origin,
            issuer,
            directory=self._directory,
            ledger=ledger,
            proofs=proofs,
            repositories=self._repositories,
            added=self._methods,
            scheme=self._challenge_scheme,
        )
        return list(server.routes)

    def _proof_checker(self) -> ProofChecker:
        checker = ProofChecker(Nonces(self._nonce_lifetime, self._clock), self._clock)
        with self._lock:
            self._proofs.append(checker)
        return checker

    def _servers(self) -> list[AuthorizationServer]:
        with self._lock:
            return list(self._issuers.values())

    def _count(self, endpoint: str) -> int:
        with self._lock:
            return sum(count for (seen, _), count in self._requests.items() if seen == endpoint)
