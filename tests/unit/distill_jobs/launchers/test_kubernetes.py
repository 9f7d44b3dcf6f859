"""A keeper over Kubernetes Jobs: a real API over HTTP, and pods that are real processes of small programs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from distill_jobs.keeper import TrainerKeeper
from distill_jobs.launchers.base import Hearing, Order, open_launcher
from distill_jobs.metrics import DistillMetrics
from distill_jobs.records import JobRecords
from distill_jobs.settings import DistillerSettings
from distill_jobs.watch import Interrupted
from engines.errors import Conflict, Diverged, InvalidRequest, JobFailed, LeaseLost, PermissionDenied
from engines.registry.files import FilesRegistry
from tests.eventually import eventually
from tests.kubernetes_server import KubernetesServer, containing, serving

SCOPE = {f"app.kubernetes.io/{key}": value for key, value in [("instance", "demo"), ("component", "trainer")]}
TEMPLATE: dict[str, Any] = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "demo-trainer", "labels": SCOPE},
    "spec": {
        "template": {
            "metadata": {"labels": SCOPE},
            "spec": {
                "subdomain": "demo-trainer",
                "terminationGracePeriodSeconds": 10,
                "containers": [{"name": "trainer", "image": "fewstep-distiller"}],
            },
        }
    },
}

# `$3` is the job's folder.
FINISHES = 'touch "$3/finished"'
DIES = "echo last words; kill -9 $$"
REFUSES = """echo '{"code": "diverged", "message": "no number"}' > "$3/failure.json"; exit 65"""
WAITS = """trap 'touch "$3/saved"; exit 75' TERM; touch "$3/began"; while :; do sleep .02; done"""
WAITS_FOR_A_WORD = 'touch "$3/began"; until [ -e "$3/go" ]; do sleep .02; done; touch "$3/finished"'


class Shop:
    """A cluster whose trainers run `script`, a job, and keepers as distillers would have them."""

    def __init__(self, folder: Path, server: KubernetesServer) -> None:
        self.server, self.registry = server, FilesRegistry(str(folder / "registry"))
        self.records = JobRecords(self.registry)
        self.job = self.records.create({})
        found = self.registry.job_path(self.job.id)
        assert found is not None
        self.folder = found
        (folder / "job.json").write_text(json.dumps(TEMPLATE))
        self.settings = DistillerSettings(
            redis_url="redis://none",
            registry_url=str(folder),
            launcher="kubernetes",
            job_template=folder / "job.json",
            kubernetes_url=server.url,
            kubernetes_account=server.account,
            kubernetes_pod="distiller-0",
            kubernetes_poll_s=0.02,
        )
        self.launcher = open_launcher(self.settings)

    def keeper(self, check: Callable[[], None] = lambda: None, processes: int = 1) -> TrainerKeeper:
        return TrainerKeeper(
            self.job.id,
            self.folder,
            1,
            records=self.records,
            settings=self.settings,
            metrics=DistillMetrics(CollectorRegistry()),
            check=check,
            launcher=self.launcher,
            processes=processes,
        )

    def trains(self, check: Callable[[], None] = lambda: None) -> None:
        self.keeper(check).run("train", (self.folder / "finished").exists)

    def left_by_a_distiller(self) -> None:
        """One that died without a word while its trainer runs."""
        life = self.launcher.start(Order(self.job.id, self.folder, "train", 1), Hearing())
        eventually(lambda: life.wait(0) is not None or (self.folder / "began").exists())

    @property
    def notes(self) -> list[str]:
        return [event["message"] for event in self.records.events(self.job.id) if event["event"] == "note"]

    @property
    def names(self) -> list[str]:
        """Of all Jobs that were ever made."""
        return [job["metadata"]["name"] for job in self.server.created]


@pytest.fixture
def shop(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Shop]:
    with serving(tmp_path, containing(tmp_path, request.param)) as server:
        yield Shop(tmp_path, server)


def running(script: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shop", [script], indirect=True, ids=[""])


@running(FINISHES)
def test_a_trainer_that_finishes_leaves_nothing_in_the_cluster(shop: Shop) -> None:
    shop.trains()
    assert shop.names == [f"demo-trainer-{shop.job.id.replace('_', '-')}-train"]
    assert shop.server.jobs == {}
    assert shop.notes == []


@running(DIES)
def test_one_that_dies_is_tried_again_by_the_keeper_alone_and_given_up_with_its_last_words(shop: Shop) -> None:
    with pytest.raises(JobFailed, match=r"died 3 times without getting further .*last words: last words"):
        shop.trains()
    assert len(shop.names) == 3
    assert {job["spec"]["backoffLimit"] for job in shop.server.created} == {0}
    assert shop.server.jobs == {}
    assert shop.notes[:2] == ["Kubernetes: OOMKilled", "the trainer ended with code 137; one more try"]


@running(REFUSES)
def test_one_that_gives_up_is_not_tried_again(shop: Shop) -> None:
    with pytest.raises(Diverged, match="no number"):
        shop.trains()
    assert len(shop.names) == 1


@running(WAITS)
@pytest.mark.parametrize("why", ["cancel", "pause"])
def test_a_job_that_is_canceled_or_paused_takes_its_pods_away_and_the_trainer_saves(shop: Shop, why: Any) -> None:
    def check() -> None:
        if (shop.folder / "began").exists():
            raise Interrupted(why)

    with pytest.raises(Interrupted):
        shop.trains(check)
    assert shop.server.jobs == {}
    assert (shop.folder / "saved").exists()


@running(WAITS)
@pytest.mark.parametrize("error", [Interrupted("stop"), LeaseLost("another has it")], ids=["stop", "lease lost"])
def test_a_distiller_that_goes_leaves_the_trainer_to_the_next(shop: Shop, error: Exception) -> None:
    def check() -> None:
        if (shop.folder / "began").exists():
            raise error

    with pytest.raises(type(error)):
        shop.trains(check)
    assert [name for name, pods in shop.server.pods.items() if pods[0].is_there()] == shop.names


@running(WAITS_FOR_A_WORD)
def test_a_distiller_that_comes_back_watches_the_trainer_that_is_there_and_it_is_no_try(shop: Shop) -> None:
    shop.records.write(shop.job.id, "tries.json", {"marker": ["train"], "lives": 3})
    shop.left_by_a_distiller()
    shop.trains((shop.folder / "go").touch)
    assert len(shop.names) == 1
    assert shop.server.jobs == {}


@running(DIES)
def test_a_death_that_no_distiller_saw_is_seen_by_the_next(shop: Shop) -> None:
    life = shop.launcher.start(Order(shop.job.id, shop.folder, "train", 1), Hearing())
    eventually(lambda: life.wait(0) or shop.server.created)
    with pytest.raises(JobFailed):
        shop.trains()
    assert shop.notes.count("the trainer ended with code 137; one more try") == len(shop.names) == 4


@running(WAITS_FOR_A_WORD)
@pytest.mark.parametrize("how", ["down", "mute"])
def test_while_the_api_is_away_nothing_is_lost_and_nothing_made_twice(shop: Shop, how: str) -> None:
    """Away before the Job is made, or so that it is made and nobody hears of it; and again while the trainer runs."""
    looks: list[int] = []
    setattr(shop.server, how, True)

    def check() -> None:
        looks.append(shop.server.asked)
        if looks[-1] == 2 or (shop.folder / "finished").exists():
            setattr(shop.server, how, False)
        elif (shop.folder / "began").exists() and not (shop.folder / "go").exists():
            setattr(shop.server, how, True)
            (shop.folder / "go").touch()

    shop.trains(check)
    assert len(shop.names) == 1
    assert shop.server.jobs == {}


@running(WAITS)
@pytest.mark.parametrize("right", [("create", "jobs"), ("get", "jobs"), ("list", "pods")], ids=" ".join)
def test_a_right_that_is_missing_is_named(shop: Shop, right: tuple[str, str]) -> None:
    shop.server.forbidden.add(right)
    shop.server.waiting = {"phase": "Pending"}
    verb, kind = right
    with pytest.raises(PermissionDenied, match=f"account needs the right to {verb} {kind} there"):
        shop.trains()
    assert shop.server.jobs == {}


@running(FINISHES)
def test_a_pod_that_waits_for_a_node_is_told_once(shop: Shop) -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes have it"}
    shop.server.waiting = {"phase": "Pending", "conditions": [condition]}
    asked: list[int] = []

    def check() -> None:
        asked.append(shop.server.asked)
        if shop.server.asked > 8:
            raise Interrupted("cancel")

    with pytest.raises(Interrupted):
        shop.trains(check)
    assert shop.notes == ["Kubernetes: Unschedulable: 0/3 nodes have it"]
    assert shop.server.jobs == {}


@running(FINISHES)
def test_what_the_cluster_does_not_take_fails_the_job_with_its_words(shop: Shop) -> None:
    wrong = TEMPLATE["spec"] | {"parallelism": 1, "backofLimit": 3}
    shop.settings.job_template.write_text(json.dumps(TEMPLATE | {"spec": wrong}))  # type: ignore[union-attr]
    with pytest.raises(JobFailed, match=r"refuses to create jobs in namespace images: .*backofLimit"):
        shop.trains()


@running(WAITS)
def test_a_sweep_takes_away_what_belongs_to_jobs_that_are_over_and_to_this_system(shop: Shop) -> None:
    shop.left_by_a_distiller()
    shop.launcher.sweep(lambda job_id: False)
    assert len(shop.server.jobs) == 1
    (job,) = shop.server.jobs.values()
    job["metadata"]["labels"] = {**job["metadata"]["labels"], "app.kubernetes.io/instance": "another"}
    shop.launcher.sweep(lambda job_id: True)
    with pytest.raises(Conflict, match="not of this system"):
        shop.trains()
    assert not any("deletionTimestamp" in each["metadata"] for each in shop.server.jobs.values())
    job["metadata"]["labels"] = {**job["metadata"]["labels"], **SCOPE}
    shop.launcher.sweep(lambda job_id: job_id == shop.job.id)
    eventually((shop.folder / "saved").exists)
    shop.server.down = True
    shop.launcher.sweep(lambda job_id: True)  # it says so in the log, and the next one does it


@running(FINISHES)
def test_a_trainer_goes_with_what_made_its_distillers_pod(shop: Shop) -> None:
    owner = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "demo-fewstep-distiller", "uid": "1234"}
    meta = {"name": "distiller-0", "labels": {}, "ownerReferences": [owner | {"controller": True}]}
    shop.server.others["distiller-0"] = {"metadata": meta}
    shop.trains()
    assert shop.server.created[0]["metadata"]["ownerReferences"] == [owner]


def test_without_a_template_there_is_no_launcher(tmp_path: Path) -> None:
    settings = DistillerSettings(redis_url="redis://none", registry_url=str(tmp_path), launcher="kubernetes")
    with pytest.raises(InvalidRequest, match="DISTILLER_JOB_TEMPLATE"):
        open_launcher(settings)
