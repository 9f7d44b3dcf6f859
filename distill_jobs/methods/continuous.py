"""Consistency in continuous time: along the teacher's path the predicted end must not move.

All is said in TrigFlow, x_t = cos t x0 + sin t z, where the consistency function is f(x, t) = cos t x - sin t F(x, t)
with the network's velocity F. The student follows the tangent, F <- F + g with g = cos t df/dt along the teacher's
velocity v: g = -cos^2 t (F - v) - r cos t sin t (x + dF/dt). The warm-up r rises from 0, where this is plain matching
of velocities, to 1; each row of g is normalised to g / (|g| + c). A student of another process is asked in its own
coordinates, its velocity is taken in these. dF/dt is a forward-mode derivative, or a difference.

`scm` draws noise levels and noises latents; `tbcm` takes states and levels from the teacher's own paths, so prompts
are enough, anywhere on the lines between the kept ones: at a few times alone nothing ties a network's derivative there
to its values, and what feeds on itself so grows; `rcm` adds distribution matching, which restores the detail that
consistency loses.

Source: arXiv 2410.11081 §4 (sCM); 2511.20410 (TBCM); 2510.08431 (rCM); log-normal noise levels of 2503.09641.
Left out: learned loss weights, training without a teacher; TBCM's rules for which states to take.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from abc import abstractmethod
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, Rows, Source
from distill_jobs.losses import toward
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods._tangent import Rebased, along, most_noise, warmed
from distill_jobs.methods.base import FewStepConfig, FewStepMethod, MethodConfig, Preset, Workspace
from distill_jobs.methods.score_matching import DMD, GRIDS, ScoreMatchingConfig
from distill_jobs.pairs import Pairs, TeacherPath, collect
from distill_jobs.roles import Cast, Role
from engines.denoiser import Cond
from engines.errors import InvalidRequest
from engines.process import TRIG, over, rebase, secant
from engines.solvers import PlainSolver, sample

_LEAST = 1e-3  # the least noise level that is trained


class ConsistencyConfig(FewStepConfig):
    batch: int = Field(64, ge=1)
    sigma_data: float = Field(1.0, gt=0, description="deviation of the latents")
    warmup: int = Field(300, ge=0, description="iterations until the derivative of the network counts fully")
    soft: float = Field(0.1, gt=0, description="c of the normalised tangent g / (|g| + c)")
    difference: float = Field(
        0.0, ge=0, le=0.05, description="step of a difference (1e-3) for networks without forward-mode derivatives"
    )


class Consistency(FewStepMethod):
    """The parent: the tangent and its loss. `Config` must be a `ConsistencyConfig`."""

    Config: ClassVar[type[MethodConfig]] = ConsistencyConfig
    own_grids = GRIDS

    def __init__(self, cast: Cast, config: Any) -> None:
        super().__init__(cast, config)
        self.trig = TRIG(config.sigma_data)
        self.student, self.tutor = Rebased(cast.student, self.trig), Rebased(cast.teacher, self.trig)
        self.curriculum = {"tangent": warmed(0, config.warmup)}

    @abstractmethod
    def point(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(x_t, t) of TrigFlow to train at."""

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        x, t = self.point(batch)
        tangent = self.tangent(x, t, batch.cond)
        norm = over(tangent.flatten(1).norm(dim=1), tangent)
        unit = tangent * (tangent[0].numel() ** 0.5 / (norm + self.config.soft))  # each value about 1 in any size
        return {"scm": toward(self._field(x, t, batch.cond), -unit)}

    @torch.no_grad()
    def tangent(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """g. The direction carries its factor cos t sin t, so that nothing is large where the derivative is."""
        cos, sin = over(self.trig.alpha(t), x), over(-self.trig.dalpha(t), x)
        flow = self.tutor.velocity(x, t, cond)
        direction = (cos * sin * flow, (cos * sin).flatten())
        field, slope = along(lambda x, t: self._field(x, t, cond), (x, t), direction, self.config.difference)
        return -cos.square() * (field - flow) - self.curriculum["tangent"] * (cos * sin * x + slope)

    def _field(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """F: the velocity whose straight line ends in the prediction, also of a network that reads s."""
        return self.student.velocity(x, t, cond, torch.zeros_like(t))

    def after(self, iteration: int) -> None:
        self.curriculum["tangent"] = warmed(iteration + 1, self.config.warmup)

    @torch.no_grad()
    def panel(self, batch: Batch) -> dict[str, Tensor]:
        schedule = next(iter(self.schedules.values()))
        return {"gen": sample(self.cast.student, batch.noise, schedule.times, batch.cond, grad=0)}


class SCMConfig(ConsistencyConfig, DataConfig):
    level_mean: float = Field(0.2, description="of log(sigma / alpha), the levels trained at")
    level_std: float = Field(1.6, gt=0)
    top: float = Field(1.0, gt=0.01, le=1, description="the most noise that is trained")


class SCM(Consistency, DataMethod):
    Config: ClassVar[type[MethodConfig]] = SCMConfig

    def point(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.rows.x is not None
        c = self.config
        levels = batch.draw(times.LogitNormal(c.level_mean, c.level_std))
        t = times.on(self.trig, levels.clamp(_LEAST, min(c.top, most_noise(self.process))))
        return self.trig.mix(batch.rows.x, batch.noise, t), t


class TBCMConfig(ConsistencyConfig):
    pairs: int = Field(1024, ge=1, description="teacher trajectories to learn from")
    rungs: tuple[float, ...] = Field(
        times.uniform(16), min_length=1, description="noise levels kept of each; the path starts at the first"
    )
    teacher_steps: int = Field(16, ge=1)
    teacher_solver: PlainSolver = "ab2"


class TBCM(Consistency):
    Config: ClassVar[type[MethodConfig]] = TBCMConfig

    def __init__(self, cast: Cast, config: TBCMConfig) -> None:
        super().__init__(cast, config)
        self.pairs: Pairs | None = None
        self._path = TeacherPath(config.rungs, config.teacher_steps, config.teacher_solver)
        self._grid = times.grid(self.process, self._path.levels)
        falls = [i for i, (t, s) in enumerate(pairwise(self._grid)) if t > s]  # rungs may fall on one step of the path
        self._starts = torch.tensor(falls)

    def prepare(self, source: Source, space: Workspace) -> bool:
        self.pairs = collect(self.cast.teacher, source, space, self._path, self.config.pairs)
        return self.pairs is not None

    def rows(self, source: Source, position: int) -> Rows:
        if self.pairs is None:
            raise InvalidRequest("tbcm learns on teacher trajectories: call prepare() before the first update")
        return self.pairs.rows(position, self.config.batch)

    def point(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.rows.pair is not None
        rows, rung = torch.arange(len(batch)), self._starts.to(batch.noise.device)[batch.picks(len(self._starts))]
        x, there = batch.rows.pair[rows, rung], batch.rows.pair[rows, rung + 1]
        grid = batch.noise.new_tensor(self._grid)
        t, s = grid[rung], grid[rung + 1]
        between = t + batch.draw(times.Uniform(0.0, 0.98)) * (s - t)
        state = self.process.mix(*secant(self.process, x, t, there, s), between)
        return rebase(state, between, self.process, self.trig)


class RCMConfig(SCMConfig, ScoreMatchingConfig):
    beta1: float = Field(0.0, ge=0, lt=1)
    score_weight: float = Field(1.0, ge=0, description="of distribution matching beside consistency")


class RCM(SCM):
    """`scm` with the loss, and the critic, of `dmd`."""

    Config: ClassVar[type[MethodConfig]] = RCMConfig

    def __init__(self, cast: Cast, config: RCMConfig) -> None:
        super().__init__(cast, config)
        self.score = DMD(cast, config)

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return DMD.roles(config)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        if role != "student":
            return self.score.loss(role, batch)
        matched = self.score.loss(role, batch)
        return super().loss(role, batch) | {name: self.config.score_weight * value for name, value in matched.items()}

    def after(self, iteration: int) -> None:
        super().after(iteration)
        self.score.after(iteration)

    def panel(self, batch: Batch) -> dict[str, Tensor]:
        return self.score.panel(batch)


PRESETS = {
    "scm": Preset(SCM, "Continuous-time consistency: stable tangents in TrigFlow, no solver, no critic.", "2410.11081"),
    "tbcm": Preset(TBCM, "scm on states of the teacher's own trajectories: prompts only.", "2511.20410"),
    "rcm": Preset(RCM, "scm with distribution matching beside it, for detail.", "2510.08431"),
}
