"""TXT records of the DNS. Imported when the first handle is looked up: what it brings along costs 60 ms, and most
programs never need it.
"""

from __future__ import annotations

import dns.edns
import dns.exception
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.resolver

# The records that a name server may send. dnspython imports each kind when it comes for the first time.
for _kind in dns.rdatatype.RdataType:
    dns.rdata.get_rdata_class(dns.rdataclass.IN, _kind)  # type: ignore[no-untyped-call]


class NoRecords(Exception):
    """There are none, or none that can be had now. The text says why.

    :ivar retryable: there may be some later.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


def txt_records(name: str, lifetime: float, resolver: dns.resolver.Resolver | None = None) -> set[str]:
    """The TXT records of ``name``.

    :param lifetime: seconds to wait at most.
    :param resolver: by default that of the operating system's configuration.
    :raises NoRecords: there are none.
    """
    try:
        resolver = resolver or dns.resolver.Resolver()
        answer = resolver.resolve(dns.name.from_text(f"{name}."), "TXT", lifetime=lifetime, search=False)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        raise NoRecords("no DNS record") from None
    except dns.name.NameTooLong:
        raise NoRecords("too long for a DNS record") from None
    except dns.exception.DNSException as error:
        raise NoRecords(f"the DNS failed ({type(error).__name__})", retryable=True) from error
    except OSError as error:
        raise NoRecords("the DNS cannot be reached", retryable=True) from error
    return {b"".join(record.strings).decode("ascii", "replace") for record in answer}
