"""The benchmarks: what is written down is what a command has printed, and the servers that they measure with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import requests

from . import bench, bench_peers, bench_servers

DOCS = bench.ROOT / "docs"


def test_the_table_of_what_it_costs_is_what_was_measured() -> None:
    document = json.loads((DOCS / "bench.json").read_text(encoding="utf-8"))
    assert bench.table(document) in (DOCS / "performance.rst").read_text(encoding="utf-8")
    with bench.client_of(1) as client:
        known = {figure.name: (figure.text, figure.target) for figure in bench.figures(client, quick=True)}
    assert known == {each["name"]: (each["text"], each["target"]) for each in document["figures"]}


def test_the_table_of_other_libraries_is_what_was_measured() -> None:
    document = json.loads((DOCS / "peers.json").read_text(encoding="utf-8"))
    outcomes = [bench_peers.Outcome(**each) for each in document["outcomes"]]
    assert bench_peers.table(outcomes) in (DOCS / "peers.rst").read_text(encoding="utf-8")
    assert [outcome.peer for outcome in outcomes] == [peer.name for peer in bench_peers.PEERS]
    assert (outcomes[0].refreshes, outcomes[0].failed, outcomes[0].alive) == (1, 0, True)


def test_what_is_worse_than_its_limit_is_measured_once_more(capsys: pytest.CaptureFixture[str]) -> None:
    values = iter([3.0, 1.5, 3.0, 4.0, 0.5])
    figure = bench.Figure("name", "text", 1.0, 2.0, lambda: next(values))
    assert [bench.measure(figure) for _ in range(3)] == [1.5, 3.0, 0.5]
    verdicts = [" ".join(line.split()[5:-1]) for line in capsys.readouterr().out.splitlines()]
    assert verdicts == ["above its target", "TOO MUCH", "ok"]


def test_a_page_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.rst"
    page.write_text("before\n.. measured\nold\n.. end of what was measured\nafter\n", encoding="utf-8")
    for _ in range(2):
        bench.write(page, "table", "here")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n.. measured\n\nMeasured on ")
    assert text.endswith(" here:\n\ntable\n\n.. end of what was measured\nafter\n")
    assert "old" not in text


def test_each_account_has_one_server() -> None:
    for number in (0, 1, 99, 12345):
        assert bench_servers.number_of(bench_servers.did_of(number)) == number
    assert bench_servers.server_of(203, 100) == f"https://s3.{bench_servers.DOMAIN}"


def test_the_token_endpoint_of_other_libraries_keeps_to_the_rules() -> None:
    front = bench_peers.Front()
    try:
        issued = front.begin_session()
        session = bench_peers.session_document(issued)
        assert bench_peers.opaque(session["accessJwt"]) == issued.access_token
        assert bench_peers.opaque(issued.access_token) == issued.access_token
        with requests.Session() as http:
            form = {"grant_type": "refresh_token", "refresh_token": issued.refresh_token}
            first = http.post(f"{front.origin}/token", data=form)
            authorization = {"Authorization": f"Bearer {first.json()['access_token']}"}
            assert http.get(f"{front.origin}/resource", headers=authorization).status_code == 200
            second = http.post(f"{front.origin}/token", data=form)
            assert (second.status_code, second.json()["error"]) == (400, "invalid_grant")
            assert http.get(f"{front.origin}/resource", headers=authorization).status_code == 401
        assert (front.refreshes, front.ledger.replays) == (2, 1)
    finally:
        front.close()
