"""Consistency training: the student's answers at two times agree on one latent and one noise; no teacher is asked.

x_t = alpha_t x0 + sigma_t eps and x_r of the same (x0, eps), r < t: f(x_t, t) = f(x_r, r), weighted 1 / (t - r), where
f(x, 0) = x and the right side is the student itself, without gradient, under the same dropout. Given x_t, x_r is in the
mean where one step of the data's own denoiser leads, so as t - r -> 0 this is consistency distillation.

`ict`: t and r are neighbours among rungs that double with each phase. `ect`: from the teacher's weights,
r = t (1 - n(t) / q^(phase + 1)) with n(t) = 1 + 8 sigmoid(-sigma / alpha); at first r is mostly 0, plain denoising.

Source: iCT arXiv 2310.14189 §3; ECT 2406.14548 §3. t is log-normal in sigma / alpha as there, but rungs, r / t and
t - r count noise level, and some rows start at pure noise, where sampling does. The teacher's guidance is not learnt,
unless the latents are its own.
Left out: Karras' rungs, LPIPS, TCM's second stage.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.methods.base import Preset
from distill_jobs.methods.consistency import END, SelfConsistency, SelfConsistencyConfig, rungs


class TrainingConfig(SelfConsistencyConfig):
    keep: float | None = Field(None, ge=0, lt=1, description="of an averaged target; without one it is the student")
    level_mean: float = Field(-1.1, description="of log sigma / alpha")
    level_std: float = Field(2.0, gt=0)
    phase_every: int = Field(400, ge=1, description="iterations of a phase")


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


class DoublingConfig(TrainingConfig):
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


class EasyTuningConfig(TrainingConfig):
    smooth: float | None = Field(1e-8, gt=0)
    q: float = Field(2.0, gt=1, description="each phase divides the distance of the sides by it")
    closest: float = Field(0.999, gt=0, lt=1, description="greatest r / t")


class EasyTuning(Training):
    Config = EasyTuningConfig

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        u = (self.config.top * self.drawn(batch)).clamp_min(END)
        apart = (1 + 8 * torch.sigmoid(-u / (1 - u))) / self.config.q ** (self.phase + 1)
        return u, u * (1 - apart).clamp(0, self.config.closest)


PRESETS = {
    "ict": Preset(Doubling, "Consistency training without a teacher, on ever finer rungs.", "2310.14189"),
    "ect": Preset(EasyTuning, "From denoising to consistency by bringing two times together.", "2406.14548"),
}
