"""Preferences between samples of Gaussian students: a linear reward has its gradient and optimum in closed form."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, TensorSource
from distill_jobs.methods.base import resolve
from distill_jobs.methods.preference import NFT, PSO, Preference
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


def pull(one: Preference, rows: int = 4096, seeds: int = 2) -> float:
    """d loss / d mean of the student."""
    name, reference = ("pso", "first") if isinstance(one, PSO) else ("nft", "old")
    with one.cast.only("student") as student:
        for seed in range(seeds):
            (one.loss("student", batch_of(rows, seed))[name] / seeds).backward()
    assert all(p.grad is None for role in (one.cast.teacher, one.cast[reference]) for p in role.parameters())
    return float(student.net.shift.grad)  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True)
class TwoSteps:
    """The student's sampling in two steps: alpha and sigma of its times, and what jumps to 0 shrink states by."""

    process: Process
    kind: Kind

    @property
    def marginals(self) -> list[tuple[float, float]]:
        both = times.on(self.process, torch.tensor([top(self.kind), 0.5 * top(self.kind)], dtype=torch.float64))
        return [(float(self.process.alpha(t)), float(self.process.sigma(t))) for t in both]

    @property
    def shrink(self) -> list[float]:
        return [STD / math.hypot(a * STD, b) for a, b in self.marginals]

    @property
    def std(self) -> float:
        """Of a sample's values."""
        (_, b), (c, d) = self.marginals
        first, second = self.shrink
        return second * math.hypot(c * first * b, d)


def expected(process: Process, kind: Kind) -> float:
    """-beta / 2 E[sign(y - y') (e - e')] alpha_s / sigma_s dx0 / dm, of the step's noises e and the ends y, averaged
    over the values; E[sign(b) a] of two normal variables is sqrt(2 / pi) cov(a, b) / std(b)."""
    path = TwoSteps(process, kind)
    (a, _), (c, d) = path.marginals
    first, second = path.shrink
    told = math.sqrt(2 / math.pi) * (2 * second * d / SIZE) / (path.std * math.sqrt(2 / SIZE))
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


@pytest.mark.parametrize(("name", "settings"), [("pso", {"counts": (2,)}), ("nft", {"counts": (1, 2)})])
def test_a_student_learns_what_the_teacher_sees_in_its_condition(name: str, settings: dict[str, Any]) -> None:
    def net(**data: Any) -> GaussianNet:
        return GaussianNet(RF(), "flow", **data).float()

    teacher = Guided(Denoiser(net(), RF(), "flow"), torch.tensor([NULL_MEAN]), 1.5)
    student = Denoiser(net(endpoint=True), RF(), "flow")
    run = StageRun(0, Stage(name, 60, {"lr": 5e-3, "batch": 64, **settings}), teacher, student, ema=(0.5,))
    source = TensorSource(torch.full((256,), MEAN), SHAPE)
    while not run.done:
        run.iterate(source)
    assert run.averages[0].weights["net.shift"].item() > 0.02


# nft -----------------------------------------------------------------------------------------------------------------


def nft(
    process: Process, kind: Kind, method: type[NFT] = NFT, *, shift: float = TRUTH, rung: int = 1, **settings: Any
) -> Any:
    """Of a student of two steps that is asked at one rung; its old policy is N(MEAN + TRUTH, STD^2)."""
    student, old = (student_of(process, kind, shift=at, reads_s=False) for at in (shift, TRUTH))
    told = {"counts": (2,), "grids": {2: (top(kind), 0.5 * top(kind))}, "deviations": 4.0, **settings}
    one: Any = method(Cast(teacher_of(process, kind), student=student, old=old), resolve("nft").config(told))
    one.reward = brighter
    one.rung = lambda batch: (one.schedules[2], rung)
    return one


def improvement(process: Process, kind: Kind, group: int = 4) -> float:
    """E[(2 r - 1) y] of the brightness y, where r stands in deviations of the group: the mean deviation of as many
    normal values, over 4."""
    whole = math.sqrt(2 / group) * math.gamma(group / 2) / math.gamma((group - 1) / 2)
    return TwoSteps(process, kind).std / math.sqrt(SIZE) * whole / 4.0


def expected_of_nft(process: Process, kind: Kind, rung: int, beta: float = 1.0) -> float:
    """-2 beta E[(2 r - 1) y] (1 - k alpha)^2 ((alpha + sigma) / sigma)^2: an x0 prediction rises by 1 - k alpha with
    its mean, and so does its distance to a sample."""
    path = TwoSteps(process, kind)
    (alpha, sigma), shrink = path.marginals[rung], path.shrink[rung]
    return -2 * beta * improvement(process, kind) * ((1 - shrink * alpha) * (alpha + sigma) / sigma) ** 2


@every_kind
@every_process
@pytest.mark.parametrize("rung", [0, 1])
def test_nft_moves_the_student_up_the_reward_as_its_samples_tell(process: Process, kind: Kind, rung: int) -> None:
    assert pull(nft(process, kind, rung=rung), rows=2048) == pytest.approx(
        expected_of_nft(process, kind, rung), rel=0.08
    )


@every_process
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_nft_is_at_rest_one_improvement_from_the_old_policy(process: Process, beta: float) -> None:
    """Of the mean's deviation 1 / beta; as far beyond it the student is pulled back as hard."""
    step, start = improvement(process, "flow") / beta, expected_of_nft(process, "flow", 1, beta)
    pulls = [pull(nft(process, "flow", shift=TRUTH + k * step, beta=beta), rows=2048) for k in (1, 2)]
    assert pulls == pytest.approx([0, -start], abs=0.08 * abs(start))


class Contrary(NFT):
    """The worst of a group is the best."""

    def goodness(self, reward: Tensor) -> Tensor:
        return 1 - super().goodness(reward)


class Content(NFT):
    """All samples are good: plain regression on them."""

    def goodness(self, reward: Tensor) -> Tensor:
        return torch.ones_like(reward)


class OnlyGood(NFT):
    """Bad samples are not learnt from."""

    def goodness(self, reward: Tensor) -> Tensor:
        return super().goodness(reward).clamp_min(0.5)


class Mixed(NFT):
    """Rewards stand among those of other groups' samples."""

    def scores(self, score: Any, y: Tensor, batch: Batch) -> Tensor:
        return super().scores(score, y, batch).roll(1, dims=1)


@pytest.mark.parametrize("mutant", [Contrary, Content, OnlyGood, Mixed])
def test_nft_that_weighs_its_samples_otherwise_fails_the_oracle(mutant: type[NFT]) -> None:
    assert abs(pull(nft(RF(), "flow", mutant)) / expected_of_nft(RF(), "flow", 1) - 1) > 0.4


def test_samples_of_a_group_stand_between_bad_and_good() -> None:
    one = nft(RF(), "flow", deviations=1.0)
    rewards = torch.tensor([[0.0, 5.0, 1.0], [1.0, 5.0, 1.0], [2.0, 5.0, 1.0], [3.0, 5.0, 5.0]])
    inner = 0.5 + 0.25 / math.sqrt(1.25)  # half a unit from the mean, of sqrt(1.25) for one deviation
    assert torch.allclose(one.goodness(rewards)[:, 0], torch.tensor([0, 1 - inner, inner, 1]), atol=1e-5)
    assert one.goodness(rewards)[:, 1].tolist() == [0.5] * 4
    assert one.goodness(rewards)[3, 2] == 1


def test_the_old_policy_follows_the_student() -> None:
    one = nft(RF(), "flow", shift=TRUTH + 1, keep=0.9)
    one.after(0)
    assert float(one.cast["old"].net.shift) == pytest.approx(TRUTH + 0.1)
    assert float(one.cast.student.net.shift) == TRUTH + 1


@every_process
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_the_student_is_asked_for_the_jumps_of_its_sampling(process: Process, eta: float) -> None:
    one = nft(process, "flow", eta=eta, rung=0)
    asked: list[float] = []
    one.cast.student.forward = lambda x, t, cond, s: asked.extend(s.tolist()) or one.cast["old"](x, t, cond, s)
    one.loss("student", batch_of(2))
    assert asked == pytest.approx([(1 - eta) * one.schedules[2].times[1]] * 8)


def test_nft_logs_a_held_out_reward_and_the_distance_within_groups_of_the_old_policy() -> None:
    seen = nft(RF(), "flow", shift=TRUTH + 1).loss("student", batch_of(2048))
    std = TwoSteps(RF(), "flow").std
    assert float(seen["reward"]) == pytest.approx(MEAN + TRUTH, abs=0.01)
    assert float(seen["distance"]) == pytest.approx(2**0.5 * std, rel=0.03)
    assert 0.5 * std < float(seen["held_out"]) < std
    assert not any(seen[name].requires_grad for name in ("reward", "held_out", "distance"))
