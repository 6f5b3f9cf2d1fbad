from collections.abc import Collection
from dataclasses import dataclass

import jwt
import pytest

from atproto_session.client_auth import authentication_params, negotiate, resolve_stored
from atproto_session.errors import AuthMethodUnsatisfiableError
from atproto_session.keys import Keyset, generate_jwk
from atproto_session.metadata import ClientMetadata
from atproto_session.session import ClientAuthMethod

ISSUER = "https://auth.example.com"
NEW, OLD = generate_jwk() | {"kid": "new"}, generate_jwk() | {"kid": "old"}
KEYS = Keyset([NEW, OLD])
PUBLIC = ClientMetadata.loopback()
CONFIDENTIAL = ClientMetadata(
    client_id="https://app.example.com/client-metadata.json",
    redirect_uris=["https://app.example.com/callback"],
    token_endpoint_auth_method="private_key_jwt",
)
NONE = ClientAuthMethod("none")


def with_key(kid: str | None) -> ClientAuthMethod:
    return ClientAuthMethod("private_key_jwt", kid)


@dataclass(frozen=True)
class Server:
    issuer: str = ISSUER
    token_endpoint_auth_methods_supported: Collection[str] = ("none", "private_key_jwt")
    token_endpoint_auth_signing_alg_values_supported: Collection[str] = ("RS256", "ES256")


ONLY_NONE = Server(token_endpoint_auth_methods_supported=["none"])
ONLY_KEYS = Server(token_endpoint_auth_methods_supported=["private_key_jwt"])
NO_ES256 = Server(token_endpoint_auth_signing_alg_values_supported=["RS256"])


class TestNegotiate:
    @pytest.mark.duty(20)
    def test_a_public_client_does_not_authenticate(self) -> None:
        assert negotiate(PUBLIC, None, Server()) == NONE
        assert negotiate(PUBLIC, None, NO_ES256) == NONE

    @pytest.mark.duty(20, 30)
    def test_a_confidential_client_signs_with_its_first_key(self) -> None:
        assert negotiate(CONFIDENTIAL, KEYS, Server()) == with_key("new")

    @pytest.mark.parametrize(
        ("metadata", "keyset", "server", "told"),
        [
            (CONFIDENTIAL, None, Server(), "no keyset"),
            (CONFIDENTIAL, KEYS, ONLY_NONE, "private_key_jwt"),
            (CONFIDENTIAL, KEYS, NO_ES256, "ES256"),
            (PUBLIC, None, ONLY_KEYS, "none"),
        ],
    )
    def test_says_what_is_not_possible(
        self, metadata: ClientMetadata, keyset: Keyset | None, server: Server, told: str
    ) -> None:
        with pytest.raises(AuthMethodUnsatisfiableError, match=told) as raised:
            negotiate(metadata, keyset, server)
        assert not raised.value.login_required


class TestResolveStored:
    @pytest.mark.duty(30)
    @pytest.mark.parametrize("kid", ["new", "old"])
    def test_a_session_keeps_its_key(self, kid: str) -> None:
        assert resolve_stored(with_key(kid), CONFIDENTIAL, KEYS, Server()) == with_key(kid)

    def test_a_public_session_stays_public(self) -> None:
        assert resolve_stored(NONE, PUBLIC, None, Server()) == NONE

    @pytest.mark.duty(30)
    def test_an_old_document_means_the_first_key_or_none(self) -> None:
        assert resolve_stored(None, CONFIDENTIAL, KEYS, Server()) == with_key("new")
        assert resolve_stored(None, PUBLIC, None, Server()) == NONE

    @pytest.mark.duty(30)
    def test_a_key_that_is_gone_is_named(self) -> None:
        for keyset in (Keyset([NEW]), None):
            with pytest.raises(AuthMethodUnsatisfiableError, match=r"client key old, .*put the key back") as raised:
                resolve_stored(with_key("old"), CONFIDENTIAL, keyset, Server())
            assert not raised.value.login_required

    def test_a_foreign_kid_is_cut_short(self) -> None:
        with pytest.raises(AuthMethodUnsatisfiableError) as raised:
            resolve_stored(with_key("\x1b" + "k" * 10_000), CONFIDENTIAL, KEYS, Server())
        assert "\x1b" not in str(raised.value)
        assert len(str(raised.value)) < 400

    @pytest.mark.parametrize(
        ("method", "metadata", "keyset"),
        [
            (NONE, CONFIDENTIAL, KEYS),
            (with_key("new"), PUBLIC, None),
            (with_key("new"), PUBLIC, KEYS),
            (None, PUBLIC, KEYS),
            (None, CONFIDENTIAL, None),
        ],
    )
    def test_a_client_that_changed_its_type_keeps_the_session(
        self, method: ClientAuthMethod | None, metadata: ClientMetadata, keyset: Keyset | None
    ) -> None:
        with pytest.raises(AuthMethodUnsatisfiableError, match="client metadata now says") as raised:
            resolve_stored(method, metadata, keyset, Server())
        assert not raised.value.login_required

    @pytest.mark.parametrize("server", [ONLY_NONE, NO_ES256])
    def test_a_server_that_dropped_the_method(self, server: Server) -> None:
        with pytest.raises(AuthMethodUnsatisfiableError, match="does not support"):
            resolve_stored(with_key("new"), CONFIDENTIAL, KEYS, server)
        with pytest.raises(AuthMethodUnsatisfiableError, match="does not support"):
            resolve_stored(NONE, PUBLIC, None, ONLY_KEYS)


class TestAuthenticationParams:
    def test_a_public_client_only_names_itself(self) -> None:
        assert authentication_params(NONE, PUBLIC, None, ISSUER) == {"client_id": PUBLIC.client_id}

    @pytest.mark.duty(29)
    @pytest.mark.parametrize(("kid", "number"), [("new", 0), ("old", 1)])
    def test_the_assertion(self, kid: str, number: int) -> None:
        params = authentication_params(with_key(kid), CONFIDENTIAL, KEYS, ISSUER, clock=lambda: 1_800_000_000.9)
        assertion = params.pop("client_assertion")
        assert params == {
            "client_id": CONFIDENTIAL.client_id,
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        }
        header = jwt.get_unverified_header(assertion)
        assert (header["alg"], header["kid"]) == ("ES256", kid)
        public = jwt.PyJWK(KEYS.jwks()["keys"][number])
        claims = jwt.decode(
            assertion, public, algorithms=["ES256"], audience=ISSUER, options={"verify_exp": False, "verify_iat": False}
        )
        assert isinstance(claims.pop("jti"), str)
        # Backdated for a clock that is ahead; the server accepts assertions of up to a minute.
        assert claims == {
            "iss": CONFIDENTIAL.client_id,
            "sub": CONFIDENTIAL.client_id,
            "aud": ISSUER,
            "iat": 1_799_999_995,
            "exp": 1_800_000_060,
        }

    @pytest.mark.duty(29)
    def test_every_assertion_is_new(self) -> None:
        jtis = set()
        for _ in range(20):
            params = authentication_params(with_key("new"), CONFIDENTIAL, KEYS, ISSUER, clock=lambda: 1_800_000_000)
            claims = jwt.decode(params["client_assertion"], options={"verify_signature": False})
            assert len(claims["jti"]) >= 20
            jtis.add(claims["jti"])
        assert len(jtis) == 20

    def test_takes_the_time_of_now(self) -> None:
        params = authentication_params(with_key("new"), CONFIDENTIAL, KEYS, ISSUER)
        public = jwt.PyJWK(KEYS.jwks()["keys"][0])
        # PyJWT checks exp and iat against the real clock.
        jwt.decode(params["client_assertion"], public, algorithms=["ES256"], audience=ISSUER)

    @pytest.mark.parametrize(
        ("method", "keyset"), [(with_key("gone"), KEYS), (with_key(None), KEYS), (with_key("new"), None)]
    )
    def test_needs_the_key(self, method: ClientAuthMethod, keyset: Keyset | None) -> None:
        with pytest.raises(AuthMethodUnsatisfiableError, match="not in the keyset"):
            authentication_params(method, CONFIDENTIAL, keyset, ISSUER)
