"""kill -9 of one of the processes that train together, of their launcher, and of all: the run goes on and ends as an
undisturbed one, bit by bit."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from distill_jobs.exit_codes import FINISHED, PAUSED, REFUSED
from distill_jobs.launchers.base import Order, command
from distill_jobs.launchers.process import TrainerProcess
from tests.distilling import DEPLOYMENT, LENIENT, PROMPTS, prepared, workshop
from tests.eventually import eventually
from tests.redis_server import RedisServer

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

ITERATIONS = 24
SPEC = {
    "teacher": {"id": DEPLOYMENT, "steps": 4, "guidance": 2.0},
    "student": {"name": "together", "steps": [1, 2]},
    "method": [
        {"name": "kd", "pairs": 128, "batch": 8, "teacher_steps": 4},
        {"name": "dmd", "batch": 4, "fake_updates": 1},
    ],
    "data": {"prompts": PROMPTS},
    "train": {"iterations": ITERATIONS, "processes": 2, "precision": "fp32", "checkpoint_every": 2, "micro_batch": 2},
    "eval": {"samples": 16, "small_samples": 16, "every": 10},
    "gates": LENIENT,
}


class Folder:
    """A job's folder after its preparation, and what is seen in it."""

    def __init__(self, path: Path) -> None:
        self.path = prepared(path, SPEC)

    def trains_past(self, step: int) -> None:
        eventually(lambda: self.saved() >= step, 300)

    def saved(self) -> int:
        """The newest checkpoint's step over both stages."""
        names = [path.name for path in (self.path / "checkpoints" / "latest").glob("0*")]
        stage, iteration, _ = max(names, default="00-0-0").split("-")
        return int(stage) * ITERATIONS // 2 + int(iteration)

    @property
    def weights(self) -> bytes:
        return (self.path / "trained" / "weights.safetensors").read_bytes()

    def log(self) -> str:
        return (self.path / "log.txt").read_text()


@contextmanager
def started(folder: Folder, *told: str) -> Iterator[TrainerProcess]:
    """The launcher of a job's trainers, or another command."""
    order = Order("together", folder.path, "train", fence=1, threads=2, processes=2)
    process = TrainerProcess(told or command(order, parent=os.getpid()), order.log)
    try:
        yield process
    finally:
        below = psutil.Process(process.pid).children(recursive=True) if psutil.pid_exists(process.pid) else []
        process.kill()
        for left in below:  # torchrun's own sessions outlive it
            with suppress(psutil.NoSuchProcess):
                left.kill()


def ends(process: TrainerProcess) -> int | None:
    return process.wait(300)


def ranks(pid: int) -> dict[int, psutil.Process]:
    """The two trainers below a process, once both are there."""

    def found() -> dict[int, psutil.Process] | None:
        children = psutil.Process(pid).children(recursive=True)
        trainers = [child for child in children if "distill_jobs.train" in child.cmdline()]
        by_rank = {int(child.environ()["RANK"]): child for child in trainers if "RANK" in child.environ()}
        return by_rank if len(by_rank) == 2 else None

    both: dict[int, psutil.Process] = eventually(found, 60)
    return both


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = Folder(tmp_path_factory.mktemp("undisturbed"))
    with started(folder) as process:
        assert ends(process) == FINISHED, folder.log()
    assert folder.saved() == ITERATIONS
    return folder.weights


def test_under_torchrun_a_run_survives_the_death_of_either_process(undisturbed: bytes, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    trainer = ["-m", "distill_jobs.train", str(folder.path), "--phase=train", "--fence=1"]
    with started(folder, *torchrun, *trainer) as process:
        for rank, step in ((1, 4), (0, ITERATIONS // 2 + 4)):
            folder.trains_past(step)
            ranks(process.pid)[rank].kill()
        assert ends(process) == 0, folder.log()
    assert folder.saved() == ITERATIONS
    assert folder.weights == undisturbed


def test_a_launched_run_dies_with_its_launcher_and_pauses_as_one(undisturbed: bytes, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with started(folder) as process:
        folder.trains_past(4)
        both = ranks(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        psutil.wait_procs(list(both.values()), timeout=10)
        assert not any(child.is_running() for child in both.values())
    died_at = folder.saved()
    with started(folder) as process:
        folder.trains_past(died_at + 2)
        process.checkpoint(30)
        assert process.wait(0) == PAUSED, folder.log()
    with started(folder) as process:
        assert ends(process) == FINISHED, folder.log()
    assert folder.weights == undisturbed


def test_a_launched_run_that_lost_its_lease_says_so_and_writes_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (folder.path / "checkpoints" / "latest").mkdir(parents=True)
    (folder.path / "checkpoints" / "latest" / "FENCE").write_text("7")
    with started(folder) as process:
        assert ends(process) == REFUSED, folder.log()
    assert json.loads((folder.path / "failure.json").read_bytes())["code"] == "lease_lost"
    assert folder.saved() == 0


def test_a_job_of_two_processes_of_which_one_is_killed_succeeds(tmp_path: Path) -> None:
    server = RedisServer().start()
    try:
        shop = workshop(tmp_path, server.url)
        job = shop.submit(**SPEC, publish=None)
        with shop.distiller():
            eventually(lambda: shop.events(job.id, "checkpoint"), 300)
            ranks(os.getpid())[1].kill()
            shop.await_state(job.id, "succeeded", within_s=400)
    finally:
        server.close()
    assert "one more try" in shop.events(job.id, "note")[0]["message"]
    steps = [event["step"] for event in shop.events(job.id, "checkpoint") if not event.get("best")]
    assert steps == sorted(steps)
    assert steps[-1] == ITERATIONS
