"""Adversarial distillation: a discriminator on the teacher's own features is all that the student learns from.

`ladd`: the student denoises noised latents from its rungs in one jump; a discriminator tells the results from the
latents. Latents are the job's data, or the teacher's own samples, which fit their conditions better. Pure noise gets
most rows; at first only the less noisy rungs are trained, where there is less to learn.

`lightning`: the student jumps from rung to rung where the teacher takes `teacher_steps` steps. First by regression of
the jump; then a discriminator sees both ends of the jump, so that the student stays on the teacher's path and keeps its
modes; in the end it sees where the jump leads only, which forgives what a network of few steps cannot follow.

Source: LADD arXiv 2403.12015; SDXL-Lightning 2402.13929. Left out of LADD: preference optimisation afterwards; of
Lightning: halving the steps stage by stage (chain stages with falling counts), the trained encoder as discriminator
(heads on the frozen one instead), LoRA, judging at further noise levels.
Checked against: the closed form of Gaussian data (tests).
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.discriminator import ROLE, Adversary, DiscriminatorConfig, HeadsConfig, fooling, telling
from distill_jobs.features import features
from distill_jobs.losses import root_mse
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods.base import Count, Preset
from distill_jobs.roles import Cast, Role, unguided
from engines.denoiser import BaseDenoiser, Cond
from engines.errors import InvalidRequest
from engines.process import over
from engines.solvers import continued

_LEAST = 0.02  # noise level of a judged sample: without noise a network's features say little


class Adversarial(DataMethod):
    """The parent: a student of some grids and the heads that judge it."""

    def __init__(self, cast: Cast, config: Any) -> None:
        super().__init__(cast, config)
        self.grids = [schedule.times for schedule in self.schedules.values()]

    @classmethod
    def make(cls, name: str, denoiser: BaseDenoiser, config: Any) -> nn.Module:
        heads: nn.Module = config.heads(denoiser)
        return heads

    @torch.no_grad()
    def panel(self, batch: Batch) -> dict[str, Tensor]:
        t = batch.noise.new_full((len(batch),), self.grids[0][0])
        start = over(self.process.sigma(t), batch.noise) * batch.noise
        return {"gen": self.cast.student.jump(start, t, torch.zeros_like(t), batch.cond)}


class LADDConfig(DiscriminatorConfig, DataConfig):
    beta1: float = Field(0.0, ge=0, lt=1)
    disc_warmup: int = Field(20, ge=0, description="discriminator updates before the first student update")
    first_share: float = Field(0.7, ge=0, le=1, description="share of rows that start at the first rung")
    easy: int = Field(100, ge=0, description="iterations on the less noisy half of the rungs, before all")


class LADD(Adversarial):
    Config = LADDConfig

    def __init__(self, cast: Cast, config: LADDConfig) -> None:
        super().__init__(cast, config)
        self.adversary = Adversary(cast, config)
        self.rungs = sorted({t for grid in self.grids for t in grid[:-1]}, reverse=True)
        self.curriculum = {"easy": float(config.easy > 0)}

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        lead = -(-config.disc_warmup // config.disc_updates)
        return {ROLE: config.disc_role(), "student": config.student_role(start=lead)}

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.x is not None
        t = self._times(batch)
        x = self.process.mix(batch.rows.x, batch.noise, t)
        y = self.cast.student.jump(x, t, torch.zeros_like(t), batch.cond)
        if role == ROLE:
            return {"gan": self.adversary.own_loss(y.detach(), batch.rows.x, batch)}
        return {"gan": self.adversary.student_loss(y, batch)}

    def after(self, iteration: int) -> None:
        self.curriculum["easy"] = float(iteration + 1 < self.config.easy)

    def _times(self, batch: Batch) -> Tensor:
        """[B] rungs: one of the less noisy half while it is easy; then the first one or another."""
        rungs = batch.noise.new_tensor(self.rungs)
        if self.curriculum["easy"]:
            return _any(rungs[len(rungs) // 2 :], batch)
        first = batch.draw(times.Uniform()) < self.config.first_share
        return torch.where(first, rungs[0], _any(rungs[1:] if len(rungs) > 1 else rungs, batch))


def _any(choices: Tensor, batch: Batch) -> Tensor:
    """[B] drawn from choices."""
    return choices[batch.picks(len(choices))]


class LightningConfig(HeadsConfig, DataConfig):
    counts: tuple[Count, ...] = Field((4,), min_length=1, description="more than one needs a student that reads s")
    beta1: float = Field(0.0, ge=0, lt=1)
    eta: float = Field(0.0, ge=0, le=1)
    teacher_steps: int = Field(4, ge=1, description="of the teacher per jump, and to make latents")
    mse: int = Field(200, ge=0, description="iterations of regression before the discriminator")
    conditional: int = Field(400, ge=0, description="iterations in which it sees both ends of the jump")


class Lightning(Adversarial):
    """`curriculum["phase"]`: 0 regression, 1 both ends, 2 the far end alone."""

    Config = LightningConfig
    several_counts_read_s = True

    def __init__(self, cast: Cast, config: LightningConfig) -> None:
        super().__init__(cast, config)
        if len(config.counts) > 1 and "s" not in cast.student.inputs:
            raise InvalidRequest("lightning learns jumps between rungs: with several counts its student must read s")
        self.curriculum = {"phase": self._phase(0)}

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {ROLE: config.disc_role(start=config.mse), "student": config.student_role()}

    def after(self, iteration: int) -> None:
        self.curriculum["phase"] = self._phase(iteration + 1)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.x is not None
        grid = self.grids[batch.pick(len(self.grids))]
        k = batch.pick(len(grid) - 1)
        t, s = (batch.noise.new_full((len(batch),), at) for at in grid[k : k + 2])
        x = self.process.mix(batch.rows.x, batch.noise, t)
        ours = self.cast.student.jump(x, t, s, batch.cond)
        if role == "student" and self.curriculum["phase"] > 0:
            return {"gan": fooling(self.logits(ours, s, x, t, batch), self.config.gan)}
        theirs = self._teacher(x, t, s, batch.cond)
        if role == "student":
            return {"mse": root_mse(ours - theirs)}
        at_real, at_fake = (self.logits(end, s, x, t, batch) for end in (theirs, ours.detach()))
        return {"gan": telling(at_real, at_fake, self.config.gan)}

    def logits(self, end: Tensor, s: Tensor, x: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """[B, N] of jumps from x at t to `end` at s; in the last phase the start is blanked."""
        den, taps = unguided(self.cast.teacher), self.config.taps
        least = times.on(self.process, torch.full_like(s, _LEAST))
        if bool((s < least).all()):  # s is 0
            end, s = self.process.mix(end, batch.randn(), least), least
        _, there = features(den, end, s, batch.cond, taps)
        with torch.no_grad():
            _, here = features(den, x, t, batch.cond, taps)
        seen = 1.0 if self.curriculum["phase"] < 2 else 0.0
        both = [torch.cat([far, seen * near], dim=1) for far, near in zip(there, here, strict=True)]
        logits: Tensor = self.cast.module(ROLE)(both, self.process.angle(s))
        return logits

    def _phase(self, iteration: int) -> float:
        c = self.config
        return float(iteration >= c.mse) + float(iteration >= c.mse + c.conditional)

    def _teacher(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """Where the teacher's path from x at t stands at s; steps are equal in noise level."""
        grid = times.between(self.process, float(t[0]), float(s[0]), self.config.teacher_steps)
        return continued(self.cast.teacher, x, grid, cond, solver=self.config.teacher_solver)[-1]


PRESETS = {
    "ladd": Preset(
        LADD,
        "A discriminator on teacher features judges one-jump denoisings of latents.",
        "2403.12015",
        {"gan": "hinge"},
    ),
    "lightning": Preset(
        Lightning, "Rung to rung as the teacher goes, by regression and then a discriminator of jumps.", "2402.13929"
    ),
}
