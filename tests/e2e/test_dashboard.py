"""Every query of every dashboard, asked of a real Prometheus that scrapes the real processes under load."""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

from engines.errors import FewstepError
from server.client import Client
from server.embedded import Stack
from server.stream import Stream
from tests.eventually import eventually
from tests.prometheus_server import Prometheus, running

ROOT = Path(__file__).parents[2]
NONZERO = (
    *(
        "Latency by tier",
        "Latency by version",
        "Latency by stage",
        "Batch occupancy",
        "Measured against the cost model",
    ),
    *("Versions", "Swaps", "Quality by version", "Jobs", "Progress", "Fréchet distance against the teacher", "Up"),
    *("Redis is durable", "Memory"),
)


def dashboards() -> ModuleType:
    sys.path.insert(0, str(ROOT / "docker" / "grafana"))
    try:
        return importlib.import_module("dashboard")
    finally:
        sys.path.pop(0)


def queries() -> dict[str, str]:
    """Expression by dashboard, panel and number, with a window that holds a few scrapes."""
    made = dashboards()
    parts = importlib.import_module("boards.board")
    found = {
        f"{board.title} / {panel.title} / {number}": query.expr
        for board in made.BOARDS
        for panel in board.panels
        for number, query in enumerate(panel.queries)
    }
    found["every dashboard / Swaps / marks"] = parts.SWAPS
    return {name: parts.concrete(expr, "10s") for name, expr in found.items()}


def test_the_committed_dashboards_are_what_the_code_makes() -> None:
    made = dashboards()
    assert {path: path.read_text() for path in made.OUTPUT.glob("*.json")} == made.files()


def test_every_dashboard_marks_swaps_and_has_the_uid_of_its_file() -> None:
    for path, text in dashboards().files().items():
        board = json.loads(text)
        assert board["uid"] == path.stem
        assert [mark["name"] for mark in board["annotations"]["list"]] == ["Swaps"]


@pytest.fixture(scope="module")
def prometheus(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    targets = {
        "fewstep-gateway": [f"127.0.0.1:{stack.port}"],
        "fewstep-worker": [f"127.0.0.1:{stack.metrics_ports['worker-0']}"],
        "fewstep-distiller": [f"127.0.0.1:{stack.metrics_ports['distiller']}"],
    }
    scrape_config = ROOT / "docker" / "prometheus" / "prometheus.yml"
    with running(tmp_path_factory.mktemp("prometheus"), targets, scrape_config) as server:
        yield server


@pytest.mark.prometheus
@pytest.mark.timeout(600)
def test_every_query_of_every_panel_has_series_while_a_job_runs_and_its_student_goes_live(
    prometheus: Prometheus, client: Client, small_job: str
) -> None:
    silent = queries()
    # Little enough that the trainer, which yields to whoever is served, is not kept waiting for it.
    load = Stream(client, {"model": "shapes"}, ["a red circle", "a large blue square"], rate=0.5)
    load.start()
    try:
        with suppress(AssertionError):
            eventually(lambda: drop_seen(prometheus, client, silent), within_s=560, pause_s=4.0)
    finally:
        tally = load.stop()
    assert not silent, "these queries never had a series"
    assert not tally.failed, tally.errors


def drop_seen(prometheus: Prometheus, client: Client, silent: dict[str, str]) -> bool:
    """Removes the queries that show something now: a job's series are gone when it has ended."""
    # A downgrade, once there is a tier that is this quick; and a ladder, which is shown once somebody asked for it.
    for asked in ({"max_latency_ms": 20}, {"tier": "auto"}):
        with suppress(FewstepError):
            client.post("/v1/generations", {"model": "shapes", "prompt": "a red circle", **asked})
    for name, expr in list(silent.items()):
        values = [float(series["value"][1]) for series in prometheus.query(expr)]
        if values and (name.split(" / ")[1] not in NONZERO or any(value > 0 for value in values)):
            del silent[name]
    return not silent
