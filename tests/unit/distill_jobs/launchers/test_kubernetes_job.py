"""What a trainer's Job looks like, and what is read from Jobs and pods that ended."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from distill_jobs.exit_codes import REFUSED
from distill_jobs.launchers._kubernetes_job import Object, job_of, judged, waits_for
from distill_jobs.launchers.base import Order
from engines.errors import InvalidRequest
from tests.chart.test_valid import KUBERNETES
from tests.unit.distill_jobs.launchers.test_kubernetes import TEMPLATE

RESOURCES: Object = {"requests": {"memory": "8Gi"}, "limits": {"cpu": "1500m", "memory": "8Gi", "nvidia.com/gpu": 1}}


def job(processes: int, most_in_pod: int, template: Object = TEMPLATE) -> Object:
    order = Order("dj_0123456789ab", Path("/registry/jobs/dj_0123456789ab"), "train", 7, 1, 0, processes)
    pod = template["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    spec = pod["spec"] | {"containers": [container | {"resources": RESOURCES}]}
    told = template | {"spec": template["spec"] | {"template": pod | {"spec": spec}}}
    return job_of(order, told, most_in_pod=most_in_pod)


def trainer(made: Object) -> Object:
    found: Object = made["spec"]["template"]["spec"]["containers"][0]
    return found


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("most_in_pod", [1, 4])
def test_a_job_is_valid(version: str, most_in_pod: int) -> None:
    assert kubernetes_validate.validate(job(4, most_in_pod), version, strict=True) == version


def test_a_pod_has_the_resources_of_its_processes_and_as_many_threads_as_whole_cores() -> None:
    made = trainer(job(4, 4))
    limits = {"cpu": "6000m", "memory": "32Gi", "nvidia.com/gpu": "4"}
    assert made["resources"] == {"requests": {"memory": "32Gi"}, "limits": limits}
    assert {"--threads=6", "--processes=4", "distill_jobs.launch"} <= set(made["command"])
    assert not [option for option in made["command"] if option.startswith("--node")]


@pytest.mark.parametrize(("processes", "most", "pods"), [(1, 8, 1), (4, 1, 4), (6, 4, 2), (5, 4, 5), (16, 8, 2)])
def test_processes_spread_evenly_over_pods(processes: int, most: int, pods: int) -> None:
    spec = job(processes, most)["spec"]
    assert (spec["completions"], spec["parallelism"]) == (pods, pods)
    assert spec["completionMode"] == ("NonIndexed" if pods == 1 else "Indexed")


def test_several_pods_meet_at_the_first_and_one_needs_nobody() -> None:
    several = {"--nodes=2", "--node-rank=$(JOB_COMPLETION_INDEX)", "--processes=2"}
    master = "--master=demo-trainer-dj-0123456789ab-train-0.demo-trainer:29500"
    assert several | {master} <= set(trainer(job(4, 2))["command"])
    assert "distill_jobs.train" in trainer(job(1, 2))["command"]


def test_several_pods_need_a_name_to_meet_under() -> None:
    pod = TEMPLATE["spec"]["template"]
    spec = {key: value for key, value in pod["spec"].items() if key != "subdomain"}
    with pytest.raises(InvalidRequest, match="2 pods, and the template has no subdomain"):
        job(2, 1, TEMPLATE | {"spec": {"template": pod | {"spec": spec}}})


def test_nobody_else_starts_a_trainer_again_and_it_has_no_rights() -> None:
    made = job(1, 1)
    assert (made["spec"]["backoffLimit"], made["spec"]["ttlSecondsAfterFinished"]) == (0, 3600)
    pod = made["spec"]["template"]
    assert (pod["spec"]["restartPolicy"], pod["spec"]["automountServiceAccountToken"]) == ("Never", False)
    for each in (made, pod):
        assert each["metadata"]["labels"].items() >= {("fewstep/job", "dj_0123456789ab"), ("fewstep/phase", "train")}


FAILED = {"type": "Failed", "reason": "BackoffLimitExceeded", "message": "Job has reached the limit"}
LATE = {"type": "Failed", "reason": "DeadlineExceeded", "message": "Job was active longer than specified deadline"}


def pod(code: int, at: str = "", why: str = "Error", **status: Any) -> Object:
    state = {"terminated": {"exitCode": code, "reason": why, "finishedAt": at}}
    return {"status": {"containerStatuses": [{"state": state}], **status}}


@pytest.mark.parametrize(
    ("condition", "pods", "code", "because"),
    [
        ({"type": "Complete"}, [pod(0)], 0, ""),
        (FAILED, [pod(143, "2026-01-01T00:00:09Z"), pod(1, "2026-01-01T00:00:01Z")], 1, ""),
        (FAILED, [pod(137, "2026-01-01T00:00:01Z"), pod(REFUSED, "2026-01-01T00:00:02Z")], REFUSED, ""),
        (FAILED, [pod(137, why="OOMKilled")], 137, "OOMKilled"),
        (FAILED, [pod(137, reason="Evicted", message="no space")], 137, "Evicted: no space"),
        (FAILED, [], 137, ""),
        (LATE, [], 137, "DeadlineExceeded: Job was active longer than specified deadline"),
    ],
    ids=["finished", "who failed first", "who refused", "memory", "evicted", "gone with its node", "too long"],
)
def test_the_end_of_pods_becomes_the_code_of_one_trainer(
    condition: Object, pods: list[Object], code: int, because: str
) -> None:
    end = judged(condition, pods)
    assert (end.code, end.because) == (code, because)


def test_only_what_lasts_is_waiting() -> None:
    def waiting(reason: str) -> str | None:
        state = {"waiting": {"reason": reason, "message": "see"}}
        return waits_for([{"status": {"containerStatuses": [{"state": state}]}}])

    assert [waiting(reason) for reason in ("ContainerCreating", "ImagePullBackOff")] == [None, "ImagePullBackOff: see"]
