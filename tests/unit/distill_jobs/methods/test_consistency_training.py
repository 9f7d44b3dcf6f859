"""Consistency training at a truth that is known. It has no teacher, so its loss is never zero: its gradient is.

By the mean the gradient vanishes at the truth for any distance of the two times, since noise and its mirror image pull
to both sides alike. By the deviation it vanishes as the times come together.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs.batches import Batch, Rows, TensorSource, make_batch
from distill_jobs.methods import consistency_training
from distill_jobs.methods.base import resolve
from distill_jobs.methods.consistency import SelfConsistency
from distill_jobs.methods.consistency_training import Doubling, EasyTuning, Truncated
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import Denoiser
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import (
    GUIDED_MEAN,
    SHAPE,
    STD,
    GaussianNet,
    batch_of,
    data_of,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import TRUTH, every_kind, every_process, top
from tests.unit.distill_jobs.tiny import TinyNet

every_name = pytest.mark.parametrize("name", consistency_training.PRESETS)


def mirrored(rows: int, seed: int) -> tuple[Batch, Batch]:
    """The same times, and latents and noise on the other side of their means."""
    one = batch_of(rows, seed, x=data_of(rows))
    other = batch_of(rows, seed, x=2 * GUIDED_MEAN - data_of(rows))
    return one, replace(other, noise=-other.noise)


def pulls(
    name: str,
    process: Process,
    kind: Kind,
    *,
    phase: int = 3,
    rows: int = 128,
    shift: float = TRUTH,
    std: float = STD,
    first_shift: float = TRUTH,
    method: Any = None,
    **settings: Any,
) -> tuple[float, float]:
    """d loss / d (mean, log std) of the student N(MEAN + shift, std^2); tcm's first stage has left the true one."""
    preset = resolve(name)
    student = student_of(process, kind, shift=shift, std=std, reads_s=False)
    first = student_of(process, kind, shift=first_shift, reads_s=False)
    cast = Cast(teacher_of(process, kind), student=student, first=first)
    told = {"top": top(kind), **({"start_phase": 0} if name == "tcm" else {}), **settings}
    one = (method or preset.method)(cast, preset.config(told))
    one.curriculum["phase"] = phase
    with cast.only("student"):
        for batch in mirrored(rows, seed=0):
            one.loss("student", batch)["consistency"].backward()
    return float(student.net.shift.grad), float(student.net.log_std.grad)


@every_kind
@every_process
@every_name
def test_training_is_at_rest_at_the_true_mean_and_points_back_to_it(name: str, process: Process, kind: Kind) -> None:
    above, at, under = (pulls(name, process, kind, shift=TRUTH + off)[0] for off in (0.5, 0.0, -0.5))
    assert abs(at) < 1e-8
    assert above > 1
    assert under < -1


@every_kind
@every_process
@every_name
def test_training_points_back_to_the_true_deviation(name: str, process: Process, kind: Kind) -> None:
    wide, at, narrow = (pulls(name, process, kind, std=std * STD, rows=512)[1] for std in (1.5, 1.0, 0.6))
    assert wide > 0.5
    assert narrow < -0.5
    assert abs(at) < 0.3 * min(wide, -narrow)


def by_deviation(name: str, phase: int, process: Process | None = None, method: Any = None) -> float:
    """Of the squared distance, whose gradient in the mean is that of a step of the data's denoiser."""
    return pulls(name, process or RF(), "flow", phase=phase, rows=4096, method=method, smooth=None)[1]


@every_process
@every_name
def test_the_pull_at_the_true_deviation_halves_with_each_phase(name: str, process: Process) -> None:
    coarse, fine = (by_deviation(name, phase, process) for phase in (1, 3))
    assert 0 < fine < 0.4 * coarse


def neighbours(parent: type[Any], where: str) -> type[Any]:
    class Wrong(parent):  # type: ignore[misc]
        """The other time has other noise, or lies on the far side."""

        def neighbour(self, batch: Batch, x: Tensor, t: Tensor, near: Tensor) -> Tensor:
            noise = batch.randn() if where == "fresh" else batch.noise
            return self.process.mix(batch.rows.x, noise, near if where == "fresh" else (2 * t - near).clamp(max=1))

    return Wrong


@every_name
@pytest.mark.parametrize("where", ["fresh", "far"])
def test_a_wrong_neighbour_fails_the_oracle(name: str, where: str) -> None:
    wrong = by_deviation(name, 6, method=neighbours(resolve(name).method, where))
    assert abs(wrong) > 10 * by_deviation(name, 6)


class Swapped(Doubling):
    """The gradient flows at the cleaner time."""

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        u, r = super().levels(batch)
        return r.clamp_min(1e-3), u

    def weight(self, u: Tensor, r: Tensor) -> Tensor:
        return 1 / (u - r).abs()


def test_a_gradient_at_the_wrong_time_fails_the_oracle() -> None:
    assert pulls("ict", RF(), "flow", shift=TRUTH + 0.5, method=Swapped)[0] < 0


# curricula -----------------------------------------------------------------------------------------------------------


def method_of(name: str, **settings: Any) -> Any:
    preset = resolve(name)
    student, first = student_of(RF(), "flow", shift=0.0), student_of(RF(), "flow", shift=3.0)
    return preset.method(Cast(teacher_of(RF(), "flow"), student=student, first=first), preset.config(settings))


def test_the_rungs_double_with_each_phase_up_to_the_most() -> None:
    one = method_of("ict", phase_every=3)
    seen = [one.rungs]
    for iteration in range(30):
        one.after(iteration)
        seen.append(one.rungs)
    assert seen[::3] == [10, 20, 40, 80, 160, 320, 640, 1280, 1280, 1280, 1280]
    assert seen[1:3] == [10, 10]
    assert one.curriculum == {"phase": 10}


def test_neighbours_are_one_rung_apart_and_weighted_by_it() -> None:
    one = method_of("ict")
    one.curriculum["phase"] = 2
    u, r = one.levels(batch_of(4096))
    torch.testing.assert_close(u - r, torch.full_like(u, 1 / 40))
    torch.testing.assert_close(one.weight(u, r), torch.full_like(u, 40.0))
    assert {round(float(level) * 40) for level in u} == set(range(1, 41))


def test_a_rung_is_as_likely_as_the_log_normal_between_it_and_the_one_below() -> None:
    """Discrete times of arXiv 2310.14189 §3.5, for sigma / alpha = u / (1 - u)."""
    one = method_of("ict", first_share=0.0)
    u, _ = one.levels(batch_of(1 << 15))
    edges = torch.arange(11).double() / 10
    mass = torch.special.ndtr((torch.log(edges / (1 - edges)) + 1.1) / 2.0).diff()
    share = torch.bincount((u * 10).round().long(), minlength=11)[1:] / len(u)
    torch.testing.assert_close(share.double(), mass, atol=0.01, rtol=0)


def test_ect_brings_the_times_together_by_its_formula() -> None:
    """At t = 1/2, sigma / alpha = 1 and n = 1 + 8 sigmoid(-1) = 3.1515."""
    one = method_of("ect", level_mean=0.0, level_std=1e-6, first_share=0.0)
    ratios = []
    for phase in (0, 1, 2, 3, 20):
        one.curriculum["phase"] = phase
        u, r = one.levels(batch_of(8))
        ratios.append(float((r / u)[0]))
    assert ratios == pytest.approx([0, 1 - 3.1515 / 4, 1 - 3.1515 / 8, 1 - 3.1515 / 16, 0.999], abs=1e-4)


def test_ect_starts_as_plain_denoising_and_at_pure_noise_r_halves_its_distance() -> None:
    one = method_of("ect", first_share=1.0)
    u, r = one.levels(batch_of(8))
    assert bool((u == 1).all())
    torch.testing.assert_close(r, torch.full_like(r, 0.5))
    one = method_of("ect", first_share=0.0, level_mean=-3.0, level_std=0.1)
    assert float(one.levels(batch_of(8))[1].max()) == 0.0
    assert isinstance(one, EasyTuning)


def test_the_presets_are_the_papers() -> None:
    ict, ect, tcm = (resolve(name).config({}) for name in ("ict", "ect", "tcm"))
    assert (ict.rungs, ict.most_rungs, ict.smooth, ict.keep) == (10, 1280, 0.00054, None)
    assert (ict.level_mean, ict.level_std, ect.q, ect.closest, ect.keep) == (-1.1, 2.0, 2.0, 0.999, None)
    assert (tcm.cut, tcm.near_cut, tcm.boundary_share, tcm.boundary_weight) == (0.5, 0.02, 0.25, 0.1)


# truncated -----------------------------------------------------------------------------------------------------------


@every_kind
@every_process
def test_tcm_learns_what_its_first_stage_knows_below_the_cut(process: Process, kind: Kind) -> None:
    """A true student is moved to a first stage that is not."""
    settings = {"boundary_weight": 1.0}
    above, under = (pulls("tcm", process, kind, first_shift=TRUTH + off, **settings)[0] for off in (0.5, -0.5))
    assert above < -1
    assert under > 1


class Untied(Truncated):
    """The student answers for itself below the cut too."""

    def target(self, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
        return SelfConsistency.target(self, x, t, s, cond)


def test_without_its_boundary_tcm_fails_the_oracle() -> None:
    assert abs(pulls("tcm", RF(), "flow", first_shift=TRUTH + 0.5, method=Untied)[0]) < 1e-8


def test_the_first_stage_answers_below_the_cut_and_the_student_above() -> None:
    one, batch = method_of("tcm"), batch_of()
    t = torch.tensor([0.0, 0.2, 0.49, 0.51], dtype=torch.float64).repeat(16)
    zero = torch.zeros_like(t)
    there = one.target(batch.noise, t, zero, batch.cond)
    first, student = (one.cast[role].jump(batch.noise, t, zero, batch.cond) for role in ("first", "student"))
    assert torch.equal(there[::4], batch.noise[::4])
    assert torch.equal(there[1::4], first[1::4])
    assert torch.equal(there[2::4], first[2::4])
    assert torch.equal(there[3::4], student[3::4])


def test_tcm_stands_at_the_cut_or_above_and_the_cuts_mean_is_weighted() -> None:
    one = method_of("tcm", first_share=0.0)
    u, r = one.levels(batch_of(1 << 15))
    at_cut = u <= 0.5
    assert float(u.min()) == 0.5
    assert bool((r < 0.5)[at_cut].all())
    assert float(at_cut.double().mean()) == pytest.approx(0.25, abs=0.01)
    share = one.weight(u, r) * (u - r)
    assert float((share * at_cut).mean()) == pytest.approx(0.1, abs=0.005)
    assert float((share * ~at_cut).mean()) == pytest.approx(1, abs=0.01)


def test_above_the_cut_log_noise_is_a_students_t_of_no_freedom() -> None:
    """Its mass from z to z': asinh(z' / near) - asinh(z / near), up to log 80."""
    u = consistency_training.Above(0.5, 80 / 81, 0.02).draw(1 << 15, torch.Generator().manual_seed(0)).double()
    edges = torch.tensor([0.0, 0.01, 0.1, 1.0, math.log(80)], dtype=torch.float64)
    mass = torch.asinh(edges / 0.02).diff() / torch.asinh(edges[-1] / 0.02)
    share = torch.histogram((u / (1 - u)).log().clamp(1e-9, 4.38), edges).hist / len(u)
    torch.testing.assert_close(share, mass, atol=0.01, rtol=0)


def test_tcm_goes_on_from_the_phase_of_its_first_stage() -> None:
    one = method_of("tcm", start_phase=5, phase_every=3)
    u = torch.full((4,), 0.5)
    first = one.approached(u)
    torch.testing.assert_close(first, 0.5 * (1 - torch.full_like(u, 3.1515 / 64)), atol=1e-5, rtol=0)
    one.after(2)
    torch.testing.assert_close(u - one.approached(u), (u - first) / 2)


def test_tcm_samples_above_its_cut() -> None:
    schedules = method_of("tcm", counts=(1, 2, 4)).schedules
    assert {k: one.times for k, one in schedules.items()} == {
        1: (1.0, 0.0),
        2: (1.0, 0.5, 0.0),
        4: pytest.approx((1.0, 5 / 6, 4 / 6, 0.5, 0.0)),
    }
    with pytest.raises(InvalidRequest, match=r"must keep above the cut 0\.5, not end at 0\.4"):
        resolve("tcm").config({"counts": [2], "grids": {2: (1.0, 0.4)}})
    with pytest.raises(InvalidRequest, match="top must be above the cut"):
        resolve("tcm").config({"top": 0.4})


# learning ------------------------------------------------------------------------------------------------------------


@every_process
@every_name
@pytest.mark.parametrize("phase", [0, 20])
def test_half_precision_gives_finite_gradients_to_the_ends_of_time(name: str, process: Process, phase: int) -> None:
    preset = resolve(name)
    student = Denoiser(TinyNet(1), process, "flow")
    one = preset.method(Cast(student, student=student, first=student), preset.config({"first_share": 0.3}))
    one.curriculum["phase"] = phase
    batch = make_batch(Rows(cond=torch.ones(256), x=torch.randn(256, 2, 2, 2)), (2, 2, 2), seed=0)
    with one.cast.only("student"), torch.autocast("cpu", dtype=torch.bfloat16):
        one.loss("student", batch)["consistency"].backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in student.parameters())


@every_name
def test_training_reaches_the_mean_and_deviation_of_the_data(name: str) -> None:
    def net(**data: float) -> GaussianNet:
        return GaussianNet(RF(), "flow", **data).float()

    teacher = Denoiser(net(), RF(), "flow")
    student = Denoiser(net(shift=0.8, std=1.0, endpoint=True), RF(), "flow")
    settings = {"counts": (1,), "lr": 2e-2, "batch": 64, "phase_every": 40}
    run = StageRun(0, Stage(name, 200, settings), teacher, student, ema=(0.9,))
    if name == "tcm":  # its first stage has reached them
        run.cast["first"].load_state_dict(Denoiser(net(endpoint=True), RF(), "flow").state_dict())
    generator = torch.Generator().manual_seed(3)
    source = TensorSource(torch.ones(1024), SHAPE, x=1 + STD * torch.randn(1024, *SHAPE, generator=generator))
    while not run.done:
        run.iterate(source)
    final = run.averages[0].weights
    assert final["net.shift"].item() == pytest.approx(0, abs=0.05)
    assert final["net.log_std"].exp().item() == pytest.approx(STD, abs=0.05)
