"""The pods of the chart for real: what Helm renders is given to `podman kube play`, and a picture comes."""

import copy
import hashlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.client import Client
from tests.chart.release import NAMESPACE, Object, Release, container, with_values
from tests.containers.engine import Engine, missing
from tests.eventually import eventually

pytestmark = pytest.mark.timeout(1800)

KEY = "a-long-enough-secret"
NETWORK = f"fewstep-{secrets.token_hex(3)}"
_START_S = 600
_REDIS_IMAGE = "docker.io/valkey/valkey:8.1.1-bookworm"
# Podman knows liveness alone, by a curl that no image of ours holds; ports it would open on every address of this host.
_LEFT_OUT = ("startupProbe", "livenessProbe", "readinessProbe", "lifecycle", "ports")


@dataclass(frozen=True, slots=True)
class Podman:
    """Storage of its own. No systemd is asked for cgroups."""

    folder: Path

    @property
    def command(self) -> tuple[str | Path, ...]:
        folders = {"--root": "root", "--runroot": "run", "--network-config-dir": "networks"}
        told = (word for option, name in folders.items() for word in (option, self.folder / name))
        return ("podman", *told, "--cgroup-manager", "cgroupfs", "--runtime", "runc")

    @property
    def env(self) -> dict[str, str]:
        """Its own default for open files and processes is more than some machines let anybody have."""
        settings = self.folder / "containers.conf"
        settings.write_text('[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n')
        return {**os.environ, "CONTAINERS_CONF": str(settings)}

    def run(self, *arguments: str | Path, told: str | None = None) -> str:
        done = subprocess.run(
            (*self.command, *arguments), env=self.env, input=told, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"podman {' '.join(map(str, arguments))}: {done.stderr[-4000:]}"
        return done.stdout

    def logs(self, container: str) -> str:
        """The end of what it said."""
        command = (*self.command, "logs", "--tail", "40", container)
        done = subprocess.run(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
        return done.stdout.decode(errors="replace")

    def play(self, *objects: Object) -> None:
        self.run("kube", "play", "--network", NETWORK, "-", told=yaml.safe_dump_all(objects))

    def ready(self, pod: str, workload: Object) -> bool:
        """What the kubelet would ask of an exec probe."""
        probe = container(workload)["readinessProbe"]["exec"]["command"]
        name = f"{pod}-{container(workload)['name']}"
        command = (*self.command, "exec", name, *probe)
        return not subprocess.run(command, env=self.env, capture_output=True, check=False).returncode

    def address(self, pod: str) -> str:
        (inspected,) = json.loads(self.run("inspect", self.infra(pod)))
        (network,) = inspected["NetworkSettings"]["Networks"].values()
        return str(network["IPAddress"])

    def infra(self, pod: str) -> str:
        found: dict[str, Any] = json.loads(self.run("pod", "inspect", pod))
        return str(found["InfraContainerID"])


def pod(workload: Object, release: Release, redis: str | None = None) -> Object:
    """The pod that a workload makes, as a Pod: podman knows Deployments, and neither StatefulSets nor Jobs.

    Podman 4.3 makes Secrets that it cannot read into an environment and mounts undecoded. So what they hold stands in
    the environment itself, and a ConfigMap is mounted.
    """
    secrets_of = {each["metadata"]["name"]: each["stringData"] for each in release.all("Secret")}
    template = copy.deepcopy(workload["spec"]["template"])
    for each in template["spec"]["containers"]:
        for name in _LEFT_OUT:
            each.pop(name, None)
        for variable in each.get("env", ()):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                variable.pop("valueFrom")
                variable["value"] = secrets_of[reference["name"]][reference["key"]]
    for volume in template["spec"].get("volumes", ()):
        if secret := volume.pop("secret", None):
            volume["configMap"] = {"name": secret["secretName"], "items": secret["items"]}
        if "emptyDir" in volume:  # podman would share it with all pods that have one of that name
            _rename(volume, f"{workload['metadata']['name']}-{volume['name']}", template["spec"])
    for claim in workload["spec"].get("volumeClaimTemplates", ()):
        name = claim["metadata"]["name"]
        template["spec"].setdefault("volumes", []).append({"name": name, "persistentVolumeClaim": {"claimName": name}})
    if redis is not None:  # its address, since Services have no names here
        template["spec"]["hostAliases"] = [{"ip": redis, "hostnames": [f"demo-fewstep-redis.{NAMESPACE}.svc"]}]
    name = workload["metadata"]["name"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": template["metadata"]["labels"]},
        "spec": template["spec"],
    }


def _rename(volume: Object, name: str, spec: Object) -> None:
    for mount in (mount for each in spec["containers"] for mount in each["volumeMounts"]):
        if mount["name"] == volume["name"]:
            mount["name"] = name
    volume["name"] = name


def config_map(secret: Object) -> Object:
    """What a pod mounts, under the same name."""
    metadata = {"name": secret["metadata"]["name"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": secret["stringData"]}


@pytest.fixture(scope="module")
def release() -> Release:
    key = {"name": "web", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "scopes": ["generate", "admin"]}
    return with_values(
        "minimal",
        auth={"apiKeys": [key], "urlSecret": secrets.token_hex(8)},
        registry={"seed": "shapes"},
        worker={"resources": {"limits": {"cpu": "2", "memory": "8Gi"}, "requests": {"cpu": "1", "memory": "1Gi"}}},
    )


@pytest.fixture(scope="module")
def podman(engine: Engine, images: Path, scratch: Path) -> Iterator[Podman]:
    """Podman with our images and that of Redis."""
    if shutil.which("podman") is None or os.geteuid():
        missing("no podman, or not root: apt-get install podman runc catatonit")
    folder = scratch / "podman"
    folder.mkdir()
    made = Podman(folder)
    ours = [path.name.removesuffix(".cdx.json") for path in images.glob("*.cdx.json")]
    named = [":".join(each.rsplit("-", 1)) for each in ours]
    engine.run("save", "--output", folder / "images.tar", *named, _REDIS_IMAGE)
    made.run("load", "--quiet", "--input", folder / "images.tar")
    (folder / "images.tar").unlink()
    made.run("network", "create", NETWORK)
    made.run("tag", "localhost/valkey/valkey:8.1.1-bookworm", _REDIS_IMAGE)
    try:
        yield made
    finally:
        made.run("pod", "rm", "--all", "--force", "--time", "10")
        made.run("network", "rm", NETWORK)
        made.run("system", "reset", "--force")


@pytest.fixture(scope="module")
def playing(podman: Podman, release: Release) -> Podman:
    """Redis, a seeded registry, a gateway and a worker."""
    redis = release.one("StatefulSet", "-redis")
    (seed,) = release.all("Job")
    podman.play(*release.all("PersistentVolumeClaim"))
    podman.play(pod(redis, release))
    eventually(lambda: podman.ready("demo-fewstep-redis", redis), _START_S, pause_s=0.5)
    podman.play(pod(seed, release))
    name = f"{seed['metadata']['name']}-{container(seed)['name']}"
    assert podman.run("wait", name).strip() == "0", podman.logs(name)
    told = map(config_map, release.all("Secret"))
    address = podman.address("demo-fewstep-redis")
    podman.play(*told, pod(release.one("Deployment", "-gateway"), release, address))
    podman.play(pod(release.one("Deployment", "-worker-default"), release, address))
    return podman


def test_a_gateway_and_a_worker_become_ready_and_draw(playing: Podman, release: Release) -> None:
    worker = release.one("Deployment", "-worker-default")
    eventually(lambda: playing.ready("demo-fewstep-worker-default", worker), _START_S, pause_s=1)
    client = Client(f"http://{playing.address('demo-fewstep-gateway')}:8000", KEY)
    eventually(client.ready, 60, pause_s=0.5)
    asked = {"model": "shapes", "prompt": "a small red circle", "seed": 7, "timeout_ms": 120_000}
    assert client.generate(asked).content.startswith(b"\x89PNG")
    client.close()


def test_they_are_nobody_and_change_nothing(playing: Podman) -> None:
    for name in ("gateway-gateway", "worker-default-worker"):
        script = "id -u; touch /opt/x /etc/x 2>&1; touch /tmp/x && echo ok"
        said = playing.run("exec", f"demo-fewstep-{name}", "sh", "-c", script)
        assert said.split()[0] == "10001"
        assert said.count("Read-only file system") == 2
        assert said.strip().endswith("ok")


def test_they_end_in_order_when_they_are_told_to(playing: Podman) -> None:
    for name, container_name in (("gateway", "gateway"), ("worker-default", "worker")):
        # As a kubelet does. `podman pod stop` takes the pod's network away first, and they would end without Redis.
        playing.run("stop", "--time", "60", f"demo-fewstep-{name}-{container_name}")
        (found,) = json.loads(playing.run("inspect", f"demo-fewstep-{name}-{container_name}"))
        assert found["State"]["ExitCode"] == 0, (found["State"], playing.logs(found["Id"]))
