"""What the chart makes of values, as objects to look at: rendered by Helm itself, without a cluster."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

CHART = Path(__file__).parents[2] / "helm" / "fewstep"
CI = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
NAMESPACE = "images"

Object = dict[str, Any]


def ci_values(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())
    return loaded


def rendered(values: Mapping[str, Any], name: str = "demo") -> dict[str, str]:
    """Template path inside the chart -> its text."""
    with Chart.load(CHART) as chart:
        out = chart.render(dict(values), name=name, namespace=NAMESPACE)
    return {path.removeprefix("fewstep/templates/"): text for path, text in out.items()}


class Release:
    """The objects of a release."""

    def __init__(self, values: Mapping[str, Any], name: str = "demo") -> None:
        texts = {path: text for path, text in rendered(values, name).items() if path.endswith(".yaml")}
        self.by_template: dict[str, list[Object]] = {
            path: [each for each in yaml.safe_load_all(text) if each] for path, text in texts.items()
        }
        self.objects = [each for objects in self.by_template.values() for each in objects]
        self.objects += [self.trainer] if self.trainer else []

    @property
    def trainer(self) -> Object | None:
        """What distillers make their Jobs of, if they make some."""
        told = [each["data"]["job.json"] for each in self.all("ConfigMap") if "job.json" in each["data"]]
        return json.loads(told[0]) if told else None

    def all(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind: str, name: str) -> Object:
        """`name` is what comes after the release's."""
        (found,) = [each for each in self.all(kind) if each["metadata"]["name"] == f"demo-fewstep{name}"]
        return found

    @property
    def workloads(self) -> list[Object]:
        return [each for each in self.objects if each["kind"] in ("Deployment", "StatefulSet", "Job")]

    @property
    def pods(self) -> list[Object]:
        """The templates of the workloads' pods."""
        return [each["spec"]["template"] for each in self.workloads]


def with_values(name: str, **changes: Any) -> Release:
    """The release of a file of ci/, its values changed: maps are merged, everything else replaced."""
    return Release(_merged(ci_values(name), changes))


def container(workload: Object) -> Object:
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def env(workload: Object) -> dict[str, Object]:
    return {entry["name"]: entry for entry in container(workload)["env"]}


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector, with `matchExpressions` of `In`, finds an object of these labels."""
    found = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In"
        found = found and labels.get(rule["key"]) in rule["values"]
    return found


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
