"""Policy imitation: one evaluation lays out the way from t to s, and along that way the teacher says where to go.

The student gives several x0 between t and the next rung s of its schedule (`engines.policy`), so its way can bend with
the teacher's, and it costs no network to follow. Training follows it: from where the student's own sampling stands on a
rung, the policy is followed without gradient to some noise levels below, and there its velocity is regressed on the
guided teacher's. The states are the policy's own, so its errors are seen and put right; no data and no teacher path are
needed. The network reads s, so that one student serves several counts.

Source: pi-Flow arXiv 2510.14974 §3-4 (imitation by on-policy flow matching), with the DX policy.
Left out: Gaussian-mixture policies, dropout and temperature of policies, the scheduled mixing of teacher and student
states.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows
from distill_jobs.methods._line import END, flow_error
from distill_jobs.methods.base import FewStepConfig, FewStepMethod, Preset
from distill_jobs.roles import Cast
from engines.denoiser import Denoiser
from engines.errors import InvalidRequest
from engines.manifest import Schedule
from engines.policy import Policy
from engines.solvers import sample


class PiFlowConfig(FewStepConfig):
    eta: float = Field(0.0, ge=0, le=0, description="a way is followed, not re-noised")
    batch: int = Field(64, ge=1)
    points: int = Field(8, ge=2, le=64, description="x0 that one evaluation gives between its time and the next")
    states: int = Field(2, ge=1, le=16, description="states of each way at which the teacher is asked")


class PiFlow(FewStepMethod):
    Config = PiFlowConfig
    inputs = frozenset({"s"})

    def __init__(self, cast: Cast, config: PiFlowConfig) -> None:
        super().__init__(cast, config)
        if not isinstance(cast.student, Denoiser):
            raise InvalidRequest("pi_flow trains a network of its own, whose answers can be a policy")
        self.student: Denoiser = cast.student

    @property
    def schedules(self) -> dict[int, Schedule]:
        solver = "dx" if self.student.points > 1 else "ddim"
        return {k: one.model_copy(update={"solver": solver}) for k, one in super().schedules.items()}

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        x, policy = self.way(batch)
        losses = [self.imitation(batch, x, policy) for _ in range(self.config.states)]
        return {"imitation": torch.stack(losses).mean()}

    def way(self, batch: Batch) -> tuple[Tensor, Policy]:
        """The student's own state on a rung of its schedule, and the way that it lays out to the next."""
        schedule, k = self.rung(batch)
        x = sample(self.student, batch.noise, schedule.times[: k + 1], batch.cond)
        t, s = (x.new_full((len(x),), time) for time in schedule.times[k : k + 2])
        return x, self.student.policy(x, t, s, batch.cond)

    def imitation(self, batch: Batch, x: Tensor, policy: Policy) -> Tensor:
        """The mean square of policy's less teacher's velocity (rectified flow's) at a random state of the way."""
        high, low = (times.level_of(self.process, time) for time in (policy.t, policy.s))
        level = torch.lerp(high, low.clamp_min(END), batch.draw(times.Uniform()))
        time = torch.minimum(times.on(self.process, level), policy.t)
        with torch.no_grad():
            state = policy.detach().follow(x, time)
            line = self.cast.teacher(state, time, batch.cond)
        return over_rows(flow_error(policy.at(state, time), line).square()).mean()


PRESETS = {
    "pi_flow": Preset(
        PiFlow, "A policy of several x0 per evaluation imitates the teacher along its own way.", "2510.14974"
    )
}
