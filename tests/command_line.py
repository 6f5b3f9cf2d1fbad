"""The commands as users run them: in this process, as processes of their own, at a terminal, with a browser.

``python -m tests.command_line`` writes the help texts of ``docs/command_line.rst`` anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import click
import requests
from click.testing import CliRunner, Result

from atproto_session import _scripts
from atproto_session._commands import program
from atproto_session.testing.network import Account

from .core import SOON
from .processes import ROOT

PAGE = ROOT / "docs" / "command_line.rst"
#: Nobody's terminal, no browser, nobody's accounts.
_NOT_INHERITED = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY", "TERM", "COLUMNS", "XDG_DATA_HOME")
URL = re.compile(r"https?://\S*/oauth/authorize\S*")


class Network(Protocol):
    """The local network, or the real PDS."""

    def client_options(self) -> dict[str, Any]: ...

    def authorize(self, url: str, account: Account, approve: bool = True) -> str: ...


def variables(network: Network | None, store: str | Path | None) -> dict[str, str]:
    """The environment of commands and scripts that use ``network``.

    :param store: a URL, or the directory of the user's data.
    """
    found = {name: value for name, value in os.environ.items() if not name.startswith("ATPROTO_")}
    found = {name: value for name, value in found.items() if name not in _NOT_INHERITED}
    found["XDG_DATA_HOME"] = str(store) if isinstance(store, Path) else "/nonexistent"
    if isinstance(store, str):
        found[_scripts.STORE] = store
    if network is not None:
        options = network.client_options()
        found |= {
            _scripts.PLC_DIRECTORY: options["plc_directory"],
            _scripts.HANDLE_RESOLVER: options["handle_resolver"],
            _scripts.ALLOW_HTTP: "1",
        }
    return found


class Shell:
    """Runs commands in this process."""

    def __init__(self, network: Network | None, store: str | Path | None) -> None:
        self.network = network
        self.variables: dict[str, str | None] = dict.fromkeys((*os.environ, *_NOT_INHERITED))
        self.variables |= variables(network, store)

    def run(self, *arguments: str, input: str | bytes | None = None) -> Result:
        return CliRunner(env=self.variables).invoke(program, arguments, input=input, prog_name="atproto-session")

    def output(self, *arguments: str, input: str | bytes | None = None) -> str:
        """What a command that succeeds prints."""
        result = self.run(*arguments, input=input)
        assert result.exit_code == 0, result.output
        return result.stdout

    def failure(self, code: int, *arguments: str, input: str | bytes | None = None) -> str:
        """What a command that fails says."""
        result = self.run(*arguments, input=input)
        assert result.exit_code == code, result.output
        return result.stderr


def browse(network: Network, url: str, account: Account, *, approve: bool = True) -> requests.Response:
    """What a browser does with the URL of a log-in. Returns the page that it ends at."""
    return requests.get(network.authorize(url, account, approve), timeout=SOON)


class Process:
    """A command as a process of its own, without a terminal."""

    def __init__(self, *arguments: str, env: Mapping[str, str], program: str | None = None, **options: Any) -> None:
        command = [sys.executable, "-m", "atproto_session"] if program is None else [program]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen([*command, *arguments], env=env, text=True, **{**streams, **options})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()

    def url(self) -> str:
        """The URL of the log-in that it waits for."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := URL.search(line):
                return found.group()
        raise AssertionError("it gave no URL")

    def end(self) -> tuple[int, str, str]:
        """Its exit code, and what it said."""
        said, complained = self.process.communicate(timeout=SOON)
        return self.process.returncode, said, complained


class Terminal:
    """A command at a terminal."""

    def __init__(self, *arguments: str, env: Mapping[str, str]) -> None:
        import pty  # Windows has none

        self._main, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "atproto_session", *arguments],
            env={**env, "COLUMNS": "400"},
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self.said = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)

    def read_until(self, what: str) -> str:
        """All that it has said when ``what`` is among it."""
        while not re.search(what, self.said):
            piece = self._read()
            assert piece, f"it ended with {self.said!r}"
            self.said += piece
        return self.said

    def _read(self) -> str:
        try:
            return os.read(self._main, 65536).decode()
        except OSError:  # all that had the terminal are gone
            return ""

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def hang_up(self) -> None:
        """What Ctrl-D does."""
        self.type("\x04")

    def end(self) -> int:
        while piece := self._read():
            self.said += piece
        return self.process.wait(SOON)


@contextmanager
def a_browser(act: Callable[[str], object], patch: Any) -> Iterator[None]:
    """In the block, commands of this process open a browser that does ``act`` with the URL."""
    threads: list[threading.Thread] = []

    def start(url: str) -> bool:
        threads.append(threading.Thread(target=act, args=(url,)))
        threads[-1].start()
        return True

    patch.setattr("webbrowser.get", lambda: None)
    patch.setattr("webbrowser.open", start)
    yield
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()


# Help texts

#: A block of text that begins with a usage line, and the command in that.
_BLOCK = re.compile(
    r"(?P<start>^\.\. code-block:: text\n\n)"
    r"(?P<text>    Usage: (?P<name>atproto-session(?: [a-z-]+)?) \[OPTIONS\].*\n(?:    .*\n|\n(?=\n*    ))*)",
    re.MULTILINE,
)


def commands() -> dict[str, click.Command]:
    return {"atproto-session": program} | {f"atproto-session {name}": each for name, each in program.commands.items()}


def help_of(name: str) -> str:
    """What ``--help`` prints, 100 columns wide."""
    arguments = [*name.split()[1:], "--help"]
    result = CliRunner().invoke(program, arguments, prog_name="atproto-session", terminal_width=100)
    return result.output


def blocks_of(page: str) -> dict[str, str]:
    """The help texts in a document, by the name of the command."""
    return {match["name"]: match["text"] for match in _BLOCK.finditer(page)}


def as_block(text: str) -> str:
    return "".join(f"    {line}".rstrip() + "\n" for line in text.splitlines())


def rewrite(page: str) -> str:
    return _BLOCK.sub(lambda match: match["start"] + as_block(help_of(match["name"])), page)


if __name__ == "__main__":
    PAGE.write_text(rewrite(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
