"""Pairwise sample optimisation: of two samples of one prompt the student is moved to the one that a reward prefers.

A student that re-noises is a policy: its step from x_t leads to a normal distribution around the mean of its jump, with
the deviation of the fresh noise. It draws two samples of each condition itself. With the log ratio of the policy and a
reference (the student as it came, frozen) of one step on the way to each sample,

    loss = softplus(-beta (log ratio of the preferred - log ratio of the other)),

so the step to the preferred one becomes likelier than the reference has it, and the other less so. Ratios count from
1 - trust to 1 + trust only: beyond, a pair pulls no further. Log ratios are per value, and both samples of a pair are
scored with the same noise. A reward need not be differentiable. The last step renews no noise and is no policy, so one
of the counts must be 2 or more.

Logged beside the loss: the reward, a held-out one, and the distance of the two samples, which falls as variety is lost.

Source: PSO arXiv 2410.03190 (online). Left out: offline pairs of people's choices.
Checked against: the gradient for a linear reward of Gaussian data in closed form (tests).
"""

import math
from dataclasses import replace
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from distill_jobs.batches import Batch, repeated
from distill_jobs.losses import over_rows
from distill_jobs.methods.base import Count, FewStepConfig, FewStepMethod, Preset
from distill_jobs.roles import Cast, Role
from distill_jobs.terms.reward import RewardConfig
from distill_jobs.terms.rewards.base import PACKAGE, Reward
from engines import plugins
from engines.denoiser import BaseDenoiser, Cond
from engines.manifest import Schedule
from engines.solvers import renoise, sample

_FIRST = "first"  # the role of the student as it came


class PSOConfig(RewardConfig, FewStepConfig):
    counts: tuple[Count, ...] = Field((4,), min_length=1, description="step counts the student is made for")
    eta: float = Field(1.0, gt=0, le=1, description="share of noise that a step renews; without any there is no policy")
    lr: float = Field(1e-4, gt=0, description="the student's learning rate")
    beta: float = Field(50.0, gt=0, description="how much a log ratio counts")
    trust: float = Field(0.1, gt=0, lt=1, description="how far from 1 ratios count")

    @model_validator(mode="after")
    def _renews(self) -> Self:
        if max(self.counts) < 2:
            raise ValueError(f"the last step renews no noise: one of the counts must be 2 or more, not {self.counts}")
        return self


class PSO(FewStepMethod):
    Config = PSOConfig
    asks_teacher = False
    for_several_steps = frozenset({"eta"})

    def __init__(self, cast: Cast, config: PSOConfig) -> None:
        super().__init__(cast, config)
        self.reward: Reward = plugins.load(PACKAGE, config.reward, "REWARD")(cast)
        self.held_out: Reward = plugins.load(PACKAGE, config.held_out, "REWARD")(cast)

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {_FIRST: Role(init="student", train="frozen"), **super().roles(config)}

    def rung(self, batch: Batch) -> tuple[Schedule, int]:
        """Any but the last, which renews no noise."""
        schedules = [schedule for _, schedule in sorted(self.schedules.items()) if schedule.steps > 1]
        schedule = schedules[batch.pick(len(schedules))]
        return schedule, batch.pick(schedule.steps - 1)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        schedule, rung = self.rung(batch)
        pairs = repeated(batch, 2)
        ends = schedule.times[rung], schedule.times[rung + 1]
        with torch.no_grad():
            x, x_s, y = self.walk(pairs, schedule.times, rung)
            known = self.log_density(self.cast[_FIRST], x, x_s, ends, pairs.cond)
            reward, held_out = (self.scores(score, y, batch) for score in (self.reward, self.held_out))
            distance = over_rows((y[: len(batch)] - y[len(batch) :]).square()).sqrt()
        ratio = self.log_density(self.cast.student, x, x_s, ends, pairs.cond) - known
        one, other = ratio.clamp(math.log1p(-self.config.trust), math.log1p(self.config.trust)).chunk(2)
        preference = torch.sign(reward[0] - reward[1])  # of the first; two alike say nothing
        return {
            "pso": functional.softplus(-self.config.beta * preference * (one - other)).mean(),
            "reward": reward.mean(),
            "held_out": held_out.mean(),
            "distance": distance.mean(),
        }

    def walk(self, pairs: Batch, path: tuple[float, ...], rung: int) -> tuple[Tensor, Tensor, Tensor]:
        """The student's states before and after one step of its sampling, and where that ends."""
        player, cond, eta, t, s = self.cast.student, pairs.cond, self.config.eta, path[rung], path[rung + 1]
        x = sample(player, pairs.noise, path[: rung + 1], cond, eta, draw=lambda _: pairs.randn())
        x_s = renoise(self.process, self.jump(player, x, (t, s), cond), pairs.randn(), (1 - eta) * s, s)
        unit = x_s / self.process.prior(torch.tensor([s], dtype=torch.float64)).item()
        return x, x_s, sample(player, unit, path[rung + 1 :], cond, eta, draw=lambda _: pairs.randn())

    def jump(self, player: BaseDenoiser, x: Tensor, ends: tuple[float, float], cond: Cond) -> Tensor:
        """To where noise is renewed from."""
        t, low = (x.new_full((len(x),), time) for time in (ends[0], (1 - self.config.eta) * ends[1]))
        return player.jump(x, t, low, cond)

    def log_density(
        self, player: BaseDenoiser, x: Tensor, x_s: Tensor, ends: tuple[float, float], cond: Cond
    ) -> Tensor:
        """[B] per value, up to a constant, of x_s as the player's step from x; `ends` are the step's (t, s)."""
        low, s = (1 - self.config.eta) * ends[1], ends[1]
        mean = renoise(self.process, self.jump(player, x, ends, cond), torch.zeros_like(x), low, s)
        deviation = float(renoise(self.process, torch.zeros(()), torch.ones(()), low, s))
        return -over_rows((x_s - mean).square()) / (2 * deviation**2)

    def scores(self, score: Reward, y: Tensor, batch: Batch) -> Tensor:
        """[2, B] of the two samples of each pair, with the same randomness."""
        state = batch.generator.clone_state()
        return torch.stack([score(half, replace(batch, generator=state.clone_state())) for half in y.chunk(2)])


PRESETS = {
    "pso": Preset(
        PSO, "Of two own samples of a prompt the student is moved to the one a reward prefers.", "2410.03190"
    ),
}
