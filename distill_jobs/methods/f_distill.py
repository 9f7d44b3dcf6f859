"""f-distill: distribution matching for any f-divergence, by the density ratio that a discriminator knows.

With r = p / q of the teacher's density p and the student's q at a noised sample, the gradient of the divergence
E_q f(r) is that of KL(student || teacher), which `dmd` follows, weighted row by row with h(r) = f''(r) r^2. Reverse KL
has h = 1: it leaves modes out. Divergences whose h grows with r ask most where the teacher puts more than the student,
and cover modes. f is scaled such that f''(1) = 1: next to the truth all are `dmd`, and so they are as long as the
discriminator is undecided.

log r is the mean of the discriminator's logits at the same noised sample. It compares with the job's data, or the
teacher's own samples, which alone have the density of a guided teacher. The student also fools it, a little.

Source: f-distill arXiv 2502.15681 (theorem 1, the table of h). Left out: the normaliser of h within bins of noise
level, which needs more rows than a share of a batch has; a discriminator on the critic's features (heads on the
teacher's instead).
Checked against: forward and reverse KL and Jensen-Shannon divergences of Gaussian data in closed form (tests).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_jobs.batches import Batch
from distill_jobs.discriminator import ROLE, Adversary, DiscriminatorConfig
from distill_jobs.losses import scale_of, toward
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods.base import Preset
from distill_jobs.methods.score_matching import ScoreMatching, ScoreMatchingConfig
from distill_jobs.roles import Cast, Role
from engines.denoiser import BaseDenoiser
from engines.process import over

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: 2 * r / (1 + r),
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: (1 + r) / 2,
    "softened_reverse_kl": lambda r: 2 / (1 + r),
    "neyman": lambda r: 1 / r,
}
"""h(r) of each divergence, 1 at r = 1."""


class FDistillConfig(DiscriminatorConfig, ScoreMatchingConfig, DataConfig):
    divergence: Literal[
        "reverse_kl", "forward_kl", "jensen_shannon", "hellinger", "jeffreys", "softened_reverse_kl", "neyman"
    ] = "jensen_shannon"
    gan: Literal["softplus"] = Field(
        "softplus", description="whose logits are log r", json_schema_extra={"enum": ["softplus"]}
    )
    disc_updates: int = Field(2, ge=1, description="discriminator updates per student update")
    r1: float = Field(1.0, ge=0, description="weight of |h(x) - h(x + a eps)|^2 on real latents; it shrinks log r")
    tau_mean: float = Field(0.0, description="of the logit-normal noise levels at which the discriminator learns")
    tau_std: float = Field(1.5, gt=0)
    ratio_min: float = Field(0.1, gt=0, le=1, description="least r that is believed")
    ratio_max: float = Field(20.0, ge=1, description="greatest r that is believed")
    gan_weight: float = Field(1e-3, ge=0, description="of fooling the discriminator")


class FDistill(ScoreMatching, DataMethod):
    Config = FDistillConfig
    term = "f_distill"

    def __init__(self, cast: Cast, config: FDistillConfig) -> None:
        super().__init__(cast, config)
        self.adversary = Adversary(cast, config)

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {ROLE: config.disc_role()} | super().roles(config)

    @classmethod
    def make(cls, name: str, denoiser: BaseDenoiser, config: Any) -> nn.Module:
        heads: nn.Module = config.heads(denoiser)
        return heads

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        if role == "fake":
            return super().loss(role, batch)
        y = self.generate(batch)
        if role == ROLE:
            assert batch.rows.x is not None
            return {"gan": self.adversary.own_loss(y.detach(), batch.rows.x, batch)}
        found = {self.term: self._student_loss(y, batch)}
        weight = self.config.gan_weight
        return found | ({"gan": weight * self.adversary.student_loss(y, batch)} if weight else {})

    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            y_t, t = self.noised(y, batch)
            real, _ = self.cast.teacher(y_t, t, batch.cond)
            fake, _ = self.cast["fake"](y_t, t, batch.cond)
            weight = self.weight(self.adversary.logits(y_t, t, batch.cond).mean(dim=1))
            direction = over(weight, y) * (fake - real) / scale_of(y - real, self.config.floor)
        return toward(y, direction)

    def weight(self, log_ratio: Tensor) -> Tensor:
        """h(r) [B]."""
        ratio = log_ratio.exp().clamp(self.config.ratio_min, self.config.ratio_max)
        return WEIGHTS[self.config.divergence](ratio)


PRESETS = {
    "f_distill": Preset(
        FDistill, "dmd for other divergences, weighted by a discriminator's density ratio.", "2502.15681", {"lr": 5e-4}
    ),
}
