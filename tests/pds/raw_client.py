"""The protocol on foot: a loopback client made of requests and PyJWT, which judges nothing and shows every answer.

The tests of the harness use it, so that they prove the harness and not the library.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import jwt
import requests
from cryptography.hazmat.primitives.asymmetric import ec

from tests.pds.harness import PATIENCE, Account, RealPDS

REDIRECT_URI = "http://127.0.0.1/callback"
SCOPE = "atproto transition:generic"
CLIENT_ID = "http://localhost?" + urlencode({"redirect_uri": REDIRECT_URI, "scope": SCOPE})
TOKEN = "/oauth/token"
GET_SESSION = "/xrpc/com.atproto.server.getSession"


class RawClient:
    """One DPoP key, the nonce that the server gave last, and the tokens of the last answer."""

    def __init__(self, pds: RealPDS) -> None:
        self.pds = pds
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.nonce: str | None = None
        self.tokens: dict[str, Any] = {}

    @property
    def private_jwk(self) -> dict[str, Any]:
        jwk: dict[str, Any] = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self.key))
        return {**jwk, "alg": "ES256"}

    def proof(self, method: str, path: str, token: str | None = None) -> str:
        claims = {
            "jti": secrets.token_urlsafe(16),
            "htm": method,
            "htu": self.pds.pds_url + path,
            "iat": int(time.time()),
        }
        if self.nonce is not None:
            claims["nonce"] = self.nonce
        if token is not None:
            claims["ath"] = _digest(token)
        jwk = {name: self.private_jwk[name] for name in ("kty", "crv", "x", "y")}
        return jwt.encode(claims, self.key, "ES256", {"typ": "dpop+jwt", "jwk": jwk})

    def send(
        self, method: str, path: str, form: dict[str, str] | None = None, token: str | None = None
    ) -> requests.Response:
        """One request, and no more: a nonce challenge is an answer like any other."""
        headers = {"DPoP": self.proof(method, path, token)}
        if token is not None:
            headers["Authorization"] = f"DPoP {token}"
        answer = requests.request(method, self.pds.pds_url + path, data=form, headers=headers, timeout=PATIENCE)
        self.nonce = answer.headers.get("DPoP-Nonce", self.nonce)
        return answer

    def post(self, path: str, **form: str) -> requests.Response:
        """POST ``form`` as the client; sent anew if the server asks for a nonce."""
        form["client_id"] = CLIENT_ID
        answer = self.send("POST", path, form)
        return self.send("POST", path, form) if "use_dpop_nonce" in answer.text else answer

    def authorization_url(self, verifier: str, **parameters: str) -> str:
        parameters = {
            "response_type": "code",
            "redirect_uri": REDIRECT_URI,
            "scope": SCOPE,
            "state": secrets.token_urlsafe(8),
            "code_challenge": _digest(verifier),
            "code_challenge_method": "S256",
            **parameters,
        }
        pushed = self.post("/oauth/par", **parameters).json()
        query = urlencode({"client_id": CLIENT_ID, "request_uri": pushed["request_uri"]})
        return f"{self.pds.pds_url}/oauth/authorize?{query}"

    def log_in(self, account: Account) -> dict[str, Any]:
        """The token response of a whole log-in."""
        verifier = secrets.token_urlsafe(48)
        url = self.pds.authorize(
            self.authorization_url(verifier, login_hint=account.handle), account.handle, account.password
        )
        code = dict(parse_qsl(urlsplit(url).query))["code"]
        answer = self.post(
            TOKEN, grant_type="authorization_code", code=code, redirect_uri=REDIRECT_URI, code_verifier=verifier
        )
        self.tokens = answer.json()
        return self.tokens

    def refresh(self, token: str | None = None) -> requests.Response:
        """Spend ``token``, by default the newest one."""
        answer = self.post(TOKEN, grant_type="refresh_token", refresh_token=token or self.tokens["refresh_token"])
        if answer.status_code == 200:
            self.tokens = answer.json()
        return answer

    def get_session(self, token: str | None = None) -> requests.Response:
        token = token or self.tokens["access_token"]
        answer = self.send("GET", GET_SESSION, token=token)
        challenged = "use_dpop_nonce" in answer.headers.get("WWW-Authenticate", "")
        return self.send("GET", GET_SESSION, token=token) if challenged else answer


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
