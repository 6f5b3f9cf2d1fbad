"""What the environment says about proxies and certificates: ``HTTPS_PROXY``, ``NO_PROXY``, ``REQUESTS_CA_BUNDLE`` and
their like. Read once for a client: requests reads all variables twice for every request, a third of what one costs.
"""

from __future__ import annotations

import os
from functools import cached_property
from urllib.parse import urlsplit
from urllib.request import (  # type: ignore[attr-defined]  # one is not in the stubs
    getproxies,
    getproxies_environment,
    proxy_bypass,
    proxy_bypass_environment,
)

from requests.utils import address_in_network, is_ipv4_address, is_valid_cidr


class Environment:
    """The environment as it is now, in the way that requests reads it.

    :param trusted: whether it is of any interest. If not, it is read only when somebody asks for it nevertheless.
    """

    def __init__(self, *, trusted: bool = True) -> None:
        self.trusted = trusted
        if trusted:
            self._read  # noqa: B018 - now

    @cached_property
    def _read(self) -> tuple[dict[str, str], bool, str | None]:
        """The proxies, whether they come from the operating system's settings, and the bundle of certificates."""
        bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
        return getproxies(), not getproxies_environment(), bundle

    @property
    def ca_bundle(self) -> str | None:
        """A file or a directory with the certificates to trust instead of the usual ones."""
        return self._read[2]

    def proxies_for(self, url: str, no_proxy: str | None = None) -> dict[str, str]:
        """The proxies by scheme; none if ``url`` is to be fetched without.

        :param no_proxy: the hosts that need no proxy, in the place of those of the environment.
        """
        proxies, of_system, _ = self._read
        if not proxies:
            return {}
        given = proxies.get("no") if no_proxy is None else no_proxy
        is_direct = _is_among(given, url) or (of_system and proxy_bypass(urlsplit(url).hostname or ""))
        return {} if is_direct else proxies.copy()


def _is_among(no_proxy: str | None, url: str) -> bool:
    """By the rules of requests, which knows networks and suffixes, and by those of Python."""
    parts = urlsplit(url)
    host = parts.hostname
    if not no_proxy or host is None:
        return host is None
    entries = [entry for entry in no_proxy.replace(" ", "").split(",") if entry]
    if is_ipv4_address(host):
        if any(address_in_network(host, entry) if is_valid_cidr(entry) else entry == host for entry in entries):
            return True
    else:
        names = (host, f"{host}:{parts.port}" if parts.port else host)
        bare = [entry.lstrip(".") for entry in entries]
        if any(name == entry or name.endswith(f".{entry}") for name in names for entry in bare):
            return True
    return bool(proxy_bypass_environment(host, {"no": no_proxy}))
