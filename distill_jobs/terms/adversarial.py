"""A GAN on the student's samples, beside another loss.

Source: DMD2 arXiv 2405.14867 (a GAN beside distribution matching), here on the frozen teacher as in 2403.12015.
"""

from typing import Any

from torch import Tensor, nn

from distill_jobs.batches import Batch
from distill_jobs.discriminator import ROLE, Adversary, DiscriminatorConfig, real_of
from distill_jobs.roles import Cast, Role
from distill_jobs.terms.base import Term
from engines.denoiser import BaseDenoiser


class Adversarial(Term):
    """A discriminator on the teacher's features tells the student's samples from data or teacher endpoints."""

    Config = DiscriminatorConfig
    needs = frozenset({"data"})
    paper = "2405.14867"

    def __init__(self, cast: Cast, config: DiscriminatorConfig) -> None:
        super().__init__(cast, config)
        self.adversary = Adversary(cast, config)

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {ROLE: config.disc_role()}

    @classmethod
    def make(cls, name: str, denoiser: BaseDenoiser, config: Any) -> nn.Module:
        heads: nn.Module = config.heads(denoiser)
        return heads

    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        return self.adversary.student_loss(y, batch)

    def own_loss(self, role: str, y: Tensor, batch: Batch) -> Tensor:
        return self.adversary.own_loss(y, real_of(batch.rows), batch)


TERM = Adversarial
