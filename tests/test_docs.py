"""What the documents say is true: their code runs, their names exist, their links lead somewhere."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

import atproto_session
from atproto_session import ClientMetadata, Keyset, OAuthClient, OAuthSession, SessionError
from atproto_session._fork import ForkAware
from atproto_session.keys import generate_jwk
from atproto_session.stores import FullStore
from atproto_session.testing.network import Account, LocalNetwork

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXAMPLES = sorted((DOCS / "examples").rglob("[!_]*.py"))
DOCUMENTS = [*(ROOT / f"{name}.rst" for name in ("README", "CHANGELOG", "CONTRIBUTING")), *sorted(DOCS.glob("*.rst"))]

CODE = re.compile(r"^( *)\.\. code-block:: python\n\n((?:\1   .*\n|\n)+)", re.MULTILINE)
LITERAL = re.compile(r"``(.+?)``", re.DOTALL)
LINK = re.compile(r"`[^`<]+\s<([^`>]+)>`__")
TABLE = re.compile(r"^(=+(?: +=+)+)\n(?:.+\n)+\1$", re.MULTILINE)
TERM = re.compile(r"^``(\w+)``\n    \S", re.MULTILINE)
UNDERLINE = re.compile(r"([=-])\1*")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: Path) -> list[tuple[int, str]]:
    """The Python code in a document, each piece with the number of its first line."""
    text = document.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(2)) + 1, textwrap.dedent(match.group(2)).strip("\n") + "\n")
        for match in CODE.finditer(text)
    ]


# Code


class Stage:
    """Where the code of the documents runs: in an empty directory, on a network of its own, with its names."""

    def __init__(self, network: LocalNetwork, account: Account) -> None:
        self.network = network
        self.account = account
        self.url = ""
        self.clients: list[OAuthClient] = []

    def client_class(self) -> type[OAuthClient]:
        """An ``OAuthClient`` that finds the people and servers of the documents on the local network."""
        stage = self

        class LocalClient(OAuthClient):
            def __init__(self, metadata: ClientMetadata, **options: Any) -> None:
                super().__init__(metadata, **stage.network.client_options(), **options)
                stage.clients.append(self)
                if not self.metadata.is_loopback:
                    stage.network.publish(self.metadata.client_id, self.metadata_document())
                    stage.network.publish(self.metadata.jwks_uri or "", self.jwks())

            def authorize(self, account: str, **options: Any) -> str:
                stage.url = super().authorize(account.replace("alice.example.com", stage.account.handle), **options)
                return stage.url

        return LocalClient

    def log_in(self, client: OAuthClient) -> dict[str, Any]:
        """Log the account in. Returns the names that the documents use from there on; ``params`` is for another
        callback."""
        client.authorize(self.account.did)
        session = client.callback(self.browse()).session
        client.authorize(self.account.did)
        return {"client": client, "session": session, "did": session.did, "params": self.browse()}

    def browse(self, prompt: str = "") -> str:
        """The address that the browser ends at."""
        return self.network.authorize(self.url, self.account)


@pytest.fixture
def stage(network: LocalNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage(network, network.create_account("reader.test"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(atproto_session, "OAuthClient", stage.client_class())
    monkeypatch.setattr(builtins, "input", stage.browse)
    monkeypatch.setenv("ATPROTO_CLIENT_KEYS", json.dumps(generate_jwk()))
    yield stage
    for client in stage.clients:
        client.close()


def is_excerpt(code: str, of: str) -> bool:
    """Whether ``code`` stands in ``of`` word for word, whatever its indentation."""
    wanted = code.strip("\n").split("\n")
    lines = of.split("\n")
    pieces = (lines[start : start + len(wanted)] for start in range(len(lines)))
    return any(textwrap.dedent("\n".join(piece)).split("\n") == wanted for piece in pieces)


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if blocks(path)], ids=named)
def test_the_code_in_it_runs_or_is_from_an_example(
    document: Path, stage: Stage, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = stage.client_class()(ClientMetadata.loopback(scope="atproto transition:generic"), store="memory:")
    names = stage.log_in(reader)
    for line, code in blocks(document):
        first, _, rest = code.partition("\n")
        if first.startswith("# docs/examples/"):
            example = (ROOT / first.removeprefix("# ")).read_text(encoding="utf-8")
            assert is_excerpt(rest, example), f"line {line} is not in {first}"
            continue
        exec(compile("\n" * (line - 1) + code, str(document), "exec"), names)
        for name in [name for name in names if name.startswith("test_")]:
            test = names.pop(name)
            test(**{parameter: request.getfixturevalue(parameter) for parameter in inspect.signature(test).parameters})
        if names["client"] is not reader:
            reader = names["client"]
            names |= stage.log_in(reader)
    if document.name == "README.rst":
        assert "'handle': 'reader.test'" in capsys.readouterr().out
        handle_of: Callable[[str], str | None] = names["handle_of"]
        assert handle_of(stage.account.did) == "reader.test"
        reader.revoke(stage.account.did)
        assert handle_of(stage.account.did) is None


@pytest.mark.parametrize("example", EXAMPLES, ids=named)
def test_examples_compile_and_import_what_exists(example: Path) -> None:
    tree = ast.parse(example.read_text(encoding="utf-8"), example.name)
    compile(tree, example.name, "exec")
    ours = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in ours:
        if node.module and node.module.partition(".")[0] == "atproto_session":
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
    called = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "client"
    ]
    assert [node.attr for node in called if not hasattr(OAuthClient, node.attr)] == []


def test_the_script_logs_in_once_and_goes_on_the_next_time(
    network: LocalNetwork, account: Account, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(DOCS / "examples" / "script.py"))["main"]
    options = {"store": f"sqlite:///{tmp_path}/sessions.db", **network.client_options()}
    pages: list[requests.Response] = []

    def browse(url: str) -> None:
        callback = network.authorize(url, account)
        with requests.Session() as browser:
            pages.append(browser.get(callback.partition("?")[0] + "favicon.ico", timeout=60))
            pages.append(browser.get(callback, timeout=60))

    browsers: list[threading.Thread] = []

    def open_browser(url: str) -> None:
        browsers.append(threading.Thread(target=browse, args=(url,)))
        browsers[-1].start()

    main(account.handle, open_browser=open_browser, **options)
    for browser in browsers:
        browser.join(60)
    assert [page.status_code for page in pages] == [404, 200]
    assert "'handle': 'alice.test'" in capsys.readouterr().out
    main(account.did, open_browser=open_browser, **options)
    captured = capsys.readouterr()
    assert "'handle': 'alice.test'" in captured.out
    assert captured.err == ""
    assert len(browsers) == 1


def test_the_tests_of_ones_own_pass() -> None:
    """As a project would run them: the fixtures come with the installed package, and the store proves itself."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(DOCS / "examples" / "own_tests.py")],
        env={**os.environ, "PYTHONPATH": str(DOCS / "examples")},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 20, "the contract suite was not collected"


# Names


def found(path: str) -> bool:
    """Whether ``path``, as in ``atproto_session.stores.complete``, leads to something."""
    try:
        if importlib.util.find_spec(path) is not None:
            return True
    except ModuleNotFoundError:
        pass
    module, _, name = path.rpartition(".")
    return bool(module) and hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_names_exist(document: Path, client: OAuthClient, session: OAuthSession) -> None:
    things: dict[str, object] = {name: getattr(atproto_session, name) for name in atproto_session.__all__}
    things |= {"client": client, "session": session, "error": SessionError("it broke"), "keyset": Keyset.generate()}
    wrong = []
    for literal in LITERAL.findall(document.read_text(encoding="utf-8")):
        if literal in ("atproto_session", "atproto-session"):
            continue
        if match := re.match(r"atproto_session(?:\.\w+)+", literal):
            wrong += [] if found(match.group()) else [literal]
        elif (match := re.match(r"(\w+)\.(\w+)(?:\.(\w+))?", literal)) and (thing := things.get(match.group(1))):
            for name in filter(None, match.groups()[1:]):
                if not hasattr(thing, name):
                    wrong.append(literal)
                    break
                thing = getattr(thing, name)
    assert wrong == []


def test_errors_that_are_named_exist() -> None:
    known = {name for name in vars(builtins) if name.endswith("Error")} | set(atproto_session.__all__)
    for document in DOCUMENTS:
        mentioned = re.findall(r"``(\w+Error)``", document.read_text(encoding="utf-8"))
        assert set(mentioned) <= known, named(document)


def test_the_reference_lists_every_public_name() -> None:
    terms = TERM.findall((DOCS / "reference.rst").read_text(encoding="utf-8"))
    assert sorted(terms) == atproto_session.__all__


def public_members() -> Iterator[Any]:
    """Every public thing: what the package exports, and the methods and properties of its classes."""
    for name in atproto_session.__all__:
        thing = getattr(atproto_session, name)
        yield pytest.param(thing, None, id=name)
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                if not member.startswith("_") and (callable(value) or isinstance(value, classmethod | property)):
                    yield pytest.param(value, thing, id=f"{name}.{member}")


def docstring_of(thing: Any, owner: type | None) -> str:
    """Its own, or that of the contract that it is part of."""
    own = inspect.getdoc(thing)
    if own or owner is None:
        return own or ""
    contracts = [getattr(contract, thing.__name__, None) for contract in (FullStore, ForkAware)]
    return next((contract.__doc__ for contract in contracts if contract and contract.__doc__), "")


def raised_in(thing: Any) -> set[str]:
    """The errors that the source of a function or a method raises by name."""
    function = (
        thing.__func__ if isinstance(thing, classmethod) else thing.fget if isinstance(thing, property) else thing
    )
    if not inspect.isfunction(function) or function.__code__.co_filename == "<string>":  # a dataclass's own
        return set()
    raised = {
        node.exc.func.id
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    return {name for name in raised if name.endswith("Error")}


@pytest.mark.parametrize(("thing", "owner"), list(public_members()))
def test_docstrings_say_what_it_is_and_which_errors_it_raises(thing: Any, owner: type | None) -> None:
    text = docstring_of(thing, owner)
    assert text, "there is no docstring"
    raised = raised_in(thing)
    if inspect.isclass(thing):
        raised = {name for maker in ("__init__", "__post_init__") for name in raised_in(vars(thing).get(maker))}
    assert {name for name in raised if name not in text} == set()


# Links and commands


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    targets = [link for link in LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in targets if not (document.parent / link).is_file()] == []


def test_the_index_lists_every_document_and_every_example() -> None:
    listed = {(DOCS / link).resolve() for link in LINK.findall((DOCS / "index.rst").read_text(encoding="utf-8"))}
    there = {path.resolve() for path in (*DOCS.rglob("*.rst"), *EXAMPLES)} - {(DOCS / "index.rst").resolve()}
    assert there <= listed


def test_make_knows_the_targets() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document in DOCUMENTS:
        lines = document.read_text(encoding="utf-8").splitlines()
        mentioned = {match.group(1) for line in lines if (match := re.match(r"\s+make (\w+)", line))}
        assert mentioned <= targets, named(document)
    assert {"demo", "test"} <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_the_markup_is_sound(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, (above, line) in enumerate(itertools.pairwise(lines), start=2):
        if above.strip() and not above.startswith(" ") and UNDERLINE.fullmatch(line):
            assert len(line) == len(above), f"line {number}: the underline is not as long as the title"
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 120 or line != line.rstrip()] == []
    prose = CODE.sub("", text)
    assert [paragraph for paragraph in prose.split("\n\n") if paragraph.count("``") % 2] == []
    for match in TABLE.finditer(text):
        gaps = [(gap.start(), gap.end()) for gap in re.finditer(" +", match.group(1))]
        crossed = [row for row in match.group().splitlines() for start, end in gaps if row[start:end].strip()]
        assert crossed == [], "a table's text runs into the next column"
