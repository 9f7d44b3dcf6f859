"""Trainers as Jobs of their own: what distillers make of the chart's template, and what they may."""

from pathlib import Path

import kubernetes_validate
import pytest

from distill_jobs.launchers import _kubernetes_job as jobs
from distill_jobs.launchers.base import Order
from distill_jobs.settings import DistillerSettings
from tests.chart.release import Object, Release, ci_values, container, with_values
from tests.chart.test_processes import settings
from tests.chart.test_valid import KUBERNETES

ID = "dj_" + "0" * 24


@pytest.fixture
def release() -> Release:
    return Release(ci_values("jobs"))


def job(release: Release, processes: int, phase: str = "train") -> Object:
    order = Order(ID, Path(f"/registry/jobs/{ID}"), phase, 3, processes=processes)  # type: ignore[arg-type]
    assert release.trainer is not None
    return jobs.job_of(order, release.trainer, most_in_pod=8)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("processes", [1, 16])
def test_the_job_of_a_trainer_is_valid(release: Release, processes: int, version: str) -> None:
    assert kubernetes_validate.validate(job(release, processes), version, strict=True) == version


def test_a_distiller_is_told_how_to_make_it(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = release.one("StatefulSet", "-distiller")
    read = settings(DistillerSettings, release, distiller, monkeypatch)
    assert (read.launcher, read.max_processes, read.processes_per_pod) == ("kubernetes", 16, 8)
    assert (read.kubernetes_pod, str(read.job_template)) == ("demo-fewstep-distiller-0", "/etc/fewstep/job.json")
    mounts = {each["mountPath"]: each["name"] for each in container(distiller)["volumeMounts"]}
    volumes = {each["name"]: each for each in distiller["spec"]["template"]["spec"]["volumes"]}
    assert volumes[mounts["/etc/fewstep"]]["configMap"]["name"] == "demo-fewstep-trainer"


def test_a_trainer_sees_what_its_distiller_sees_under_the_same_names_and_no_secret(release: Release) -> None:
    distiller, trainer = release.one("StatefulSet", "-distiller"), release.trainer
    assert trainer is not None
    mounts = [
        {each["mountPath"]: each for each in container(workload)["volumeMounts"]} for workload in (trainer, distiller)
    ]
    assert {path: mounts[1][path] for path in mounts[0]} == mounts[0]
    claims = [
        {each["name"]: each["persistentVolumeClaim"] for each in workload["spec"]["template"]["spec"]["volumes"]
         if "persistentVolumeClaim" in each}
        for workload in (trainer, distiller)
    ]  # fmt: skip
    assert claims[0] == claims[1]
    assert container(trainer)["env"] == [{"name": "HOME", "value": "/tmp"}]
    assert "envFrom" not in container(trainer)


def test_a_pod_of_eight_processes_has_eight_gpus_and_the_image_of_trainers(release: Release) -> None:
    made = container(job(release, 16))
    assert made["resources"]["limits"] == {"cpu": "64", "memory": "256Gi", "nvidia.com/gpu": "8"}
    assert made["image"] == "fewstep-trainer:0.1.0-cuda"


def test_pods_of_a_trainer_meet_through_the_service(release: Release) -> None:
    made, service = job(release, 16), release.one("Service", "-trainer")
    (master,) = [each for each in container(made)["command"] if each.startswith("--master=")]
    host, port = master.removeprefix("--master=").split(":")
    assert host == f"{made['metadata']['name']}-0.{service['metadata']['name']}"
    assert service["spec"]["ports"][0]["port"] == int(port) == container(made)["ports"][0]["containerPort"]
    assert service["spec"]["publishNotReadyAddresses"] is True
    labels = made["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


@pytest.mark.parametrize("name", ["demo", "a-release-of-a-very-long-name-that-is-cut"])
def test_names_leave_room_for_the_index_of_a_pod(name: str) -> None:
    made = job(Release(ci_values("jobs"), name=name), 16, "prepare")["metadata"]["name"]
    assert len(f"{made}-99") <= 63


def test_distillers_may_make_and_watch_trainers_and_nothing_else(release: Release) -> None:
    (role,), (binding,) = release.all("Role"), release.all("RoleBinding")
    rights = {(verb, kind) for rule in role["rules"] for verb in rule["verbs"] for kind in rule["resources"]}
    assert rights == {
        ("create", "jobs"), ("get", "jobs"), ("list", "jobs"), ("delete", "jobs"), ("get", "pods"), ("list", "pods"),
    }  # fmt: skip
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (subject,) = binding["subjects"]
    holders = [
        workload["metadata"]["name"]
        for workload in release.workloads
        if workload["spec"]["template"]["spec"]["serviceAccountName"] == subject["name"]
    ]
    assert holders == ["demo-fewstep-distiller"]


def test_an_account_of_yours_is_the_one_that_is_bound() -> None:
    release = with_values("jobs", serviceAccount={"create": False, "name": "mine"})
    assert release.all("RoleBinding")[0]["subjects"][0]["name"] == "mine"
    assert {pod["spec"]["serviceAccountName"] for pod in release.pods} == {"mine"}


def test_trainers_talk_to_each_other_and_to_dns_servers_alone(release: Release) -> None:
    spec = release.one("NetworkPolicy", "-trainer")["spec"]
    assert spec["ingress"] == [{"from": [{"podSelector": spec["podSelector"]}]}]
    others, dns = spec["egress"]
    assert others == {"to": [{"podSelector": spec["podSelector"]}]}
    assert {port["port"] for port in dns["ports"]} == {53}
    assert (
        job(release, 1)["spec"]["template"]["metadata"]["labels"].items() >= spec["podSelector"]["matchLabels"].items()
    )


def test_distillers_reach_the_api_where_it_is(release: Release) -> None:
    (rule,) = release.one("NetworkPolicy", "-distiller")["spec"]["egress"]
    assert rule["to"] == [{"ipBlock": {"cidr": "10.96.0.1/32"}}]
    assert {port["port"] for port in rule["ports"]} == {443, 6443}
