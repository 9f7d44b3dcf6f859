"""LD3: the times of a solver learnt by gradient through it, so that its endpoints meet the teacher's.

A few-step student can seldom land on the teacher's endpoint from the same noise, but from noise close by it often can,
and as a distribution that is as good. So each row's starting noise may move within `tolerance` while the times are
learnt; sampling starts from noise as it is.

Source: arXiv 2405.15506 (§3, soft teacher). Left out: the perceptual distance (root mean square of latents instead), a
second time per step that only the network is told, minibatches: one batch is learnt from.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from distill_jobs.batches import Batch
from distill_jobs.methods._unrolled import Base, Learned, LearnedConfig, StepRows, solver_rows
from distill_jobs.methods.base import Preset
from engines.manifest import Schedule


class LD3Config(LearnedConfig):
    solvers: tuple[Base, ...] = Field(
        ("ddim", "ab2", "dpmpp_2m"), min_length=1, description="of which the best is used"
    )
    tolerance: float = Field(0.05, ge=0, lt=1, description="how far a row's noise may move, over its own length")


class LD3(Learned):
    Config = LD3Config

    @property
    def bases(self) -> tuple[Base, ...]:
        solvers: tuple[Base, ...] = self.config.solvers
        return solvers

    def extras(self, k: int) -> list[Tensor]:
        return []

    def step_rows(self, t: Tensor, base: Base, extras: Sequence[Tensor]) -> StepRows:
        return solver_rows(self.process, t, base)

    def schedule(self, grid: tuple[float, ...], base: Base, rows: list[list[float]]) -> Schedule:
        return Schedule(times=grid, solver=base)

    def starting_noise(self, batch: Batch, shifts: Tensor) -> Tensor:
        """Shifted by no more than the tolerance: longer shifts are cut to it."""
        axes = tuple(range(1, shifts.dim()))
        most = self.config.tolerance * batch.noise.square().sum(axes, keepdim=True).sqrt()
        length = (shifts.square().sum(axes, keepdim=True) + 1e-12).sqrt()
        moved: Tensor = batch.noise + shifts * (most / length).clamp(max=1)
        return moved


PRESETS = {"ld3": Preset(LD3, "A solver's times, learnt by gradient from the teacher's endpoints.", "2405.15506")}
