"""Regression: from the start of a teacher trajectory, one jump must end where the teacher does.

Trajectories are those of the batch where its method has made some (`kd`); otherwise the teacher is followed from the
batch's noise, on a share of the rows, because that costs `teacher_steps` evaluations of it. It ties each noise to the
teacher's sample of it, which keeps a student of score matching from dropping modes.

Source: DMD arXiv 2311.18828. Left out: LPIPS; `distance` features is its like in latents, on the teacher.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, take
from distill_jobs.features import MIDDLE, features
from distill_jobs.losses import root_mse
from distill_jobs.methods.base import MethodConfig
from distill_jobs.pairs import follow
from distill_jobs.roles import unguided
from distill_jobs.terms.base import Term
from engines.denoiser import Cond
from engines.process import over
from engines.solvers import PlainSolver


class RegressionConfig(MethodConfig):
    start: float = Field(1.0, gt=0, le=1, description="noise level where trajectories start: the first rung of kd")
    teacher_steps: int = Field(8, ge=1, description="of the teacher where the batch has no trajectories")
    teacher_solver: PlainSolver = "ab2"
    share: float = Field(0.25, gt=0, le=1, description="share of the rows that are used")
    distance: Literal["latent", "features"] = "latent"
    taps: tuple[str, ...] = Field(MIDDLE, description="name ends of the teacher's submodules, for distance features")
    tau: float = Field(0.1, gt=0, lt=1, description="noise level at which the teacher's features are compared")


class Regression(Term):
    """One jump from pure noise ends where the teacher's trajectory does, in latents or in teacher features."""

    Config = RegressionConfig
    paper = "2311.18828"
    samples = 0

    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        count = max(1, round(self.config.share * len(batch)))
        cond = take(batch.cond, torch.arange(count))
        t = times.on(self.process, batch.noise.new_full((count,), self.config.start))
        start, end = self._ends(batch, t, cond)
        guess = self.cast.student.jump(start, t, torch.zeros_like(t), cond)
        if self.config.distance == "latent":
            return root_mse(guess - end)
        tau, noise = times.on(self.process, torch.full_like(t, self.config.tau)), batch.randn()[:count]
        ours, theirs = (self._seen(x, noise, tau, cond) for x in (guess, end))
        sizes = [their.square().mean().sqrt() for their in theirs]
        gaps = [root_mse((our - their) / size) for our, their, size in zip(ours, theirs, sizes, strict=True)]
        return torch.stack(gaps).mean()

    def _ends(self, batch: Batch, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Where trajectories stand at t and where they end, as many as t has rows."""
        pair, c = batch.rows.pair, self.config
        if pair is not None:
            return pair[: len(t), 0], pair[: len(t), -1]
        start = over(self.process.sigma(t), batch.noise) * batch.noise[: len(t)]
        levels = tuple(c.start * u for u in times.uniform(c.teacher_steps))
        return start, follow(self.cast.teacher, start, levels, cond, c.teacher_solver)

    def _seen(self, x: Tensor, noise: Tensor, tau: Tensor, cond: Cond) -> list[Tensor]:
        den = unguided(self.cast.teacher)
        return features(den, self.process.mix(x, noise, tau), tau, cond, self.config.taps)[1]


TERM = Regression
