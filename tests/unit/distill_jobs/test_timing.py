"""How long training should take beside how long it takes, where time is what is asked of networks: it is the same on
every machine, whatever else that does."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.evaluations import metered
from distill_jobs import preparation
from distill_jobs import spec as specs
from distill_jobs.group import Group
from distill_jobs.lora import adapted
from distill_jobs.needs import Needs
from distill_jobs.progress import Hooks
from distill_jobs.stage import Stage
from distill_jobs.terms.base import Wanted
from distill_jobs.timing import shortened
from distill_jobs.trainer import TrainConfig, Trainer
from engines.denoiser import BaseDenoiser
from engines.manifest import Schedule
from tests.unit.distill_jobs.tiny import SHAPE, STAGES, tiny_source, tiny_student, tiny_teacher

FULL = ("kd", "lcm", "boot", "dmd", "sid", "ladd", "ctm")
CASES: dict[str, tuple[list[str], Any]] = {name: ([name], "full") for name in FULL}
CASES |= {f"{name} with adapters": ([name], {"lora": {"rank": 2}}) for name in ("kd", "dmd")}
CASES |= {"a chain with a discriminator": (["kd", "dmd"], "full")}


def needs(methods: list[str], train: Any, folder: Path) -> tuple[Needs, Needs]:
    """Estimated and measured. The first method of several has a discriminator beside its loss."""
    stages: list[dict[str, Any]] = [{"name": name, **STAGES[name]} for name in methods]
    stages[0]["terms"] = [{"name": "adversarial"}] if len(stages) > 1 else []
    spec = specs.parse(
        {
            "teacher": {"id": "t"},
            "student": {"name": "s", "steps": [1] if methods == ["boot"] else [1, 2], "train": train},
            "method": stages,
            "train": {"iterations": 40},
        }
    )
    teacher, source = tiny_teacher(), tiny_source()

    def beginner() -> BaseDenoiser:
        return tiny_student() if spec.student.lora is None else adapted(teacher.denoiser, spec.student.lora)

    def evaluate(iteration: int, student: BaseDenoiser, schedules: Mapping[int, Schedule]) -> dict[str, float]:
        made = [student(torch.randn(64, *SHAPE), torch.full((64,), 0.5), torch.zeros(64)) for _ in schedules]
        return {"fd": float(len(made))}

    with metered() as meter:

        def clock() -> float:
            return float(meter.rows)

        plan = preparation.timed_plan(
            spec, teacher, beginner, source, config=TrainConfig(), folder=folder / "trial", group=Group(),
            evaluate=evaluate, spent_s=0.0, clock=clock,
        )  # fmt: skip
        hooks, config = Hooks(evaluate=evaluate, clock=clock), replace(TrainConfig(), eval_every=plan.eval_every)
        run = Trainer(preparation.stages(plan.stages), teacher, beginner(), source, config, hooks=hooks)
        return plan.needs, run.fit().needs


@pytest.mark.parametrize(("methods", "train"), CASES.values(), ids=CASES)
def test_training_takes_the_time_that_was_estimated_within_a_quarter(
    methods: list[str], train: Any, tmp_path: Path
) -> None:
    estimated, measured = needs(methods, train, tmp_path)
    assert estimated.train_seconds == pytest.approx(measured.train_seconds, rel=0.25)


def test_in_a_trial_every_term_counts_from_the_beginning() -> None:
    late = Stage("dmd", 100, {}, terms=(Wanted("reward", 0.1, after=0.9, ramp=0.1),))
    (term,) = shortened(late, 4).terms
    assert [term.weight_at(done) for done in (term.after, 1.0)] == [0.1, 0.1]
    assert term.after == 0
