"""Consistency training: the student's answers at two times agree on one latent and one noise; no teacher is asked.

x_t = alpha_t x0 + sigma_t eps and x_r of the same (x0, eps), r < t: f(x_t, t) = f(x_r, r), weighted 1 / (t - r), where
f(x, 0) = x and the right side is the student itself, without gradient, under the same dropout. Given x_t, x_r is in the
mean where one step of the data's own denoiser leads, so as t - r -> 0 this is consistency distillation.

`ict`: t and r are neighbours among rungs that double with each phase. `ect`: from the teacher's weights,
r = t (1 - n(t) / q^(phase + 1)) with n(t) = 1 + 8 sigmoid(-sigma / alpha); at first r is mostly 0, plain denoising.

`tcm` goes on from a student of `ect` (a stage before it) and spends the whole network on noise levels above a cut.
Below it the student as it came, frozen, answers for f(x_r, r). A share of the rows stands at the cut, whose other side
it always answers: without this boundary any constant would agree with itself. Sampling keeps above the cut.

Source: iCT arXiv 2310.14189 §3; ECT 2406.14548 §3; TCM 2410.14895 §3. t is log-normal in sigma / alpha as there (of
TCM, a Student's t of log sigma / alpha as its degrees of freedom go to 0), but rungs, r / t and t - r count noise
level, and some rows start at pure noise, where sampling does. The teacher's guidance is not learnt, unless the latents
are its own.
Left out: Karras' rungs, LPIPS.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.methods.base import Count, Preset
from distill_jobs.methods.consistency import END, SelfConsistency, SelfConsistencyConfig, rungs
from distill_jobs.roles import Role
from engines.denoiser import Cond
from engines.manifest import Schedule
from engines.process import over

_MOST = 80 / 81  # Karras' greatest sigma / alpha, as a noise level
_FIRST = "first"  # the role of the student as it came


class TrainingConfig(SelfConsistencyConfig):
    keep: float | None = Field(None, ge=0, lt=1, description="of an averaged target; without one it is the student")
    phase_every: int = Field(400, ge=1, description="iterations of a phase")


class LogNormalConfig(TrainingConfig):
    level_mean: float = Field(-1.1, description="of log sigma / alpha")
    level_std: float = Field(2.0, gt=0)


class Training(SelfConsistency):
    Config = TrainingConfig
    asks_teacher = False

    def drawn(self, batch: Batch) -> Tensor:
        c = self.config
        return batch.draw(times.WithFirst(times.LogitNormal(c.level_mean, c.level_std), c.first_share))

    @property
    def phase(self) -> int:
        return int(self.curriculum.get("phase", 0))

    def neighbour(self, batch: Batch, x: Tensor, t: Tensor, near: Tensor) -> Tensor:
        assert batch.rows.x is not None
        return self.process.mix(batch.rows.x, batch.noise, near)

    def weight(self, u: Tensor, r: Tensor) -> Tensor:
        return 1 / (u - r)

    def after(self, iteration: int) -> None:
        super().after(iteration)
        self.curriculum["phase"] = (iteration + 1) // self.config.phase_every


class DoublingConfig(LogNormalConfig):
    smooth: float | None = Field(0.00054, gt=0)
    rungs: int = Field(10, ge=1, description="of the first phase; each phase doubles them")
    most_rungs: int = Field(1280, ge=1)


class Doubling(Training):
    """A rung is drawn with the log-normal's mass between it and the one below."""

    Config = DoublingConfig

    @property
    def rungs(self) -> int:
        now: int = self.config.rungs << min(self.phase, 30)
        return min(now, int(self.config.most_rungs))

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return rungs(self.drawn(batch), self.rungs, 1, self.config.top)


class ApproachConfig(TrainingConfig):
    smooth: float | None = Field(1e-8, gt=0)
    q: float = Field(2.0, gt=1, description="each phase divides the distance of the sides by it")
    closest: float = Field(0.999, gt=0, lt=1, description="greatest r / t")


class Approach(Training):
    Config = ApproachConfig

    def approached(self, u: Tensor) -> Tensor:
        """r of t, both noise levels [B]."""
        apart = (1 + 8 * torch.sigmoid(-u / (1 - u))) / self.config.q ** (self.phase + 1)
        r: Tensor = u * (1 - apart).clamp(0, self.config.closest)
        return r


class EasyTuningConfig(ApproachConfig, LogNormalConfig):
    pass


class EasyTuning(Approach):
    Config = EasyTuningConfig

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        u = (self.config.top * self.drawn(batch)).clamp_min(END)
        return u, self.approached(u)


class TruncatedConfig(ApproachConfig):
    counts: tuple[Count, ...] = Field((1, 2), min_length=1, description="step counts the student is made for")
    cut: float = Field(0.5, gt=0, le=0.9, description="noise level below which the student as it came answers")
    near_cut: float = Field(0.02, gt=0, description="log sigma / alpha above the cut's up to which all are as likely")
    boundary_share: float = Field(0.25, gt=0, lt=1, description="share of rows that stand at the cut")
    boundary_weight: float = Field(0.1, ge=0, description="of their mean beside that of the others")
    start_phase: int = Field(5, ge=0, description="the phase in which the stage before this one ended")

    @model_validator(mode="after")
    def _stays_above(self) -> Self:
        if self.top <= self.cut:
            raise ValueError(f"top must be above the cut {self.cut}, not {self.top}")
        for count, levels in self.grids.items():
            if levels[-1] < self.cut:
                raise ValueError(f"grids[{count}] must keep above the cut {self.cut}, not end at {levels[-1]}")
        return self


class Truncated(Approach):
    Config = TruncatedConfig

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {_FIRST: Role(init="student", train="frozen")} | super().roles(config)

    @property
    def schedules(self) -> dict[int, Schedule]:
        """Equal steps of noise level from 1 to the cut."""
        cut = self.config.cut
        own = {k: tuple(1 - (1 - cut) * i / max(1, k - 1) for i in range(k)) for k in self.config.counts}
        return self.scheduled(own)

    @property
    def phase(self) -> int:
        return super().phase + int(self.config.start_phase)

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        c = self.config
        above = times.WithFirst(Above(c.cut, min(c.top, _MOST), c.near_cut), c.first_share)
        u = torch.where(batch.draw(times.Uniform()) < c.boundary_share, c.cut, batch.draw(above).clamp_max(c.top))
        return u, self.approached(u)

    def weight(self, u: Tensor, r: Tensor) -> Tensor:
        """So that the mean over rows is that of the others, and that at the cut by its weight."""
        c = self.config
        at_cut, others = c.boundary_weight / c.boundary_share, 1 / (1 - c.boundary_share)
        return super().weight(u, r) * torch.where(u <= c.cut, at_cut, others)

    @torch.no_grad()
    def target(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        above = super().target(x, t, s, cond)
        known = (times.level_of(self.process, t) < self.config.cut) & (t > s)
        return torch.where(over(known, x), self.cast[_FIRST].jump(x, t, s, cond), above)


@dataclass(frozen=True)
class Above:
    """Noise levels from `cut` to `most`: z = log(sigma / alpha), less the cut's, has density 1 / sqrt(z^2 + near^2)."""

    cut: float
    most: float
    near: float

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        low, high = (math.log(u / (1 - u)) for u in (self.cut, self.most))
        spread = math.asinh((high - low) / self.near)
        return torch.sigmoid(low + self.near * torch.sinh(spread * torch.rand(rows, generator=generator)))


PRESETS = {
    "ict": Preset(Doubling, "Consistency training without a teacher, on ever finer rungs.", "2310.14189"),
    "ect": Preset(EasyTuning, "From denoising to consistency by bringing two times together.", "2406.14548"),
    "tcm": Preset(Truncated, "Consistency at high noise alone, held at its lower edge; after ect.", "2410.14895"),
}
