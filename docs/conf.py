"""How Sphinx makes the site: ``make docs``."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "atproto_session"
author = "The atproto_session authors"
release = version = version_of("atproto-session")
extensions = ["sphinx.ext.autodoc", "api_from_reference", "plain_links", "sequence"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"atproto_session {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# Links and labels have to lead somewhere. Names in signatures and docstrings become links where there is something to
# link to: many types are of other projects, or not for users.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r".*")]
