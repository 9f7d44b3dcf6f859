"""Flow maps: a student that jumps from any time t to any earlier s, moved where it ends by the teacher; no critic.

Lagrangian self-distillation (`lsd`): where the student's jump ends, it must move as the teacher's field does,
d/ds X_{t->s}(x) = v_s(X_{t->s}(x)). With `delta` > 0 the derivative is a difference: the jump to s is regressed on the
student's own jump to s + delta followed by one Heun step of the teacher, so that no forward-mode derivative of the
network is needed; `delta` = 0 takes the exact derivative. Where s + delta reaches t this is the plain teacher step.

`boot` is the same from pure noise alone, so it needs no latents, and makes one step. Of x_t = alpha y_t + sigma z with
the noise z that a path started from, y_t is the signal. It obeys the signal ODE dy/dt = -lambda' (f(x_t, t) - y_t),
lambda = log(sigma / alpha), f the teacher's x0. The student, always asked at pure noise x_T, gives y_s for every s: y_s
is the x0 of its line from x_T to x_s. It is regressed on its own y at s + delta, moved by one step of the teacher, over
delta; at s = T it must give the teacher's own x0. One DDIM step of the teacher from x_t is the exact solution of the
signal ODE for a constant f.

Source: LSD arXiv 2505.18825; BOOT 2306.05544 §3.1-3.2.
Left out: ESD and PSD (mean_flow.py), learned loss weights; BOOT's guidance weights that the student reads.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows, root_mse
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods.base import FewStepConfig, FewStepMethod, Preset
from distill_jobs.roles import Cast
from engines.denoiser import BaseDenoiser, Cond
from engines.errors import InvalidRequest
from engines.process import over, secant

_END = 1e-3  # the last noise level at which the teacher is asked


class LSDConfig(DataConfig):
    eta: float = Field(0.0, ge=0, le=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    delta: float = Field(0.125, ge=0, lt=1, description="length of the teacher's step; 0 takes the exact derivative")
    top: float = Field(1.0, gt=0.01, le=1, description="the most noise a jump starts from")
    first_share: float = Field(0.25, ge=0, le=1, description="share of rows that start at pure noise")
    diagonal: float = Field(0.25, ge=0, le=1, description="share of rows that learn one teacher step only")


class LSD(DataMethod):
    Config = LSDConfig
    inputs = frozenset({"s"})

    def __init__(self, cast: Cast, config: LSDConfig) -> None:
        super().__init__(cast, config)
        if "s" not in cast.student.inputs:
            raise InvalidRequest("lsd trains a flow map: its student's network must read s")

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.x is not None
        u, end = self._levels(batch)
        t = times.on(self.process, u)
        x = self.process.mix(batch.rows.x, batch.noise, t)
        match = self._exact if self.config.delta == 0 else self._stepped
        return {"lsd": root_mse(match(x, t, u, end, batch.cond))}

    def _levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noise levels (from, to) with to < from."""
        start = times.WithFirst(times.Uniform(2 * _END, 1.0), self.config.first_share)
        u = self.config.top * batch.draw(start)
        end = u * batch.draw(times.Uniform(0.0, 0.98))
        one_step = batch.draw(times.Uniform()) < self.config.diagonal
        end = torch.where(one_step, u - self.config.delta, end) if self.config.delta else end
        return u, end.clamp_min(0) if self.config.delta else end.clamp_min(_END)

    def _stepped(self, x: Tensor, t: Tensor, u: Tensor, end: Tensor, cond: Cond) -> Tensor:
        """The error of the jump per unit of noise level, with the finite difference."""
        before = torch.minimum(end + self.config.delta, u)
        s, near = times.on(self.process, end), times.on(self.process, before)
        with torch.no_grad():
            there = self.cast.student.jump(x, t, near, cond)
            there = torch.where(over(before >= u, x), x, there)
            target = heun(self.cast.teacher, there, near, s, cond, times.on(self.process, end.clamp_min(_END)))
        return (self.cast.student.jump(x, t, s, cond) - target) / over(before - end, x)

    def _exact(self, x: Tensor, t: Tensor, u: Tensor, end: Tensor, cond: Cond) -> Tensor:
        s = times.on(self.process, end)
        both: Any = torch.func.jvp(lambda to: self.cast.student.jump(x, t, to, cond), (s,), (torch.ones_like(s),))
        there, slope = both
        with torch.no_grad():
            field = self.cast.teacher.velocity(there.detach(), s, cond)
        error: Tensor = slope - field
        return error

    @torch.no_grad()
    def panel(self, batch: Batch) -> dict[str, Tensor]:
        t = times.on(self.process, torch.ones_like(batch.noise[:, 0, 0, 0]))
        start = over(self.process.sigma(t), batch.noise) * batch.noise
        return {"gen": self.cast.student.jump(start, t, torch.zeros_like(t), batch.cond)}


def heun(den: BaseDenoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond, ask: Tensor) -> Tensor:
    """One Heun step from t to s; the field at the far end is asked at time `ask` (s, kept off zero)."""
    first = den.velocity(x, t, cond)
    second = den.velocity(x + over(s - t, x) * first, ask, cond)
    return x + over(s - t, x) * (first + second) / 2


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


PRESETS = {
    "lsd": Preset(LSD, "Lagrangian flow map: any step count, from latents and the teacher, no critic.", "2505.18825"),
    "boot": Preset(BOOT, "One step from noise alone, bootstrapped along the signal ODE.", "2306.05544"),
}
