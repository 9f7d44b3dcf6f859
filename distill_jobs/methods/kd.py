"""Knowledge distillation: from any rung of a teacher trajectory, predict where the trajectory ends.

The student becomes a map noise -> picture by plain regression, which is stable and fast but averages what it cannot
tell apart; it is the best start for score matching. It is sampled by re-noising (eta 1) unless told otherwise: a
deterministic jump towards the predicted end leaves the curved trajectories it was trained on (eight Gaussians in the
plane, energy distance to the teacher x 1000 at 1, 2, 4 steps: eta 0 gives 0.8, 1.5, 4.9, eta 1 gives 0.8, 1.4, 1.6).
Where trajectories are nearly straight it is the other way round: re-noising the regression's averages costs diversity
(embedded teacher, fd ratio at 4 steps 1.02 with eta 0, 1.06 with eta 1; diversity 1.00 and .88 of real pictures').

A student of several steps is asked where its own sampling leads it, which is beside the teacher's path. `own_share` of
the rows start there (backward distillation): the student samples from fresh noise down to the last rung of its largest
count, the teacher goes on from there, and the student learns where that ends. Only this jump is trained so: it is the
one that ends in the picture, the nearer the end the fewer steps the teacher needs, and smaller counts gain nothing.

Source: arXiv 2101.02388; as initialisation of distribution matching 2405.14867 §4.5, 2412.07772. Guiding the teacher
in an interval of noise levels only: 2404.07724. Backward distillation: 2405.05224 §3.1.
Left out: perceptual distances.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, Rows, Source, take
from distill_jobs.losses import root_mse
from distill_jobs.methods.base import FewStepConfig, FewStepMethod, Preset, Workspace
from distill_jobs.pairs import Pairs, TeacherPath, collect, follow
from distill_jobs.roles import Cast, guided_within
from engines.errors import InvalidRequest
from engines.process import over
from engines.solvers import PlainSolver, sample


class KDConfig(FewStepConfig):
    batch: int = Field(128, ge=1)
    lr: float = Field(1e-3, gt=0)
    pairs: int = Field(4992, ge=1, description="teacher trajectories to learn from")
    rungs: tuple[float, ...] = Field((1.0, 0.75, 0.5, 0.25), min_length=1, description="noise levels kept of each")
    first_share: float = Field(0.5, ge=0, le=1, description="share of rows at the first rung, pure noise")
    teacher_steps: int = Field(16, ge=1)
    teacher_solver: PlainSolver = Field("euler", description="ab2 follows the teacher closer")
    guidance_interval: tuple[float, float] | None = Field(
        None, description="noise levels between which a guided teacher is guided; all without one"
    )
    own_share: float = Field(
        0.0, ge=0, lt=1, description="share of rows from the student's own last rung on, where the teacher goes on"
    )

    @model_validator(mode="after")
    def _own_has_a_rung(self) -> Self:
        if self.own_share > 0 and max(self.counts) == 1:
            raise ValueError("own_share needs a count of at least 2: a single step starts at pure noise")
        return self


class KD(FewStepMethod):
    Config = KDConfig
    for_several_steps = frozenset({"own_share"})

    def __init__(self, cast: Cast, config: KDConfig) -> None:
        super().__init__(cast, config)
        self.pairs: Pairs | None = None
        self.tutor = guided_within(cast.teacher, config.guidance_interval)
        levels = TeacherPath(config.rungs, config.teacher_steps, config.teacher_solver).levels
        self._times = times.grid(self.process, levels)[:-1]

    def prepare(self, source: Source, space: Workspace) -> bool:
        c = self.config
        how = TeacherPath(c.rungs, c.teacher_steps, c.teacher_solver)
        self.pairs = collect(self.tutor, source, space, how, c.pairs)
        return self.pairs is not None

    def rows(self, source: Source, position: int) -> Rows:
        if self.pairs is None:
            raise InvalidRequest("kd learns from teacher pairs: call prepare() before the first update")
        return self.pairs.rows(position, self.config.batch)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        own = round(self.config.own_share * len(batch))
        rung = self._rungs(batch)
        t = batch.noise.new_tensor(self._times)[rung]
        x, end = batch.rows.pair[torch.arange(len(batch)), rung], batch.rows.pair[:, -1]
        if own:
            level, states, ends = self._own(batch, own)
            t = torch.cat([t.new_full((own,), level), t[own:]])
            x, end = torch.cat([states, x[own:]]), torch.cat([ends, end[own:]])
        guess = self.cast.student.jump(x, t, torch.zeros_like(t), batch.cond)
        return {"kd": root_mse(guess - end)}

    @torch.no_grad()
    def _own(self, batch: Batch, rows: int) -> tuple[float, Tensor, Tensor]:
        """Time, states [rows, ...] where the student's own sampling makes its last jump, and their ends."""
        c, noise, cond = self.config, batch.noise[:rows], take(batch.cond, torch.arange(rows))
        levels = c.levels(max(c.counts), self.own_grids)
        grid = times.grid(self.process, levels)[:-1]
        states = sample(self.cast.student, noise, grid, cond, c.eta, draw=lambda _: batch.randn()[:rows])
        steps = max(1, round(levels[-1] * c.teacher_steps))
        rest = tuple(levels[-1] * u for u in times.uniform(steps))
        return grid[-1], states, follow(self.tutor, states, rest, cond, c.teacher_solver)

    def _rungs(self, batch: Batch) -> Tensor:
        """[B] index of a rung: `first_share` at the first, the others spread over the rest."""
        others = len(self._times) - 1
        if others == 0:
            return torch.zeros(len(batch), dtype=torch.long)
        first = batch.draw(times.Uniform()) < self.config.first_share
        rest = 1 + batch.picks(others)
        return torch.where(first, torch.zeros_like(rest), rest)

    @torch.no_grad()
    def panel(self, batch: Batch) -> dict[str, Tensor]:
        t = batch.noise.new_full((len(batch),), self._times[0])
        start = over(self.process.sigma(t), batch.noise) * batch.noise
        return {"gen": self.cast.student.jump(start, t, torch.zeros_like(t), batch.cond)}


PRESETS = {
    "kd": Preset(KD, "Regression on the endpoints of teacher trajectories; a stable start for others.", "2101.02388"),
    "backward_distillation": Preset(
        KD, "kd that learns from the student's own states too, for several steps.", "2405.05224", {"own_share": 0.25}
    ),
}
