"""An adapter that answers without a network."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import requests
from requests.adapters import BaseAdapter

#: Status, JSON document and headers.
CannedAnswer = tuple[int, dict[str, Any], dict[str, str]]
OK: CannedAnswer = (200, {}, {"DPoP-Nonce": "n"})


class Canned(BaseAdapter):
    """Answers what it was told to, and keeps what it was sent."""

    def __init__(self, *answers: CannedAnswer) -> None:
        super().__init__()
        self._answers: Iterator[CannedAnswer] = iter(answers)
        self.sent: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.responses: list[requests.Response] = []
        self.closed = False
        self.before_answer: Callable[[], object] = lambda: None

    def send(
        self, request: requests.PreparedRequest, stream: bool = False, timeout: Any = None, *more: Any
    ) -> requests.Response:
        status, document, headers = next(self._answers)
        self.sent.append(dict(request.headers))
        self.paths.append(request.path_url)
        self.options.append({"stream": stream, "timeout": timeout})
        self.before_answer()
        response = requests.Response()
        response.status_code, response.url, response.request = status, request.url or "", request
        response.headers.update({"Content-Type": "application/json", **headers})
        response.raw = io.BytesIO(json.dumps(document).encode())
        response.headers.setdefault("Content-Length", str(len(json.dumps(document))))
        self.responses.append(response)
        return response

    def close(self) -> None:
        self.closed = True
