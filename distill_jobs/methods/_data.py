"""Methods that learn from clean latents: the job's own, or latents that the teacher makes where there are none."""

from pydantic import Field

from distill_jobs.batches import Rows, Source
from distill_jobs.methods.base import FewStepConfig, FewStepMethod, Workspace
from distill_jobs.pairs import Pairs, TeacherPath, collect
from distill_jobs.roles import Cast
from engines.errors import InvalidRequest
from engines.solvers import PlainSolver


class DataConfig(FewStepConfig):
    generate: int = Field(2048, ge=0, description="latents that the teacher makes when there is no data")
    teacher_steps: int = Field(16, ge=1, description="of the teacher when it makes them")
    teacher_solver: PlainSolver = "ab2"


class DataMethod(FewStepMethod):
    """Its batches carry `rows.x`. `Config` must be a `DataConfig`."""

    def __init__(self, cast: Cast, config: DataConfig) -> None:
        super().__init__(cast, config)
        self.made: Pairs | None = None

    def prepare(self, source: Source, space: Workspace) -> bool:
        c = self.config
        if source.has_data:
            return True
        if not c.generate:
            raise InvalidRequest("the method needs latents: give data, or let the teacher make some (generate)")
        first = max(c.levels(count, {})[0] for count in c.counts)  # where the student starts, for eps below pure noise
        how = TeacherPath((first,), c.teacher_steps, c.teacher_solver)
        self.made = collect(self.cast.teacher, source, space, how, c.generate)
        return self.made is not None

    def rows(self, source: Source, position: int) -> Rows:
        if self.made is None:
            return source.rows(position, self.config.batch)
        made = self.made.rows(position, self.config.batch)
        assert made.pair is not None
        return Rows(cond=made.cond, x=made.pair[:, -1])
