"""The examples that the README submits are the jobs that are shipped."""

from pathlib import Path

import pytest
import yaml

from distill_jobs import spec
from distill_jobs.tasks import base
from engines import plugins

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("task", plugins.names(base.PACKAGE))
def test_a_task_s_example_is_its_shipped_job(task: str) -> None:
    example = spec.parse(yaml.safe_load((EXAMPLES / f"{task}-fast.yaml").read_text()))
    assert example == spec.parse(spec.preset(f"{task}-fast"))
    assert example.teacher.id == task
