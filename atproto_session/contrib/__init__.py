"""Integrations, each an extra of its own. Nothing here is imported by ``import atproto_session``."""
