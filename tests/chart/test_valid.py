"""Everything that the chart renders is valid, strictly: a misspelt or misplaced field is an error."""

import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python import Chart, HelmValuesError, lint, package

from tests.chart.custom_resources import SCHEMAS
from tests.chart.release import CHART, CI, NAMESPACE, Object, Release, ci_values, rendered

ROOT = CHART.parents[1]
KUBERNETES = ("1.30", "1.34", "1.37")  # the oldest that Chart.yaml allows, one between, the newest
INFO = 1


def validate(object_: Object, version: str) -> None:
    if object_["kind"] in SCHEMAS:
        jsonschema.validate(object_, SCHEMAS[object_["kind"]])
    else:
        assert kubernetes_validate.validate(object_, version, strict=True) == version


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", CI)
def test_every_object_is_valid(name: str, version: str) -> None:
    objects = Release(ci_values(name)).objects
    for each in objects:
        validate(each, version)
    assert len(objects) > 8


def test_a_misspelt_field_is_seen() -> None:
    deployment = Release(ci_values("minimal")).one("Deployment", "-gateway")
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        validate(deployment, KUBERNETES[0])


def test_the_oldest_version_is_the_one_that_the_chart_asks_for() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


def test_every_template_makes_something_somewhere() -> None:
    made = [Release(ci_values(name)).by_template for name in CI]
    silent = {path for path in made[0] if not any(templates[path] for templates in made)}
    assert silent == {"check.yaml"}  # it makes nothing but errors


@pytest.mark.parametrize("name", CI)
def test_names_are_unique_and_labelled(name: str) -> None:
    objects = Release(ci_values(name)).objects
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(names)) == len(names)
    for each in objects:
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo"


@pytest.mark.parametrize("name", CI)
def test_lint_finds_nothing(name: str) -> None:
    report = lint(CHART, ci_values(name), strict=True)
    assert report["errors"] == []
    assert [each for each in report["messages"] if each["severity"] > INFO] == []


def test_the_package_renders_what_the_folder_does(tmp_path: Path) -> None:
    archive = Path(package(CHART, destination=tmp_path))
    with Chart.load(archive) as chart:
        packed = chart.render(ci_values("full"), name="demo", namespace=NAMESPACE)
        names = {each["name"] for each in chart.files}
    assert {path.removeprefix("fewstep/templates/"): text for path, text in packed.items()} == rendered(
        ci_values("full")
    )
    assert not [name for name in names if name.startswith("ci/")]


def test_the_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart["appVersion"] == chart["version"] == release


def test_the_schema_knows_every_value() -> None:
    with Chart.load(CHART) as chart:
        chart.validate_schema({"pools": [{"name": "gpu", "cache": {"persistent": True}}]})
        for process in ("gateway", "worker", "distiller"):
            chart.validate_schema({process: {"env": {"OTEL_TRACES_SAMPLER": "always_off"}}})
        unknown: list[Object] = [
            {"gatway": {}},
            {"gateway": {"replica": 2}},
            {"pools": [{"name": "gpu", "replica": 2}]},
        ]
        for values in unknown:
            with pytest.raises(HelmValuesError):
                chart.validate_schema(values)


@pytest.mark.parametrize(
    "values",
    [
        {"redis": {"password": "with/slash"}},
        {"pools": []},
        {"pools": [{"name": "Upper"}]},
        {"pools": [{"name": "gpu", "autoscaling": {"min": 0}}]},
        {"auth": {"apiKeys": [{"name": "web"}]}},
        {"gateway": {"env": {"WORKER_BACKEND": "eager"}}},
        {"worker": {"env": {"WORKER_STREAMS": 1}}},
        {"registry": {"url": "/a/folder"}},
    ],
    ids=str,
)
def test_the_schema_refuses(values: Object) -> None:
    with Chart.load(CHART) as chart, pytest.raises(HelmValuesError):
        chart.validate_schema(values)
