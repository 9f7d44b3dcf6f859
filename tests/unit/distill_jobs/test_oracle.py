"""Every method at a truth that is known in closed form, for every process and every prediction kind.

Trajectory methods have zero loss at the true flow map and not beside it; the gradients of score matching vanish where
critic, student and teacher agree and point back from where they do not. One mutant per method must fail its oracle.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import toward
from distill_jobs.methods import flow_map, score_matching
from distill_jobs.methods.flow_map import LSD, LSDConfig
from distill_jobs.methods.kd import KD, KDConfig
from distill_jobs.methods.optimal_steps import OptimalSteps, OptimalStepsConfig
from distill_jobs.methods.score_matching import DMD, ScoreMatchingConfig, SiD, SiDConfig
from distill_jobs.roles import Cast
from engines.denoiser import Guided
from engines.manifest import Kind
from engines.process import RF, Process
from engines.solvers import sample
from tests.unit.distill_jobs.closed_form import STD, batch_of, data_of, exact_pairs, fake_of, student_of, teacher_of
from tests.unit.distill_jobs.oracle import (
    OFF,
    TRUTH,
    every_kind,
    every_process,
    other_guidance,
    score_gradients,
    top,
)

SCORE = {"dmd": (DMD, ScoreMatchingConfig), "sid": (SiD, SiDConfig)}
every_score = pytest.mark.parametrize("name", SCORE)
exact_derivative = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own


# trajectory methods --------------------------------------------------------------------------------------------------


def kd_loss(process: Process, kind: Kind, *, method: type[KD] = KD, reads_s: bool = True, **student: float) -> float:
    config = KDConfig(rungs=tuple(top(kind) * u for u in KDConfig().rungs))
    cast = Cast(teacher_of(process, kind), student=student_of(process, kind, reads_s=reads_s, **student))
    rungs = times.grid(process, config.rungs)[:-1]
    batch = batch_of(pair=exact_pairs(process, batch_of().noise, rungs))
    return float(method(cast, config).loss("student", batch)["kd"])


@every_kind
@every_process
@pytest.mark.parametrize("reads_s", [True, False], ids=["flow map", "plain network"])
def test_kd_is_zero_at_the_true_endpoint_map_only(process: Process, kind: Kind, reads_s: bool) -> None:
    assert kd_loss(process, kind, reads_s=reads_s) < 1e-6
    assert kd_loss(process, kind, reads_s=reads_s, shift=TRUTH + OFF) > 0.05
    assert kd_loss(process, kind, reads_s=reads_s, std=1.2 * STD) > 0.02


class BackwardKD(KD):
    """Time runs the wrong way: the endpoint is asked to become the noise."""

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        return super().loss(role, batch_of(pair=batch.rows.pair.flip(1)))


def test_kd_with_time_reversed_fails_the_oracle() -> None:
    assert kd_loss(RF(), "flow", method=BackwardKD) > 0.1


def own_loss(process: Process, kind: Kind, *, teacher: Guided | None = None, **student: float) -> float:
    """Of a batch whose rows all stand where the student's own sampling makes its last jump."""
    rungs = tuple(top(kind) * u for u in KDConfig().rungs)
    grids = {4: rungs}
    own = {"own_share": 0.99, "teacher_steps": 64, "teacher_solver": "ab2"}
    config = KDConfig(counts=(4,), grids=grids, rungs=rungs, eta=0, **own)
    cast = Cast(teacher or teacher_of(process, kind), student=student_of(process, kind, **student))
    pairs = exact_pairs(process, batch_of().noise, times.grid(process, rungs)[:-1])
    method = KD(cast, config)
    return max(float(method.loss("student", batch_of(seed=seed, pair=pairs))["kd"]) for seed in range(3))


@every_kind
@every_process
def test_kd_on_the_students_own_states_is_small_at_the_true_endpoint_map_only(process: Process, kind: Kind) -> None:
    assert own_loss(process, kind) < 1e-3  # the teacher's path has steps
    assert own_loss(process, kind, shift=TRUTH + OFF) > 0.01
    assert own_loss(process, kind, std=1.2 * STD) > 0.02


def test_kd_on_own_states_with_the_other_guidance_convention_fails_the_oracle() -> None:
    assert own_loss(RF(), "flow", teacher=other_guidance(RF(), "flow")) > 0.1


def lsd_loss(process: Process, kind: Kind, *, delta: float, method: type[LSD] = LSD, **student: float) -> float:
    cast = Cast(teacher_of(process, kind), student=student_of(process, kind, **student))
    config = LSDConfig(delta=delta, first_share=0.1, top=top(kind))
    return float(method(cast, config).loss("student", batch_of(x=data_of()))["lsd"])


@exact_derivative
@every_kind
@every_process
def test_lsd_is_zero_at_the_true_flow_map_only(process: Process, kind: Kind) -> None:
    assert lsd_loss(process, kind, delta=0) < 1e-6
    assert lsd_loss(process, kind, delta=0, shift=TRUTH + OFF) > 0.004
    assert lsd_loss(process, kind, delta=0, std=1.2 * STD) > 0.004


@every_kind
def test_lsd_by_differences_tends_to_zero_with_the_teachers_step(kind: Kind) -> None:
    coarse, fine = (lsd_loss(RF(), kind, delta=delta) for delta in (0.1, 0.025))
    assert fine < 0.25 * coarse
    assert fine < 0.1 * lsd_loss(RF(), kind, delta=0.025, shift=TRUTH + 0.2)


def test_lsd_with_the_teachers_step_reversed_fails_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lsd_loss(RF(), "flow", delta=0.025)

    def backwards(den: Any, x: Tensor, t: Tensor, s: Tensor, cond: Any, ask: Tensor) -> Tensor:
        return heun(den, x, t, 2 * t - s, cond, ask)

    heun = flow_map.heun
    monkeypatch.setattr(flow_map, "heun", backwards)
    assert lsd_loss(RF(), "flow", delta=0.025) > 50 * right


@exact_derivative
def test_lsd_with_the_other_guidance_convention_fails_the_oracle() -> None:
    cast = Cast(other_guidance(RF(), "flow"), student=student_of(RF(), "flow"))
    wrong = LSD(cast, LSDConfig(delta=0)).loss("student", batch_of(x=data_of()))["lsd"]
    assert wrong > 0.1


# score matching ------------------------------------------------------------------------------------------------------


@every_kind
@every_process
@every_score
def test_score_matching_is_at_rest_at_the_truth(name: str, process: Process, kind: Kind) -> None:
    assert score_gradients(name, process, kind, counts=(1, 2, 4)) == pytest.approx((0, 0), abs=1e-9)


@every_kind
@every_process
@every_score
@pytest.mark.parametrize("side", [-1, 1])
def test_score_matching_points_back_to_the_truth(name: str, process: Process, kind: Kind, side: int) -> None:
    by_mean, _ = score_gradients(name, process, kind, shift=TRUTH + side * 0.5)
    _, by_std = score_gradients(name, process, kind, std=STD * (1.5 if side > 0 else 0.6))
    assert side * by_mean > 1e-3
    assert side * by_std > 1e-4


def mutant_of(name: str) -> Any:
    class WrongSign(SCORE[name][0]):  # type: ignore[misc]
        def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
            (direction,) = torch.autograd.grad(super()._student_loss(y, batch), y)
            return toward(y, -direction * y.numel())

    return WrongSign


@every_score
def test_score_matching_with_the_wrong_sign_fails_the_oracle(name: str) -> None:
    by_mean, _ = score_gradients(name, RF(), "flow", shift=TRUTH + 0.5, method=mutant_of(name))
    assert by_mean < -1e-3


@every_score
def test_score_matching_with_the_other_guidance_convention_fails_the_oracle(name: str) -> None:
    by_mean, _ = score_gradients(name, RF(), "flow", teacher=other_guidance(RF(), "flow"))
    assert abs(by_mean) > 1e-2


@every_kind
@every_process
def test_the_critic_is_at_rest_at_the_samples_own_distribution(process: Process, kind: Kind) -> None:
    """Its loss is least, among shifted critics, where it knows what the student makes."""

    def loss(shift: float) -> float:
        student = student_of(process, kind, reads_s=False)
        cast = Cast(teacher_of(process, kind), student=student, fake=fake_of(process, kind, shift=shift))
        method = DMD(cast, ScoreMatchingConfig(counts=(1,), grids={1: (top(kind),)}))
        return sum(float(method.loss("fake", batch_of(256, seed))["dsm"]) for seed in range(4))

    at = TRUTH
    assert loss(at) < loss(at + 0.3)
    assert loss(at) < loss(at - 0.3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_of_any_alpha_points_back(alpha: float) -> None:
    class Fixed(SiD):
        def __init__(self, cast: Cast, config: SiDConfig) -> None:
            super().__init__(cast, config.model_copy(update={"alpha": alpha}))

    by_mean, _ = score_gradients("sid", RF(), "flow", shift=TRUTH + 0.5, method=Fixed)
    assert by_mean > 1e-3


# schedules -----------------------------------------------------------------------------------------------------------


def search(process: Process, kind: Kind, cls: type[OptimalSteps] = OptimalSteps, **settings: Any) -> OptimalSteps:
    cheap = {"counts": (1, 2, 3), "fine": 8, "rounds": 2, "refine": 1, "reference_steps": 24}
    method = cls(Cast(teacher_of(process, kind)), OptimalStepsConfig(**{**cheap, **settings}))
    method.search(batch_of(8))
    return method


@every_process
@pytest.mark.parametrize("kind", ["x0", "flow"])
def test_optimal_steps_come_closer_to_the_teacher_than_uniform_ones(process: Process, kind: Kind) -> None:
    found = search(process, kind).found
    for k, share in {2: 0.9, 3: 0.8}.items():
        assert found[k].distance < share * found[k].uniform_distance
        assert found[k].schedule.steps == k
        assert found[k].schedule.times[0] == process.t_max
        assert found[k].schedule.times[-1] == 0
    assert found[3].distance < found[2].distance


def test_the_dynamic_programme_alone_beats_equal_steps() -> None:
    method, batch = search(RF(), "flow", counts=(1,)), batch_of(8)
    method.config = method.config.model_copy(update={"counts": (4,), "fine": 16})
    end = method._path(batch, times.uniform(200), "ddim")[-1]
    levels = method.programme(batch)[4]
    assert len(levels) == 4
    assert method._distance(batch, end, levels, "ddim") < 0.95 * method._distance(batch, end, times.uniform(4), "ddim")


class WorstSteps(OptimalSteps):
    """The wrong sign: looks for the farthest."""

    def _distance(self, *args: Any) -> float:
        return -super()._distance(*args)


def test_a_search_with_the_wrong_sign_fails_the_oracle() -> None:
    found = search(RF(), "flow", WorstSteps).found
    assert found[3].distance == found[3].uniform_distance  # what was found is no better


@every_score
def test_a_rollout_is_the_sampling_of_the_schedule(name: str) -> None:
    """Same noise, same picture: backward simulation to the last rung equals the emitted schedule."""
    cls, config = SCORE[name]
    cast = Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow", reads_s=False), fake=fake_of(RF(), "flow"))
    method = cls(cast, config(counts=(4,), eta=1.0))
    schedule = method.schedules[4]
    batch, fresh = batch_of(8), [batch_of(8, seed).noise for seed in range(1, 5)]
    ours = sample(cast.student, batch.noise, schedule.times, batch.cond, 1.0, grad=3, draw=lambda i: fresh[i])
    theirs = sample(cast.student, batch.noise, schedule.times, batch.cond, 1.0, draw=lambda i: fresh[i])
    assert torch.equal(ours, theirs)
    assert schedule.times == (*score_matching.GRIDS[4], 0.0)
