"""How much a latent varies over its positions: the mean over channels of its deviation. Collapse shows in it first."""

from torch import Tensor

from distill_jobs.batches import Batch
from distill_jobs.terms.rewards.base import Reward


class Contrast(Reward):
    def __call__(self, y: Tensor, batch: Batch) -> Tensor:
        deviation: Tensor = (y.flatten(2).var(dim=2, unbiased=False) + 1e-8).sqrt().mean(dim=1)
        return deviation


REWARD = Contrast
