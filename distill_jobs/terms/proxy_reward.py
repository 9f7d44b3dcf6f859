"""Reward by proxy: the student climbs a small learnt model of a reward, which is trained beside it.

The proxy is heads on what the frozen teacher sees in a noised sample. Of two samples of one condition it learns by how
much the reward prefers one, so it knows the reward up to a constant for each condition, which the student could not
change anyway. The reward need not be differentiable, and what noise of that level hides (the fine grain that a score
can be fooled by) has little slope. Of a reward that is random the proxy learns the mean. It learns from the first
iteration: let the term join when it knows something (`after`). With `lcm` it is RG-LCD; what is climbed is the outcome
of one evaluation of the student in every method.

Logged: what proxy and reward each say of the samples. Where the first runs ahead of the second, the student has found
what the proxy does not know yet: more `proxy_updates`.

Source: RG-LCD arXiv 2403.11027 (latent proxy reward model).
Left out: the proxy there is a pretrained pair of encoders, and learns preferences (a softmax) between a sample, its
target and the real picture; here differences in the reward's own unit, so that weights mean what they do in `reward`.
Checked against: Ji4chenLi/rg-lcd train_lcm_distill_sd_wds.py (who is trained on what, and in which order).
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.discriminator import Heads
from distill_jobs.features import MIDDLE, features, tapped
from distill_jobs.roles import Role, unguided
from distill_jobs.terms.reward import RewardConfig, RewardTerm
from engines.denoiser import BaseDenoiser

ROLE = "proxy"


class ProxyRewardConfig(RewardConfig):
    taps: tuple[str, ...] = Field(
        MIDDLE, description="name ends of the teacher's submodules that are read; without any, its prediction is"
    )
    width: int = Field(64, ge=1, description="channels of a head")
    level: float = Field(0.1, gt=0, lt=1, description="noise level at which samples are looked at; it hides grain")
    proxy_lr: float = Field(1e-3, gt=0)
    proxy_updates: int = Field(2, ge=1, description="proxy updates per student update")


class ProxyReward(RewardTerm):
    """The student's samples climb a small model of a score, trained beside it, so that the score need have no slope."""

    Config = ProxyRewardConfig
    paper = "2403.11027"

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {ROLE: Role(init="new", lr=config.proxy_lr, steps=config.proxy_updates)}

    @classmethod
    def make(cls, name: str, denoiser: BaseDenoiser, config: Any) -> nn.Module:
        heads = Heads(len(tapped(denoiser, config.taps)) or 1, config.width)
        return heads.to(next(denoiser.parameters()).device)

    def score(self, y: Tensor, batch: Batch) -> Tensor:
        """[B], what the proxy takes for the reward of y; differentiable in y."""
        t = times.on(self.process, batch.noise.new_full((len(y),), self.config.level))
        y_t = self.process.mix(y, batch.randn(), t)
        _, seen = features(unguided(self.cast.teacher), y_t, t, batch.cond, self.config.taps)
        score: Tensor = self.cast.module(ROLE)(seen, self.process.angle(t)).mean(dim=1)
        return score

    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        return -self.score(y, batch).mean()

    def own_loss(self, role: str, y: Tensor, batch: Batch) -> Tensor:
        """The variance of the proxy's error among the samples of one condition."""
        with torch.no_grad():
            said = self.reward(y, batch)
        one, other = (self.score(y, batch) - said).chunk(2)
        return (one - other).square().mean() / 2

    def report(self, y: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"reward": self.reward(y, batch).mean(), **super().report(y, batch)}


TERM = ProxyReward
