"""Diversity: the student's first jump is kept on the teacher's path, which decides what a noise becomes.

Score differences and discriminators are content with fewer kinds of samples; where the teacher's own path stands after
its first steps from the same noise (the anchor), the kinds are still all there. The student's jump from the noise to
the anchor's level must end at the anchor, per unit of noise level: in rectified flow that is the error of its first
velocity against (noise - anchor) / (1 - level).

A student that ignores s and samples in one step cannot both go towards the anchor and end in a sample: give it several
steps, or use `mode_seeking`.

Source: DP-DMD arXiv 2602.03139. Left out: keeping the method's own loss off the first step.
"""

from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import root_mse
from distill_jobs.methods.base import MethodConfig
from distill_jobs.roles import Cast
from distill_jobs.terms.base import Term
from engines.process import over
from engines.solvers import PlainSolver, trajectory


class DiversityConfig(MethodConfig):
    start: float = Field(1.0, gt=0, le=1, description="noise level of the first jump; below 1 for eps predictions")
    anchor: float = Field(0.75, gt=0, lt=1, description="noise level at which the teacher's path is kept to")
    teacher_steps: int = Field(4, ge=1, description="of the teacher from start to anchor")
    teacher_solver: PlainSolver = "ab2"

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.anchor >= self.start:
            raise ValueError(f"anchor {self.anchor} must lie below start {self.start}")
        return self


class Diversity(Term):
    """The student's first jump ends where the teacher's path from the same noise stands: keeps its variety."""

    Config = DiversityConfig
    paper = "2602.03139"
    samples = 0

    def __init__(self, cast: Cast, config: Any) -> None:
        super().__init__(cast, config)
        first, last, _ = times.grid(self.process, (config.start, config.anchor))
        self._times = times.between(self.process, first, last, config.teacher_steps)

    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        path = trajectory(self.cast.teacher, batch.noise, self._times, batch.cond, solver=self.config.teacher_solver)
        t, s = (batch.noise.new_full((len(batch),), at) for at in (self._times[0], self._times[-1]))
        there = self.cast.student.jump(path[0], t, s, batch.cond)
        # alpha + sigma is 1 in rectified flow: the unit of the loss is its velocity in every process
        unit = (self.process.alpha(s) + self.process.sigma(s)) * (self.config.start - self.config.anchor)
        return root_mse((there - path[-1]) / over(unit, there))


TERM = Diversity
