"""Every query of every panel, asked of a real Prometheus that scrapes the real processes under load."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from server.client import Client
from server.embedded import Stack
from server.stream import Stream
from tests.eventually import eventually
from tests.prometheus_server import Prometheus, running

ROOT = Path(__file__).parents[2]
NONZERO = ("Latency by tier", "Latency by stage", "Batch occupancy", "Swaps", "Quality by version", "Jobs")


def dashboard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", ROOT / "docker" / "grafana" / "dashboard.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_dashboard_is_what_the_code_makes() -> None:
    made = dashboard()
    assert made.OUTPUT.read_text() == made.build()


@pytest.fixture(scope="module")
def prometheus(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    targets = {
        "fewstep-gateway": f"127.0.0.1:{stack.port}",
        "fewstep-worker": f"127.0.0.1:{stack.metrics_ports['worker-0']}",
        "fewstep-distiller": f"127.0.0.1:{stack.metrics_ports['distiller']}",
    }
    scrape_config = ROOT / "docker" / "prometheus" / "prometheus.yml"
    with running(tmp_path_factory.mktemp("prometheus"), targets, scrape_config) as server:
        yield server


@pytest.mark.prometheus
@pytest.mark.timeout(600)
def test_every_query_of_every_panel_has_series_while_a_job_runs_and_its_student_goes_live(
    prometheus: Prometheus, client: Client, small_job: str
) -> None:
    panels = {panel.title: panel for row in dashboard().ROWS.values() for panel in row}
    load = Stream(client, {"model": "shapes"}, ["a red circle", "a large blue square"], rate=2)
    load.start()
    try:
        eventually(lambda: drop_seen(prometheus, panels), within_s=560, pause_s=1.0)
    finally:
        tally = load.stop()
    assert not tally.failed, tally.errors


def drop_seen(prometheus: Prometheus, panels: dict[str, ModuleType]) -> bool:
    """Removes the panels that show something now: a job's series are gone when it has ended."""
    quiet = silent(prometheus, panels)
    for title in [title for title in panels if title not in quiet]:
        del panels[title]
    return not panels


def silent(prometheus: Prometheus, panels: dict[str, ModuleType]) -> list[str]:
    """The queries without a series, and those of `NONZERO` panels with nothing above zero."""
    missing = []
    for title, panel in panels.items():
        values = [value(s) for query in panel.queries for s in prometheus.query(concrete(query.expr))]
        if not values or (title in NONZERO and not any(v > 0 for v in values)):
            missing.append(title)
    return missing


def value(series: dict[str, list[str]]) -> float:
    return float(series["value"][1])


def concrete(expr: str) -> str:
    """The query as Grafana would send it: every model, and a window that holds a few scrapes."""
    return re.sub(r"\$__rate_interval", "10s", expr.replace("$model", ".*"))
