"""A whole AT Protocol network for tests: one process, pure Python, reachable from this machine alone.

It is as strict as the real servers: a refresh token works once, a replay ends the session, a PDS's access token dies
when it is replaced, nonces rotate, no proof and no client assertion is accepted twice. And it fails on demand, in all
the ways that networks and servers do.

======================== ==========================================================
``network``              :class:`LocalNetwork`: the door, and the handles for tests
``accounts``             accounts, DID documents, handle resolution
``clients``              client metadata, client authentication
``authorization_server`` metadata, pushed requests, tokens, revocation
``authorizations``       log-ins under way
``consent``              the page where an account's owner says yes or no
``sessions``             what was issued, and the rules of rotation
``resource_server``      the PDS
``repositories``         the records and blobs on it
``proofs``, ``nonces``   DPoP
``faults``               what can go wrong
``wire``, ``routes``     HTTP
======================== ==========================================================
"""

from .accounts import Account
from .faults import ACTIONS, ENDPOINTS, Fault
from .network import LocalNetwork
from .repositories import MethodError
from .sessions import SessionInfo
from .wire import ConnectionCut, Request, Response

__all__ = [
    "ACTIONS",
    "ENDPOINTS",
    "Account",
    "ConnectionCut",
    "Fault",
    "LocalNetwork",
    "MethodError",
    "Request",
    "Response",
    "SessionInfo",
]
