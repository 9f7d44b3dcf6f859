"""Progressive distillation: one step of the student lands where two steps of its guide land, and N halves by phases.

The guide of the first phase is the teacher; after each phase the guide becomes the student, which goes on with half the
steps. From x_t on the student's grid, guide steps t -> mid -> s (mid halves the noise level) lead to x_s; the student's
target is the line through x_t and x_s, so that one DDIM step of it ends at x_s too. Errors weigh max(SNR, 1). A guided
teacher's steps are guided; to make one evaluation of two first is another stage, `guidance`.

Source: arXiv 2202.00512 §3-4, algorithm 2.
Left out: the decay of the learning rate within a phase (the stage has one); stochastic sampling (2210.03142 §3.3).
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from itertools import pairwise
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods._line import Line, snr_error
from distill_jobs.methods.base import Count, Preset
from distill_jobs.roles import Cast, Role
from engines.denoiser import BaseDenoiser
from engines.process import secant


class ProgressiveConfig(DataConfig):
    counts: tuple[Count, ...] = Field((4,), min_length=1, max_length=1, description="the steps of the last phase")
    eta: float = Field(0.0, ge=0, le=0, description="one step lands where two did: no step re-noises")
    batch: int = Field(64, ge=1)
    halvings: int = Field(2, ge=0, le=12, description="phases before the last; the first has 2^halvings x its steps")
    phase: int = Field(500, ge=1, description="iterations of each phase; the last one goes on to the end")

    @model_validator(mode="after")
    def _one_count(self) -> Self:
        if len(self.counts) > 1:
            raise ValueError("progressive distillation ends at one count: its students of more steps are left behind")
        return self


class Progressive(DataMethod):
    Config = ProgressiveConfig

    def __init__(self, cast: Cast, config: ProgressiveConfig) -> None:
        super().__init__(cast, config)
        self.curriculum = {"phase": 0.0}

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {"guide": Role(init="student", train="frozen"), "student": config.student_role()}

    def levels(self, halvings: int) -> tuple[float, ...]:
        """The final grid with every step halved so many times, and its end 0."""
        (count,) = self.config.counts
        levels: tuple[float, ...] = (*self.config.levels(count, {}), 0.0)
        for _ in range(halvings):
            levels = (*(part for u, v in pairwise(levels) for part in (u, (u + v) / 2)), 0.0)
        return levels

    @property
    def guide(self) -> BaseDenoiser:
        return self.cast["guide"] if self.curriculum["phase"] else self.cast.teacher

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        x, t, s, line = self._step(batch)
        return {"progressive": snr_error(self.cast.student(x, t, batch.cond, s), line).mean()}

    @torch.no_grad()
    def _step(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Line]:
        """A state on the student's grid, its time and the next, and the line to where the guide leads."""
        assert batch.rows.x is not None
        levels = batch.noise.new_tensor(self.levels(self.config.halvings - int(self.curriculum["phase"])))
        i = batch.picks(len(levels) - 1)
        t, mid, s = (times.on(self.process, u) for u in (levels[i], (levels[i] + levels[i + 1]) / 2, levels[i + 1]))
        x = self.process.mix(batch.rows.x, batch.noise, t)
        there = self.guide.jump(self.guide.jump(x, t, mid, batch.cond), mid, s, batch.cond)
        return x, t, s, secant(self.process, x, t, there, s)

    def after(self, iteration: int) -> None:
        if (iteration + 1) % self.config.phase == 0 and self.curriculum["phase"] < self.config.halvings:
            self.cast.follow("guide", "student", 0.0)
            self.curriculum["phase"] += 1


PRESETS = {
    "progressive": Preset(
        Progressive, "One step lands where two did; the number of steps halves by phases.", "2202.00512"
    ),
}
