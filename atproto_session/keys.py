"""ES256 keys as JWKs (RFC 7517), their thumbprints (RFC 7638), and the keyset of a confidential client.

Two kinds of key are at work in AT Protocol OAuth, both on the curve P-256: every session's own DPoP key, and the keys
that a confidential client signs its client assertions with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from ._fork import importing
from .errors import ClientMetadataError, printable

_SIZE = 32
_ECDSA = ec.ECDSA(hashes.SHA256())
#: The curves that are known, by ``crv``, and the algorithm that goes with each (RFC 7518 section 3.4, RFC 8812 section
#: 3.2). Keys made here are ES256; ``@atproto/oauth-client-node`` makes ES256K keys for its sessions where the server
#: takes them.
_CURVES: dict[str, tuple[ec.EllipticCurve, str]] = {
    "P-256": (ec.SECP256R1(), "ES256"),
    "secp256k1": (ec.SECP256K1(), "ES256K"),
}
_PEM_PRIVATE_KEY = r"(?s)-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?-----END \1-----"


def generate_jwk() -> dict[str, str]:
    """A new private ES256 key as a JWK: ``kty``, ``crv``, ``x``, ``y`` and ``d``."""
    return _to_jwk(ec.generate_private_key(ec.SECP256R1()))


def algorithm_of(jwk: Mapping[str, Any]) -> str:
    """What signatures with a JWK are called: ``"ES256"`` or ``"ES256K"``.

    :raises ValueError: ``jwk`` is on no curve that is known. The message names the member at fault.
    """
    return _CURVES[_curve_of(jwk)][1]


def load_private_key(jwk: Mapping[str, Any]) -> ec.EllipticCurvePrivateKey:
    """The key in a private ES256 or ES256K JWK, checked through and through. A key seen lately comes from memory, so
    this may be called for every request.

    :raises ValueError: ``jwk`` is no such key. The message names the member at fault and never holds a value.
    """
    crv, algorithm = _curve_of(jwk), algorithm_of(jwk)
    if jwk.get("alg") not in (None, algorithm):
        raise ValueError(f"alg is not {algorithm}")
    if jwk.get("use") not in (None, "sig"):
        raise ValueError("use is not sig: this key is not for signing")
    operations = jwk.get("key_ops")
    if operations is not None and not (isinstance(operations, list | tuple) and "sign" in operations):
        raise ValueError("key_ops does not hold sign: this key is not for signing")
    x, y = _member(jwk, "x"), _member(jwk, "y")
    if jwk.get("d") is None:
        raise ValueError("d is missing: this is not a private key")
    return _private_key(crv, x, y, _member(jwk, "d"))


def encoded(part: Mapping[str, Any]) -> str:
    """The header or the claims of a JWS as they stand in it: JSON in base64url."""
    return _encode(json.dumps(part, separators=(",", ":")).encode())


def sign(key: ec.EllipticCurvePrivateKey, header: str, claims: Mapping[str, Any]) -> str:
    """The compact JWS of ``claims`` (RFC 7515 section 7.1), signed with SHA-256 (RFC 7518 section 3.4, RFC 8812 section
    3.2). Signed here and not by PyJWT, since every request needs one: PyJWT takes twice the time of the signature, and
    to import it 30 ms.

    :param header: :func:`encoded`, with ``alg``, which is :func:`algorithm_of` the key.
    """
    signed = f"{header}.{encoded(claims)}"
    r, s = decode_dss_signature(key.sign(signed.encode("ascii"), _ECDSA))
    return f"{signed}.{_encode(r.to_bytes(_SIZE) + s.to_bytes(_SIZE))}"


def public_jwk(jwk: Mapping[str, Any]) -> dict[str, str]:
    """The public part of such a JWK: ``kty``, ``crv``, ``x``, ``y``, and ``kid``, ``alg`` and ``use`` where present.

    :raises ValueError: ``jwk`` is no such key. The message names the member at fault.
    """
    public = {"kty": "EC", "crv": _curve_of(jwk), "x": _member(jwk, "x"), "y": _member(jwk, "y")}
    return public | {name: _member(jwk, name) for name in ("kid", "alg", "use") if jwk.get(name) is not None}


def thumbprint(jwk: Mapping[str, Any]) -> str:
    """The SHA-256 thumbprint of an ES256 JWK (RFC 7638), base64url. It is that of the public part.

    :raises ValueError: ``jwk`` is no such key. The message names the member at fault.
    """
    public = public_jwk(jwk)
    required = {name: public[name] for name in ("crv", "kty", "x", "y")}
    return _encode(hashlib.sha256(json.dumps(required, separators=(",", ":")).encode()).digest())


class Keyset:
    """The ES256 keys of a confidential client. Immutable.

    Order matters: the first key signs for new sessions, the others go on serving the sessions that began with them.
    To rotate, add the new key at the end, and move it to the front when authorization servers have had the time to
    fetch it: the reference server looks again after ten minutes and not before, and refuses what an unknown key signed.
    Take an old one out only when no session uses it any more, and never give its ``kid`` to another key: that ends its
    sessions.

    Every key has a ``kid``: its own, or its thumbprint (RFC 7638).

    :param keys: private JWKs, at least one.
    :raises ClientMetadataError: (every constructor) a key is missing, malformed, not ES256, or a ``kid`` occurs twice.
        No message holds any part of a key.
    """

    def __init__(self, keys: Iterable[Mapping[str, Any]]) -> None:
        if isinstance(keys, str | bytes | Mapping) or not isinstance(keys, Iterable):
            raise _wrong(
                f"keys is a list of private JWKs, not {type(keys).__name__}; Keyset.from_jwks() reads a JWKS, and "
                "Keyset.from_pem() PEM text"
            )
        self._private: dict[str, ec.EllipticCurvePrivateKey] = {}
        self._public: dict[str, dict[str, str]] = {}
        for number, jwk in enumerate(keys, start=1):
            if not isinstance(jwk, Mapping):
                raise _wrong(f"key {number} is not a JWK (a JSON object)")
            try:
                private = load_private_key(jwk)
                public = public_jwk(jwk)
            except ValueError as error:
                raise _wrong(f"key {number} is not a private ES256 key: {error}") from None
            if algorithm_of(jwk) != "ES256":
                raise _wrong(f"key {number} is not a private ES256 key: crv is not P-256")
            kid = public.get("kid") or thumbprint(jwk)
            if kid in self._private:
                raise _wrong(f"two keys have the kid {printable(kid)}; every key needs its own")
            self._private[kid] = private
            self._public[kid] = public | {"kid": kid, "alg": "ES256", "use": "sig"}
        if not self._private:
            raise _wrong("a keyset needs at least one key")

    @classmethod
    def generate(cls, n: int = 1) -> Self:
        """A keyset of ``n`` new keys. They exist in memory only: sessions made with them end with the process."""
        if not isinstance(n, int):
            raise _wrong(f"n is how many keys to make, a number, not {type(n).__name__}")
        return cls([generate_jwk() for _ in range(n)])

    @classmethod
    def of(cls, keys: str | bytes | Mapping[str, Any] | Iterable[str | bytes | Mapping[str, Any]]) -> Self:
        """The keys in a setting: PEM text (unencrypted; its line ends may be written as ``\\n``), a JWK or a JWKS, as
        text or as mappings; or several of these in a list."""
        if isinstance(keys, str | bytes | Mapping):
            keys = [keys]
        elif not isinstance(keys, Iterable):
            raise _wrong(f"keys are PEM text, a JWK, or a list of them, not {type(keys).__name__}")
        return cls(key for each in keys for key in _parse_setting(each))

    @classmethod
    def from_jwks(cls, jwks: str | bytes | Mapping[str, Any]) -> Self:
        """The keys of a JWKS (``{"keys": [...]}``) or the one in a JWK, as a mapping or as JSON text."""
        return cls(_keys_of(jwks if isinstance(jwks, Mapping) else _parse_json(_to_text(jwks, "jwks"))))

    @classmethod
    def from_pem(cls, pem: str | bytes, kid: str | None = None, password: str | bytes | None = None) -> Self:
        """The private keys in PEM text (PKCS #8 or ``EC PRIVATE KEY``), one or several.

        :param kid: the key's id; only where there is one key.
        :param password: opens encrypted keys.
        """
        if not isinstance(kid, str | None):
            raise _wrong(f"kid is a string, not {type(kid).__name__}")
        keys = _parse_pem(_to_text(pem, "pem"), password)
        if kid is not None:
            if len(keys) != 1:
                raise _wrong("kid names one key, but the PEM text holds several; make a keyset of JWKs instead")
            keys[0]["kid"] = kid
        return cls(keys)

    @classmethod
    def from_env(cls, name: str) -> Self:
        """The keys in the environment variable ``name``, read now: a JWKS, a JWK, or PEM text (unencrypted; its line
        ends may be written as ``\\n``)."""
        if not isinstance(name, str):
            raise _wrong(f"name is that of an environment variable, a string, not {type(name).__name__}")
        text = os.environ.get(name, "") if name.isprintable() else ""
        if not text.strip():
            raise _wrong(f"the environment variable {printable(name)} is not set or empty")
        with _naming(f"the environment variable {printable(name)}"):
            return cls(_parse_setting(text))

    @classmethod
    def from_files(cls, *paths: str | os.PathLike[str]) -> Self:
        """The keys in files, in the order given. Each holds a JWKS, a JWK, or PEM text (unencrypted).

        The permissions of the files are not looked at: keep them readable by their owner alone.
        """
        keys: list[Mapping[str, Any]] = []
        for path in paths:
            if not isinstance(path, str | bytes | os.PathLike):
                raise _wrong(f"the paths of keys are strings or pathlib.Path, not {type(path).__name__}")
            path = os.fsdecode(path)  # noqa: PLW2901 - the same, as text
            if path.startswith("~"):
                raise _wrong(f"the file {printable(path)}: only a shell replaces ~; os.path.expanduser() does it here")
            with _naming(f"the file {printable(path)}"):
                try:
                    content = Path(path).read_bytes()
                except (OSError, ValueError) as error:
                    raise _wrong(f"it cannot be read ({type(error).__name__})") from None
                found = _parse(_to_text(content, "the content"))
                cls(found)
            keys += found
        return cls(keys)

    @property
    def first(self) -> str:
        """The ``kid`` of the key that signs for new sessions."""
        return next(iter(self._private))

    def get(self, kid: str) -> ec.EllipticCurvePrivateKey | None:
        """The private key ``kid``, or ``None`` if it is not in this keyset."""
        return self._private.get(kid)

    def jwks(self) -> dict[str, list[dict[str, str]]]:
        """The JWKS to publish: the public part of every key, with ``kid``, ``alg`` and ``use``."""
        return {"keys": [dict(public) for public in self._public.values()]}

    def __reduce__(self) -> Any:
        raise TypeError("a Keyset cannot be pickled; have each process read the keys, as with Keyset.from_env()")

    def __len__(self) -> int:
        return len(self._private)

    def __iter__(self) -> Iterator[str]:
        """The ``kid`` of every key, in order."""
        return iter(self._private)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {list(self)}>"


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Puts the place that keys were read from in front of what is wrong with them."""
    try:
        yield
    except ClientMetadataError as error:
        raise _wrong(f"{place}: {error}") from None


def _wrong(message: str) -> ClientMetadataError:
    return ClientMetadataError(message, field="keyset")


# JWKs


def _curve_of(jwk: Mapping[str, Any]) -> str:
    if jwk.get("kty") != "EC":
        raise ValueError("kty is not EC")
    crv = jwk.get("crv")
    if not isinstance(crv, str) or crv not in _CURVES:
        raise ValueError("crv is neither P-256 nor secp256k1")
    return crv


def _member(jwk: Mapping[str, Any], name: str) -> str:
    value = jwk.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is missing or not a string")
    return value


@lru_cache(maxsize=1024)
def _private_key(crv: str, x: str, y: str, d: str) -> ec.EllipticCurvePrivateKey:
    curve, _ = _CURVES[crv]
    point = ec.EllipticCurvePublicNumbers(_number(x, "x"), _number(y, "y"), curve)
    secret = _number(d, "d")
    try:
        point.public_key()
    except ValueError:
        raise ValueError("x and y are not a point on the curve") from None
    try:
        key = ec.derive_private_key(secret, curve)
    except ValueError:
        raise ValueError("d is out of range") from None
    if key.public_key().public_numbers() != point:
        raise ValueError("d does not belong to x and y")
    return key


def _number(text: str, name: str) -> int:
    try:
        data = base64.b64decode(text + "=", altchars=b"-_", validate=True)
    except ValueError:
        data = b""
    # The last character has two bits to spare; encoding again finds the texts that make use of them.
    if len(data) != _SIZE or _encode(data) != text:
        raise ValueError(f"{name} is not {_SIZE} bytes of base64url without padding")
    return int.from_bytes(data, "big")


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _to_jwk(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    numbers = key.private_numbers()
    values = {"x": numbers.public_numbers.x, "y": numbers.public_numbers.y, "d": numbers.private_value}
    return {"kty": "EC", "crv": "P-256"} | {name: _encode(n.to_bytes(_SIZE, "big")) for name, n in values.items()}


# Text


def _to_text(content: object, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, bytes | bytearray):
        raise _wrong(f"{name} is text, not {type(content).__name__}")
    # Neither JSON nor PEM has a use for what this replaces, and an error of the decoder would hold the content.
    return content.decode("utf-8-sig", errors="replace")


def _parse_setting(value: object) -> list[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        return _keys_of(value)
    if not isinstance(value, str | bytes):
        raise _wrong(f"each of the keys is PEM text or a JWK, not {type(value).__name__}")
    text = _to_text(value, "a key")
    # What sets variables (env files, most dashboards) keeps them on one line.
    return _parse(text.replace("\\n", "\n") if "-----BEGIN" in text else text)


def _parse(text: str) -> list[Mapping[str, Any]]:
    if "-----BEGIN" in text:
        return list(_parse_pem(text, None))
    return _keys_of(_parse_json(text))


def _parse_json(text: str) -> Mapping[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    # Raised here and not above, where it would carry the decoder's error, and with that the text, along.
    if not isinstance(document, dict):
        raise _wrong("this is neither a JWKS nor a JWK (a JSON object)")
    return document


def _keys_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if "keys" not in document:
        return [document]
    keys = document["keys"]
    if not isinstance(keys, list | tuple):
        raise _wrong("keys of a JWKS is not a list")
    return list(keys)


def _parse_pem(text: str, password: str | bytes | None) -> list[dict[str, str]]:
    # One by one, since a file made by `openssl ecparam -genkey` holds the curve's name in a block of its own.
    blocks = [match.group(0) for match in re.finditer(_PEM_PRIVATE_KEY, text)]
    if not blocks:
        raise _wrong("there is no private key in the PEM text")
    return [_to_jwk(_load_pem(block, password)) for block in blocks]


def _load_pem(block: str, password: str | bytes | None) -> ec.EllipticCurvePrivateKey:
    if not isinstance(password, str | bytes | None):
        raise _wrong(f"password is text, not {type(password).__name__}")
    with importing():
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    try:
        secret = password.encode() if isinstance(password, str) else password
        key = load_pem_private_key(block.encode(), secret or None)
    except TypeError:
        # That is how cryptography says that a password is needed and missing, or given and not needed.
        hint = (
            "not encrypted, but a password was given" if password else "encrypted, and from_pem(password=...) opens it"
        )
        raise _wrong(f"the PEM key is {hint}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise _wrong("the PEM key cannot be read: it is damaged, or the password is wrong") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _wrong("the PEM key is not on the curve P-256, which ES256 needs")
    return key
