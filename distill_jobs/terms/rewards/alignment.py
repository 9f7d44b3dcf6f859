"""How much better the teacher denoises a latent when it knows its condition: log p(c | y) up to a factor.

Both predictions are for the same noised latent, so that what the picture is by itself cancels.

Source: arXiv 2303.16203 (a diffusion model as a classifier), between the condition and none.
"""

from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows
from distill_jobs.roles import Cast
from distill_jobs.terms.rewards.base import Reward
from engines.denoiser import Guided, expand
from engines.errors import InvalidRequest

_LEVELS = times.Uniform(0.3, 0.7)  # below, no condition is needed; above, nothing of the latent is left


class Alignment(Reward):
    def __init__(self, cast: Cast) -> None:
        super().__init__(cast)
        if not isinstance(cast.teacher, Guided):
            raise InvalidRequest(
                "reward alignment needs a guided teacher, which knows the empty prompt", param="method.terms"
            )
        self.teacher = cast.teacher

    def __call__(self, y: Tensor, batch: Batch) -> Tensor:
        process = self.teacher.process
        t = times.on(process, batch.draw(_LEVELS))
        y_t = process.mix(y, batch.randn(), t)
        told, _ = self.teacher.denoiser(y_t, t, batch.cond)
        untold, _ = self.teacher.denoiser(y_t, t, expand(self.teacher.null_cond, len(y)))
        return over_rows((untold - y).square() - (told - y).square())


REWARD = Alignment
