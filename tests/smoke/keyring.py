"""The extra ``keyring`` alone: keys that are said to be there, where there is no keyring."""

import os

from atproto_session import OAuthClient, StoreError

os.environ["PYTHON_KEYRING_BACKEND"] = "keyring.backends.fail.Keyring"
os.environ["ATPROTO_SESSION_ENCRYPTION_KEYS"] = "keyring"
try:
    OAuthClient.for_scripts(store="sqlite:///sessions.db")
except StoreError as error:
    if "keyring, which cannot be used" not in str(error):
        raise
else:
    raise SystemExit("no keyring was looked at")
