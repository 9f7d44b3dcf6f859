"""Fitted steps: what each step of a simple solver gets wrong is corrected by numbers had in closed form.

The student's own sampling is followed step by step beside the teacher's fine path from the same noise. At each step a
row of coefficients is known (`base`) and may be moved along some directions; how far, is the least-squares answer to
"end this step where the path is". Later steps start from what the fitted ones made. No gradient, k evaluations.

`optimal_step_size`: one scale on the straight jump. `d_ode`: one weight on the change of the clean prediction since the
step before. `fitted_solver`: every coefficient of the state and of all predictions so far; a Gaussian's flow map is
linear in these, so of Gaussian data it is exact.

Source: D-ODE arXiv 2309.16421 (one parameter per step, fitted to finer steps of the same solver). The other two are
ours; the scale is that of arXiv 2312.00094, fitted instead of learnt.
Checked against: closed forms of Gaussian data (tests).
"""

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.methods._search import Levels, Search, SearchConfig, distance, starts, written_out
from distill_jobs.methods._unrolled import solver_rows
from distill_jobs.methods.base import Preset
from engines.manifest import Schedule
from engines.process import Process
from engines.solvers import trajectory


class FittedConfig(SearchConfig):
    fit: Literal["scale", "change", "all"] = Field("scale", description="which coefficients of a step are fitted")
    path_steps: int = Field(24, ge=1, description="teacher steps, at least, of the path that each grid is fitted to")
    ridge: float = Field(1e-6, ge=0, description="holds what the rows do not decide at the simple solver's value")


class Fitted(Search):
    Config = FittedConfig

    def best(self, batch: Batch, truth: Tensor, k: int) -> Schedule:
        """Of the uniform grid and its bends, the one whose fitted steps end nearest."""
        fitted = [self.fitted(batch, levels) for levels in starts(k)]
        return min(fitted, key=lambda schedule: distance(self.cast.teacher, batch, truth, schedule))

    @torch.no_grad()
    def fitted(self, batch: Batch, levels: Levels) -> Schedule:
        """The schedule of these noise levels with its coefficients fitted on `batch`."""
        grid = times.grid(self.process, levels)
        path, rows = self._path(batch, grid), list[list[float]]()
        x, seen = path[0], list[Tensor]()
        base = solver_rows(self.process, torch.tensor(grid, dtype=torch.float64), "ddim")
        for i, row in enumerate(base):
            seen.insert(0, self.cast.teacher(x, x.new_full((len(x),), grid[i]), batch.cond)[0])
            parts = torch.stack([x, *seen]).flatten(1).double()
            known = torch.cat([row, row.new_zeros(i)])
            rows.append((known + self._moved(parts, known, path[i + 1], grid[i : i + 2])).tolist())
            x = (torch.tensor(rows[-1], dtype=torch.float64) @ parts).reshape(x.shape).to(x)
        return written_out(grid, rows)

    def _moved(self, parts: Tensor, known: Tensor, there: Tensor, ends: tuple[float, ...]) -> Tensor:
        """[i + 2] what is added to the known row so that row @ parts [i + 2, N] is nearest to `there`."""
        directions = _directions(self.config.fit, self.process, known, ends)
        columns, miss = (directions @ parts), there.flatten().double() - known @ parts
        gram = columns @ columns.T
        held = self.config.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        shares: Tensor = torch.linalg.pinv(gram + held, hermitian=True) @ (columns @ miss)
        return shares @ directions

    def _path(self, batch: Batch, grid: tuple[float, ...]) -> list[Tensor]:
        """The teacher's states at `grid`, by fine steps between."""
        between = max(1, -(-self.config.path_steps // (len(grid) - 1)))
        pieces = [times.between(self.process, *ends, between)[:-1] for ends in pairwise(grid)]
        fine = (*(t for piece in pieces for t in piece), grid[-1])
        path = trajectory(self.cast.teacher, batch.noise, fine, batch.cond, solver=self.config.reference_solver)
        return path[::between]


def _directions(fit: str, process: Process, known: Tensor, ends: tuple[float, ...]) -> Tensor:
    """[directions, i + 2] in which a row may be moved."""
    if fit == "all":
        return torch.eye(len(known), dtype=known.dtype)
    if fit == "change":
        shift = torch.zeros_like(known)
        if len(known) > 2:
            shift[1:3] = known[1] * known.new_tensor([1.0, -1.0])
        return shift[None]
    # The jump is what DDIM adds to the state in rectified flow's scale, x / (alpha + sigma).
    t = known.new_tensor(ends)
    size = process.alpha(t) + process.sigma(t)
    stay = torch.zeros_like(known)
    stay[0] = size[1] / size[0]
    return (known - stay)[None]


PRESETS = {
    "optimal_step_size": Preset(
        Fitted,
        "One scale on each straight jump, by least squares on the teacher's path.",
        "own, after 2312.00094",
        {"fit": "scale"},
    ),
    "d_ode": Preset(
        Fitted,
        "One weight per step on the change of the prediction, by least squares.",
        "2309.16421",
        {"fit": "change"},
    ),
    "fitted_solver": Preset(
        Fitted,
        "All coefficients of each step, by least squares on the teacher's path.",
        "own, after 2309.16421",
        {"fit": "all"},
    ),
}
