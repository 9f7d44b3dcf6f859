"""kill -9 of the trainer and of the distiller at random steps: the job ends with the weights of an undisturbed one."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from distill_jobs.jobs import JobState
from tests.distilling import LENIENT, Workshop, workshop
from tests.eventually import eventually
from tests.redis_server import RedisServer

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

ITERATIONS = 60


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer(aof=True).start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def shop(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("shop"), server.url)


@contextmanager
def distiller(shop: Workshop) -> Iterator[subprocess.Popen[bytes]]:
    """`fewstep distiller` as a process of its own."""
    told = shop.settings.model_dump(mode="json", exclude_defaults=True)
    env = {f"DISTILLER_{name.upper()}": str(value) for name, value in told.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "distiller"],
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def submit(shop: Workshop, name: str, iterations: int = ITERATIONS) -> str:
    train = {"iterations": iterations, "precision": "fp32", "checkpoint_every": 3}
    evals = {"samples": 16, "small_samples": 16, "every": 24}
    student = {"name": name, "steps": [1, 2]}
    method = [{"name": "kd", "pairs": 64, "batch": 8, "teacher_steps": 4}, {"name": "sid", "batch": 4}]
    return shop.submit(train=train, eval=evals, student=student, method=method, publish=None, gates=LENIENT).id


def trainer(process: subprocess.Popen[bytes]) -> psutil.Process | None:
    children = psutil.Process(process.pid).children(recursive=True)
    return next((child for child in children if "distill_jobs.train" in " ".join(child.cmdline())), None)


def trains_past(shop: Workshop, job_id: str, step: int) -> None:
    eventually(lambda: (shop.events(job_id, "checkpoint") or [{"step": 0}])[-1]["step"] >= step, 600)


def weights(shop: Workshop, job_id: str) -> bytes:
    return shop.registry.read_job_file(job_id, "trained/weights.safetensors") or b""


def test_a_job_whose_trainer_and_distiller_were_killed_ends_with_the_same_weights(shop: Workshop) -> None:
    draw = random.Random(0)
    undisturbed, killed = submit(shop, "undisturbed"), submit(shop, "killed")
    with distiller(shop) as process:
        shop.await_state(undisturbed, "succeeded")

        trains_past(shop, killed, draw.randrange(3, ITERATIONS // 3))
        child = trainer(process)
        assert child is not None
        child.kill()
        trains_past(shop, killed, ITERATIONS // 2 + draw.randrange(3, ITERATIONS // 5))
        child = trainer(process)
        assert child is not None
        process.kill()
        process.wait()
        eventually(lambda: not psutil.pid_exists(child.pid), 10)  # the trainer dies with its service
    assert shop.state(killed) == JobState.RUNNING

    with distiller(shop):
        shop.await_state(killed, "succeeded")

    assert [entry.claim for entry in shop.records.get(killed).log].count(True) == 2
    assert "code -9" in shop.events(killed, "note")[0]["message"]
    assert weights(shop, undisturbed) == weights(shop, killed) != b""


def test_a_stopped_distiller_leaves_its_job_to_the_next_with_nothing_lost(shop: Workshop) -> None:
    job_id = submit(shop, "stopped", 30)
    with distiller(shop) as process:
        trains_past(shop, job_id, 6)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    saved = shop.events(job_id, "checkpoint")[-1]["step"]

    with distiller(shop):
        eventually(lambda: len(shop.events(job_id, "progress")) and shop.state(job_id) == "succeeded", 600)

    resumed = [event["step"] for event in shop.events(job_id, "checkpoint") if not event.get("best")]
    assert resumed == sorted(resumed)
    assert 6 <= saved < 30, "it had ended before it was stopped"


def test_redis_may_forget_everything_while_a_job_runs(shop: Workshop, server: RedisServer) -> None:
    job_id = submit(shop, "forgotten", 30)
    with distiller(shop):
        trains_past(shop, job_id, 6)
        assert shop.events(job_id, "checkpoint")[-1]["step"] < 30, "it had ended before Redis forgot"
        server.kill()
        shutil.rmtree(server.folder / "appendonlydir")
        server.start()
        shop.await_state(job_id, "succeeded")
