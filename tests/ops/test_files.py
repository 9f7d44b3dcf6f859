"""What can be said of the container files without a container: linted, pinned, limited, reachable from here alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_settings import BaseSettings

from distill_jobs.settings import DistillerSettings
from server.settings import GatewaySettings, WorkerSettings, load
from tests.chart.release import CHART, Release, ci_values

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
REQUIRED = {"API_KEYS": "[]", "REDIS_PASSWORD": "correctHorse1", "URL_SECRET": "x" * 32, "GRAFANA_PASSWORD": "y"}


def resolved(text: str) -> str:
    """A value as Compose hands it on, with the defaults and `REQUIRED`."""

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        return REQUIRED[name] if operator == "?" else rest or ""

    return VARIABLE.sub(value, text).replace("$$", "$")


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_front_end_is_fetched_to_build() -> None:
    assert "syntax=" not in (DOCKER / "Dockerfile").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_change_nothing_and_take_no_more_than_its_share(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert service["logging"]["options"]["max-size"]
    assert not service.get("privileged")
    assert not [each for each in service.get("volumes", ()) if "docker.sock" in each]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_an_image_of_one_version(name: str) -> None:
    image = resolved(SERVICES[name]["image"])
    assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", image), image
    assert "latest" not in image


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_asked_whether_it_is_well(name: str) -> None:
    """By itself, or by its image."""
    service = SERVICES[name]
    if service["restart"] == "no":
        return
    targets = re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", (DOCKER / "Dockerfile").read_text(), re.M | re.S)
    checked = {target for target, body in targets if "HEALTHCHECK" in body}
    ours = re.search(r"fewstep-(\w+):", service["image"])
    assert (ours and ours[1] in checked) or service["healthcheck"]["test"]


def test_ports_are_published_on_loopback_alone() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(ports) == {"gateway", "prometheus", "alertmanager", "grafana"}
    assert all(each.startswith("127.0.0.1:") for listed in ports.values() for each in listed)


def test_only_those_reach_redis_who_must() -> None:
    assert COMPOSE["networks"]["queue"]["internal"] is True
    on_it = {name for name, service in SERVICES.items() if "queue" in service.get("networks", ())}
    assert on_it == {"redis", "gateway", "worker", "worker-gpu", "distiller"}


def test_the_example_names_what_is_required_and_holds_no_secret() -> None:
    lines = [line for line in (DOCKER / "example.env").read_text().splitlines() if "=" in line]
    told = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    optional = {line.removeprefix("# ").split("=")[0] for line in lines if line.startswith("# ")}
    asked = {name: operator for name, operator, _ in VARIABLE.findall((DOCKER / "compose.yaml").read_text())}
    required = {name for name, operator in asked.items() if operator == "?"}
    assert required == set(REQUIRED) == {name for name, value in told.items() if not value}
    assert set(asked) - required <= set(told) | optional


@pytest.mark.parametrize(
    ("name", "cls"), [("gateway", GatewaySettings), ("worker", WorkerSettings), ("distiller", DistillerSettings)]
)
def test_a_process_reads_its_settings(name: str, cls: type[BaseSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of compose.yaml and those of its image."""
    stage = re.search(rf" AS {name}\n.*?^ENV (.*?)\n[A-Z]", (DOCKER / "Dockerfile").read_text(), re.M | re.S)
    assert stage is not None
    for variable, value in re.findall(r"(\w+)=(\S+)", stage[1]):
        monkeypatch.setenv(variable, value)
    for variable, value in SERVICES[name]["environment"].items():
        monkeypatch.setenv(variable, resolved(value))
    if name == "gateway":
        monkeypatch.setenv("GATEWAY_API_KEYS", '[{"name": "web", "key": "a-long-enough-secret"}]')
    read: Any = load(cls)
    mounted = {each.split(":")[1] for each in map(resolved, SERVICES[name]["volumes"])}
    assert read.registry_url in mounted
    assert read.redis_url == f"redis://:{REQUIRED['REDIS_PASSWORD']}@redis:6379/0"


def test_containers_get_the_time_that_processes_take_to_end() -> None:
    grace = {name: float(service.get("stop_grace_period", "10s")[:-1]) for name, service in SERVICES.items()}
    pods = {
        each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]["terminationGracePeriodSeconds"]
        for each in (workload["spec"]["template"] for workload in Release(ci_values("minimal")).workloads)
        if "terminationGracePeriodSeconds" in each["spec"]
    }
    assert grace["worker"] == grace["worker-gpu"] == pods["worker"]
    assert grace["distiller"] == pods["distiller"]
    assert grace["redis"] == pods["redis"]
    assert grace["gateway"] > 30 + GatewaySettings.model_fields["drain_s"].default + 5


def test_versions_are_those_of_the_package_and_the_chart() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    assert set(re.findall(r"FEWSTEP_VERSION:-([^}]+)", (DOCKER / "compose.yaml").read_text())) == {version[1]}
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version[1]
    assert SERVICES["redis"]["image"] == yaml.safe_load((CHART / "values.yaml").read_text())["redis"]["image"]


def test_prometheus_scrapes_the_jobs_that_alerts_know_and_forgets_no_target() -> None:
    here, elsewhere = (
        yaml.safe_load((DOCKER / "prometheus" / name).read_text()) for name in ("compose.yml", "prometheus.yml")
    )
    assert [each["job_name"] for each in here["scrape_configs"]] == [
        each["job_name"] for each in elsewhere["scrape_configs"]
    ]
    for job in here["scrape_configs"]:
        ((target,),) = (each["targets"] for each in job["static_configs"])
        name, port = target.split(":")
        assert "metrics" in SERVICES[name]["networks"]
        assert f"EXPOSE {port}" in (DOCKER / "Dockerfile").read_text()
    # One of the two kinds of worker is there, under the name that is scraped.
    assert "worker" in SERVICES["worker-gpu"]["networks"]["metrics"]["aliases"]
    flags = " ".join(SERVICES["prometheus"]["command"])
    assert "enable-lifecycle" not in flags
    assert "enable-admin-api" not in flags


def test_grafana_asks_for_a_password() -> None:
    told = SERVICES["grafana"]["environment"]
    assert told["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD:?")
    assert told["GF_AUTH_ANONYMOUS_ENABLED"] == "false"


@pytest.mark.prometheus
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("promtool", ["check", "config", "prometheus/compose.yml"]),
        ("amtool", ["check-config", "alertmanager/alertmanager.yml"]),
    ],
)
def test_the_programs_accept_their_files(program: str, arguments: list[str]) -> None:
    if not shutil.which(program):
        reason = f"no {program} on PATH: apt-get install prometheus prometheus-alertmanager"
        pytest.fail(reason) if os.environ.get("CI") and program == "promtool" else pytest.skip(reason)
    done = subprocess.run([program, *arguments], cwd=DOCKER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
