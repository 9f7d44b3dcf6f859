"""Students that read their guidance weight: any method that imitates the guided teacher learns all weights at once.

The truth is known: a Gaussian teacher guided by w is the Gaussian whose mean is u + w (c - u).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import Batch, TensorSource, WeightedSource, take
from distill_jobs.methods.base import Workspace, resolve
from distill_jobs.progress import Hooks
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from distill_jobs.trainer import Result, TrainConfig, Trainer
from engines.denoiser import Denoiser, Guided, Weighted
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import (
    MEAN,
    NULL_MEAN,
    SHAPE,
    STD,
    GaussianNet,
    W,
    batch_of,
    data_of,
    over,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import OFF, RUNGS, every_kind, every_process, top
from tests.unit.distill_jobs.tiny import STAGES, TinyNet, tiny_source, tiny_teacher

LOW, HIGH = 0.5, 3.0
TO_ZERO = {"lcm", "cd"}  # what a network without s can answer for every t at once
NAMES = ("kd", "lcm", "cd", "pcm", "tdd", "lsd", "tcd", "shortcut", "guidance")


class WeightedNet(GaussianNet):
    """The answer for data whose mean is u + w (c - u) + shift; one that is `deaf` takes every row for the default."""

    deaf = False

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Tensor | None, w: Tensor | None) -> Tensor:
        assert w is not None
        w = torch.full_like(w, W) if self.deaf else w
        return super().forward(x, t, NULL_MEAN + w * (cond - NULL_MEAN), s, None)


class DeafNet(WeightedNet):
    deaf = True


class WithoutS(WeightedNet):
    """The optimal denoiser, whatever s."""

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Tensor | None, w: Tensor | None) -> Tensor:
        return super().forward(x, t, cond, None, w)


class OtherWeights(Guided):
    """The other convention, c + w (c - u)."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Any = None, w: Any = None) -> tuple[Tensor, Tensor]:
        return super().forward(x, t, cond.cond, s, cond.w + 1)


def weighted_batch(process: Process, kind: Kind, seed: int = 0) -> Batch:
    """Rows with weights spread over the range; x is data of the teacher guided by each row's, pair its exact path."""
    batch = batch_of(seed=seed)
    w = torch.linspace(LOW, HIGH, len(batch), dtype=torch.float64)
    cond = Weighted(batch.cond, w)
    x = data_of(mean=0.0) + over(NULL_MEAN + w * (MEAN - NULL_MEAN))
    flow = Denoiser(WeightedNet(process, "x0"), process, "x0", {"s", "w"})
    grid = times.grid(process, tuple(top(kind) * u for u in RUNGS))
    first = torch.full_like(w, grid[0])
    start = over(process.sigma(first)) * batch.noise
    with torch.no_grad():
        path = [start] + [flow.jump(start, first, torch.full_like(first, t), cond) for t in grid[1:]]
    return replace(batch, rows=replace(batch.rows, cond=cond, x=x, pair=torch.stack(path, dim=1)))


def loss(
    name: str, process: Process, kind: Kind, net: type[WeightedNet] = WeightedNet, *, guide: Any = Guided, **data: float
) -> float:
    """Of a student that answers as `net`, by default the truth; roles besides it are itself."""
    preset = resolve(name)
    rungs = {"rungs": tuple(top(kind) * u for u in RUNGS)} if name == "kd" else {}
    few = {"grids": {1: (top(kind),)}, "counts": (1,)} if name == "guidance" else {}
    asked = {"top": top(kind), "substeps": 8, "delta": 0.01}
    known = {key: value for key, value in asked.items() if key in preset.method.Config.model_fields}
    net = WithoutS if name == "guidance" and net is WeightedNet else net
    player = Denoiser(net(process, kind, endpoint=name in TO_ZERO, **data), process, kind, reads(name))
    config = preset.config({**known, **rungs, **few})
    others = {role: player for role in preset.method.roles(config) if role != "student"}
    right = teacher_of(process, kind)
    teacher = guide(right.denoiser, right.null_cond, right.w)
    one = preset.method(Cast(teacher, student=player, **others), config)
    return float(sum(one.loss("student", weighted_batch(process, kind)).values()))


def reads(name: str) -> set[str]:
    return {"w"} if name in TO_ZERO | {"guidance"} else {"s", "w"}


@every_kind
@every_process
@pytest.mark.parametrize("name", ["kd", "lcm", "guidance"])
def test_the_truth_at_every_weight_is_the_guided_teacher_and_nothing_beside_it(
    name: str, process: Process, kind: Kind
) -> None:
    right = loss(name, process, kind)
    assert right < 5e-5
    assert loss(name, process, kind, shift=OFF) > 5e-4 + 5 * right
    assert loss(name, process, kind, DeafNet) > 5e-3 + 50 * right


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_does_not_hear_its_weight_fails_the_oracle_of_every_method(name: str) -> None:
    assert loss(name, RF(), "flow", DeafNet) > 50 * loss(name, RF(), "flow")


@pytest.mark.parametrize("name", NAMES[1:])  # kd asks its teacher before the first update
def test_the_other_convention_of_the_weight_fails_the_oracle_of_every_method(name: str) -> None:
    assert loss(name, RF(), "flow", guide=OtherWeights) > 50 * loss(name, RF(), "flow")


# the condition brings the weight -------------------------------------------------------------------------------------


def test_a_guide_takes_the_weights_of_its_condition_row_by_row() -> None:
    teacher, batch = teacher_of(RF(), "flow"), batch_of(4)
    t, w = torch.full((4,), 0.5, dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    together = teacher(batch.noise, t, Weighted(batch.cond, w))[0]
    for i, weight in enumerate(w.tolist()):
        alone = teacher_of(RF(), "flow", weight)(batch.noise, t, batch.cond)[0]
        torch.testing.assert_close(together[i], alone[i])
    given = teacher(batch.noise, t, Weighted(batch.cond, w), w=torch.full_like(w, 2.0))[0]
    torch.testing.assert_close(given, teacher_of(RF(), "flow", 2.0)(batch.noise, t, batch.cond)[0])


def test_a_weight_of_one_on_the_guide_itself_does_not_silence_those_of_the_rows() -> None:
    batch, t = batch_of(2), torch.full((2,), 0.5, dtype=torch.float64)
    cond = Weighted(batch.cond, torch.full_like(t, W))
    one, other = (teacher_of(RF(), "flow", w)(batch.noise, t, cond)[0] for w in (1.0, 5.0))
    assert torch.equal(one, other)


def test_rows_keep_their_weights_when_they_are_taken_apart() -> None:
    cond = Weighted(torch.arange(4.0), torch.arange(4.0) + 10)
    assert [part.tolist() for part in take(cond, torch.tensor([3, 1]))] == [[3.0, 1.0], [13.0, 11.0]]


def test_weights_are_uniform_in_their_range_and_follow_from_seed_and_position() -> None:
    def weights(seed: int, position: int, count: int = 2000) -> Tensor:
        return WeightedSource(tiny_source(), LOW, HIGH, seed=seed).rows(position, count).cond.w

    first = weights(1, 5)
    assert torch.equal(first, weights(1, 5))
    assert not torch.equal(first, weights(1, 6))
    assert not torch.equal(first, weights(2, 5))
    assert LOW <= float(first.min()) < LOW + 0.01
    assert HIGH - 0.01 < float(first.max()) <= HIGH
    assert float(first.mean()) == pytest.approx((LOW + HIGH) / 2, abs=0.05)


def test_latents_and_pairs_are_made_at_the_weights_that_they_are_learnt_with() -> None:
    source = WeightedSource(TensorSource(torch.ones(64), SHAPE), LOW, HIGH)
    teacher = teacher_of(RF(), "flow")
    run = StageRun(0, Stage("lcm", 1, {"generate": 256, "batch": 256}), teacher.float(), line().float())
    assert run.method.prepare(source, Workspace())
    rows = run.method.rows(source, 0)
    assert rows.x is not None
    slope, start = fitted(rows.cond.w, rows.x.mean(dim=(1, 2, 3)))
    assert slope == pytest.approx(MEAN - NULL_MEAN, abs=0.1)
    assert start == pytest.approx(NULL_MEAN, abs=0.2)


def fitted(w: Tensor, y: Tensor) -> list[float]:
    """[slope, start] of the line through y(w)."""
    design = torch.stack([w, torch.ones_like(w)], dim=1)
    found: list[float] = torch.linalg.lstsq(design, y[:, None]).solution.flatten().tolist()
    return found


# learning ------------------------------------------------------------------------------------------------------------


class LineNet(nn.Module):
    """The endpoint map of N(start + slope w, std^2), whatever the condition: what the student has to find."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Parameter(torch.tensor([0.5, 0.0]))
        self.log_std = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Any, w: Tensor) -> Tensor:
        slope, start = self.line
        t = over(t)
        mean = over(start + slope * w)
        std = self.log_std.exp()
        x0 = mean + std / ((1 - t) ** 2 * std**2 + t**2).sqrt() * (x - (1 - t) * mean)
        return (x - x0) / t


def line() -> Denoiser:
    return Denoiser(LineNet(), RF(), "flow", {"w"})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("kd", {"pairs": 512, "teacher_solver": "ab2"}),
        ("lcm", {"generate": 512, "rungs": 8, "skip": 1, "substeps": 4, "keep": 0.5}),
    ],
)
def test_one_student_becomes_the_teacher_guided_by_any_weight_of_the_range(name: str, settings: dict[str, Any]) -> None:
    source = WeightedSource(TensorSource(torch.ones(64), SHAPE), LOW, HIGH)
    told = {"counts": (1,), "lr": 5e-2, "batch": 128, **settings}
    run = StageRun(0, Stage(name, 200, told), teacher_of(RF(), "flow").float(), line().float(), ema=(0.9,))
    assert run.method.prepare(source, Workspace())
    while not run.done:
        run.iterate(source)
    slope, start = run.averages[0].weights["net.line"].tolist()
    for w in (LOW, 1.0, 2.0, HIGH):
        assert start + slope * w == pytest.approx(NULL_MEAN + w * (MEAN - NULL_MEAN), abs=0.06)
    assert run.averages[0].weights["net.log_std"].exp().item() == pytest.approx(STD, abs=0.06)


class TinyWeighted(TinyNet):
    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Tensor | None, w: Tensor | None) -> Tensor:
        assert w is not None
        return super().forward(x, t, cond + 0.1 * w, s, None)


def trained(name: str, folder: Path | None = None, hooks: Hooks | None = None) -> Result:
    student = Denoiser(TinyWeighted(1), RF(), "flow", {"s", "w"})
    source = WeightedSource(tiny_source(), LOW, HIGH, seed=3)
    config = TrainConfig(seed=3, checkpoint_every=1, checkpoint_every_s=1e9)
    stages = [Stage(name, 6, STAGES[name])]
    return Trainer(stages, tiny_teacher(), student, source, config, folder=folder, hooks=hooks or Hooks()).fit()


@pytest.mark.parametrize("name", ["lcm", "kd", "guidance", "reflow", "lsd", "mean_flow"])
def test_an_interrupted_run_with_weights_ends_as_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    asked = 0

    def poll() -> Any:
        nonlocal asked
        asked += 1
        return "pause" if asked > 4 else None

    whole = trained(name)
    assert trained(name, tmp_path, Hooks(poll=poll)).state == "paused"
    resumed = trained(name, tmp_path)
    assert resumed.iteration == whole.iteration == 6
    assert all(torch.equal(value, resumed.weights[key]) for key, value in whole.weights.items())
