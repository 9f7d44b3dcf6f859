"""Each alert fires when it must and only then, has a page that says what to do, and asks for what exists."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from distill_jobs.metrics import DistillMetrics
from server.metrics import Metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RULES = ROOT / "docker" / "prometheus" / "rules" / "fewstep.yml"
RUNBOOKS = ROOT / "docs" / "runbooks"
SECTIONS = ("## What it means", "## How to look", "## What to do")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}


def promtool() -> str:
    if found := shutil.which("promtool"):
        return found
    reason = "no promtool on PATH: apt-get install prometheus (make test does it for root)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.prometheus
@pytest.mark.parametrize("alert", ALERTS)
def test_it_fires_when_it_must_and_only_then(alert: str) -> None:
    path = HERE / f"{alert}.yml"
    checks = [check for test in yaml.safe_load(path.read_text())["tests"] for check in test["alert_rule_test"]]
    assert {check["alertname"] for check in checks} == {alert}
    assert {bool(check["exp_alerts"]) for check in checks} == {True, False}
    done = subprocess.run([promtool(), "test", "rules", path.name], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == set(ALERTS)
    for alert, rule in ALERTS.items():
        assert rule["annotations"]["runbook"] == f"docs/runbooks/{alert}.md"
        text = (ROOT / rule["annotations"]["runbook"]).read_text()
        assert text.startswith(f"# {alert}\n")
        assert [line for line in text.splitlines() if line.startswith("## ")] == list(SECTIONS)


def test_each_alert_says_how_urgent_it_is() -> None:
    assert {rule["labels"]["severity"] for rule in ALERTS.values()} == {"page", "ticket"}


@pytest.mark.parametrize("text", [rule["expr"] for rule in rules()])
def test_a_rule_asks_for_metrics_that_some_process_has(text: str) -> None:
    kept = (CollectorRegistry(), CollectorRegistry())
    Metrics(kept[0])
    DistillMetrics(kept[1])
    families = {family.name for registry in kept for family in registry.collect()}
    asked = set(re.findall(r"(?<![:\w])fewstep_\w+", text))
    assert {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked} <= families


def test_the_scrape_file_reads_the_rules() -> None:
    config = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    assert [path for pattern in config["rule_files"] for path in (RULES.parents[1]).glob(pattern)] == [RULES]
