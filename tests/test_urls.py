"""What URLs and addresses have to look like."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atproto_session._urls import (
    TrustedHosts,
    check_origin,
    check_url,
    is_host_name,
    is_public_address,
    is_public_or_loopback,
    origin,
)


@pytest.mark.duty(42)
@pytest.mark.parametrize(
    "url",
    [
        "https://pds.example.com",
        "https://pds.example.com/",
        "https://pds.example.com:8443/path;x?a=b&c=%20[]",
        "https://xn--bcher-kva.example.com/%E2%82%AC",
        "https://1.2.example.com/",
    ],
)
def test_a_proper_url_is_taken_as_it_is(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.duty(17, 42)
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (None, "not a URL"),
        (["https://pds.example.com"], "not a URL"),
        ("", "not a URL"),
        ("pds.example.com", "https"),
        ("http://pds.example.com", "https"),
        ("http://localhost", "https"),
        ("file:///etc/passwd", "https"),
        ("https:", "not a URL"),
        ("https:///path", "not a URL"),
        ("https://user@pds.example.com", "user name"),
        ("https://user:password@pds.example.com", "user name"),
        ("https://@pds.example.com", "user name"),
        ("https://10.0.0.1/", "full name"),
        ("https://8.8.8.8/", "full name"),
        ("https://2130706433/", "full name"),
        ("https://0x7f.1/", "full name"),
        ("https://127.0.0.0x1/", "full name"),
        ("https://[::1]/", "full name"),
        ("https://[::ffff:8.8.8.8]/", "full name"),
        ("https://intranet/", "full name"),
        ("https://localhost/", "full name"),
        ("https://pds.example.com./", "full name"),
        ("https://.example.com/", "full name"),
        ("https://-a.example.com/", "full name"),
        ("https://a_b.example.com/", "not a URL"),
        (f"https://{'a' * 64}.example.com/", "full name"),
        (f"https://{'a.' * 130}com/", "full name"),
        ("https://pds.example.com:0/", "not a URL"),
        ("https://pds.example.com:65536/", "not a URL"),
        ("https://pds.example.com:x/", "not a URL"),
        ("https://pds.example.com:/", "not a URL"),
        ("https://[::1/", "not a URL"),
        ("https://pds.example.com/#", "fragment"),
        ("https://pds.example.com/#a", "fragment"),
        ("https://pds.example.com/\n", "not a URL"),
        ("https://pds.example.com\n", "not a URL"),
        ("https://pds.example.com/a b", "not a URL"),
        ("https://pds.example.com\\@evil.example.com/", "not a URL"),
        ("https://pds.example.com/%", "not a URL"),
        ("https://pds.ex\u00e4mple.com/", "not a URL"),
        ("https://pds\u3002example.com/", "not a URL"),
    ],
)
def test_any_other_is_refused(url: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        check_url(url)
    assert "password" not in str(caught.value).replace("user name or a password", "")


@pytest.mark.duty(42)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_loopback_is_for_development(host: str) -> None:
    for scheme in ("http", "https"):
        assert check_url(f"{scheme}://{host}:2583/path", allow_http=True)
        with pytest.raises(ValueError):
            check_url(f"{scheme}://{host}:2583/path")


@pytest.mark.duty(42)
@pytest.mark.parametrize("url", ["http://pds.example.com", "http://127.0.0.2", "http://[::2]", "https://10.0.0.1"])
def test_development_allows_nothing_else(url: str) -> None:
    with pytest.raises(ValueError):
        check_url(url, allow_http=True)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://PDS.Example.com:443/path?query", "https://pds.example.com"),
        ("HTTPS://pds.example.com:8443", "https://pds.example.com:8443"),
        ("http://localhost:80/", "http://localhost"),
        ("http://[::1]:2583/", "http://[::1]:2583"),
    ],
)
def test_an_origin_has_one_form(url: str, expected: str) -> None:
    assert origin(url) == expected


@pytest.mark.parametrize(
    "url", ["", "/path", "ftp://pds.example.com", "https://", "https://a:b", "https://[", "at://x.y"]
)
def test_what_has_no_origin(url: str) -> None:
    with pytest.raises(ValueError, match=r"^is not a"):
        origin(url)


@pytest.mark.duty(14)
@pytest.mark.parametrize("rest", ["/", "/path", "?query", ":443", "?", "/?"])
def test_an_issuer_is_an_origin_and_nothing_else(rest: str) -> None:
    assert check_origin("https://pds.example.com:8443") == "https://pds.example.com:8443"
    with pytest.raises(ValueError, match="more than an origin"):
        check_origin(f"https://pds.example.com{rest}")


@given(st.text() | st.text(alphabet="htps:/.@[]#?%0a1\\ \n").map("https://".__add__))
def test_whatever_is_taken_for_a_url_has_an_origin_with_a_full_host_name(text: str) -> None:
    try:
        url = check_url(text)
    except ValueError:
        return
    assert is_host_name(origin(url).removeprefix("https://").partition(":")[0])


@pytest.mark.duty(42)
@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.0.1",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.168.0.1",
        "198.18.0.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:8.8.8.8",
        "::ffff:10.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::8.8.8.8",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:a00:1::",
        "2002:808:808::",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public_address(address)


@pytest.mark.duty(42)
@pytest.mark.parametrize("address", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public_address(address)
    assert is_public_or_loopback(address)


def test_loopback_can_be_allowed_and_nothing_else() -> None:
    assert is_public_or_loopback("127.0.0.1")
    assert is_public_or_loopback("::1")
    assert not is_public_or_loopback("10.0.0.1")


TRUSTED = TrustedHosts.of(["pds", "my_pds", "Inner.Example.", "10.0.0.5", "172.16.0.0/12", "[fd00::1]"])


@pytest.mark.duty(42)
@pytest.mark.parametrize(
    "url",
    [
        *("https://pds/", "https://PDS:2583/x", "https://my_pds:2583/", "https://inner.example/", "https://10.0.0.5/"),
        *("https://172.17.0.2:2583/", "https://[fd00::1]/"),
    ],
)
def test_a_trusted_host_may_be_named_as_it_is(url: str) -> None:
    assert check_url(url, trusted=TRUSTED) == url
    with pytest.raises(ValueError):
        check_url(url.replace("https", "http"), trusted=TRUSTED)
    local = url.replace("https", "http")
    assert check_url(local, trusted=TRUSTED, allow_http=True) == local
    if "inner" not in url:
        with pytest.raises(ValueError):
            check_url(url, allow_http=True)


@pytest.mark.duty(42)
@pytest.mark.parametrize(
    "url",
    [
        *("https://other/", "https://other_pds/", "https://10.0.0.6/", "https://0xa.0.0.5/", "https://[fd00::2]/"),
        *("https://pds@elsewhere/", "https://user@pds/", "https://pds:0/", "http://pds.example.com/", "https://127.1/"),
        *("https://[::ffff:10.0.0.5]/", "https://pds#x", "ftp://pds/", "https://pds_/", "https://167772165/"),
    ],
)
def test_everything_else_stays_refused(url: str) -> None:
    with pytest.raises(ValueError):
        check_url(url, trusted=TRUSTED, allow_http=True)


def test_an_origin_of_a_trusted_host() -> None:
    assert check_origin("https://pds:2583", trusted=TRUSTED) == "https://pds:2583"


def test_trusted_hosts_are_read_once() -> None:
    assert TrustedHosts.of(TRUSTED) is TRUSTED
    assert "PDS" in TRUSTED
    assert "::1" not in TRUSTED


@pytest.mark.parametrize(
    "hosts",
    [
        "pds",
        b"pds",
        None,
        5,
        [None],
        [""],
        ["http://pds"],
        ["pds:2583"],
        ["10.0.0.5/40"],
        ["*.example.com"],
        ["10.1.2"],
    ],
)
def test_what_is_no_list_of_hosts(hosts: object) -> None:
    with pytest.raises(ValueError, match="trusted_hosts"):
        TrustedHosts.of(hosts)  # type: ignore[arg-type]
