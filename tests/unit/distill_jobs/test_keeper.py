"""How often a trainer may die, with small programs that die in its place."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from distill_jobs.keeper import TrainerKeeper
from distill_jobs.launchers.base import Hearing, Order, Usage
from distill_jobs.launchers.process import TrainerProcess
from distill_jobs.metrics import DistillMetrics
from distill_jobs.records import JobRecords
from distill_jobs.settings import DistillerSettings
from distill_jobs.watch import Interrupted
from engines.errors import Diverged, JobFailed, StorageFull
from engines.registry.files import FilesRegistry
from tests.eventually import eventually

DIES = "import os, signal, sys; print('last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
GETS_FURTHER_AND_DIES = (
    "import os, pathlib, signal, sys; folder = pathlib.Path(sys.argv[1]) / 'checkpoints' / 'latest';"
    "(folder / f'00-{len(list(folder.glob(chr(42)))) if folder.exists() else 0:08d}-1').mkdir(parents=True);"
    "os.kill(os.getpid(), signal.SIGKILL)"
)
REFUSES = (
    "import json, pathlib, sys;"
    "pathlib.Path(sys.argv[1], 'failure.json').write_text(json.dumps({'code': 'diverged', 'message': 'no number'}));"
    "sys.exit(65)"
)
WAITS = (
    "import pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1]);"
    "signal.signal(signal.SIGTERM, lambda *_: (folder.joinpath('saved').touch(), sys.exit(75)));"
    "folder.joinpath('began').touch(); time.sleep(60)"
)


class Trainer:
    """A keeper over a program, the launcher of that program, and what it has seen."""

    def __init__(self, folder: Path, code: str, check: Callable[[], None] = lambda: None) -> None:
        registry = FilesRegistry(str(folder))
        self.records = JobRecords(registry)
        self.job = self.records.create({})
        found = registry.job_path(self.job.id)
        assert found is not None
        self.folder, self.code, self.lives = found, code, 0
        settings = DistillerSettings(redis_url="redis://none", registry_url=str(folder), max_tries=3)
        self.metrics = DistillMetrics(CollectorRegistry())
        self.keeper = TrainerKeeper(
            self.job.id,
            found,
            1,
            records=self.records,
            settings=settings,
            metrics=self.metrics,
            check=check,
            launcher=self,
        )

    def start(self, order: Order, hearing: Hearing) -> TrainerProcess:
        hearing.begins()
        self.lives += 1
        return TrainerProcess([sys.executable, "-c", self.code, str(order.folder)], order.log)

    def sweep(self, over: Callable[[str], bool]) -> None:
        pass


def test_a_trainer_that_gets_no_further_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, DIES)
    with pytest.raises(JobFailed, match=r"died 3 times without getting further .*last words"):
        trainer.keeper.run("train", lambda: False)
    assert trainer.lives == 3
    assert trainer.metrics.registry.get_sample_value("fewstep_distill_trainer_deaths_total") == 3


def test_the_tries_of_another_distiller_count(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, DIES)
    trainer.records.write(trainer.job.id, "tries.json", {"marker": ["train"], "lives": 2})
    with pytest.raises(JobFailed):
        trainer.keeper.run("train", lambda: False)
    assert trainer.lives == 1


def test_a_trainer_that_gets_further_may_die_as_often_as_it_likes(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, GETS_FURTHER_AND_DIES)
    trainer.keeper.run("train", lambda: trainer.lives >= 6)
    assert trainer.lives == 6


def test_a_trainer_that_gives_up_is_not_tried_again(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, REFUSES)
    with pytest.raises(Diverged, match="no number"):
        trainer.keeper.run("train", lambda: False)
    assert trainer.lives == 1


def test_a_trainer_without_space_has_all_its_tries_again(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, REFUSES.replace("diverged", "storage_full"))
    trainer.records.write(trainer.job.id, "tries.json", {"marker": ["train"], "lives": 2})
    for _ in range(2):
        with pytest.raises(StorageFull, match="no number"):
            trainer.keeper.run("train", lambda: False)
    assert trainer.lives == 2
    assert trainer.records.read(trainer.job.id, "tries.json") is None


@pytest.mark.parametrize(("why", "saves"), [("pause", True), ("stop", True), ("cancel", False)])
def test_an_interrupted_trainer_is_gone_and_saves_unless_canceled(tmp_path: Path, why: str, saves: bool) -> None:
    began: list[Path] = []

    def check() -> None:
        if began and began[0].exists():
            raise Interrupted(why)  # type: ignore[arg-type]

    trainer = Trainer(tmp_path, WAITS, check)
    began.append(trainer.folder / "began")
    with pytest.raises(Interrupted):
        trainer.keeper.run("train", lambda: False)
    assert (trainer.folder / "saved").exists() is saves
    assert trainer.records.read(trainer.job.id, "tries.json") == (None if saves else {"marker": ["train"], "lives": 1})


def test_work_that_is_done_starts_nothing(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, DIES)
    trainer.keeper.run("train", lambda: True)
    assert trainer.lives == 0


def test_a_trainer_says_what_it_uses_until_it_ends(tmp_path: Path) -> None:
    process = TrainerProcess(
        [sys.executable, "-c", "sum(range(10**6)); print('busy', flush=True); import time; time.sleep(60)"],
        tmp_path / "log",
    )
    try:
        eventually(lambda: (tmp_path / "log").read_text() == "busy\n" or process.wait(0) is not None, 10)
        used = process.usage()
    finally:
        process.kill()
    assert used.memory_bytes > 2**20
    assert used.cpu_s > 0
    assert process.usage() == Usage()
