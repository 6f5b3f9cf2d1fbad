"""TXT records. More of the DNS is in ``test_identity.py``."""

from __future__ import annotations

import subprocess
import sys

import dns.resolver
import pytest

from atproto_session._dns import NoRecords, txt_records

from .loopback import NameServer


def test_records_are_joined_from_their_strings() -> None:
    names = NameServer()
    names.records["a.example.com"] = [["did=did:", "plc:x"], ["other"]]
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = ["127.0.0.1"], names.port
    try:
        assert txt_records("a.example.com", 10.0, resolver) == {"did=did:plc:x", "other"}
        with pytest.raises(NoRecords, match="no DNS record") as caught:
            txt_records("nobody.example.com", 10.0, resolver)
        assert not caught.value.retryable
    finally:
        names.close()


def test_the_dns_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys\n"
        "from atproto_session import ClientMetadata, OAuthClient\n"
        "OAuthClient(ClientMetadata.loopback(), store='memory:').close()\n"
        "print([name for name in ('dns', 'jwt', 'cryptography.fernet', 'filelock') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
