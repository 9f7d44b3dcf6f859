"""A whole job whose trainers are pods of Kubernetes Jobs: a real API over HTTP, real processes, real weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distilling import SEARCH, Workshop, workshop
from tests.eventually import eventually
from tests.kubernetes_server import KubernetesServer, python_here, serving
from tests.redis_server import RedisServer
from tests.unit.distill_jobs.launchers.test_kubernetes import TEMPLATE

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KubernetesServer]:
    with serving(tmp_path, python_here()) as server:
        yield server


@pytest.fixture
def shop(tmp_path: Path, cluster: KubernetesServer) -> Iterator[Workshop]:
    server = RedisServer().start()
    template = tmp_path / "job.json"
    template.write_text(json.dumps(TEMPLATE))
    try:
        yield workshop(
            tmp_path,
            server.url,
            launcher="kubernetes",
            job_template=template,
            kubernetes_url=cluster.url,
            kubernetes_account=cluster.account,
            kubernetes_poll_s=0.1,
            max_processes=2,
        )
    finally:
        server.close()


def test_a_job_of_two_pods_outlives_its_distiller_and_becomes_a_student(
    shop: Workshop, cluster: KubernetesServer
) -> None:
    train = {"iterations": 8, "precision": "fp32", "checkpoint_every": 1, "processes": 2}
    student = {"name": "tiny-cluster", "steps": [1]}
    evals = {"samples": 16, "small_samples": 16, "every": 8}
    job = shop.submit(train=train, student=student, eval=evals, schedule=SEARCH, publish=None)
    with shop.distiller():
        eventually(lambda: shop.events(job.id, "checkpoint"), 300)
    with shop.distiller():
        shop.await_state(job.id, "succeeded")

    kinds = [(one["metadata"]["labels"]["fewstep/phase"], one["spec"]["completionMode"]) for one in cluster.created]
    assert kinds == [("prepare", "NonIndexed"), ("train", "Indexed")]
    assert cluster.jobs == {}
    assert [entry.claim for entry in shop.records.get(job.id).log].count(True) == 2
    assert shop.events(job.id, "note") == []
    assert len(shop.events(job.id, "stage")) == 1  # a life says so when it begins
    assert shop.registry.student((shop.records.read(job.id, "result.json") or {})["student"]).kind == "full"
