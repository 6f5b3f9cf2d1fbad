"""What the environment says about proxies and certificates, as requests reads it, and once."""

from __future__ import annotations

import os
from urllib.request import getproxies

import pytest
from requests.utils import get_environ_proxies

from atproto_session import _environment
from atproto_session._environment import Environment

PROXY = "http://proxy.example.com:3128"
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "requests_ca_bundle", "curl_ca_bundle")
URLS = [
    "https://pds.example.com/xrpc/a",
    "https://example.com/",
    "https://notexample.com:8443/",
    "http://10.1.2.3/",
    "http://10.1.2.3:8080/",
    "http://[::1]:2583/",
    "http://localhost:2583/",
    "file:///etc/passwd",
]


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("proxies", [["HTTPS_PROXY"], ["all_proxy"], ["http_proxy", "HTTPS_PROXY"], []], ids=str)
@pytest.mark.parametrize(
    "no_proxy",
    [None, "*", "example.com", ".example.com", "pds.example.com:443,  localhost", "10.0.0.0/8", "10.1.2.3", "::1", ","],
)
def test_it_means_what_it_means_to_requests(
    proxies: list[str], no_proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in proxies:
        monkeypatch.setenv(name, PROXY)
    by_request = {url: Environment().proxies_for(url, no_proxy) for url in URLS}
    assert by_request == {url: get_environ_proxies(url, no_proxy=no_proxy) for url in URLS}
    if no_proxy is not None:
        monkeypatch.setenv("NO_PROXY", no_proxy)
    environment = Environment()
    assert {url: environment.proxies_for(url) for url in URLS} == {url: get_environ_proxies(url) for url in URLS}


def test_it_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("CURL_CA_BUNDLE", "ca.pem")
    environment = Environment()
    for name in ("HTTPS_PROXY", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, "http://another.example.com")
    assert environment.proxies_for(URLS[0]) == {"https": PROXY}
    assert environment.ca_bundle == "ca.pem"
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "first.pem")
    assert Environment().ca_bundle == "first.pem"


def test_what_is_given_out_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    environment = Environment()
    environment.proxies_for(URLS[0]).clear()
    assert environment.proxies_for(URLS[0]) == {"https": PROXY}


def test_one_that_is_not_trusted_is_read_when_it_is_asked_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment(trusted=False)
    assert not environment.trusted
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    assert environment.proxies_for(URLS[0]) == {"https": PROXY}


def test_settings_of_the_operating_system_come_with_its_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows and macOS, where there are such settings."""
    monkeypatch.setattr(_environment, "getproxies", lambda: {"https": PROXY})
    monkeypatch.setattr(_environment, "proxy_bypass", lambda host: host == "example.com")
    environment = Environment()
    assert environment.proxies_for(URLS[0]) == {"https": PROXY}
    assert environment.proxies_for(URLS[1]) == {}
    assert getproxies() == {}, os.environ
