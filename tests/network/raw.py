"""A client without mercy or manners: every message is made by hand, so that a test can get any part of it wrong.

It shares no code with the library, and stands on ``requests`` and ``PyJWT`` alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qs, urlencode, urlsplit

import jwt
import requests
from cryptography.hazmat.primitives.asymmetric import ec

from atproto_session.testing.network import Account

REDIRECT_URI = "http://127.0.0.1:8000/callback"
SCOPE = "atproto transition:generic"
LOOPBACK = "http://localhost?" + urlencode({"redirect_uri": REDIRECT_URI, "scope": SCOPE})
ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


#: The name and the algorithm of every curve (RFC 7518 section 3.4, RFC 8812 section 3.2).
CURVES: dict[type[ec.EllipticCurve], tuple[str, str]] = {
    ec.SECP256R1: ("P-256", "ES256"),
    ec.SECP256K1: ("secp256k1", "ES256K"),
}


def new_key(curve: type[ec.EllipticCurve] = ec.SECP256R1) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


def public_jwk(key: ec.EllipticCurvePrivateKey, **members: str) -> dict[str, str]:
    numbers = key.public_key().public_numbers()
    crv, _ = CURVES[type(key.curve)]
    return {"kty": "EC", "crv": crv, "x": b64(numbers.x.to_bytes(32)), "y": b64(numbers.y.to_bytes(32)), **members}


def query_of(url: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}


class Network(Protocol):
    """Whoever has accounts and a browser: the local network, or the real PDS."""

    def authorize(self, url: str, account: Account, approve: bool = True) -> str: ...


@dataclass(frozen=True)
class Tokens:
    access: str
    refresh: str
    response: Mapping[str, Any]


class RawClient:
    """One client with one DPoP key. Nonces are learned from every answer and kept by origin.

    :param signing_key: and ``kid``: authenticates with ``private_key_jwt``.
    """

    def __init__(
        self,
        issuer: str,
        *,
        client_id: str = LOOPBACK,
        redirect_uri: str = REDIRECT_URI,
        signing_key: ec.EllipticCurvePrivateKey | None = None,
        kid: str = "key-1",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.issuer = issuer
        self.client_id = client_id
        self.redirect_uri = redirect_uri
        self.signing_key = signing_key
        self.kid = kid
        self.clock = clock
        self.key = new_key()
        self.verifier = secrets.token_urlsafe(48)
        self.state = secrets.token_urlsafe(16)
        self.nonces: dict[str, str] = {}
        self.http = requests.Session()

    def take_key(self, jwk: Mapping[str, Any]) -> None:
        """Use the DPoP key of another client, a private JWK."""
        curve = next(curve for curve, (crv, _) in CURVES.items() if crv == jwk["crv"])
        self.key = ec.derive_private_key(int.from_bytes(base64.urlsafe_b64decode(jwk["d"] + "=")), curve())

    # Messages

    def proof(
        self, method: str, url: str, *, token: str | None = None, header: Mapping[str, Any] | None = None, **claims: Any
    ) -> str:
        """A proof; ``claims`` and ``header`` replace members, ``None`` takes one out."""
        parts = urlsplit(url)
        payload: dict[str, Any] = {
            "jti": secrets.token_urlsafe(16),
            "htm": method,
            "htu": f"{parts.scheme}://{parts.netloc}{parts.path}",
            "iat": int(self.clock()),
            "nonce": self.nonces.get(f"{parts.scheme}://{parts.netloc}"),
            "ath": None if token is None else b64(hashlib.sha256(token.encode()).digest()),
        } | claims
        payload = {name: value for name, value in payload.items() if value is not None}
        headers = {"typ": "dpop+jwt", "jwk": public_jwk(self.key)} | dict(header or {})
        _, algorithm = CURVES[type(self.key.curve)]
        return jwt.encode(payload, self.key, algorithm, headers={n: v for n, v in headers.items() if v is not None})

    def assertion(self, **claims: Any) -> str:
        if self.signing_key is None:
            raise ValueError("a public client has no assertions")
        now = int(self.clock())
        payload = {
            **{"iss": self.client_id, "sub": self.client_id, "aud": self.issuer},
            **{"jti": secrets.token_urlsafe(16), "iat": now, "exp": now + 60},
        } | claims
        payload = {name: value for name, value in payload.items() if value is not None}
        return jwt.encode(payload, self.signing_key, "ES256", headers={"kid": self.kid})

    def post(
        self, path: str, form: Mapping[str, str | None], *, proof: str | None = None, retry: bool = True
    ) -> requests.Response:
        """Post a form to the authorization server. ``None`` takes a parameter out."""
        url = self.issuer + path
        whole: dict[str, str | None] = {"client_id": self.client_id}
        if self.signing_key is not None:
            whole |= {"client_assertion_type": ASSERTION_TYPE, "client_assertion": self.assertion()}
        body = {name: value for name, value in {**whole, **form}.items() if value is not None}
        response = self.http.post(url, data=body, headers={"DPoP": proof or self.proof("POST", url)}, timeout=10)
        self.learn(response)
        if retry and proof is None and response.status_code == 400 and error_of(response)[0] == "use_dpop_nonce":
            return self.post(path, form, retry=False)
        return response

    def learn(self, response: requests.Response) -> None:
        if nonce := response.headers.get("DPoP-Nonce"):
            self.nonces["{0.scheme}://{0.netloc}".format(urlsplit(response.url))] = nonce

    # A log-in and its life

    def push(self, **changes: str | None) -> requests.Response:
        challenge = b64(hashlib.sha256(self.verifier.encode()).digest())
        form = {
            **{"response_type": "code", "code_challenge": challenge, "code_challenge_method": "S256"},
            **{"state": self.state, "redirect_uri": self.redirect_uri, "scope": SCOPE},
        }
        return self.post("/oauth/par", {**form, **changes})

    def authorize_url(self, **changes: str | None) -> str:
        response = self.push(**changes)
        assert response.status_code == 201, response.text
        query = {"client_id": self.client_id, "request_uri": response.json()["request_uri"]}
        return f"{self.issuer}/oauth/authorize?{urlencode(query)}"

    def code(self, network: Network, account: Account) -> str:
        return query_of(network.authorize(self.authorize_url(login_hint=account.handle), account))["code"]

    def exchange(self, code: str, **changes: str | None) -> requests.Response:
        form = {"grant_type": "authorization_code", "code": code, "code_verifier": self.verifier}
        return self.post("/oauth/token", {**form, "redirect_uri": self.redirect_uri, **changes})

    def log_in(self, network: Network, account: Account) -> Tokens:
        return tokens_of(self.exchange(self.code(network, account)))

    def refresh(self, token: str, **changes: str | None) -> requests.Response:
        return self.post("/oauth/token", {"grant_type": "refresh_token", "refresh_token": token, **changes})

    def revoke(self, token: str) -> requests.Response:
        return self.post("/oauth/revoke", {"token": token})

    def call(
        self, pds: str, path: str, token: str, *, method: str = "GET", proof: str | None = None, **options: Any
    ) -> requests.Response:
        """Call a method of a PDS."""
        url = pds + path
        for _ in range(2):
            headers = {"Authorization": f"DPoP {token}", "DPoP": proof or self.proof(method, url, token=token)}
            headers |= options.pop("headers", {})
            response = self.http.request(method, url, headers=headers, timeout=10, allow_redirects=False, **options)
            self.learn(response)
            if proof is not None or "use_dpop_nonce" not in response.headers.get("WWW-Authenticate", ""):
                break
        return response


@dataclass(frozen=True)
class LoggedIn:
    account: Account
    client: RawClient
    tokens: Tokens


def tokens_of(response: requests.Response) -> Tokens:
    assert response.status_code == 200, response.text
    members = response.json()
    return Tokens(members["access_token"], members["refresh_token"], members)


def error_of(response: requests.Response) -> tuple[str, str]:
    """The OAuth error code and its description."""
    members = json.loads(response.text or "{}")
    return members.get("error", ""), members.get("error_description", members.get("message", ""))
