"""What a reward is: a differentiable score of clean latents under their conditions; one file each; ends in `REWARD`."""

from abc import ABC, abstractmethod

from torch import Tensor

from distill_jobs.batches import Batch
from distill_jobs.roles import Cast

PACKAGE = "distill_jobs.terms.rewards"


class Reward(ABC):
    """A score over a cast; what it needs of it, it asks for when it is made."""

    def __init__(self, cast: Cast) -> None:
        self.cast = cast

    @abstractmethod
    def __call__(self, y: Tensor, batch: Batch) -> Tensor:
        """[B], the higher the better, of y [B, ...] under the batch's conditions."""
