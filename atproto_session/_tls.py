"""TLS contexts that many connections share. To make one costs as much as 30 handshakes: the certificates that are
trusted have to be read.
"""

from __future__ import annotations

import os
import socket
import ssl
from typing import Any

from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.util.ssl_ import ALPN_PROTOCOLS, create_urllib3_context

from ._fork import reset_in_child

#: Of how many servers the last session is remembered.
_SESSIONS = 500


class SharedContext:
    """A context for the connections of all threads, as urllib3 uses one. It remembers the last session of each server,
    and begins the next connection with it (RFC 8446 section 2.2): certificates are not sent and verified again.

    urllib3 sets up its context anew for each connection. What it sets is kept here, and does not reach the real one:
    OpenSSL does not expect a context to change while another thread makes a connection of it.

    :param ca_bundle: a file or a directory with the certificates to trust.
    :raises OSError: it cannot be read.
    """

    check_hostname = True
    verify_mode = ssl.CERT_REQUIRED

    def __init__(self, ca_bundle: str) -> None:
        is_directory = os.path.isdir(ca_bundle)  # noqa: PTH112 - a Path has nothing to add
        self._context = create_urllib3_context()
        self._context.load_verify_locations(**{"capath" if is_directory else "cafile": ca_bundle})
        self._context.set_alpn_protocols(ALPN_PROTOCOLS)
        # What is asked of it happens in one step.
        self._sessions: dict[str, ssl.SSLSession] = {}

    def set_alpn_protocols(self, protocols: Any) -> None:
        """Nothing: they are set."""

    def wrap_socket(self, sock: socket.socket, server_hostname: str) -> ssl.SSLSocket:
        """As in :class:`ssl.SSLContext`. A session with which it did not work is forgotten."""
        session = self._sessions.get(server_hostname)
        if session is None:
            return self._context.wrap_socket(sock, server_hostname=server_hostname)
        try:
            return self._context.wrap_socket(sock, server_hostname=server_hostname, session=session)
        except OSError:
            self._sessions.pop(server_hostname, None)
            raise

    def remember(self, connected: object) -> None:
        """Keep the session of a connection, which its server may have given after the handshake. One that began with a
        session has nothing new: that works until the server has enough of it, and then it gives another."""
        if not isinstance(connected, ssl.SSLSocket) or connected.session_reused:
            return
        session = connected.session
        if session is None:
            return
        name = str(connected.server_hostname)
        self._sessions.pop(name, None)  # the ones that were used last are the last
        self._sessions[name] = session
        if len(self._sessions) > _SESSIONS:
            self._sessions.pop(next(iter(list(self._sessions))), None)


class Contexts:
    """The contexts of a client: one for each bundle of certificates, read when it is first needed. Others in a child
    after a fork."""

    def __init__(self) -> None:
        self.reset_after_fork()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        self._contexts: dict[str, SharedContext] = {}

    def get(self, ca_bundle: str | None) -> SharedContext:
        """
        :param ca_bundle: a file or a directory; ``None``: the certificates that requests brings.
        :raises OSError: it is not there, or cannot be read.
        """
        path = ca_bundle or DEFAULT_CA_BUNDLE_PATH
        if not os.path.exists(path):  # noqa: PTH110
            raise OSError(f"Could not find a suitable TLS CA certificate bundle, invalid path: {path}")
        context = self._contexts.get(path)
        return self._contexts.setdefault(path, SharedContext(path)) if context is None else context
