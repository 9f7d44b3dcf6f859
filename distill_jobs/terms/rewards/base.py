"""What a reward is: a score of clean latents under their conditions; one file each; ends in `REWARD`.

It must be differentiable only where a student climbs it directly (the term `reward`).
"""

from abc import ABC, abstractmethod

from torch import Tensor

from distill_jobs.batches import Batch
from distill_jobs.roles import Cast, Decode
from engines.errors import InvalidRequest

PACKAGE = "distill_jobs.terms.rewards"


class Reward(ABC):
    """A score over a cast; what it needs of it, it asks for when it is made."""

    def __init__(self, cast: Cast) -> None:
        self.cast = cast

    @abstractmethod
    def __call__(self, y: Tensor, batch: Batch) -> Tensor:
        """[B], the higher the better, of y [B, ...] under the batch's conditions."""


class PictureReward(Reward):
    """A score of decoded pictures."""

    def __init__(self, cast: Cast) -> None:
        super().__init__(cast)
        if cast.decode is None:
            raise InvalidRequest("this reward looks at pictures, and there is no decoder", param="method.terms")
        self._decode: Decode = cast.decode

    def __call__(self, y: Tensor, batch: Batch) -> Tensor:
        return self.of_pictures(self._decode(y), batch)

    @abstractmethod
    def of_pictures(self, pictures: Tensor, batch: Batch) -> Tensor:
        """[B], the higher the better, of pictures [B, 3, H, W] in levels 0..255."""
