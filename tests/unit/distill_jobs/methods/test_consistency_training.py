"""Consistency training at a truth that is known. It has no teacher, so its loss is never zero: its gradient is.

By the mean the gradient vanishes at the truth for any distance of the two times, since noise and its mirror image pull
to both sides alike. By the deviation it vanishes as the times come together.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs.batches import Batch, Rows, TensorSource, make_batch
from distill_jobs.methods import consistency_training
from distill_jobs.methods.base import resolve
from distill_jobs.methods.consistency_training import Doubling, EasyTuning
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import Denoiser
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
    method: Any = None,
    **settings: Any,
) -> tuple[float, float]:
    """d loss / d (mean, log std) of the student N(MEAN + shift, std^2)."""
    preset = resolve(name)
    student = student_of(process, kind, shift=shift, std=std, reads_s=False)
    cast = Cast(teacher_of(process, kind), student=student)
    one = (method or preset.method)(cast, preset.config({"top": top(kind), **settings}))
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
    return preset.method(Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow")), preset.config(settings))


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
    ict, ect = (resolve(name).config({}) for name in ("ict", "ect"))
    assert (ict.rungs, ict.most_rungs, ict.smooth, ict.keep) == (10, 1280, 0.00054, None)
    assert (ict.level_mean, ict.level_std, ect.q, ect.closest, ect.keep) == (-1.1, 2.0, 2.0, 0.999, None)


# learning ------------------------------------------------------------------------------------------------------------


@every_process
@every_name
@pytest.mark.parametrize("phase", [0, 20])
def test_half_precision_gives_finite_gradients_to_the_ends_of_time(name: str, process: Process, phase: int) -> None:
    preset = resolve(name)
    student = Denoiser(TinyNet(1), process, "flow")
    one = preset.method(Cast(student, student=student), preset.config({"first_share": 0.3}))
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
    generator = torch.Generator().manual_seed(3)
    source = TensorSource(torch.ones(1024), SHAPE, x=1 + STD * torch.randn(1024, *SHAPE, generator=generator))
    while not run.done:
        run.iterate(source)
    final = run.averages[0].weights
    assert final["net.shift"].item() == pytest.approx(0, abs=0.05)
    assert final["net.log_std"].exp().item() == pytest.approx(STD, abs=0.05)
