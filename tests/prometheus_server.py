"""A real Prometheus for the tests: started on loopback with its own folder, stopped at the end."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.embedded import free_port
from tests.eventually import eventually


def binary() -> str:
    """The Debian package's program; without it the test is skipped on a laptop and fails in CI."""
    if found := shutil.which("prometheus"):
        return found
    reason = "no prometheus on PATH: apt-get install prometheus (make test does it for root)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Prometheus:
    """Asks one server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The series of an instant query.

        Raises:
            AssertionError: Prometheus refused the expression.
        """
        response = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=10).json()
        assert response["status"] == "success", f"{expr}: {response}"
        series: list[dict[str, Any]] = response["data"]["result"]
        return series

    def exemplars(self, expr: str, begin_s: float, end_s: float) -> list[dict[str, Any]]:
        """What the series of a query were marked with, of all of them together."""
        given = {"query": expr, "start": begin_s, "end": end_s}
        response = httpx.get(f"{self.url}/api/v1/query_exemplars", params=given, timeout=10).json()
        assert response["status"] == "success", f"{expr}: {response}"
        return [exemplar for series in response["data"] for exemplar in series["exemplars"]]

    def healthy_targets(self) -> int:
        response = httpx.get(f"{self.url}/api/v1/targets", timeout=10).raise_for_status()  # 503 while it starts
        targets = response.json()["data"]["activeTargets"]
        return sum(target["health"] == "up" for target in targets)


@contextmanager
def running(folder: Path, targets: Mapping[str, Sequence[str]], scrape_config: Path) -> Iterator[Prometheus]:
    """Prometheus with the project's own scrape file, its static targets replaced by `targets` (job -> host:port).

    It goes on with what an earlier one left in `folder`; without targets it is only asked.
    """
    program = binary()
    config = yaml.safe_load(scrape_config.read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "900ms"}
    config["rule_files"] = [str(scrape_config.parent / rules) for rules in config["rule_files"]]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": list(targets.get(job["job_name"], ()))}]
    path = folder / "prometheus.yml"
    path.write_text(json.dumps(config))
    port = free_port()
    command = (
        program,
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    )
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield _ready(Prometheus(f"http://127.0.0.1:{port}"), sum(map(len, targets.values())))
        finally:
            process.terminate()


def _ready(prometheus: Prometheus, targets: int) -> Prometheus:
    def scraping() -> bool:
        try:
            return prometheus.healthy_targets() == targets
        except httpx.HTTPError:
            return False

    eventually(scraping, within_s=60)
    return prometheus
