"""What URLs and IP addresses from outside have to look like. Nothing here touches the network."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

_DEFAULT_PORTS = {"https": 443, "http": 80}
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# A last label that starts with a digit is refused because resolvers read such names as IPv4 addresses ("0x7f.1").
_HOST_NAME = re.compile(rf"(?:{_LABEL}\.)+(?![0-9]){_LABEL}")
# RFC 3986, appendix A. Whatever else a parser may be lenient about (backslashes, control characters, spaces, letters
# beyond ASCII), parsers differ in what they make of it.
_URL = re.compile(r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")
_AUTHORITY = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


# Names of private networks may be single labels, and hold underscores.
_PRIVATE_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")


@dataclass(frozen=True)
class TrustedHosts:
    """Hosts that may have private addresses, for development and for networks of one's own. Everything else stays
    refused."""

    names: frozenset[str] = frozenset()
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()

    @classmethod
    def of(cls, hosts: TrustedHosts | Iterable[str]) -> TrustedHosts:
        """Read a list of names (``"pds"``), addresses (``"10.0.0.5"``) and networks (``"172.16.0.0/12"``).

        :raises ValueError: an entry is none of these; the message names it.
        """
        if isinstance(hosts, TrustedHosts):
            return hosts
        if isinstance(hosts, str | bytes) or not isinstance(hosts, Iterable):
            raise ValueError("trusted_hosts is not a list of host names, addresses and networks")  # noqa: TRY004
        names: list[str] = []
        networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for host in hosts:
            text = host.strip().strip("[]").rstrip(".").lower() if isinstance(host, str) else ""
            try:
                networks.append(ipaddress.ip_network(text, strict=False))
                continue
            except ValueError:
                pass
            if not _PRIVATE_NAME.fullmatch(text) or text.rpartition(".")[2].isdigit():
                raise ValueError(
                    f"trusted_hosts: {host!r} is not a host name, an IP address or a network such as 172.16.0.0/12"
                )
            names.append(text)
        return cls(frozenset(names), tuple(networks))

    def __contains__(self, host: str) -> bool:
        """Whether ``host``, a name or an address, is trusted."""
        bare = host.strip("[]").lower()
        if bare in self.names:
            return True
        if ":" not in bare and not bare[-1:].isdigit():
            return False  # a name: this look costs less than the error of ip_address()
        try:
            address = ipaddress.ip_address(bare)
        except ValueError:
            return False
        return any(address in network for network in self.networks)


NOBODY = TrustedHosts()


def is_host_name(text: str) -> bool:
    """Whether ``text`` is a full host name: at most 253 ASCII characters, two labels or more, not an IP address."""
    return len(text) <= 253 and _HOST_NAME.fullmatch(text) is not None


def check_url(url: object, *, allow_http: bool = False, trusted: TrustedHosts = NOBODY) -> str:
    """``url`` itself, if it may be fetched although it comes from outside.

    It is https, names its host by a full name, and has no user name, password or fragment.

    :param allow_http: for development: loopback hosts (``localhost``, ``127.0.0.1``, ``[::1]``) are good too, over http
        as well as https; and those in ``trusted`` may use http.
    :param trusted: hosts that may be single labels and addresses.
    :raises ValueError: it may not be. The message is a predicate ("does not use https") without the URL, in which
        there may be a password.
    """
    if not isinstance(url, str) or not _URL.fullmatch(url):
        raise ValueError("is not a URL")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("is not a URL") from None
    is_trusted = host in trusted
    is_local = is_trusted or (allow_http and host in LOOPBACK_HOSTS)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_local and allow_http):
        raise ValueError("does not use https")
    if "@" in parts.netloc:
        raise ValueError("holds a user name or a password")
    if not _AUTHORITY.fullmatch(parts.netloc.replace("_", "-") if is_trusted else parts.netloc) or port == 0:
        raise ValueError("is not a URL")
    if not is_local and not is_host_name(host):
        raise ValueError("does not name its host by a full name")
    if "#" in url:
        raise ValueError("has a fragment")
    return url


def check_origin(url: object, *, allow_http: bool = False, trusted: TrustedHosts = NOBODY) -> str:
    """``url`` itself, if it is an origin as :func:`origin` writes it and may be fetched (:func:`check_url`).

    :raises ValueError: it is not. The message is a predicate.
    """
    if origin(checked := check_url(url, allow_http=allow_http, trusted=trusted)) != checked:
        raise ValueError("is more than an origin, or not in its normal form")
    return checked


def origin(url: str) -> str:
    """``scheme://host[:port]`` of an http or https URL, in lower case and without the scheme's default port.

    :raises ValueError: it is no such URL. The message is a predicate.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise ValueError("is not an http or https URL")
    bracketed = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{bracketed}" + ("" if port in (None, _DEFAULT_PORTS[parts.scheme]) else f":{port}")


# IP addresses

# The IANA special-purpose registries, written out because ``ipaddress.is_global`` differs between releases of Python.
_SPECIAL_IPV4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; Alibaba Cloud's metadata service
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's platform service, which only its own virtual machines reach
        "169.254.0.0/16",  # link-local; most clouds' metadata services
        "172.16.0.0/12",
        "192.0.0.0/24",  # Oracle Cloud's metadata service among others
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
]
_UNICAST_IPV6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_IPV6 = [
    ipaddress.IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3ffe::/16", "3fff::/20")
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public_address(address: str) -> bool:
    """Whether an IP address is one of the public Internet's: not private, loopback, link-local, shared, multicast,
    reserved, for documentation, or an IPv4 address in IPv6 clothes (mapped, 6to4, Teredo). NAT64 addresses, the only
    ones that IPv6-only networks have for IPv4 hosts, are judged by the IPv4 address inside."""
    parsed = ipaddress.ip_address(address)
    if parsed in _NAT64:
        parsed = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _SPECIAL_IPV4)
    return parsed in _UNICAST_IPV6 and not any(parsed in network for network in _SPECIAL_IPV6)


def is_public_or_loopback(address: str) -> bool:
    """Whether an IP address is public (:func:`is_public_address`) or this machine's own."""
    return ipaddress.ip_address(address).is_loopback or is_public_address(address)
