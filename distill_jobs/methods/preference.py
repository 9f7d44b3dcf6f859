"""Preference: of several own samples of a condition the student is moved to those that a reward prefers.

It draws the samples itself. Rewards are compared within a condition only, and need not be differentiable. Logged beside
the loss: the reward, a held-out one, and the distance of two samples of a condition, which falls as variety is lost.

`pso`: a student that re-noises is a policy: its step from x_t leads to a normal distribution around the mean of its
jump, with the deviation of the fresh noise. Of two samples, with the log ratio of the policy and a reference (the
student as it came, frozen) of one step on the way to each,

    loss = softplus(-beta (log ratio of the preferred - log ratio of the other)),

so the step to the preferred one becomes likelier than the reference has it, and the other less so. Ratios count from
1 - trust to 1 + trust only: beyond, a pair pulls no further. Log ratios are per value, and both samples of a pair are
scored with the same noise. The last step renews no noise and is no policy, so one of the counts must be 2 or more.

`nft`: forward-process regression that learns from bad samples too. A clean sample y of the old policy (an average of
the student) is noised to a time at which the student is asked when it samples; with the x0 predictions D of student and
old policy, in units of velocity,

    loss = r |D_old + beta (D - D_old) - y|^2 + (1 - r) |D_old - beta (D - D_old) - y|^2,

where r in 0..1 is where the sample's reward stands in its group, 1/2 being the mean. It is least at
D = D_old + E[(2 r - 1) (y - D_old) | x_t] / beta. Of a student of few steps D_old is no mean of y, so where the reward
can be foreseen from x_t, good states are pulled towards that mean, which is blurred, and bad ones away from it; at pure
noise the two cancel. Its authors made it for many steps: look at the pictures, and stop early.

Source: PSO arXiv 2410.03190 (online), without offline pairs of people's choices; DiffusionNFT 2509.16117, without the
distance from the student as it came, with one weight for both errors and rewards in units of their own group.
Checked against: gradients and optimum for a linear reward of Gaussian data in closed form (tests).
"""

import math
from dataclasses import replace
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from distill_jobs.batches import Batch, repeated
from distill_jobs.losses import over_rows, row_distance
from distill_jobs.methods.base import Count, FewStepConfig, FewStepMethod, Preset
from distill_jobs.roles import Cast, Role
from distill_jobs.terms.reward import RewardConfig
from distill_jobs.terms.rewards.base import PACKAGE, Reward
from engines import plugins
from engines.denoiser import BaseDenoiser, Cond
from engines.manifest import Schedule
from engines.solvers import renoise, sample

_FIRST = "first"  # the role of the student as it came
_OLD = "old"  # the role of the policy that samples are drawn from
_ALIKE = 1e-6  # a deviation of rewards that is rounding


class PreferenceConfig(RewardConfig, FewStepConfig):
    lr: float = Field(1e-4, gt=0, description="the student's learning rate")


class Preference(FewStepMethod):
    """The parent: what the rewards say of own samples. `Config` must be a `PreferenceConfig`."""

    asks_teacher = False

    def __init__(self, cast: Cast, config: PreferenceConfig) -> None:
        super().__init__(cast, config)
        self.reward: Reward = plugins.load(PACKAGE, config.reward, "REWARD")(cast)
        self.held_out: Reward = plugins.load(PACKAGE, config.held_out, "REWARD")(cast)

    def scores(self, score: Reward, y: Tensor, batch: Batch) -> Tensor:
        """[G, B] of the G samples y [G x B, ...] of each condition, with the same randomness."""
        state = batch.generator.clone_state()
        groups = y.chunk(len(y) // len(batch))
        return torch.stack([score(one, replace(batch, generator=state.clone_state())) for one in groups])

    def figures(self, reward: Tensor, y: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What is logged of the samples y, two or more of each condition, and their rewards [G, B]."""
        one, other, *_ = y.chunk(len(y) // len(batch))
        return {
            "reward": reward.mean(),
            "held_out": self.scores(self.held_out, y, batch).mean(),
            "distance": row_distance(one, other).mean(),
        }


class PSOConfig(PreferenceConfig):
    counts: tuple[Count, ...] = Field((4,), min_length=1, description="step counts the student is made for")
    eta: float = Field(1.0, gt=0, le=1, description="share of noise that a step renews; without any there is no policy")
    beta: float = Field(50.0, gt=0, description="how much a log ratio counts")
    trust: float = Field(0.1, gt=0, lt=1, description="how far from 1 ratios count")

    @model_validator(mode="after")
    def _renews(self) -> Self:
        if max(self.counts) < 2:
            raise ValueError(f"the last step renews no noise: one of the counts must be 2 or more, not {self.counts}")
        return self


class PSO(Preference):
    Config = PSOConfig
    for_several_steps = frozenset({"eta"})

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
            reward = self.scores(self.reward, y, batch)
            figures = self.figures(reward, y, batch)
        ratio = self.log_density(self.cast.student, x, x_s, ends, pairs.cond) - known
        one, other = ratio.clamp(math.log1p(-self.config.trust), math.log1p(self.config.trust)).chunk(2)
        preference = torch.sign(reward[0] - reward[1])  # of the first; two alike say nothing
        return {"pso": functional.softplus(-self.config.beta * preference * (one - other)).mean(), **figures}

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


class NFTConfig(PreferenceConfig):
    batch: int = Field(16, ge=1, description="conditions of one update")
    group: int = Field(4, ge=2, description="samples of each condition")
    beta: float = Field(1.0, gt=0, description="how far the two policies lie from the old one; less is bolder")
    deviations: float = Field(
        2.0, gt=0, description="of its group's rewards, at which a sample above or below their mean is all good or bad"
    )
    keep: float = Field(0.95, ge=0, lt=1, description="of the old policy per update")


class NFT(Preference):
    Config = NFTConfig

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {_OLD: Role(init="student", train="frozen"), **super().roles(config)}

    def after(self, iteration: int) -> None:
        self.cast.follow(_OLD, "student", self.config.keep)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        schedule, rung = self.rung(batch)
        wide, old, eta = repeated(batch, self.config.group), self.cast[_OLD], self.config.eta
        t = wide.noise.new_full((len(wide),), schedule.times[rung])
        low = torch.full_like(t, (1 - eta) * schedule.times[rung + 1])
        with torch.no_grad():
            y = sample(old, wide.noise, schedule.times, wide.cond, eta, draw=lambda _: wide.randn())
            reward = self.scores(self.reward, y, batch)
            figures = self.figures(reward, y, batch)
            x = self.process.mix(y, wide.randn(), t)
            known, _ = old(x, t, wide.cond, low)
        guess, _ = self.cast.student(x, t, wide.cond, low)
        away = self.config.beta * (guess - known)
        good, bad = (over_rows((known + side * away - y).square()) for side in (1, -1))
        r = self.goodness(reward).flatten()
        velocity = (self.process.alpha(t) + self.process.sigma(t)) / self.process.sigma(t)  # of x0, in rectified flow
        return {"nft": (velocity.square() * (r * good + (1 - r) * bad)).mean(), **figures}

    def goodness(self, reward: Tensor) -> Tensor:
        """r [G, B] in 0..1 of the rewards of each condition's G samples; samples that are as good have 1/2."""
        deviation, mean = torch.std_mean(reward, dim=0, correction=0, keepdim=True)
        stands: Tensor = (reward - mean) / (self.config.deviations * deviation + _ALIKE)
        return 0.5 + 0.5 * stands.clamp(-1, 1)


PRESETS = {
    "pso": Preset(
        PSO, "Of two own samples of a prompt the student is moved to the one a reward prefers.", "2410.03190"
    ),
    "nft": Preset(NFT, "Own samples, noised again, are learnt or unlearnt as a reward says.", "2509.16117"),
}
