"""Pairwise sample optimisation of Gaussian students: a linear reward has its gradient in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, TensorSource
from distill_jobs.methods.base import resolve
from distill_jobs.methods.pso import PSO
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import BaseDenoiser, Denoiser, Guided
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import (
    MEAN,
    NULL_MEAN,
    SHAPE,
    STD,
    GaussianNet,
    batch_of,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import TRUTH, every_kind, every_process, top

SIZE = math.prod(SHAPE)
BETA = 50.0


def brighter(y: Tensor, batch: Batch) -> Tensor:
    return y.flatten(1).mean(dim=1)


def pso(process: Process, kind: Kind, method: type[PSO] = PSO, shift: float = TRUTH, **settings: Any) -> Any:
    """Of a student of two steps; its first version is N(MEAN + TRUTH, STD^2)."""
    student, first = (student_of(process, kind, shift=at, reads_s=False) for at in (shift, TRUTH))
    told = {"counts": (2,), "grids": {2: (top(kind), 0.5 * top(kind))}, "beta": BETA, **settings}
    one: Any = method(Cast(teacher_of(process, kind), student=student, first=first), resolve("pso").config(told))
    one.reward = brighter
    return one


def pull(one: PSO, rows: int = 4096, seeds: int = 2) -> float:
    """d loss / d mean of the student."""
    with one.cast.only("student") as student:
        for seed in range(seeds):
            (one.loss("student", batch_of(rows, seed))["pso"] / seeds).backward()
    assert all(p.grad is None for role in (one.cast.teacher, one.cast["first"]) for p in role.parameters())
    return float(student.net.shift.grad)  # type: ignore[union-attr, arg-type]


def expected(process: Process, kind: Kind) -> float:
    """-beta / 2 E[sign(y - y') (e - e')] alpha_s / sigma_s dx0 / dm, of the step's noises e and the ends y, averaged
    over the values; E[sign(b) a] of two normal variables is sqrt(2 / pi) cov(a, b) / std(b)."""
    t, s = times.on(process, torch.tensor([top(kind), 0.5 * top(kind)], dtype=torch.float64))
    a, b, c, d = (float(part(time)) for time in (t, s) for part in (process.alpha, process.sigma))
    first, second = STD / math.hypot(a * STD, b), STD / math.hypot(c * STD, d)  # what jumps to 0 shrink states by
    variance = second**2 * ((c * first * b) ** 2 + d**2)
    told = math.sqrt(2 / math.pi) * (2 * second * d / SIZE) / math.sqrt(2 * variance / SIZE)
    return -BETA / 2 * told * c / d * (1 - a * first)


@every_kind
@every_process
def test_the_student_is_moved_up_the_reward_as_its_own_noise_tells(process: Process, kind: Kind) -> None:
    assert pull(pso(process, kind)) == pytest.approx(expected(process, kind), rel=0.08)


class Swapped(PSO):
    """The preferred sample is the other."""

    def scores(self, score: Any, y: Tensor, batch: Batch) -> Tensor:
        return super().scores(score, y, batch).flip(0)


class AnotherStep(PSO):
    """The step whose density is asked is not the one that was taken."""

    def walk(self, pairs: Batch, path: tuple[float, ...], rung: int) -> tuple[Tensor, Tensor, Tensor]:
        x, x_s, y = super().walk(pairs, path, rung)
        return x, x_s + pairs.randn() - pairs.randn(), y.flip(0)


class NarrowStep(PSO):
    """The deviation of the step is half of what it is."""

    def log_density(self, player: BaseDenoiser, *where: Any) -> Tensor:
        return 4 * super().log_density(player, *where)


@pytest.mark.parametrize("mutant", [Swapped, AnotherStep, NarrowStep])
def test_another_preference_or_density_fails_the_oracle(mutant: type[PSO]) -> None:
    assert abs(pull(pso(RF(), "flow", mutant)) / expected(RF(), "flow") - 1) > 0.5


def test_at_first_the_loss_is_undecided() -> None:
    seen = pso(RF(), "flow").loss("student", batch_of(16))
    assert float(seen["pso"]) == pytest.approx(math.log(2))


def test_samples_that_are_as_good_say_nothing() -> None:
    one = pso(RF(), "flow")
    one.reward = lambda y, batch: y.new_zeros(len(y))
    assert pull(one, rows=64) == 0


def test_beyond_the_trusted_ratio_a_pair_pulls_no_further() -> None:
    """A student far from its first version has no ratio within the bounds; with wide bounds it has."""
    assert pull(pso(RF(), "flow", shift=TRUTH + 3, trust=1e-3), rows=256) == 0
    assert pull(pso(RF(), "flow", shift=TRUTH + 0.1, trust=0.9, beta=1.0), rows=256) != 0


def test_only_steps_that_renew_noise_are_asked() -> None:
    one = pso(RF(), "flow", counts=(1, 2, 4), grids={})
    seen = {(len(path.times) - 1, rung) for path, rung in (one.rung(batch_of(2, seed)) for seed in range(60))}
    assert seen == {(2, 0), (4, 0), (4, 1), (4, 2)}
    for settings in ({"counts": [1]}, {"eta": 0.0}):
        with pytest.raises(InvalidRequest, match=r"2 or more|setting eta"):
            resolve("pso").config(settings)


@every_process
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_density_of_a_step_is_that_of_its_noise(process: Process, eta: float) -> None:
    """The mean of -e^2 / 2, which is -1/2; another deviation would give another."""
    one = pso(process, "flow", counts=(4,), grids={}, eta=eta)
    pairs, path = batch_of(1024), one.schedules[4].times
    x, x_s, _ = one.walk(pairs, path, 1)
    density = one.log_density(one.cast.student, x, x_s, path[1:3], pairs.cond)
    assert float(density.mean()) == pytest.approx(-0.5, rel=0.03)


@every_process
def test_the_walk_is_the_students_sampling(process: Process) -> None:
    """States of the step and the end have the moments of the process' marginals."""
    one = pso(process, "flow", counts=(4,), grids={})
    grid = one.schedules[4].times
    states = one.walk(batch_of(2048), grid, 1)
    ends = torch.tensor([grid[1], grid[2], 0.0], dtype=torch.float64)
    for x, alpha, sigma in zip(states, process.alpha(ends), process.sigma(ends), strict=True):
        deviation = float((alpha**2 * STD**2 + sigma**2).sqrt())
        assert float(x.mean()) == pytest.approx(float(alpha) * (MEAN + TRUTH), abs=0.03 * deviation)
        assert float(x.std()) == pytest.approx(deviation, rel=0.02)


def test_both_of_a_pair_are_scored_with_the_same_noise() -> None:
    one, y = pso(RF(), "flow"), batch_of(16).noise
    one.reward = resolve("pso").method(one.cast, one.config).reward  # type: ignore[attr-defined]
    first, second = one.scores(one.reward, torch.cat([y, y]), batch_of(16))
    assert torch.equal(first, second)


def test_a_held_out_reward_and_the_distance_of_pairs_are_logged() -> None:
    seen = pso(RF(), "flow").loss("student", batch_of(4096))
    assert float(seen["reward"]) == pytest.approx(MEAN + TRUTH, abs=0.01)
    assert float(seen["distance"]) == pytest.approx(2**0.5 * STD, rel=0.03)
    assert 0.3 < float(seen["held_out"]) < STD
    assert not any(seen[name].requires_grad for name in ("reward", "held_out", "distance"))


def test_a_student_learns_what_the_teacher_sees_in_its_condition() -> None:
    def net(**data: Any) -> GaussianNet:
        return GaussianNet(RF(), "flow", **data).float()

    teacher = Guided(Denoiser(net(), RF(), "flow"), torch.tensor([NULL_MEAN]), 1.5)
    student = Denoiser(net(endpoint=True), RF(), "flow")
    run = StageRun(0, Stage("pso", 60, {"counts": (2,), "lr": 5e-3, "batch": 64}), teacher, student, ema=(0.5,))
    source = TensorSource(torch.full((256,), MEAN), SHAPE)
    while not run.done:
        run.iterate(source)
    assert run.averages[0].weights["net.shift"].item() > 0.02
