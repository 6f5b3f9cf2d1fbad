import base64
import copy
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atproto_session.errors import ClientMetadataError
from atproto_session.keys import Keyset, encoded, generate_jwk, load_private_key, public_jwk, sign, thumbprint

# RFC 6979 appendix A.2.5: a published key, so that these tests do not only agree with themselves.
KNOWN = {
    "kty": "EC",
    "crv": "P-256",
    "x": base64.urlsafe_b64encode(
        bytes.fromhex("60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6")
    ).decode()[:43],
    "y": base64.urlsafe_b64encode(
        bytes.fromhex("7903FE1008B8BC99A41AE9E95628BC64F2F1B20C2D7E9F5177A3C294D4462299")
    ).decode()[:43],
    "d": base64.urlsafe_b64encode(
        bytes.fromhex("C9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721")
    ).decode()[:43],
}
OTHER = generate_jwk()

# On a busy machine the first text that is drawn can take seconds.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

Encrypt = serialization.KeySerializationEncryption


def pem_of(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey,
    password: bytes | None = None,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> str:
    encryption: Encrypt = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, form, encryption).decode()


def refusal(make: Callable[[], object], *secrets: str) -> str:
    """The message of the ClientMetadataError that ``make`` raises, once it is known to hold none of ``secrets``."""
    with pytest.raises(ClientMetadataError) as raised:
        make()
    assert raised.value.field == "keyset"
    error: BaseException | None = raised.value
    while error is not None:
        for secret in secrets:
            assert secret not in str(error)
            assert secret not in repr(vars(error))
        error = error.__context__
    return str(raised.value)


class TestGenerate:
    def test_makes_a_private_jwk_that_loads(self) -> None:
        jwk = generate_jwk()
        assert sorted(jwk) == ["crv", "d", "kty", "x", "y"]
        assert (jwk["kty"], jwk["crv"]) == ("EC", "P-256")
        for name in "xyd":
            assert len(base64.urlsafe_b64decode(jwk[name] + "=")) == 32
        load_private_key(jwk)

    def test_makes_another_every_time(self) -> None:
        assert generate_jwk()["d"] != generate_jwk()["d"]


class TestLoadPrivateKey:
    def test_loads_a_published_key(self) -> None:
        numbers = load_private_key(KNOWN).private_numbers()
        assert numbers.private_value == 0xC9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721
        assert numbers.public_numbers.x == 0x60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6

    def test_signs_what_the_public_part_verifies(self) -> None:
        token = jwt.encode({"a": 1}, load_private_key(OTHER), algorithm="ES256")
        assert jwt.decode(token, jwt.PyJWK(public_jwk(OTHER), "ES256"), algorithms=["ES256"]) == {"a": 1}

    @pytest.mark.parametrize(
        "members",
        [
            {"alg": "ES256"},
            {"alg": None, "use": None, "key_ops": None},
            {"use": "sig", "kid": "a", "ext": True},
            {"key_ops": ["sign", "verify"]},
            {"key_ops": ("sign",)},
        ],
    )
    def test_accepts_what_says_that_it_signs(self, members: Mapping[str, Any]) -> None:
        load_private_key({**KNOWN, **members})

    @pytest.mark.parametrize(
        ("member", "value"),
        [
            ("kty", "OKP"),
            ("kty", None),
            ("crv", "P-384"),
            ("crv", None),
            ("alg", "ES256K"),
            ("alg", ["ES256"]),
            ("use", "enc"),
            ("key_ops", ["verify"]),
            ("key_ops", []),
            ("key_ops", "sign"),
            ("x", None),
            ("x", 7),
            ("x", ""),
            ("x", KNOWN["x"][:-1]),
            ("x", KNOWN["x"] + "A"),
            ("x", KNOWN["x"] + "="),
            ("x", KNOWN["x"] + "\n"),
            ("x", "+" + KNOWN["x"][1:]),
            ("x", "\u0661" + KNOWN["x"][1:]),
            ("x", KNOWN["x"][:-1] + "B"),
            ("x", OTHER["x"]),
            ("y", [KNOWN["y"]]),
            ("y", "A" * 43),
            ("y", OTHER["y"]),
            ("d", None),
            ("d", 1),
            ("d", "A" * 43),
            ("d", "_" * 42 + "8"),
            ("d", KNOWN["d"] + "A"),
            ("d", OTHER["d"]),
        ],
    )
    def test_names_the_member_at_fault_and_no_value(self, member: str, value: object) -> None:
        load_private_key(KNOWN)
        with pytest.raises(ValueError, match=rf"\b{member}\b") as raised:
            load_private_key({**KNOWN, member: value})
        for secret in (KNOWN["x"], KNOWN["y"], KNOWN["d"], OTHER["d"]):
            assert secret not in str(raised.value)

    def test_the_last_character_has_one_spelling(self) -> None:
        # 43 characters hold two bits more than 32 bytes do; a lax decoder takes four texts for one key.
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        position = alphabet.index(KNOWN["d"][-1])
        for offset in (1, 2, 3):
            with pytest.raises(ValueError, match="d is not 32 bytes"):
                load_private_key({**KNOWN, "d": KNOWN["d"][:-1] + alphabet[position + offset]})

    def test_comes_from_memory_the_second_time(self) -> None:
        jwk = generate_jwk()
        assert load_private_key(jwk) is load_private_key(dict(jwk))

    def test_a_key_in_memory_is_still_checked(self) -> None:
        jwk = generate_jwk()
        load_private_key(jwk)
        with pytest.raises(ValueError, match="alg"):
            load_private_key({**jwk, "alg": "RS256"})

    def test_many_threads_get_the_right_keys(self) -> None:
        jwks = [generate_jwk() for _ in range(8)]
        wrong: list[int] = []

        def load_all() -> None:
            for number, jwk in enumerate(jwks * 20):
                if load_private_key(jwk).private_numbers().private_value != int.from_bytes(
                    base64.urlsafe_b64decode(jwk["d"] + "="), "big"
                ):
                    wrong.append(number)

        threads = [threading.Thread(target=load_all) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    @patient
    @given(
        st.dictionaries(st.sampled_from(["kty", "crv", "x", "y", "d", "alg", "use", "key_ops"]), st.text() | st.none())
    )
    def test_raises_nothing_but_value_error(self, members: dict[str, str | None]) -> None:
        message = ""
        try:
            load_private_key({**KNOWN, **members})
        except ValueError as error:
            message = str(error)
        assert KNOWN["d"] not in message


class TestPublicPart:
    def test_leaves_out_everything_else(self) -> None:
        jwk = {**KNOWN, "kid": "k", "alg": "ES256", "use": "sig", "key_ops": ["sign"], "ext": True, "k": "secret"}
        public = {name: KNOWN[name] for name in ("kty", "crv", "x", "y")}
        assert public_jwk(jwk) == {**public, "kid": "k", "alg": "ES256", "use": "sig"}
        assert public_jwk(KNOWN) == public

    @pytest.mark.parametrize(("member", "value"), [("kty", "RSA"), ("crv", ""), ("x", None), ("y", 1), ("kid", 1)])
    def test_names_the_member_at_fault(self, member: str, value: object) -> None:
        with pytest.raises(ValueError, match=rf"\b{member}\b"):
            public_jwk({**KNOWN, member: value})

    def test_thumbprint_is_that_of_rfc_7638(self) -> None:
        canonical = f'{{"crv":"P-256","kty":"EC","x":"{KNOWN["x"]}","y":"{KNOWN["y"]}"}}'
        expected = base64.urlsafe_b64encode(hashlib.sha256(canonical.encode()).digest()).decode().rstrip("=")
        assert thumbprint(KNOWN) == thumbprint({**public_jwk(KNOWN), "kid": "k"}) == expected


class TestKeyset:
    @pytest.mark.duty(20, 30)
    def test_keeps_the_order_and_publishes_no_private_part(self) -> None:
        keys = Keyset([{**KNOWN, "kid": "new"}, {**OTHER, "kid": "old"}])
        assert (keys.first, list(keys), len(keys)) == ("new", ["new", "old"], 2)
        published = keys.jwks()["keys"]
        assert [set(key) for key in published] == [{"kty", "crv", "x", "y", "kid", "alg", "use"}] * 2
        assert [(key["kid"], key["alg"], key["use"]) for key in published] == [
            ("new", "ES256", "sig"),
            ("old", "ES256", "sig"),
        ]

    def test_gets_the_private_key_of_a_kid(self) -> None:
        keys = Keyset([{**KNOWN, "kid": "a"}])
        assert keys.get("a") is load_private_key(KNOWN)
        assert keys.get("b") is None

    @pytest.mark.duty(20)
    def test_a_key_without_a_kid_has_its_thumbprint(self) -> None:
        assert list(Keyset([KNOWN, OTHER])) == [thumbprint(KNOWN), thumbprint(OTHER)]

    def test_what_it_publishes_is_its_own(self) -> None:
        keys = Keyset([KNOWN])
        keys.jwks()["keys"][0]["kid"] = "changed"
        assert keys.jwks()["keys"][0]["kid"] == keys.first

    def test_hides_everything_private_when_printed(self) -> None:
        keys = Keyset([{**KNOWN, "kid": "k1"}])
        assert repr(keys) == "<Keyset ['k1']>"

    def test_copies_are_itself(self) -> None:
        keys = Keyset([KNOWN])
        assert copy.copy(keys) is copy.deepcopy(keys) is keys

    def test_generates(self) -> None:
        assert len(Keyset.generate()) == 1
        assert len(set(Keyset.generate(3))) == 3

    @pytest.mark.duty(20)
    def test_refuses_a_kid_that_occurs_twice(self) -> None:
        message = refusal(lambda: Keyset([{**KNOWN, "kid": "a"}, {**OTHER, "kid": "a"}]), KNOWN["d"], OTHER["d"])
        assert "two keys have the kid a" in message
        refusal(lambda: Keyset([KNOWN, KNOWN]))

    @pytest.mark.parametrize(
        ("keys", "told"),
        [
            ([], "at least one key"),
            (["a"], "key 1 is not a JWK"),
            ({"keys": []}, "Keyset.from_jwks() reads a JWKS"),
            ([KNOWN, {**OTHER, "kty": "RSA"}], "key 2 is not a private ES256 key: kty"),
            ([public_jwk(KNOWN)], "d is missing"),
            ([{**KNOWN, "kid": ""}], "kid"),
            ([{**KNOWN, "kid": 5}], "kid"),
            ([{**KNOWN, "use": "enc"}], "use"),
        ],
    )
    def test_refuses_with_one_clear_message(self, keys: Any, told: str) -> None:
        assert told in refusal(lambda: Keyset(keys), KNOWN["d"], OTHER["d"])

    def test_cuts_a_foreign_kid_short(self) -> None:
        key = {**KNOWN, "kid": "\x1b[2J" + "k" * 10_000}
        message = refusal(lambda: Keyset([key, key]))
        assert "\x1b" not in message
        assert len(message) < 300


class TestFromJWKS:
    def test_reads_text_bytes_and_mappings(self) -> None:
        jwks = {"keys": [{**KNOWN, "kid": "a"}, {**OTHER, "kid": "b"}]}
        text = json.dumps(jwks)
        for source in (jwks, text, text.encode(), b"\xef\xbb\xbf" + text.encode()):
            assert list(Keyset.from_jwks(source)) == ["a", "b"]

    def test_reads_a_single_jwk(self) -> None:
        assert list(Keyset.from_jwks(KNOWN)) == list(Keyset.from_jwks(json.dumps(KNOWN))) == [thumbprint(KNOWN)]

    @pytest.mark.parametrize(
        "source",
        ["", "null", "[]", "[" * 100_000, '"secret-d"', '{"d": "secret-d"', b"\xff\xfe secret-d", {"keys": "secret-d"}],
    )
    def test_refuses_other_things_and_shows_nothing_of_them(self, source: Any) -> None:
        refusal(lambda: Keyset.from_jwks(source), "secret-d")

    @patient
    @given(
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["keys", *KNOWN, "kid", "key_ops"]), inner),
        )
    )
    @example({"keys": [{**KNOWN, "kid": "\ud800"}]})
    def test_raises_nothing_but_client_metadata_error(self, document: Any) -> None:
        for source in (json.dumps(document), document if isinstance(document, dict) else "x"):
            with suppress(ClientMetadataError):
                Keyset.from_jwks(source)

    @patient
    @given(st.text() | st.binary())
    def test_takes_any_text(self, text: str | bytes) -> None:
        for read in (Keyset.from_jwks, Keyset.from_pem):
            with pytest.raises(ClientMetadataError):
                read(text)


class TestFromPEM:
    @pytest.mark.parametrize(
        "form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL]
    )
    def test_reads_both_forms(self, form: serialization.PrivateFormat) -> None:
        pem = pem_of(load_private_key(KNOWN), form=form)
        assert Keyset.from_pem(pem).jwks() == Keyset.from_pem(pem.encode()).jwks() == Keyset([KNOWN]).jwks()

    def test_reads_several(self) -> None:
        # OpenSSL's `ecparam -genkey` writes the curve's name in front.
        pem = "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
        for jwk in (KNOWN, OTHER):
            pem += pem_of(load_private_key(jwk), form=serialization.PrivateFormat.TraditionalOpenSSL)
        assert list(Keyset.from_pem(pem.replace("\n", "\r\n"))) == [thumbprint(KNOWN), thumbprint(OTHER)]
        assert "kid" in refusal(lambda: Keyset.from_pem(pem, kid="a"))

    def test_numbers_that_begin_with_a_zero_byte_keep_it(self) -> None:
        short = ec.derive_private_key(379, ec.SECP256R1())
        assert short.public_key().public_numbers().x < 2**248
        assert [len(key["x"]) for key in Keyset.from_pem(pem_of(short)).jwks()["keys"]] == [43]

    def test_takes_a_kid(self) -> None:
        assert list(Keyset.from_pem(pem_of(load_private_key(KNOWN)), kid="a")) == ["a"]

    def test_opens_encrypted_keys(self) -> None:
        pem = pem_of(load_private_key(KNOWN), b"hunter2")
        assert list(Keyset.from_pem(pem, password="hunter2")) == [thumbprint(KNOWN)]
        assert list(Keyset.from_pem(pem, password=b"hunter2")) == [thumbprint(KNOWN)]

    def test_an_empty_password_is_none(self) -> None:
        assert len(Keyset.from_pem(pem_of(load_private_key(KNOWN)), password="")) == 1

    @pytest.mark.parametrize(
        ("pem", "password", "told"),
        [
            (pem_of(load_private_key(KNOWN), b"hunter2"), None, "is encrypted"),
            (pem_of(load_private_key(KNOWN), b"hunter2"), "swordfish", "password is wrong"),
            (pem_of(load_private_key(KNOWN), b"hunter2"), "swordfish\ud800", "password is wrong"),
            (pem_of(load_private_key(KNOWN)), "swordfish", "not encrypted"),
            (pem_of(ec.generate_private_key(ec.SECP384R1())), None, "P-256"),
            (pem_of(ed25519.Ed25519PrivateKey.generate()), None, "P-256"),
            (pem_of(rsa.generate_private_key(65537, 2048)), None, "P-256"),
            ("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----", None, "damaged"),
            ("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END EC PRIVATE KEY-----", None, "no private key"),
            ("-----BEGIN PUBLIC KEY-----\nc2VjcmV0\n-----END PUBLIC KEY-----", None, "no private key"),
            ("", None, "no private key"),
        ],
    )
    def test_refuses_with_one_clear_message(self, pem: str, password: str | None, told: str) -> None:
        body = [line for line in pem.splitlines() if line and not line.startswith("-")]
        assert told in refusal(lambda: Keyset.from_pem(pem, password=password), "swordfish", "hunter2", *body)


class TestFromEnvironment:
    @pytest.mark.parametrize(
        "text",
        [
            json.dumps(KNOWN),
            json.dumps({"keys": [KNOWN]}),
            pem_of(load_private_key(KNOWN)),
            pem_of(load_private_key(KNOWN)).replace("\n", "\\n"),
        ],
    )
    def test_reads_every_form(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLIENT_KEYS", text)
        assert list(Keyset.from_env("CLIENT_KEYS")) == [thumbprint(KNOWN)]

    def test_is_read_when_called(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for jwk in (KNOWN, OTHER):
            monkeypatch.setenv("CLIENT_KEYS", json.dumps(jwk))
            assert Keyset.from_env("CLIENT_KEYS").first == thumbprint(jwk)

    @pytest.mark.parametrize("text", [None, "", " \n", "{}", "secret-d", '{"keys": []}', "-----BEGIN secret-d"])
    def test_names_the_variable_and_shows_nothing_of_it(
        self, text: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if text is None:
            monkeypatch.delenv("CLIENT_KEYS", raising=False)
        else:
            monkeypatch.setenv("CLIENT_KEYS", text)
        assert "environment variable CLIENT_KEYS" in refusal(lambda: Keyset.from_env("CLIENT_KEYS"), "secret-d")


class TestFromFiles:
    def test_reads_every_form_in_order(self, tmp_path: Path) -> None:
        third = generate_jwk()
        (tmp_path / "a.pem").write_text(pem_of(load_private_key(OTHER)))
        (tmp_path / "b.json").write_text(json.dumps({"keys": [{**KNOWN, "kid": "b"}]}))
        (tmp_path / "c.json").write_text(json.dumps(third))
        keys = Keyset.from_files(tmp_path / "a.pem", str(tmp_path / "b.json"), tmp_path / "c.json")
        assert list(keys) == [thumbprint(OTHER), "b", thumbprint(third)]

    @pytest.mark.parametrize(
        "content",
        [b"", b"secret-d", b"\xff\x00", b'{"kty": "secret-d"}', b'{"keys": [{"kty": "EC"}]}', b'{"keys": []}'],
    )
    def test_names_the_file_and_shows_nothing_of_it(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "good.json").write_text(json.dumps(KNOWN))
        (tmp_path / "bad.json").write_bytes(content)
        message = refusal(lambda: Keyset.from_files(tmp_path / "good.json", tmp_path / "bad.json"), "secret-d")
        assert "bad.json" in message
        assert "good.json" not in message

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        assert "(FileNotFoundError)" in refusal(lambda: Keyset.from_files(tmp_path / "missing"))
        assert "(IsADirectoryError)" in refusal(lambda: Keyset.from_files(tmp_path))
        refusal(lambda: Keyset.from_files("a\0b"))

    def test_no_files_are_no_keys(self) -> None:
        assert "at least one key" in refusal(Keyset.from_files)

    def test_the_same_key_in_two_files(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).write_text(json.dumps(KNOWN))
        assert "kid" in refusal(lambda: Keyset.from_files(tmp_path / "a", tmp_path / "b"))


def test_a_keyset_takes_no_key_of_another_algorithm() -> None:
    numbers = ec.generate_private_key(ec.SECP256K1()).private_numbers()
    members = {"x": numbers.public_numbers.x, "y": numbers.public_numbers.y, "d": numbers.private_value}
    key = {
        name: base64.urlsafe_b64encode(value.to_bytes(32, "big")).rstrip(b"=").decode()
        for name, value in members.items()
    }
    with pytest.raises(ClientMetadataError, match="crv is not P-256"):
        Keyset([{"kty": "EC", "crv": "secp256k1", **key}])


def test_keys_of_a_setting() -> None:
    pem = pem_of(load_private_key(KNOWN))
    texts: list[Any] = [pem, pem.encode(), pem.replace("\n", "\\n"), [pem], iter([pem])]
    for setting in texts:
        assert list(Keyset.of(setting)) == list(Keyset.from_pem(pem))
    one, two = generate_jwk() | {"kid": "one"}, generate_jwk() | {"kid": "two"}
    jwks: list[Any] = [one, json.dumps(one), {"keys": [one]}, [one]]
    for setting in jwks:
        assert list(Keyset.of(setting)) == ["one"]
    assert list(Keyset.of([one, {"keys": [two]}, pem]))[:2] == ["one", "two"]
    wrong: list[Any] = [5, None, [5], [], "", {}, [{"keys": 5}], "secret-d", [{"d": "secret-d"}]]
    for setting in wrong:
        refusal(lambda setting=setting: Keyset.of(setting), "secret-d")  # type: ignore[misc]


# Signatures


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP256K1()], ids=lambda curve: curve.name)
def test_what_is_signed_is_a_jws(curve: ec.EllipticCurve) -> None:
    """As another library reads it, also where a number of the signature is short."""
    key = ec.generate_private_key(curve)
    algorithm = {"secp256r1": "ES256", "secp256k1": "ES256K"}[curve.name]
    for number in range(300):
        header, claims = {"typ": "JWT", "alg": algorithm}, {"number": number, "text": "\u00e9"}
        signed = sign(key, encoded(header), claims)
        assert jwt.decode(signed, key.public_key(), algorithms=[algorithm]) == claims
        assert jwt.get_unverified_header(signed) == header
