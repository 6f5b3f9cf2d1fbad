"""The errors that the local network's servers answer with."""

from __future__ import annotations


class OAuthError(Exception):
    """An OAuth error answer (RFC 6749 section 5.2).

    :ivar error: the error code.
    :ivar description: for people.
    :ivar status: the HTTP status.
    """

    def __init__(self, error: str, description: str, status: int = 400) -> None:
        super().__init__(f"{error}: {description}")
        self.error = error
        self.description = description
        self.status = status

    @property
    def challenge(self) -> str:
        """The ``WWW-Authenticate`` header of a 401."""
        return self.challenge_of("DPoP")

    def challenge_of(self, scheme: str) -> str:
        parameters = {"algs": "ES256 ES256K"} if scheme == "DPoP" else {}
        parameters |= {"error": self.error, "error_description": self.description}
        # The reference server leaves out what it would have to escape.
        return f"{scheme} " + ", ".join(f'{name}="{value}"' for name, value in parameters.items() if '"' not in value)


def invalid_request(description: str) -> OAuthError:
    return OAuthError("invalid_request", description)


def invalid_client(description: str) -> OAuthError:
    return OAuthError("invalid_client", description)


def invalid_grant(description: str) -> OAuthError:
    return OAuthError("invalid_grant", description)


def invalid_scope(description: str) -> OAuthError:
    return OAuthError("invalid_scope", description)


def invalid_token(description: str) -> OAuthError:
    return OAuthError("invalid_token", description, 401)


def invalid_proof(description: str) -> OAuthError:
    return OAuthError("invalid_dpop_proof", description, 401)


def use_nonce(description: str = "Authorization server requires nonce in DPoP proof") -> OAuthError:
    return OAuthError("use_dpop_nonce", description)
