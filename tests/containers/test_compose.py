"""docker/compose.yaml for real: pictures, a student, killed containers, an orderly end."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_jobs.jobs import ENDED
from server.client import Client
from server.embedded import free_port
from tests.containers.engine import COMPOSE_FILE, ROOT, Engine
from tests.e2e.conftest import SMALL_JOB
from tests.eventually import eventually

pytestmark = pytest.mark.timeout(3600)

PROJECT, KEY = "fewstep-test", "a-long-enough-secret"
# Grafana's image cannot be made of Debian's packages, so its service is only checked (`config`, test_files.py).
SERVICES = ("redis", "gateway", "worker", "distiller", "prometheus", "alertmanager")
ASKED = {"model": "shapes", "prompt": "a small red circle above a large blue square", "seed": 7}
_START_S, _AGAIN_S, _JOB_S = 900, 180, 1200


@dataclass(frozen=True, slots=True)
class System:
    """The services of compose.yaml, and a client with a key."""

    engine: Engine
    env: dict[str, str]
    client: Client

    def compose(self, *arguments: str) -> str:
        return self.engine.run("compose", "--project-name", PROJECT, "--file", COMPOSE_FILE, *arguments, env=self.env)

    def state(self, service: str) -> dict[str, Any]:
        found: dict[str, Any] = self.engine.inspect(f"{PROJECT}-{service}-1")["State"]
        return found

    def kill(self, service: str) -> None:
        """As the kernel would for want of memory: Docker is not asked, and starts it again."""
        before = self.state(service)["Pid"]
        os.kill(before, signal.SIGKILL)
        eventually(lambda: self.state(service)["Pid"] not in (0, before), _AGAIN_S, pause_s=0.5)

    def healthy(self, service: str) -> None:
        eventually(lambda: self.state(service)["Health"]["Status"] == "healthy", _START_S, pause_s=1)


@pytest.fixture(scope="module")
def system(engine: Engine, images: Path, record_testsuite_property: Callable[[str, object], None]) -> Iterator[System]:
    port = free_port()
    env = {
        "API_KEYS": json.dumps([{"name": "web", "key": KEY, "scopes": ["generate", "distill", "admin"]}]),
        "REDIS_PASSWORD": "correctHorse1",
        "URL_SECRET": "x" * 32,
        "GRAFANA_PASSWORD": "correctHorse2",
        "COMPOSE_PROFILES": "cpu,seed",
        "GATEWAY_PORT": str(port),
        "PROMETHEUS_PORT": str(free_port()),
        "ALERTMANAGER_PORT": str(free_port()),
    }
    made = System(engine, env, Client(f"http://127.0.0.1:{port}", KEY))
    began_s = time.monotonic()
    try:
        made.compose("up", "--detach", *SERVICES)
        for service in SERVICES:
            if service != "alertmanager" and service != "prometheus":
                made.healthy(service)
                record_testsuite_property(f"{service}: healthy after", f"{time.monotonic() - began_s:.0f} s")
        yield made
    finally:
        made.compose("down", "--volumes", "--timeout", "60")
        made.client.close()


def test_compose_accepts_the_file_with_the_example(engine: Engine, tmp_path: Path) -> None:
    example = re.sub(r"^(\w+)=$", r"\1=x", (ROOT / "docker" / "example.env").read_text(), flags=re.M)
    (tmp_path / "env").write_text(example)
    told = ("--file", COMPOSE_FILE, "--env-file", tmp_path / "env", "--profile", "gpu")
    config = yaml.safe_load(engine.run("compose", *told, "config"))
    assert "worker-gpu" in config["services"]
    assert "grafana" in config["services"]
    assert not [each for each in config["services"]["grafana"]["environment"].values() if each is None]


@pytest.mark.parametrize("name", ["gateway", "worker", "distiller"])
def test_what_an_image_holds_is_written_beside_it_and_pinned(images: Path, name: str) -> None:
    (path,) = images.glob(f"fewstep-{name}-*.cdx.json")
    listed = {each["name"]: each["version"] for each in json.loads(path.read_text())["components"]}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    known = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    found = {name.lower().replace("_", "-"): version.split("+")[0] for name, version in listed.items()}
    assert "pip" not in found
    assert {each: version for each, version in found.items() if known.get(each) != version} == {"fewstep": "0.1.0"}
    assert ("torch" in found) == (name != "gateway")


def test_processes_are_nobody_and_change_nothing(system: System) -> None:
    for service in ("gateway", "worker", "distiller"):
        script = "id -u; touch /opt/x /etc/x 2>&1; touch /tmp/x && echo ok"
        said = system.compose("exec", "-T", service, "sh", "-c", script)
        assert said.split()[0] == "10001"
        assert said.count("Read-only file system") == 2
        assert said.strip().endswith("ok")


def test_a_picture_comes_and_prometheus_sees_everybody(system: System) -> None:
    assert system.client.generate(ASKED).content.startswith(b"\x89PNG")
    prometheus = Client(f"http://127.0.0.1:{system.env['PROMETHEUS_PORT']}")

    def up() -> set[str]:
        found = prometheus.get("/api/v1/query", query="up == 1")["data"]["result"]
        return {each["metric"]["instance"] for each in found}

    eventually(lambda: up() == {"gateway:8000", "worker:9100", "distiller:9100"}, _AGAIN_S, pause_s=1)
    rules = prometheus.get("/api/v1/rules")["data"]["groups"]
    assert "FewstepWorkerDown" in {rule["name"] for group in rules for rule in group["rules"]}
    prometheus.close()


def test_a_student_is_distilled_and_serves(system: System) -> None:
    job = system.client.post("/v1/distillation/jobs", SMALL_JOB)["id"]

    def ended() -> dict[str, Any] | None:
        read = system.client.get(f"/v1/distillation/jobs/{job}")
        return read if read["status"] in ENDED else None

    done = eventually(ended, _JOB_S, pause_s=2)
    assert done is not None
    assert done["status"] == "succeeded", done
    drawn = system.client.generate({**ASKED, "tier": "low"})
    assert done["student"].startswith(drawn.version)


def test_a_killed_worker_comes_back_and_draws(system: System) -> None:
    system.kill("worker")
    assert system.client.generate({**ASKED, "timeout_ms": 300_000}).content.startswith(b"\x89PNG")
    system.healthy("worker")


def test_a_killed_redis_forgets_no_accepted_request(system: System) -> None:
    system.compose("pause", "worker")
    accepted = system.client.post(
        "/v1/generations", {**ASKED, "seed": 8, "timeout_ms": 300_000}, headers={"prefer": "respond-async"}
    )
    system.kill("redis")
    system.healthy("redis")
    system.compose("unpause", "worker")

    def ended() -> bool:
        return bool(system.client.get(f"/v1/generations/{accepted['id']}")["status"] == "succeeded")

    eventually(ended, _AGAIN_S, pause_s=0.5)


def test_everything_ends_in_order_when_it_is_told_to(system: System) -> None:
    system.compose("stop")
    ended = {service: system.state(service) for service in SERVICES}
    assert {service: state["ExitCode"] for service, state in ended.items()} == dict.fromkeys(SERVICES, 0)
    assert not [service for service, state in ended.items() if state["OOMKilled"]]
