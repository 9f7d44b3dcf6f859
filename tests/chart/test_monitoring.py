"""How Prometheus and Grafana find what to scrape and to show."""

import json

import yaml

from tests.chart.release import CHART, Release, ci_values, selects

DOCKER = CHART.parents[1] / "docker"
DASHBOARDS = DOCKER / "grafana" / "dashboards"


def test_a_monitor_finds_what_it_scrapes_and_names_it_as_dashboards_do() -> None:
    release = Release(ci_values("full"))
    service = release.one("Service", "-gateway")
    monitor = release.one("ServiceMonitor", "-gateway")
    assert selects(monitor["spec"]["selector"], service["metadata"]["labels"])
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    for component in ("worker", "distiller"):
        spec = release.one("PodMonitor", f"-{component}")["spec"]
        pods = [pod for pod in release.pods if selects(spec["selector"], pod["metadata"]["labels"])]
        assert {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods} == {component}
        endpoint = spec["podMetricsEndpoints"][0]
        assert endpoint["port"] == pods[0]["spec"]["containers"][0]["ports"][0]["name"]
        assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": f"fewstep-{component}"}]


def test_every_dashboard_is_in_a_config_map_for_grafana() -> None:
    maps = Release(ci_values("full")).all("ConfigMap")
    assert all(each["metadata"]["labels"]["grafana_dashboard"] == "1" for each in maps)
    found = {name: json.loads(text) for each in maps for name, text in each["data"].items()}
    assert found == {path.name: json.loads(path.read_text()) for path in DASHBOARDS.glob("*.json")}
    assert found


def test_every_alert_is_in_a_rule_of_the_operator_as_it_is() -> None:
    found = [each["spec"] for each in Release(ci_values("full")).all("PrometheusRule")]
    assert found == [yaml.safe_load(path.read_text()) for path in sorted(DOCKER.glob("prometheus/rules/*.yml"))]
    assert found
