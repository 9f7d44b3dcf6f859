"""Consistency trajectories: a jump from t to any s must agree with one teacher step followed by the rest of the jump.

For u in s..t and the teacher's step x_u from x_t, f(x_t, t -> s) = f(x_u, u -> s); the right side is a slow average of
the student. `tcd` compares at s, with u one long DDIM step below t. `ctm` draws u anywhere above s, follows the teacher
there by Heun steps, and compares after both sides have jumped on to 0 through the frozen average: an error at s weighs
as much as it changes the picture. It adds denoising where the jump has no length, x0(x_t, t -> t) = x0.

These ask at pictures noised anew, which are on a teacher trajectory each, but not on one that sampling would follow. In
single trajectory distillation (`std`) all states of a training row lie on one trajectory of the teacher from the state
that sampling starts at, kept in a bank: x_t and x_u are neighbours on it; where s is u the right side is x_u itself.

Source: CTM arXiv 2310.02279 eq. 9 to 11; TCD 2402.19159 §4, its sampler's gamma is eta; STD 2412.18945. In `ctm` times
are continuous, not Karras' rungs.
Left out: LPIPS, the GAN terms of CTM and STD, CTM's weight of denoising by gradient norms; STD's starting states that
are pictures noised in part (students are sampled from noise) and a bank that is refilled while training.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows, root_mse
from distill_jobs.methods._bank import BankConfig, BankMethod
from distill_jobs.methods.base import Preset
from distill_jobs.methods.consistency import END, Distillation, DistillationConfig, TeacherStep, TeacherStepConfig
from distill_jobs.pairs import TeacherPath
from distill_jobs.roles import Cast, Role
from engines.denoiser import Cond
from engines.errors import InvalidRequest
from engines.process import over

_FLAT = 0.05  # the noise level below which the weight of denoising stays


class TCDConfig(DistillationConfig):
    eta: float = Field(0.3, ge=0, le=1, description="the sampler's gamma: it jumps to (1 - eta) s and re-noises to s")


class TCD(Distillation):
    Config = TCDConfig
    inputs = frozenset({"s"})

    def ends(self, batch: Batch, u: Tensor, r: Tensor) -> Tensor:
        return times.on(self.process, r * batch.draw(times.Uniform()))


class CTMConfig(TeacherStepConfig):
    eta: float = Field(0.0, ge=0, le=1, description="the sampler's gamma: it jumps to (1 - eta) s and re-noises to s")
    keep: float = Field(0.999, ge=0, lt=1, description="of the averaged target per update")
    solver: Literal["ddim", "heun"] = Field("heun", description="the teacher's step")
    substeps: int = Field(4, ge=1, description="teacher steps from t to u")
    dsm: float = Field(1.0, ge=0, description="weight of denoising")


class CTM(TeacherStep):
    Config = CTMConfig
    inputs = frozenset({"s"})

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        u = self.config.top * batch.draw(times.WithFirst(times.Uniform(2 * END, 1.0), self.config.first_share))
        return u, END + (u - END) * batch.draw(times.Uniform())

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.x is not None
        u, low = self.levels(batch)
        middle = low + (u - low) * batch.draw(times.Uniform())
        t, near, s = (times.on(self.process, level) for level in (u, middle, low))
        x = self.process.mix(batch.rows.x, batch.noise, t)
        target = self.target(self.neighbour(batch, x, t, near), near, s, batch.cond)
        guess = self.cast.student.jump(x, t, s, batch.cond)
        ours, theirs = (self.picture(side, s, batch.cond) for side in (guess, target))
        found = {"consistency": self.distance(ours - theirs, self.weight(u, low))}
        return found | ({"dsm": self.config.dsm * self.denoising(x, t, u, batch)} if self.config.dsm else {})

    def picture(self, x: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """Where the frozen average takes x from s to 0; the gradient passes through it."""
        return self.cast["target"].jump(x, s, torch.zeros_like(s), cond)

    def denoising(self, x: Tensor, t: Tensor, u: Tensor, batch: Batch) -> Tensor:
        """The error of x0 where the jump has no length, weighted as flow matching."""
        guess, _ = self.cast.student(x, t, batch.cond)
        loss: Tensor = (over_rows((guess - batch.rows.x).square()) / u.clamp_min(_FLAT).square()).mean()
        return loss


class STDConfig(BankConfig):
    batch: int = Field(64, ge=1)
    pairs: int = Field(2048, ge=1, description="teacher trajectories in the bank")
    states: int = Field(8, ge=1, description="states kept of each, besides its end")
    between: int = Field(2, ge=1, description="teacher steps from one state to the next")
    keep: float = Field(0.95, ge=0, lt=1, description="of the averaged student after each iteration")


class STD(BankMethod):
    Config = STDConfig
    inputs = frozenset({"s"})

    def __init__(self, cast: Cast, config: STDConfig) -> None:
        super().__init__(cast, config)
        if "s" not in cast.student.inputs:
            raise InvalidRequest("std trains a flow map: its student's network must read s")
        self.levels = tuple(config.top * u for u in times.uniform(config.states))

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {"target": Role(init="student", train="frozen"), "student": config.student_role()}

    @property
    def path(self) -> TeacherPath:
        return TeacherPath(self.levels, self.config.states * self.config.between, self.config.teacher_solver)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        n, k = self._rungs(batch)
        grid = batch.noise.new_tensor(times.grid(self.process, self.levels))
        row = torch.arange(len(batch), device=n.device)
        x, after = batch.rows.pair[row, n], batch.rows.pair[row, n + 1]
        with torch.no_grad():
            there = self.cast["target"].jump(after, grid[n + 1], grid[k], batch.cond)
            there = torch.where(over(k == n + 1, x), after, there)
        return {"std": root_mse(self.cast.student.jump(x, grid[n], grid[k], batch.cond) - there)}

    def _rungs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B] indices: of a state, and of where to jump from it, at the next state or later."""
        n = batch.picks(self.config.states)
        later = batch.draw(times.Uniform()) * (self.config.states - n)
        return n, n + 1 + later.long()

    def after(self, iteration: int) -> None:
        self.cast.follow("target", "student", self.config.keep)


PRESETS = {
    "ctm": Preset(
        CTM, "Consistency trajectories, compared where they end in the picture, with denoising.", "2310.02279"
    ),
    "tcd": Preset(
        TCD, "Consistency trajectories after long teacher steps, sampled with a share of noise.", "2402.19159"
    ),
    "std": Preset(STD, "A flow map that agrees with itself along stored teacher trajectories.", "2412.18945"),
}
