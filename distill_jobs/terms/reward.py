"""Reward: the student's samples are moved up a differentiable score; a second one, held out, shows what that costs.

A student finds what a score does not see. What is gained in the held-out score too is gained in the pictures; a reward
that rises while the other falls is being exploited: weigh it less, let it join later (`after`, `ramp`), or climb a
proxy of it (`proxy_reward`). Beside them stands the distance of two samples of one condition, which falls as variety is
lost. With `dmd` it is ReFL beside distribution matching, which holds the student to the teacher.

Source: ReFL arXiv 2304.05977; with few-step students 2403.11027.
"""

from typing import Any

from pydantic import Field
from torch import Tensor

from distill_jobs.batches import Batch
from distill_jobs.losses import row_distance
from distill_jobs.methods.base import MethodConfig
from distill_jobs.roles import Cast
from distill_jobs.terms.base import Term
from distill_jobs.terms.rewards.base import PACKAGE, Reward
from engines import plugins

_ONE: Any = {"json_schema_extra": {"enum": plugins.names(PACKAGE)}}  # a job that names no such file is not queued


class RewardConfig(MethodConfig):
    reward: str = Field("alignment", description="the file in distill_jobs/terms/rewards that is climbed", **_ONE)
    held_out: str = Field("contrast", description="another one, which is only reported", **_ONE)


class RewardTerm(Term):
    """The student's samples climb a differentiable score, and a held-out one is reported beside it."""

    Config = RewardConfig
    paper = "2304.05977"
    samples = 2

    def __init__(self, cast: Cast, config: Any) -> None:
        super().__init__(cast, config)
        self.reward: Reward = plugins.load(PACKAGE, config.reward, "REWARD")(cast)
        self.held_out: Reward = plugins.load(PACKAGE, config.held_out, "REWARD")(cast)

    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        return -self.reward(y, batch).mean()

    def report(self, y: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"held_out": self.held_out(y, batch).mean(), "distance": row_distance(*y.chunk(2)).mean()}


TERM = RewardTerm
