"""Single trajectory distillation at the closed-form flow map, along exact trajectories."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, Rows
from distill_jobs.methods.base import Workspace, resolve
from distill_jobs.methods.single_trajectory import STD
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from engines.solvers import trajectory
from tests.unit.distill_jobs.closed_form import STD as SPREAD
from tests.unit.distill_jobs.closed_form import batch_of, exact_pairs, student_of, teacher_of
from tests.unit.distill_jobs.oracle import OFF, TRUTH, every_kind, every_process, top, trajectory_loss
from tests.unit.distill_jobs.tiny import STAGES, tiny_source, tiny_student, tiny_teacher


def std_loss(process: Process, kind: Kind, **other: Any) -> float:
    settings = {"counts": (1,), "grids": {1: (top(kind),)}, "states": 8}
    rungs = tuple(top(kind) * u for u in times.uniform(8))
    return trajectory_loss("std", process, kind, settings=settings, rungs=rungs, **other)


@every_kind
@every_process
def test_std_is_zero_at_the_true_flow_map_only(process: Process, kind: Kind) -> None:
    assert std_loss(process, kind) < 1e-6
    assert std_loss(process, kind, shift=TRUTH + OFF) > 0.004
    assert std_loss(process, kind, std=1.2 * SPREAD) > 0.004


class Changed(STD):
    """States of the trajectory in another order."""

    order = (8, 7, 6, 5, 4, 3, 2, 1, 0)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        rows = Rows(batch.cond, pair=batch.rows.pair[:, list(self.order)])
        return super().loss(role, Batch(rows, batch.noise, batch.generator))


class OneLate(Changed):
    """Every state is taken for the one before it."""

    order = (1, 2, 3, 4, 5, 6, 7, 8, 8)


class Jumbled(STD):
    """Neighbours are of two trajectories."""

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        pair = batch.rows.pair.clone()
        pair[:, 1::2] = pair[:, 1::2].roll(1, 0)
        return super().loss(role, Batch(Rows(batch.cond, pair=pair), batch.noise, batch.generator))


@pytest.mark.parametrize("mutant", [Changed, OneLate, Jumbled])
def test_std_along_another_path_fails_the_oracle(mutant: type[STD]) -> None:
    assert std_loss(RF(), "flow", method=mutant) > 0.01


def test_a_jump_to_the_next_state_is_regressed_on_the_banks_own() -> None:
    """With one state there is only its end, so a target that knows nothing does not matter."""
    truth, lost = student_of(RF(), "flow"), student_of(RF(), "flow", shift=-5.0)
    batch = batch_of(pair=exact_pairs(RF(), batch_of().noise, (1.0,)))

    def loss(states: int, pair: Tensor) -> float:
        method = STD(
            Cast(teacher_of(RF(), "flow"), student=truth, target=lost), resolve("std").config({"states": states})
        )
        return float(method.loss("student", batch_of(pair=pair))["std"])

    assert batch.rows.pair is not None
    assert loss(1, batch.rows.pair) < 1e-6
    assert loss(4, exact_pairs(RF(), batch.noise, (1.0, 0.75, 0.5, 0.25))) > 0.1


def test_every_later_state_is_jumped_to_from_every_state() -> None:
    method = STD(
        Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow"), target=student_of(RF(), "flow")),
        resolve("std").config({"states": 4}),
    )
    seen = {
        tuple(pair) for seed in range(8) for pair in torch.stack(method._rungs(batch_of(seed=seed)), dim=1).tolist()
    }
    assert seen == {(n, k) for n in range(4) for k in range(n + 1, 5)}


def test_the_bank_holds_the_teachers_trajectory_from_noise_to_its_end() -> None:
    run = StageRun(0, Stage("std", 2, {**STAGES["std"], "states": 4, "between": 3}), tiny_teacher(), tiny_student())
    assert isinstance(run.method, STD)
    assert run.method.prepare(tiny_source(), Workspace())
    assert run.method.bank is not None
    states = run.method.bank.states
    assert states.shape[1] == 5
    assert run.method.path.levels == pytest.approx((1.0, 0.75, 0.5, 0.25))
    grid = tuple(1 - i / 12 for i in range(13))
    path = trajectory(tiny_teacher(), states[:8, 0], grid, run.method.bank.conds[0][:8], solver="ab2")
    torch.testing.assert_close(states[:8], torch.stack(path[::3], dim=1), rtol=1e-4, atol=1e-5)


def test_the_target_is_the_students_average() -> None:
    run = StageRun(0, Stage("std", 9, {**STAGES["std"], "keep": 0.75}), tiny_teacher(), tiny_student())
    run.method.prepare(tiny_source(), Workspace())
    before = {name: value.clone() for name, value in run.cast.weights("target").items()}
    run.iterate(tiny_source())
    student = run.cast.weights("student")
    for name, value in run.cast.weights("target").items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * student[name])


def test_std_refuses_a_network_that_does_not_read_s() -> None:
    with pytest.raises(InvalidRequest, match="must read s"):
        STD(Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow", reads_s=False)), resolve("std").config({}))
