"""GAS: a whole solver learnt by gradient: its times, and what each step makes of all predictions so far.

A step's coefficients are those of a known solver at the learnt times plus learnt corrections, and it may use every
earlier clean prediction. The corrections begin at zero, so learning starts from the known solver.

Source: arXiv 2510.17699 (generalised solver). Left out: the adversarial loss, a time of its own for the network.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from distill_jobs.methods._search import written_out
from distill_jobs.methods._unrolled import Base, Learned, LearnedConfig, StepRows, leaf, solver_rows
from distill_jobs.methods.base import Preset
from engines.manifest import Schedule


class GASConfig(LearnedConfig):
    solvers: tuple[Base, ...] = Field(("ddim", "ab2", "dpmpp_2m"), min_length=1, description="to start from, the best")


class GAS(Learned):
    Config = GASConfig

    @property
    def bases(self) -> tuple[Base, ...]:
        solvers: tuple[Base, ...] = self.config.solvers
        return solvers

    def extras(self, k: int) -> list[Tensor]:
        return [leaf([0.0] * (i + 2)) for i in range(k)]

    def step_rows(self, t: Tensor, base: Base, extras: Sequence[Tensor]) -> StepRows:
        known = solver_rows(self.process, t, base)
        return [pad(row, (0, len(more) - len(row))) + more for row, more in zip(known, extras, strict=True)]

    def schedule(self, grid: tuple[float, ...], base: Base, rows: list[list[float]]) -> Schedule:
        return written_out(grid, rows)


PRESETS = {
    "gas": Preset(GAS, "Times and coefficients of a whole solver, learnt from the teacher's endpoints.", "2510.17699")
}
