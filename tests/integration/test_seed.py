"""`fewstep seed`: any task's embedded teacher in a registry, whoever else is putting it there."""

import subprocess
import sys
from pathlib import Path

import pytest

from distill_jobs.tasks import base
from engines import plugins
from engines.registry.files import FilesRegistry


def seed(registry: Path, task: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "server.cli", "seed", "--registry-url", str(registry), "--task", task]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("task", plugins.names(base.PACKAGE))
def test_two_at_once_publish_the_teacher_of_the_task_once(task: str, tmp_path: Path) -> None:
    both = [seed(tmp_path, task) for _ in range(2)]
    said = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    registry = FilesRegistry(tmp_path)
    revision = registry.current(task)
    assert revision is not None
    assert revision.number == 1
    (tier,) = revision.tiers.values()
    assert base.of(registry.student(tier.student)).name == task


def test_an_unknown_task_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    process = seed(tmp_path, "nothing")
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 1
    assert "digits, shapes" in said
    assert FilesRegistry(tmp_path).deployments() == []
