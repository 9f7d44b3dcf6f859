"""Mode seeking: two samples of one condition must differ as their noises do.

The loss is 1 / (|y1 - y2| / |z1 - z2| + floor): it pushes samples of one condition apart, the harder the more alike
they are. It has no rest: weigh it little, and no more than variety asks for.

Source: arXiv 1903.05628 (distances of pictures, here of latents).
"""

from pydantic import Field
from torch import Tensor

from distill_jobs.batches import Batch
from distill_jobs.losses import row_distance
from distill_jobs.methods.base import MethodConfig
from distill_jobs.terms.base import Term


class ModeSeekingConfig(MethodConfig):
    floor: float = Field(0.1, gt=0, description="bounds the push on samples that are one")


class ModeSeeking(Term):
    """Samples of one condition from two noises are pushed apart, the harder the more alike they are."""

    Config = ModeSeekingConfig
    paper = "1903.05628"
    samples = 2

    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        apart = row_distance(*y.chunk(2)) / row_distance(*batch.noise.chunk(2))
        loss: Tensor = (1 / (apart + self.config.floor)).mean()
        return loss

    def report(self, y: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"distance": row_distance(*y.chunk(2)).mean()}


TERM = ModeSeeking
