"""Checks DPoP proofs (RFC 9449 section 4.3)."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256K1,
    SECP256R1,
    EllipticCurve,
    EllipticCurvePublicKey,
    EllipticCurvePublicNumbers,
)

from .errors import invalid_proof, use_nonce
from .nonces import Nonces, UsedIdentifiers
from .wire import Request

#: How far the client's clock may be off, and how old a proof may be by that clock, in seconds.
CLOCK_TOLERANCE = 180.0
MAX_AGE = 10.0

#: The algorithms of proofs, with the curve of their keys. The reference client likes ES256K best.
CURVES: Mapping[str, tuple[str, EllipticCurve]] = {
    "ES256": ("P-256", SECP256R1()),
    "ES256K": ("secp256k1", SECP256K1()),
}

_jws = jwt.PyJWS()


@dataclass(frozen=True)
class SignedJWT:
    """A JWT whose signature holds; its claims are unchecked."""

    header: Mapping[str, Any]
    claims: Mapping[str, Any]


def public_key(jwk: object, algorithm: str = "ES256") -> EllipticCurvePublicKey:
    """The key in a public JWK.

    :raises ValueError: it is another kind of key, or holds a private part.
    """
    crv, curve = CURVES[algorithm]
    if not isinstance(jwk, dict) or jwk.get("kty") != "EC" or jwk.get("crv") != crv:
        raise ValueError(f"the key is not a {crv} JWK")
    if "d" in jwk:
        raise ValueError("the key holds a private part")
    try:
        x, y = (int.from_bytes(base64.urlsafe_b64decode(jwk[name] + "=")) for name in ("x", "y"))
        return EllipticCurvePublicNumbers(x, y, curve).public_key()
    except (KeyError, TypeError, ValueError):
        raise ValueError("the key is malformed") from None


def thumbprint(jwk: Mapping[str, Any]) -> str:
    """The JWK thumbprint (RFC 7638) of an EC key."""
    members = {name: jwk[name] for name in ("crv", "kty", "x", "y")}
    return _sha256(json.dumps(members, separators=(",", ":"), sort_keys=True))


def verify(token: str, key: EllipticCurvePublicKey, algorithm: str = "ES256") -> SignedJWT:
    """Verify a signature.

    :raises ValueError: it does not hold, or the payload is not a JSON object.
    """
    try:
        decoded = _jws.decode_complete(token, key, algorithms=[algorithm])
        claims = json.loads(decoded["payload"])
    except (jwt.PyJWTError, ValueError):
        raise ValueError("signature verification failed") from None
    if not isinstance(claims, dict):
        raise ValueError("the payload is not a JSON object")  # noqa: TRY004 - bad data, not a bad call
    return SignedJWT(decoded["header"], claims)


class ProofChecker:
    """Checks the proofs that one server receives."""

    def __init__(self, nonces: Nonces, clock: Callable[[], float]) -> None:
        self.nonces = nonces
        self._clock = clock
        # A proof must be remembered for as long as its nonce could make it acceptable again.
        self._used = UsedIdentifiers(MAX_AGE + 2 * CLOCK_TOLERANCE, clock)

    def check(self, request: Request, access_token: str | None = None) -> str:
        """Check the request's proof and use up its ``jti``.

        :param access_token: the token that the proof must name (``ath``), at a resource server.
        :returns: the thumbprint of the key that signed it.
        :raises OAuthError: ``invalid_dpop_proof`` or ``use_dpop_nonce``.
        """
        proof, jkt = self._verified(request)
        claims = proof.claims
        self._check_time(claims.get("iat"))
        jti = claims.get("jti")
        if not isinstance(jti, str) or not jti:
            raise invalid_proof('DPoP "jti" missing')
        if claims.get("htm") != request.method:
            raise invalid_proof('DPoP "htm" mismatch')
        if claims.get("htu") != request.url:
            raise invalid_proof('DPoP "htu" mismatch')
        self._check_nonce(claims.get("nonce"))
        if access_token is None:
            if "ath" in claims:
                raise invalid_proof('DPoP "ath" claim not allowed')
        elif claims.get("ath") != _sha256(access_token):
            raise invalid_proof('DPoP "ath" mismatch')
        if not self._used.use(jti):
            raise invalid_proof("DPoP proof replayed")
        return jkt

    def _verified(self, request: Request) -> tuple[SignedJWT, str]:
        proofs = request.headers.get_all("DPoP") or []
        if not proofs:
            raise invalid_proof("DPoP proof required")
        if len(proofs) > 1:
            raise invalid_proof("DPoP header must contain a single proof")
        try:
            header = jwt.get_unverified_header(proofs[0])
        except jwt.PyJWTError:
            raise invalid_proof("Failed to verify DPoP proof: malformed") from None
        if header.get("typ") != "dpop+jwt":
            raise invalid_proof('Failed to verify DPoP proof: unexpected "typ" JWT header value')
        algorithm = str(header.get("alg"))
        if algorithm not in CURVES:
            raise invalid_proof("Failed to verify DPoP proof: unexpected alg")
        try:
            proof = verify(proofs[0], public_key(header.get("jwk"), algorithm), algorithm)
        except ValueError as error:
            raise invalid_proof(f"Failed to verify DPoP proof: {error}") from None
        return proof, thumbprint(header["jwk"])

    def _check_time(self, iat: object) -> None:
        if isinstance(iat, bool) or not isinstance(iat, int | float):
            raise invalid_proof('Failed to verify DPoP proof: "iat" claim must be a number')
        # Whole seconds on both sides, as the reference server counts them.
        age = int(self._clock()) - int(iat)
        problem = 'Failed to verify DPoP proof: "iat" claim timestamp check failed'
        if age > MAX_AGE + CLOCK_TOLERANCE:
            raise invalid_proof(f"{problem} (too far in the past)")
        if age < -CLOCK_TOLERANCE:
            raise invalid_proof(f"{problem} (it should be in the past)")

    def _check_nonce(self, nonce: object) -> None:
        if nonce is None:
            raise use_nonce()
        if not isinstance(nonce, str):
            raise invalid_proof('Invalid DPoP "nonce" type')
        if not self.nonces.accepts(nonce):
            raise use_nonce('DPoP "nonce" mismatch')


def _sha256(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
