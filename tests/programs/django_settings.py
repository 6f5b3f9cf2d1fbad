"""The Django example's settings, for the place that ``SITE_SCENE`` tells."""

from __future__ import annotations

import json
import os

from mysite.settings import *  # type: ignore[import-not-found] # noqa: F403
from mysite.settings import ATPROTO_SESSION as EXAMPLE

from ..core import RESTLESS

scene = json.loads(os.environ["SITE_SCENE"])
SECRET_KEY = "a secret of the tests"
DEBUG = False
DATABASES = {"default": scene["database"]}
ATPROTO_SESSION = {**EXAMPLE, "OPTIONS": {"times": RESTLESS, **scene["options"]}}
