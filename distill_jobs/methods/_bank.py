"""Methods that learn from whole trajectories of the teacher, made before the first update and kept."""

from abc import abstractmethod
from typing import Self

from pydantic import Field, model_validator

from distill_jobs.batches import Rows, Source
from distill_jobs.methods.base import FewStepConfig, FewStepMethod, Workspace
from distill_jobs.pairs import Pairs, TeacherPath, collect
from distill_jobs.roles import Cast
from engines.errors import InvalidRequest
from engines.solvers import PlainSolver


class BankConfig(FewStepConfig):
    eta: float = Field(0.0, ge=0, le=1)
    lr: float = Field(1e-3, gt=0)
    pairs: int = Field(4992, ge=1, description="teacher trajectories to learn from")
    teacher_solver: PlainSolver = "ab2"

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        starts = {self.levels(k, {})[0] for k in self.counts}
        if len(starts) > 1:
            raise ValueError(f"the grids of all counts start where the trajectories do, not at {sorted(starts)}")
        return self

    @property
    def top(self) -> float:
        """The noise level at which trajectories start, as sampling does."""
        return self.levels(min(self.counts), {})[0]


class BankMethod(FewStepMethod):
    """Its batches carry `rows.pair`. `Config` must be a `BankConfig`."""

    def __init__(self, cast: Cast, config: BankConfig) -> None:
        super().__init__(cast, config)
        self.bank: Pairs | None = None

    @property
    @abstractmethod
    def path(self) -> TeacherPath:
        """How the teacher is followed, and which of its states are kept."""

    def prepare(self, source: Source, space: Workspace) -> bool:
        self.bank = collect(self.cast.teacher, source, space, self.path, self.config.pairs)
        return self.bank is not None

    def rows(self, source: Source, position: int) -> Rows:
        if self.bank is None:
            raise InvalidRequest("the method learns from teacher trajectories: call prepare() before the first update")
        return self.bank.rows(position, self.config.batch)
