"""Flow maps: a student that jumps from any time t to any earlier s, learnt from data and the teacher, without a critic.

Lagrangian self-distillation (`lsd`): where the student's jump ends, it must move as the teacher's field does,
d/ds X_{t->s}(x) = v_s(X_{t->s}(x)). With `delta` > 0 the derivative is a difference: the jump to s is regressed on the
student's own jump to s + delta followed by one Heun step of the teacher, so that no forward-mode derivative of the
network is needed; `delta` = 0 takes the exact derivative. Where s + delta reaches t this is the plain teacher step.

Source: arXiv 2505.18825 (LSD). Left out: ESD, PSD, learned loss weights.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import root_mse
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods.base import Preset
from distill_jobs.roles import Cast
from engines.denoiser import BaseDenoiser, Cond
from engines.errors import InvalidRequest
from engines.process import over

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


PRESETS = {
    "lsd": Preset(LSD, "Lagrangian flow map: any step count, from latents and the teacher, no critic.", "2505.18825")
}
