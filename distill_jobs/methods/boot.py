"""BOOT: a one-step student learnt from noise alone, by following the teacher along the student's own states.

Of x_t = alpha y_t + sigma z with the noise z that a path started from, y_t is the signal. It obeys the signal ODE
dy/dt = -lambda' (f(x_t, t) - y_t), lambda = log(sigma / alpha), f the teacher's x0. The student, always asked at pure
noise x_T, gives y_s for every s: y_s is the x0 of its line from x_T to x_s. It is regressed on its own y at s + delta,
moved by one step of the teacher, over delta; at s = T it must give the teacher's own x0. One DDIM step of the teacher
from x_t is the exact solution of the signal ODE for a constant f.

Source: arXiv 2306.05544 §3.1-3.2. Left out: guidance weights that the student reads.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows
from distill_jobs.methods.base import FewStepConfig, FewStepMethod, Preset
from distill_jobs.roles import Cast
from engines.errors import InvalidRequest
from engines.process import over, secant


class BOOTConfig(FewStepConfig):
    counts: tuple[Annotated[int, Field(ge=1, le=1)], ...] = Field(
        (1,), min_length=1, max_length=1, description="only one step: its network is asked at pure noise"
    )
    eta: float = Field(0.0, ge=0, le=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    delta: float = Field(0.04, gt=0, le=0.5, description="length of the teacher's step, in noise levels")
    boundary: float = Field(0.1, ge=0, description="weight of the teacher's first x0 as the student's y at s = T")


class BOOT(FewStepMethod):
    Config = BOOTConfig
    inputs = frozenset({"s"})

    def __init__(self, cast: Cast, config: BOOTConfig) -> None:
        super().__init__(cast, config)
        if "s" not in cast.student.inputs:
            raise InvalidRequest("boot asks its student for every s: its network must read s")
        self._top = config.levels(1, {})[0]

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        c, student = self.config, self.cast.student
        top = times.on(self.process, batch.noise.new_full((len(batch),), self._top))
        x = over(self.process.sigma(top), batch.noise) * batch.noise
        end = batch.draw(times.Uniform(0.0, self._top - c.delta))
        s, near = (times.on(self.process, u) for u in (end, end + c.delta))
        with torch.no_grad():
            there = self.cast.teacher.jump(student.jump(x, top, near, batch.cond), near, s, batch.cond)
            signal, _ = secant(self.process, x, top, there, s)
            first, _ = self.cast.teacher(x, top, batch.cond)
        y, _ = student(x, top, batch.cond, s)
        at_top, _ = student(x, top, batch.cond, top)
        return {
            "bootstrap": over_rows(((y - signal) / c.delta).square()).mean(),
            "boundary": c.boundary * over_rows((at_top - first).square()).mean(),
        }


PRESETS = {"boot": Preset(BOOT, "One step from noise alone, bootstrapped along the signal ODE.", "2306.05544")}
