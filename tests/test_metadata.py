import copy
import dataclasses
import json
import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atproto_session.errors import ClientMetadataError
from atproto_session.keys import Keyset
from atproto_session.metadata import ClientMetadata, is_subset, parse_scope

CLIENT_ID = "https://app.example.com/oauth/client-metadata.json"
CALLBACK = "https://app.example.com/callback"
KEYS = Keyset.generate(2)

# On a busy machine the first text that is drawn can take seconds.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def client(**members: Any) -> ClientMetadata:
    return ClientMetadata(**{"client_id": CLIENT_ID, "redirect_uris": [CALLBACK], **members})


def native(**members: Any) -> ClientMetadata:
    return client(**{"application_type": "native", **members})


def confidential(**members: Any) -> ClientMetadata:
    return client(**{"token_endpoint_auth_method": "private_key_jwt", **members})


def refusal(field: str | None, make: Callable[[], object]) -> str:
    with pytest.raises(ClientMetadataError) as raised:
        make()
    assert raised.value.field == field
    return str(raised.value)


class TestScope:
    @pytest.mark.duty(44)
    def test_keeps_the_order_and_every_scope_once(self) -> None:
        assert parse_scope("b atproto b a") == ("b", "atproto", "a")
        assert parse_scope("repo:app.bsky.feed.post?action=create") == ("repo:app.bsky.feed.post?action=create",)

    @pytest.mark.parametrize(
        "text", ["", " ", "a  b", " a", "a ", "a\n", "a\tb", 'a"', "a\\b", "\u00e4", "a\x7f", None, 1]
    )
    def test_refuses_what_is_no_scope(self, text: Any) -> None:
        with pytest.raises(ValueError, match="scope"):
            parse_scope(text)

    @pytest.mark.duty(32)
    def test_subsets_ignore_the_order(self) -> None:
        assert is_subset("b a", of="a b c")
        assert is_subset("a a", of="a")
        assert not is_subset("a d", of="a b c")
        assert not is_subset("a", of="ab")

    @patient
    @given(st.text(alphabet=st.characters(codec="ascii")))
    def test_every_text_is_a_list_of_scopes_or_a_value_error(self, text: str) -> None:
        with suppress(ValueError):
            assert set(parse_scope(text)) == set(text.split(" "))


class TestClientId:
    @pytest.mark.duty(18)
    @pytest.mark.parametrize(
        "client_id",
        [
            CLIENT_ID,
            "https://example.com/a",
            "https://example.com/a?b=c",
            "https://xn--bcher-kva.example.com/.well-known/client.json",
            "https://a.b.c.d.com/...",
        ],
    )
    def test_is_an_https_url(self, client_id: str) -> None:
        assert client(client_id=client_id).client_id == client_id

    @pytest.mark.duty(18)
    @pytest.mark.parametrize(
        ("client_id", "told"),
        [
            ("ftp://app.example.com/client.json", "https"),
            ("app.example.com/client.json", "use https"),
            ("HTTPS://app.example.com/client.json", "lower case"),
            ("https://app.example.com/a b", "not a URL"),
            ("https://app.example.com/a\n", "not a URL"),
            ("https://app.example.com\\@evil.com/a", "not a URL"),
            ("https://b\u00fccher.com/a", "not a URL"),
            ("https://app.example.com/%zz", "not a URL"),
            ("https://[::1/a", "not a URL"),
            ("https://app.example.com:99999/a", "not a URL"),
            ("https://app.example.com:443/client.json", "port"),
            ("https://app.example.com:8443/client.json", "port"),
            ("https://app.example.com:/client.json", "not a URL"),
            ("https://app.example.com/client.json#", "fragment"),
            ("https://app.example.com/client.json#a", "fragment"),
            ("https://user@app.example.com/client.json", "user name"),
            ("https://@app.example.com/client.json", "user name"),
            ("https://app.example.com", "path"),
            ("https://app.example.com/", "path"),
            ("https://app.example.com//", "path"),
            ("https://app.example.com/client/", "path"),
            ("https://app.example.com?a", "path"),
            ("https://app.example.com/a/../b", "dot segments"),
            ("https://app.example.com/./b", "dot segments"),
            ("https://app.example.com/a/%2E%2e/b", "dot segments"),
            ("https://app.example.com/a/.%2e", "dot segments"),
            ("https://App.example.com/a", "lower case"),
            ("https://192.0.2.1/a", "full name"),
            ("https://[2001:db8::1]/a", "full name"),
            ("https://0x7f.1/a", "full name"),
            ("https://intranet/a", "full name"),
            ("https://localhost/a", "full name"),
            ("https://app.localhost/a", "reserved"),
            ("https://printer.local/a", "reserved"),
            ("https://app.test/a", "reserved"),
            ("https://app.example/a", "reserved"),
            ("https://app.example.com./a", "full name"),
            ("https://-app.example.com/a", "full name"),
            ("https://a..com/a", "full name"),
            ("https:///a", "not a URL"),
            ("https:a", "not a URL"),
            ("", "not a URL"),
            (None, "not a string"),
            (b"https://app.example.com/a", "not a string"),
        ],
    )
    def test_and_nothing_else(self, client_id: Any, told: str) -> None:
        assert told in refusal("client_id", lambda: client(client_id=client_id))

    def test_no_message_shows_a_password(self) -> None:
        for url in (
            "https://u:hunter2@example.com/a",
            "https://u:hunter2@example.com:x/a",
            "https://u:hunter2@e.com/ ",
        ):
            assert "hunter2" not in refusal("client_id", partial(client, client_id=url))
            assert "hunter2" not in refusal("redirect_uris", partial(client, redirect_uris=[url]))
            assert "hunter2" not in refusal("redirect_uri", partial(client().check_redirect_uri, url))


class TestGrantAndScope:
    @pytest.mark.duty(1, 19)
    def test_defaults(self) -> None:
        metadata = client()
        assert metadata.application_type == "web"
        assert metadata.scope == "atproto"
        assert metadata.grant_types == ("authorization_code", "refresh_token")
        assert metadata.response_types == ("code",)
        assert metadata.dpop_bound_access_tokens is True
        assert metadata.redirect_uris == (CALLBACK,)

    @pytest.mark.duty(1, 19)
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("application_type", "browser"),
            ("application_type", None),
            ("grant_types", []),
            ("grant_types", ["refresh_token"]),
            ("grant_types", ["authorization_code", "authorization_code"]),
            ("grant_types", ["authorization_code", "refresh_token", "implicit"]),
            ("grant_types", ["authorization_code", "refresh_token", "refresh_token"]),
            ("grant_types", "authorization_code"),
            ("response_types", ["token"]),
            ("response_types", ["code", "nonsense"]),
            ("response_types", []),
            ("response_types", [["code"]]),
            ("dpop_bound_access_tokens", False),
            ("dpop_bound_access_tokens", 1),
            ("dpop_bound_access_tokens", None),
            ("redirect_uris", []),
            ("redirect_uris", CALLBACK),
            ("redirect_uris", None),
            ("redirect_uris", [None]),
            ("client_name", 5),
            ("scope", "transition:generic"),
            ("scope", "atproto  transition:generic"),
            ("scope", ""),
            ("scope", None),
            ("scope", ["atproto"]),
            ("scope", "atproto a atproto"),
        ],
    )
    def test_refuses_others(self, field: str, value: object) -> None:
        refusal(field, lambda: client(**{field: value}))

    def test_what_the_specification_leaves_free(self) -> None:
        assert client(grant_types=["authorization_code"]).document()["grant_types"] == ["authorization_code"]
        assert client(response_types=["code", "code id_token"]).document()["response_types"][1] == "code id_token"

    def test_grant_types_in_any_order(self) -> None:
        assert client(grant_types=["refresh_token", "authorization_code"]).grant_types[0] == "refresh_token"

    @pytest.mark.duty(44)
    def test_scopes(self) -> None:
        scope = "atproto transition:generic transition:chat.bsky transition:email"
        assert client(scope=scope).scope == scope
        assert client(scope="atproto x:y? include:com.example.perms?aud=did:web:a.com%23b").scope
        assert "twice" in refusal("scope", lambda: client(scope="atproto a atproto"))
        assert "transition:generic" in refusal("scope", lambda: client(scope="atproto transition:chat.bsky"))

    @pytest.mark.duty(19, 23, 44)
    def test_a_login_asks_for_a_subset(self) -> None:
        metadata = client(scope="atproto transition:generic transition:chat.bsky")
        assert metadata.check_scope("transition:generic atproto atproto") == "transition:generic atproto"
        assert "transition:email" in refusal("scope", lambda: metadata.check_scope("atproto transition:email"))
        assert "atproto" in refusal("scope", lambda: metadata.check_scope("transition:generic"))
        assert metadata.check_scope("atproto transition:chat.bsky"), "it is registered, and the server decides"
        refusal("scope", lambda: metadata.check_scope(""))
        assert len(refusal("scope", lambda: metadata.check_scope("atproto " + "x" * 9999))) < 300

    @pytest.mark.duty(23, 44)
    def test_a_login_may_ask_for_less_than_a_scope_that_is_registered(self) -> None:
        metadata = client(scope="atproto repo:com.example.event blob:image/* account:email?action=manage")
        for narrower in ("repo:com.example.event?action=create", "blob:image/png", "account:email"):
            assert metadata.check_scope(f"atproto {narrower}") == f"atproto {narrower}"
        for other in ("repo:com.example.day", "repo:*", "blob:*/*", "account:status", "transition:email"):
            assert "not among" in refusal("scope", lambda other=other: metadata.check_scope(f"atproto {other}"))  # type: ignore[misc]


class TestRedirectUris:
    @pytest.mark.duty(21)
    @pytest.mark.parametrize(
        "uri",
        [
            CALLBACK,
            "https://other.example.org/cb?x=1",
            "https://app.example.com:8443/cb",
            "https://App.Example.com/",
            "https://my_app.example.com/cb",
            "https://_a.example.com/cb_1",
        ],
    )
    def test_of_a_web_client(self, uri: str) -> None:
        assert client(redirect_uris=[uri]).redirect_uris == (uri,)

    @pytest.mark.duty(21)
    @pytest.mark.parametrize(
        ("uri", "told"),
        [
            ("http://app.example.com/cb", "127.0.0.1"),
            ("http://127.0.0.1/cb", "only a native one"),
            ("http://localhost/cb", "for localhost"),
            ("https://localhost/cb", "full name"),
            ("https://127.0.0.1/cb", "full name"),
            ("https://app.example.com:443/cb", "port"),
            ("https://app.example.com:0443/cb", "port"),
            ("https://app.example.com:/cb", "not a URL"),
            ("https://app.example.com/cb#x", "fragment"),
            ("https://u:p@app.example.com/cb", "user name"),
            ("com.example.app:/cb", "web client"),
            ("javascript:alert(1)", "web client"),
            ("HTTPS://app.example.com/cb", "web client"),
            ("https://a b_c.example.com/cb", "not a URL"),
            ("https://app.test/cb", "reserved"),
            ("/cb", "web client"),
        ],
    )
    def test_others_of_a_web_client(self, uri: str, told: str) -> None:
        assert told in refusal("redirect_uris", lambda: client(redirect_uris=[CALLBACK, uri]))

    @pytest.mark.duty(21)
    @pytest.mark.parametrize(
        "uri",
        [
            "com.example.app:/callback",
            "com.example.app:/",
            CALLBACK,
            "http://127.0.0.1/cb",
            "http://127.0.0.1:8080/cb",
            "http://[::1]:8080/cb?a=b",
        ],
    )
    def test_of_a_native_client(self, uri: str) -> None:
        assert native(redirect_uris=[uri]).redirect_uris == (uri,)

    @pytest.mark.duty(21)
    @pytest.mark.parametrize(
        ("uri", "told"),
        [
            ("com.example.app://callback", "com.example.app:/callback"),
            ("com.example.app:callback", "com.example.app:/callback"),
            ("com.example.app:", "com.example.app:/callback"),
            ("com.example:/callback", "com.example.app:/"),
            ("com.example.apps:/callback", "com.example.app:/"),
            ("comXexampleXapp:/callback", "com.example.app:/"),
            ("com.example.app:/a b", "com.example.app:/"),
            ("com.example.app:/a#b", "com.example.app:/"),
            ("com.example.app:/a\n", "com.example.app:/"),
            ("app.example.com:/callback", "com.example.app:/"),
            ("myapp:/callback", "com.example.app:/"),
            ("https://example.com/cb", "origin"),
            ("https://app.example.com:8443/cb", "origin"),
            ("http://app.example.com/cb", "127.0.0.1"),
            ("http://localhost:8080/cb", "RFC 8252"),
            ("http://127.0.0.2/cb", "127.0.0.1"),
            ("http://127.1/cb", "127.0.0.1"),
            ("http://127.0.0.1.example.com/cb", "127.0.0.1"),
            ("http://127.0.0.1:/cb", "127.0.0.1"),
            ("http://u@127.0.0.1/cb", "user name"),
        ],
    )
    def test_others_of_a_native_client(self, uri: str, told: str) -> None:
        assert told in refusal("redirect_uris", lambda: native(redirect_uris=[uri]))

    @pytest.mark.duty(23)
    def test_a_login_returns_to_a_registered_one(self) -> None:
        metadata = client(redirect_uris=[CALLBACK, CALLBACK + "?a=b"])
        assert metadata.check_redirect_uri(CALLBACK + "?a=b") == CALLBACK + "?a=b"
        for uri in (CALLBACK + "/", CALLBACK + "?", CALLBACK + "?a=c", "https://app.example.com:8443/callback", "x:y"):
            assert CALLBACK in refusal("redirect_uri", partial(metadata.check_redirect_uri, uri))
        broken: Any
        for broken in ("", None, "a b"):
            refusal("redirect_uri", partial(metadata.check_redirect_uri, broken))

    @pytest.mark.duty(22)
    @pytest.mark.parametrize(
        ("registered", "asked", "matches"),
        [
            ("http://127.0.0.1/", "http://127.0.0.1:8080/", True),
            ("http://127.0.0.1/", "http://127.0.0.1", True),
            ("http://127.0.0.1", "http://127.0.0.1:1/", True),
            ("http://[::1]/cb", "http://[::1]:8080/cb", True),
            ("http://127.0.0.1/cb?a=b", "http://127.0.0.1:80/cb?a=b", True),
            ("http://127.0.0.1:8080/cb", "http://127.0.0.1:8080/cb", True),
            ("http://127.0.0.1:8080/cb", "http://127.0.0.1:8081/cb", False),
            ("http://127.0.0.1:8080/cb", "http://127.0.0.1/cb", False),
            ("http://127.0.0.1/", "http://127.0.0.1:8080/cb", False),
            ("http://127.0.0.1/cb", "http://127.0.0.1:8080/cb/", False),
            ("http://127.0.0.1/cb", "http://127.0.0.1:8080/cb?a=b", False),
            ("http://127.0.0.1/cb", "http://127.0.0.1:8080/cb#", False),
            ("http://127.0.0.1/cb", "http://u@127.0.0.1:8080/cb", False),
            ("http://127.0.0.1/cb", "http://[::1]:8080/cb", False),
            ("http://127.0.0.1/cb", "http://localhost:8080/cb", False),
            ("http://127.0.0.1/cb", "https://127.0.0.1:8080/cb", False),
            ("http://127.0.0.1/cb", "http://127.0.0.1:123456/cb", False),
            ("http://127.0.0.1/cb", "HTTP://127.0.0.1:8080/cb", False),
        ],
    )
    def test_loopback_ports_are_free_where_none_is_registered(self, registered: str, asked: str, matches: bool) -> None:
        for metadata in (ClientMetadata.loopback(redirect_uris=[registered]), native(redirect_uris=[registered])):
            if matches:
                assert metadata.check_redirect_uri(asked) == asked
            else:
                refusal("redirect_uri", partial(metadata.check_redirect_uri, asked))


class TestPages:
    @pytest.mark.parametrize(
        "uri",
        [
            "https://app.example.com",
            "https://app.example.com/",
            "https://app.example.com/oauth",
            "https://app.example.com/oauth/",
            "https://APP.example.com/",
            "https://app.example.com/#about",
            CLIENT_ID,
        ],
    )
    def test_client_uri_is_a_parent_of_client_id(self, uri: str) -> None:
        assert client(client_uri=uri).client_uri == uri

    @pytest.mark.parametrize(
        ("uri", "told"),
        [
            ("https://example.com/", "origin"),
            ("https://app.example.com:8443/", "origin"),
            ("https://app.example.com/oau", "parent"),
            ("https://app.example.com/about", "parent"),
            ("http://app.example.com/", "https"),
            ("HTTPS://app.example.com/", "lower case"),
            ("https://app.test/", "reserved"),
            ("https://app.example.com/#a#b", "fragment"),
        ],
    )
    def test_and_nothing_else(self, uri: str, told: str) -> None:
        assert told in refusal("client_uri", lambda: client(client_uri=uri))

    @pytest.mark.parametrize("field", ["logo_uri", "tos_uri", "policy_uri"])
    def test_other_pages_are_https(self, field: str) -> None:
        for good in (
            "https://cdn.example.net:8443/x.png",
            "https://app.test/logo.png",
            "https://example.com/terms?a=b#privacy",
            "https://my_cdn.example.com/x",
        ):
            assert client(**{field: good}).document()[field] == good
        for value in (
            "https://printer.local/x",
            "HTTPS://example.com/",
            "HTTP://example.com/",
            "http://cdn.example.net/x.png",
            "data:,x",
            "https://localhost/x",
            "javascript:x()",
            "x",
            "",
            5,
        ):
            refusal(field, partial(client, **{field: value}))


class TestAuthentication:
    @pytest.mark.duty(20)
    def test_public(self) -> None:
        metadata = client()
        assert (metadata.token_endpoint_auth_method, metadata.is_confidential) == ("none", False)
        assert metadata.token_endpoint_auth_signing_alg is None
        metadata.check_with_keyset(None)
        assert "private_key_jwt" in refusal("keyset", lambda: metadata.check_with_keyset(KEYS))
        refusal("keyset", lambda: metadata.document(KEYS))

    @pytest.mark.duty(1, 20)
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("token_endpoint_auth_signing_alg", "ES256"),
            ("token_endpoint_auth_method", "client_secret_basic"),
            ("token_endpoint_auth_method", None),
            ("token_endpoint_auth_method", ["none"]),
        ],
    )
    def test_public_has_no_keys_and_no_secret(self, field: str, value: object) -> None:
        refusal(field, lambda: client(**{field: value}))

    def test_public_may_publish_keys(self) -> None:
        assert client(jwks=KEYS.jwks()).document()["jwks"] == KEYS.jwks()
        assert client(jwks_uri="https://app.example.com/jwks.json").document()["jwks_uri"]
        refusal("jwks", lambda: client(jwks=KEYS.jwks(), jwks_uri="https://app.example.com/jwks.json"))

    @pytest.mark.duty(20)
    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"key_ops": ["sign"]}, "key_ops"),
            ({"key_ops": ["sign", "verify"]}, "key_ops"),
            ({"key_ops": ["verify", "verify"]}, "key_ops"),
            ({"key_ops": []}, "key_ops"),
            ({"key_ops": None}, "key_ops"),
            ({"alg": "RS256"}, "alg"),
            ({"alg": "ES384"}, "alg"),
            ({"alg": None}, "alg"),
            ({"use": "enc"}, "use"),
            ({"use": None}, "use"),
            ({"kty": "RSA"}, "kty"),
            ({"kty": "oct"}, "kty"),
            ({"kty": ["EC"]}, "kty"),
            ({"crv": "P-384"}, "alg"),
            ({"crv": {}}, "kty"),
            ({"x": ""}, "x or y"),
            ({"y": 7}, "x or y"),
        ],
    )
    def test_keys_that_servers_do_not_take(self, changes: dict[str, Any], told: str) -> None:
        first, second = KEYS.jwks()["keys"]
        jwks = {"keys": [first, second | {"alg": "ES256"} | changes]}
        for make in (client, confidential):
            assert told in refusal("jwks", partial(make, jwks=jwks))

    @pytest.mark.parametrize(
        "key",
        [
            KEYS.jwks()["keys"][0] | {"use": "sig", "key_ops": ["verify"]},
            {"kty": "RSA", "kid": "a", "n": "AQAB", "e": "AQAB", "alg": "PS256"},
            {"kty": "OKP", "kid": "a", "crv": "Ed25519", "x": "AQAB"},
        ],
    )
    def test_keys_that_servers_take(self, key: dict[str, Any]) -> None:
        assert confidential(jwks={"keys": [key]}).document()["jwks"] == {"keys": [key]}

    @pytest.mark.duty(20)
    def test_confidential(self) -> None:
        metadata = confidential()
        assert metadata.is_confidential
        assert metadata.token_endpoint_auth_signing_alg == "ES256"
        metadata.check_with_keyset(KEYS)
        refusal("keyset", lambda: metadata.check_with_keyset(None))
        assert confidential(jwks_uri="https://keys.example.com/jwks").document(KEYS).get("jwks") is None

    @pytest.mark.duty(20)
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("token_endpoint_auth_signing_alg", "none"),
            ("token_endpoint_auth_signing_alg", "RS256"),
            ("jwks_uri", "http://app.example.com/jwks.json"),
            ("jwks_uri", "https://u:p@app.example.com/jwks.json"),
            ("jwks", []),
            ("jwks", {}),
            ("jwks", {"keys": []}),
            ("jwks", {"keys": {}}),
            ("jwks", {"keys": ["a"]}),
            ("jwks", {"keys": [{"kty": "EC"}]}),
            ("jwks", {"keys": [{"kid": ""}]}),
            ("jwks", {"keys": [{"kid": 1}]}),
            ("jwks", {"keys": [{"kid": "a"}, {"kid": "a"}]}),
        ],
    )
    def test_confidential_publishes_usable_keys(self, field: str, value: object) -> None:
        refusal(field, lambda: confidential(**{field: value}))

    @pytest.mark.duty(20)
    @pytest.mark.parametrize("member", ["d", "p", "q", "dp", "dq", "qi", "oth", "k"])
    def test_never_publishes_a_private_part(self, member: str) -> None:
        jwks = {"keys": [KEYS.jwks()["keys"][0] | {member: "hunter2"}]}
        message = refusal("jwks", lambda: confidential(jwks=jwks))
        assert "private" in message
        assert "hunter2" not in message

    @pytest.mark.duty(20)
    def test_has_its_keys_in_one_place(self) -> None:
        refusal("jwks", lambda: confidential(jwks=KEYS.jwks(), jwks_uri="https://app.example.com/jwks.json"))

    @pytest.mark.duty(20)
    def test_publishes_every_key_that_it_signs_with(self) -> None:
        confidential(jwks=KEYS.jwks()).check_with_keyset(KEYS)
        first, second = KEYS.jwks()["keys"]
        incomplete = confidential(jwks={"keys": [first]})
        assert second["kid"] in refusal("jwks", lambda: incomplete.check_with_keyset(KEYS))
        other = confidential(jwks={"keys": [first, second | {"x": first["x"]}]})
        assert second["kid"] in refusal("jwks", lambda: other.document(KEYS))

    @pytest.mark.duty(20)
    def test_native_is_public(self) -> None:
        refusal("token_endpoint_auth_method", lambda: native(token_endpoint_auth_method="private_key_jwt"))


class TestDocument:
    @pytest.mark.duty(18, 19, 20)
    def test_of_a_public_client(self) -> None:
        assert client(client_name="App", scope="atproto transition:generic").document() == {
            "client_id": CLIENT_ID,
            "redirect_uris": [CALLBACK],
            "scope": "atproto transition:generic",
            "application_type": "web",
            "client_name": "App",
            "token_endpoint_auth_method": "none",
            "grant_types": ["authorization_code", "refresh_token"],
            "response_types": ["code"],
            "dpop_bound_access_tokens": True,
        }

    @pytest.mark.duty(20)
    def test_of_a_confidential_client(self) -> None:
        document = confidential().document(KEYS)
        assert document["token_endpoint_auth_signing_alg"] == "ES256"
        assert document["jwks"] == KEYS.jwks()
        assert '"d"' not in json.dumps(document)
        refusal("jwks", confidential().document)

    def test_holds_the_jwks_it_was_given(self) -> None:
        jwks = copy.deepcopy(KEYS.jwks())
        metadata = confidential(jwks=jwks)
        jwks["keys"][0]["d"] = "secret"
        document = metadata.document()
        assert document["jwks"] == KEYS.jwks()
        document["jwks"]["keys"].clear()
        assert metadata.document(KEYS)["jwks"] == KEYS.jwks()

    @pytest.mark.parametrize(
        "metadata",
        [
            client(client_uri="https://app.example.com/"),
            native(redirect_uris=["com.example.app:/cb"]),
            confidential(jwks=KEYS.jwks()),
            confidential(jwks_uri="https://app.example.com/jwks.json"),
            ClientMetadata.loopback("atproto transition:generic", ["http://127.0.0.1:8000/cb"]),
        ],
    )
    def test_survives_the_way_through_json(self, metadata: ClientMetadata) -> None:
        document = json.loads(json.dumps(metadata.document()))
        again = ClientMetadata.from_document(document)
        assert again == metadata
        assert again.document() == document
        assert hash(again) == hash(metadata)
        assert pickle.loads(pickle.dumps(metadata)) == copy.deepcopy(metadata) == metadata

    def test_members_not_known_here_are_left_out(self) -> None:
        document = client().document() | {"contacts": ["a@example.com"], "x": None, "subject_type": "public"}
        assert ClientMetadata.from_document(document) == client()

    @pytest.mark.duty(18, 19, 20)
    @pytest.mark.parametrize(
        "member",
        [
            "client_id",
            "redirect_uris",
            "scope",
            "grant_types",
            "response_types",
            "token_endpoint_auth_method",
            "token_endpoint_auth_signing_alg",
            "jwks",
            "dpop_bound_access_tokens",
        ],
    )
    def test_a_member_that_servers_insist_on_is_missing(self, member: str) -> None:
        document = confidential(jwks=KEYS.jwks()).document()
        del document[member]
        refusal(member, lambda: ClientMetadata.from_document(document))

    @pytest.mark.parametrize(
        ("member", "value"),
        [
            ("client_name", None),
            ("logo_uri", None),
            ("scope", None),
            ("contacts", None),
            ("contacts", ["nobody"]),
            ("contacts", [1]),
            ("contacts", "a@example.com"),
            ("subject_type", "pairwise"),
            ("default_max_age", 60),
            ("id_token_signed_response_alg", "ES256"),
            ("require_auth_time", "true"),
            ("request_object_signing_alg", 1),
            ("tls_client_certificate_bound_access_tokens", True),
            ("authorization_details_types", ["a"]),
        ],
    )
    def test_members_that_servers_refuse(self, member: str, value: object) -> None:
        document = client().document() | {member: value}
        assert "authorization servers refuse" in refusal(member, lambda: ClientMetadata.from_document(document))

    @pytest.mark.parametrize("document", [None, [], "{}", 5])
    def test_is_an_object(self, document: Any) -> None:
        refusal(None, lambda: ClientMetadata.from_document(document))

    @patient
    @given(
        st.dictionaries(
            st.sampled_from([field.name for field in dataclasses.fields(ClientMetadata)]),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.text()
                | st.sampled_from([CLIENT_ID, CALLBACK, "http://"]),
                lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["keys", "kid", "d", "x"]), inner),
                max_leaves=8,
            ),
        )
    )
    @example({"client_id": "http://localhost?scope=%ff"})
    @example({"client_id": "http://localhost?redirect_uri=http://[::1"})
    @example({"jwks": {"keys": [{"kid": "\ud800", "x": []}]}, "token_endpoint_auth_method": "private_key_jwt"})
    def test_raises_nothing_but_client_metadata_error(self, members: Mapping[str, Any]) -> None:
        for document in (members, {**confidential().document(KEYS), **members}):
            with suppress(ClientMetadataError):
                metadata = ClientMetadata.from_document(document)
                metadata.check_with_keyset(KEYS)
                metadata.document(KEYS)


class TestDevelopmentClient:
    @pytest.mark.duty(22)
    def test_default(self) -> None:
        metadata = ClientMetadata.loopback()
        assert metadata.client_id == "http://localhost"
        assert metadata.redirect_uris == ("http://127.0.0.1/", "http://[::1]/")
        assert metadata.scope == "atproto"
        assert metadata.application_type == "native"
        assert metadata.is_loopback
        assert not metadata.is_confidential
        assert not client().is_loopback

    @pytest.mark.duty(22)
    def test_says_everything_in_its_client_id(self) -> None:
        scope = "atproto transition:generic repo:app.bsky.feed.post?action=create&action=delete"
        redirect_uris = ("http://127.0.0.1:8080/cb?a=b&c=d", "http://[::1]/cb")
        metadata = ClientMetadata.loopback(scope, redirect_uris)
        assert metadata.scope == scope
        assert metadata.redirect_uris == redirect_uris
        assert metadata.client_id.startswith("http://localhost?")
        assert parse_qsl(urlsplit(metadata.client_id).query) == [
            ("scope", scope),
            ("redirect_uri", redirect_uris[0]),
            ("redirect_uri", redirect_uris[1]),
        ]
        assert ClientMetadata(metadata.client_id) == metadata
        assert ClientMetadata.from_document({"client_id": metadata.client_id}) == metadata

    @pytest.mark.duty(22)
    def test_leaves_out_what_is_the_default(self) -> None:
        assert ClientMetadata.loopback("atproto").client_id == "http://localhost"
        refusal("scope", lambda: ClientMetadata.loopback("atproto atproto"))
        assert "redirect_uri" not in ClientMetadata.loopback("atproto a").client_id
        assert "scope" not in ClientMetadata.loopback(redirect_uris=["http://127.0.0.1/cb"]).client_id
        # As the other implementations have it, order and duplicates do not matter here.
        swapped = ClientMetadata.loopback(redirect_uris=["http://[::1]/", "http://127.0.0.1/", "http://[::1]/"])
        assert swapped.client_id == "http://localhost"

    @pytest.mark.duty(22)
    def test_is_written_as_other_implementations_write_it(self) -> None:
        """The values are of ``buildAtprotoLoopbackClientId`` of ``@atproto/oauth-types``."""
        uri = "http://127.0.0.1:80/a_b-c.d~e*f!g'(h)?i=j&k=%20l+m"
        assert ClientMetadata.loopback("atproto repo:*?action=create~", [uri, "http://[::1]/", uri]).client_id == (
            "http://localhost?scope=atproto+repo%3A*%3Faction%3Dcreate%7E"
            "&redirect_uri=http%3A%2F%2F127.0.0.1%3A80%2Fa_b-c.d%7Ee*f%21g%27%28h%29%3Fi%3Dj%26k%3D%2520l%2Bm"
            "&redirect_uri=http%3A%2F%2F%5B%3A%3A1%5D%2F"
            "&redirect_uri=http%3A%2F%2F127.0.0.1%3A80%2Fa_b-c.d%7Ee*f%21g%27%28h%29%3Fi%3Dj%26k%3D%2520l%2Bm"
        )

    @pytest.mark.duty(22)
    @pytest.mark.parametrize(
        ("client_id", "scope", "redirect_uris"),
        [
            ("http://localhost", "atproto", ("http://127.0.0.1/", "http://[::1]/")),
            ("http://localhost/", "atproto", ("http://127.0.0.1/", "http://[::1]/")),
            ("http://localhost?", "atproto", ("http://127.0.0.1/", "http://[::1]/")),
            ("http://localhost/?scope=atproto+a", "atproto a", ("http://127.0.0.1/", "http://[::1]/")),
            ("http://localhost?scope=atproto%20a", "atproto a", ("http://127.0.0.1/", "http://[::1]/")),
            ("http://localhost?redirect_uri=http://127.0.0.1/cb", "atproto", ("http://127.0.0.1/cb",)),
            (
                "http://localhost?redirect_uri=http%3A%2F%2F%5B%3A%3A1%5D%2F&redirect_uri=http://127.0.0.1:3/&scope=atproto",
                "atproto",
                ("http://[::1]/", "http://127.0.0.1:3/"),
            ),
        ],
    )
    def test_a_ready_client_id(self, client_id: str, scope: str, redirect_uris: tuple[str, ...]) -> None:
        metadata = ClientMetadata(client_id)
        assert (metadata.client_id, metadata.scope, metadata.redirect_uris) == (client_id, scope, redirect_uris)

    @pytest.mark.duty(22)
    @pytest.mark.parametrize(
        ("client_id", "field"),
        [
            ("http://localhost:3000", "client_id"),
            ("http://localhost/client.json", "client_id"),
            ("http://localhost//", "client_id"),
            ("http://localhost#", "client_id"),
            ("http://localhost?#", "client_id"),
            ("http://localhosts", "client_id"),
            ("http://127.0.0.1", "client_id"),
            ("http://127.0.0.1:3000/client.json", "client_id"),
            ("http://app.example.com/client.json", "client_id"),
            ("http://u@localhost", "client_id"),
            ("http://localhost?scope=atproto a", "client_id"),
            ("http://localhost?x=y", "client_id"),
            ("http://localhost?x", "client_id"),
            ("http://localhost?redirect_uris=http://127.0.0.1/", "client_id"),
            ("http://localhost?scope=atproto&scope=atproto", "client_id"),
            ("http://localhost?scope=atproto&scope=a", "client_id"),
            ("http://localhost?scope=atproto+atproto", "client_id"),
            ("http://localhost?scope=", "scope"),
            ("http://localhost?scope=a", "scope"),
            ("http://localhost?scope=atproto+transition:chat.bsky", "scope"),
            ("http://localhost?redirect_uri=", "redirect_uris"),
            ("http://localhost?redirect_uri=http://localhost/", "redirect_uris"),
            ("http://localhost?redirect_uri=http://localhost:3000/cb", "redirect_uris"),
            ("http://localhost?redirect_uri=http://10.0.0.1/", "redirect_uris"),
            ("http://localhost?redirect_uri=https://127.0.0.1/", "redirect_uris"),
            ("http://localhost?redirect_uri=https://app.example.com/", "redirect_uris"),
            ("http://localhost?redirect_uri=localhost:/cb", "redirect_uris"),
            ("http://localhost?redirect_uri=http://127.0.0.1/%23a", "redirect_uris"),
        ],
    )
    def test_a_broken_client_id(self, client_id: str, field: str) -> None:
        refusal(field, lambda: ClientMetadata(client_id))

    def test_a_port_in_the_client_id_is_told_where_it_belongs(self) -> None:
        assert "redirect_uris" in refusal("client_id", lambda: ClientMetadata("http://localhost:3000"))

    @pytest.mark.duty(22)
    def test_nothing_else_may_be_said_beside_the_client_id(self) -> None:
        ready = ClientMetadata.loopback("atproto a", ["http://127.0.0.1/a", "http://127.0.0.1/b"]).client_id
        same = ClientMetadata(ready, redirect_uris=["http://127.0.0.1/b", "http://127.0.0.1/a"], scope="a atproto")
        assert same == ClientMetadata(ready)
        refusal("scope", lambda: ClientMetadata(ready, scope="atproto b"))
        refusal("redirect_uris", lambda: ClientMetadata(ready, redirect_uris=["http://127.0.0.1/a"]))
        refusal("client_uri", lambda: ClientMetadata(ready, client_uri="https://app.example.com/"))

    @pytest.mark.duty(22)
    def test_is_always_public(self) -> None:
        method = "token_endpoint_auth_method"
        refusal(method, lambda: ClientMetadata("http://localhost", token_endpoint_auth_method="private_key_jwt"))
        told = refusal("keyset", lambda: ClientMetadata.loopback().check_with_keyset(KEYS))
        assert "a loopback client is public" in told

    @pytest.mark.duty(22)
    @pytest.mark.parametrize(
        ("field", "arguments"),
        [
            ("scope", {"scope": "a"}),
            ("scope", {"scope": "atproto\n"}),
            ("redirect_uris", {"redirect_uris": "http://127.0.0.1/"}),
            ("redirect_uris", {"redirect_uris": []}),
            ("redirect_uris", {"redirect_uris": ["http://localhost/"]}),
            ("redirect_uris", {"redirect_uris": ["com.example.app:/cb"]}),
        ],
    )
    def test_refuses_what_no_server_would_take(self, field: str, arguments: Any) -> None:
        refusal(field, lambda: ClientMetadata.loopback(**arguments))

    @patient
    @given(st.text(alphabet=st.characters(codec="ascii")))
    def test_any_query_is_read_or_refused(self, query: str) -> None:
        with suppress(ClientMetadataError):
            metadata = ClientMetadata(f"http://localhost?{query}")
            assert ClientMetadata(metadata.client_id) == metadata
