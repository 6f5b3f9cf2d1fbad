"""The documents as a site: it is built without a warning, and every link within it leads somewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

import atproto_session

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """What a page links to, and what of it can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" and value:
                self.ids.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--nitpicky", "--fail-on-warning", "--keep-going"]
    done = subprocess.run(
        [*command, "-d", str(site / ".doctrees"), str(ROOT / "docs"), str(site)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return site


def test_the_site_is_whole(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.rst")} <= {path.stem for path in pages}
    dead, checked = [], 0
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if urlsplit(target).scheme:
                continue
            checked += 1
            to = (path.parent / unquote(urlsplit(target).path)).resolve() if target else path
            is_there = to.is_file() and (to not in pages or not anchor or unquote(anchor) in pages[to].ids)
            if not is_there and not anchor.startswith("furo"):
                dead.append(f"{path.name}: {link}")
    assert dead == []
    assert checked > 1000

    # Each of these is the reader's way to something.
    titles = json.loads((site / "searchindex.js").read_text("utf-8").removeprefix("Search.setIndex(").rstrip(");"))
    assert "quickstart" in titles["docnames"]
    assert '<svg class="sequence"' in pages[site / "refreshing.html"].text
    assert {f"atproto_session.{name}" for name in atproto_session.__all__} <= pages[site / "api.html"].ids
    assert "example-script-py" in pages[site / "examples.html"].ids
    assert "theme-toggle" in pages[site / "index.html"].text
    listed = pages[site / "index.html"]
    for document in (ROOT / "docs").glob("*.rst"):
        assert document.stem == "index" or f"{document.stem}.html" in listed.links
