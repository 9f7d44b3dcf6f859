"""Each process starts from the environment that its pod would have: its own settings read it."""

import json
import re
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pydantic_settings import BaseSettings
from typer.testing import CliRunner

from distill_jobs.settings import DistillerSettings
from helm.values_table import README
from server import tracing
from server.cli import app
from server.settings import GatewaySettings, WorkerSettings, load
from tests.chart.release import CI, Object, Release, ci_values, container, env, with_values

AnySettings = TypeVar("AnySettings", bound=BaseSettings)
CPU_LIMIT = "6"
PROCESSES = ("gateway", "worker", "distiller")


def settings(cls: type[AnySettings], release: Release, workload: Object, patch: pytest.MonkeyPatch) -> AnySettings:
    """What `fewstep …` reads in the pod, every reference of its environment looked up."""
    for name, entry in env(workload).items():
        if name != "HOME":
            patch.setenv(name, value_of(release, entry))
    return load(cls)


def value_of(release: Release, entry: Object) -> str:
    if "value" in entry:
        assert isinstance(entry["value"], str)
        return entry["value"]
    if "fieldRef" in entry["valueFrom"]:
        return "demo-fewstep-distiller-0"
    if "resourceFieldRef" in entry["valueFrom"]:
        assert entry["valueFrom"]["resourceFieldRef"] == {"resource": "limits.cpu"}
        return CPU_LIMIT
    reference = entry["valueFrom"]["secretKeyRef"]
    secrets = [each for each in release.all("Secret") if each["metadata"]["name"] == reference["name"]]
    known = {"url": "redis://kept.elsewhere:6379/0", "url-secret": "kept-elsewhere-as-well"}
    return str((secrets[0]["stringData"] if secrets else known)[reference["key"]])


@pytest.mark.parametrize("name", CI)
def test_a_gateway_reads_its_settings(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = Release(ci_values(name))
    keys = [
        each["stringData"]["api-keys.json"] for each in release.all("Secret") if "-auth" in each["metadata"]["name"]
    ]
    path = tmp_path / "api-keys.json"
    path.write_text(keys[0] if keys else json.dumps([{"name": "web", "key": "a-long-enough-secret"}]))
    gateway = release.one("Deployment", "-gateway")
    (mount,) = [each for each in container(gateway)["volumeMounts"] if each["name"] == "auth"]
    told = env(gateway)["GATEWAY_API_KEYS_FILE"]
    assert told["value"] == f"{mount['mountPath']}/api-keys.json"
    told["value"] = str(path)

    read = settings(GatewaySettings, release, gateway, monkeypatch)

    assert [key.name for key in read.keys] == ["web"]
    assert (read.host, read.port) == ("0.0.0.0", container(gateway)["ports"][0]["containerPort"])
    assert read.url_secret is not None
    assert read.base_url.startswith(("http://demo-fewstep-gateway.images.svc", "https://images.example.com"))


@pytest.mark.parametrize("name", CI)
def test_workers_read_their_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release = Release(ci_values(name))
    workers = [each for each in release.all("Deployment") if "-worker-" in each["metadata"]["name"]]
    assert len(workers) == len(ci_values(name).get("pools", ["default"]))
    for worker in workers:
        with monkeypatch.context() as patch:
            read = settings(WorkerSettings, release, worker, patch)
        assert read.metrics_port == container(worker)["ports"][0]["containerPort"]
        assert str(read.cache_dir) in {each["mountPath"] for each in container(worker)["volumeMounts"]}
        assert worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > read.drain_s + 5
        assert read.threads == int(CPU_LIMIT)


def test_a_distiller_reads_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Release(ci_values("full"))
    distiller = release.one("StatefulSet", "-distiller")
    read = settings(DistillerSettings, release, distiller, monkeypatch)
    mounted = {each["mountPath"] for each in container(distiller)["volumeMounts"]}
    assert {str(read.work_dir), str(read.data_dir), read.registry_url} <= mounted
    assert (read.max_processes, read.threads, read.nice) == (2, int(CPU_LIMIT), 0)


def test_a_pool_has_what_it_says_and_the_rest_of_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Release(ci_values("full"))
    cpu, gpu = (release.one("Deployment", f"-worker-{pool}") for pool in ("cpu", "gpu"))
    with monkeypatch.context() as patch:
        read = settings(WorkerSettings, release, cpu, patch)
        assert (read.backend, read.precision, read.deployments) == ("openvino", "bf16", ("shapes", "digits"))
    with monkeypatch.context() as patch:
        read = settings(WorkerSettings, release, gpu, patch)
        assert (read.backend, read.precision, read.batch_sizes) == ("tensorrt", "auto", (1, 2, 4, 8))
    assert container(cpu)["image"] == "registry.example.com/fewstep/fewstep-worker:0.1.0"
    assert container(gpu)["image"].endswith(":0.1.0-tensorrt")
    assert container(gpu)["resources"]["limits"] == {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": 1}
    spec = gpu["spec"]["template"]["spec"]
    assert (spec["runtimeClassName"], spec["tolerations"][0]["key"]) == ("nvidia", "nvidia.com/gpu")
    assert "runtimeClassName" not in cpu["spec"]["template"]["spec"]


def test_a_redis_elsewhere_may_be_several_with_sentinels(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "rediss+sentinel://user:secret@one:26379,two:26379/pictures/0"
    release = with_values("external", redis={"url": url})
    read = settings(WorkerSettings, release, release.one("Deployment", "-worker-default"), monkeypatch)
    assert read.redis_url == url


def test_every_process_is_told_where_its_spans_go() -> None:
    workloads = [each for each in Release(ci_values("full")).workloads if container(each)["command"][-1] in PROCESSES]
    assert len(workloads) == len(["gateway", "cpu", "gpu", "distiller"])
    for each in workloads:
        assert tracing.wanted({name: entry.get("value", "") for name, entry in env(each).items()})


def test_what_the_readme_says_to_delete_with_is_run_by_a_worker(tmp_path: Path) -> None:
    said = re.search(r"exec deploy/fewstep(\S+) -- fewstep (gc [^`]+)`", README.read_text())
    assert said is not None
    there = env(Release(ci_values("minimal")).one("Deployment", said[1]))
    arguments = said[2].split()
    for option, variable in {"--registry-url": "WORKER_REGISTRY_URL", "--cache-dir": "WORKER_CACHE_DIR"}.items():
        at = arguments.index(option) + 1
        assert arguments[at] == there[variable]["value"]
        arguments[at] = str(tmp_path / arguments[at].strip("/"))
        Path(arguments[at]).mkdir(parents=True)
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.output.strip().splitlines()[-1]) == (0, "nothing to delete")


def test_a_password_that_changes_brings_new_pods() -> None:
    before, after = (with_values("minimal", redis={"password": password}) for password in ("one", "two"))
    for old, new in zip(before.workloads, after.workloads, strict=True):
        assert annotations(old)["checksum/secrets"] != annotations(new)["checksum/secrets"]


def test_a_key_that_changes_brings_new_gateways_alone() -> None:
    before, after = (
        with_values("minimal", auth={"apiKeys": [{"name": "web", "sha256": digit * 64}]}).workloads for digit in "ab"
    )
    changed = [new["metadata"]["name"] for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["demo-fewstep-gateway"]


def test_no_password_can_be_tried_on_what_those_see_who_see_no_secrets() -> None:
    """A sum holds what nobody guesses, too; where there is no such thing, there is no sum."""

    def seen(**auth: str) -> list[list[Object]]:
        changes: dict[str, Any] = {"auth": auth, "registry": {"seed": "shapes"}}
        return [with_values("minimal", redis={"password": each}, **changes).workloads for each in ("one", "two")]

    kept_elsewhere, again = seen(existingSecret="kept-elsewhere")
    assert kept_elsewhere == again
    for salted, otherwise in zip(seen(urlSecret="x" * 32)[0], seen(urlSecret="y" * 32)[0], strict=True):
        if salted["kind"] == "Job":
            assert salted == otherwise
        else:
            assert annotations(salted)["checksum/secrets"] != annotations(otherwise)["checksum/secrets"]


def test_a_seed_for_other_values_is_another_job() -> None:
    names = [
        with_values("full", registry={"seed": seed}).all("Job")[0]["metadata"]["name"] for seed in ("shapes", "digits")
    ]
    assert names[0] != names[1]


def annotations(workload: Object) -> dict[str, Any]:
    found: dict[str, Any] = workload["spec"]["template"]["metadata"]["annotations"]
    return found
