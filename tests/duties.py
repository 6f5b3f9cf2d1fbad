"""The duties of an AT Protocol OAuth client, and the tests that prove each: ``python -m tests.duties`` writes
``docs/duties.rst``. A test names its duties with ``@pytest.mark.duty(1, 2)``."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "duties.rst"

PARTS = {
    1: "Basics",
    4: "Identity",
    14: "Discovery",
    18: "Client metadata",
    23: "Authorization request",
    26: "DPoP",
    29: "Client assertions",
    31: "Callback",
    32: "Token responses",
    35: "The life of a session",
    40: "Requests to the account's server",
    42: "Hardening",
    44: "Scopes",
}

DUTIES = {
    1: "The authorization code grant alone, with PKCE, pushed requests and DPoP for every kind of client.",
    2: "Tokens are opaque: their content is never looked into.",
    3: "The whole flow runs, verification of the account included, even where only the log-in is wanted.",
    4: "A log-in starts from a handle, a DID, or the URL of a server.",
    5: "Handles have their syntax checked as whole strings and compared in lower case; what people paste is cleaned.",
    6: "Handles under reserved top-level domains fail at once; ``.test`` works in development only.",
    7: "DNS: the TXT record at ``_atproto.<handle>``; two different DIDs are a failure.",
    8: "HTTPS: ``/.well-known/atproto-did`` of the handle, where alone a few redirects are followed.",
    9: "DNS and HTTPS side by side; DNS wins a conflict.",
    10: "Handles count only if the DID document claims them as well.",
    11: "``did:plc`` and ``did:web``; malformed, unsupported and failed are told apart; the document is the DID's.",
    12: "The PDS and the handle are taken from the document by its rules.",
    13: "Identities are cached for minutes in log-ins, and never for the check before a refresh.",
    14: "The protected resource metadata of the PDS name exactly one authorization server.",
    15: "The authorization server's metadata name the issuer that was asked.",
    16: "All that the profile demands of the metadata holds before they are used.",
    17: "The URL of a server may be a PDS's or an authorization server's; no endpoint in metadata is trusted.",
    18: "The client identifier is an https URL, equal to where its document is served.",
    19: "The document has the grant types, response types, scopes and redirect URIs that are asked for.",
    20: "Confidential clients use ``private_key_jwt`` with ES256 and publish public keys alone; public ones use none.",
    21: "Redirect URIs keep the rules for web and for native clients.",
    22: "The development client ``http://localhost`` and its rules.",
    23: "The request is pushed; the browser gets the client identifier and the request URI alone.",
    24: "A new verifier and a new state for each log-in.",
    25: "The pending log-in is stored before redirecting, expires, and is taken out exactly once.",
    26: "A DPoP key for each session, kept through refreshes; proofs carry what they must.",
    27: "Nonces are kept for each server; a nonce error is answered with a new proof and a new assertion.",
    28: "An answer without a nonce is refused in log-ins, and never costs refreshed tokens.",
    29: "A new client assertion for every request, whose clock may be a little behind.",
    30: "A session keeps the client key that it began with.",
    31: "The callback's state and issuer are checked, whatever else it says.",
    32: "Token responses are checked; fewer scopes than asked for are recorded.",
    33: "Tokens are trusted only when their account is verified; otherwise they are revoked.",
    34: "Before every refresh, the account still belongs to this issuer; its PDS may have moved.",
    35: "A refresh token is used once: locks keep others from it.",
    36: "No lifetime is assumed; the server's word counts.",
    37: "``invalid_grant`` means a new log-in; a session may be revoked at any time.",
    38: "Signing out revokes at the server, and works here even if that is away.",
    39: "An account is its DID.",
    40: "401 about the token, 401 about the nonce, 403 and 429 are told apart.",
    41: "``atproto-proxy`` passes untouched.",
    42: "Every URL from outside is checked, its address when the connection is made; all is bounded.",
    43: "Validation is code that always runs; comparisons are exact; text from servers is never trusted.",
    44: "Scopes are sets; ``atproto`` is always there; unknown ones pass.",
}


def proofs() -> dict[int, list[str]]:
    """The tests that name each duty."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        whole = [number for node in tree.body if _is_pytestmark(node) for number in _numbers(node)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                own = [number for decorator in node.decorator_list for number in _numbers(decorator)]
                for number in sorted({*own, *whole}):
                    found[number].append(f"{path.relative_to(TESTS.parent).as_posix()}::{node.name}")
    return dict(found)


def _is_pytestmark(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets
    )


def _numbers(node: ast.AST) -> Iterator[int]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.duty":
            yield from (int(ast.literal_eval(argument)) for argument in call.args)


def table() -> str:
    """The document."""
    found = proofs()
    lines = [
        "The duties of a client, and their proofs",
        "========================================",
        "",
        "What the AT Protocol OAuth profile, and the RFCs that it builds on, ask of a client; and the tests that prove",
        "that this one does it. ``make test`` runs them all.",
    ]
    for number, duty in DUTIES.items():
        if number in PARTS:
            lines += ["", PARTS[number], "-" * len(PARTS[number])]
        lines += ["", f"{number}. {duty}", ""]
        lines += [f"   * ``{test}``" for test in found.get(number, [])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(table(), encoding="utf-8")
