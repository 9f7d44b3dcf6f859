"""GITS: the times at which straight steps leave the teacher's path least, by dynamic programming over its curvature.

One fine path of the teacher is followed. What a single straight step from each of its points to each later one misses
the path by is the cost of that step, and all costs together say where the path is bent. The k steps of least total cost
are the schedule. Unlike the programme of optimal_steps, every step is judged from the teacher's own state, so one table
of costs serves all counts.

Source: arXiv 2405.11326 §4 (geometry-inspired time schedule, with the weight of later costs).
Checked against: an exhaustive search (tests).
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows
from distill_jobs.methods._search import Found, Search, SearchConfig, distance, plain
from distill_jobs.methods.base import Preset
from distill_jobs.roles import Cast
from engines.manifest import Schedule
from engines.solvers import PlainSolver


class GITSConfig(SearchConfig):
    fine: int = Field(48, ge=2, description="steps of the path whose costs are taken")
    later: float = Field(1.15, gt=0, description="weight of each next step's cost over the one before")
    solvers: tuple[PlainSolver, ...] = Field(
        ("ddim", "ab2", "dpmpp_2m"), min_length=1, description="of which the best is used"
    )


class GITS(Search):
    Config = GITSConfig

    def __init__(self, cast: Cast, config: GITSConfig) -> None:
        super().__init__(cast, config)
        self._costs = torch.zeros(0, 0)

    def search(self, batch: Batch, proceed: Callable[[], bool] = lambda: True) -> Mapping[int, Found]:
        self._costs = self.costs(batch)
        return super().search(batch, proceed)

    def best(self, batch: Batch, truth: Tensor, k: int) -> Schedule:
        rungs, fine = cheapest(self._costs, k, self.config.later), times.uniform(self._fine)
        solvers = self.config.solvers if k > 1 else ("ddim",)  # one step is the same for all
        made = [plain(self.process, tuple(fine[i] for i in rungs), solver) for solver in solvers]
        return min(made, key=lambda schedule: distance(self.cast.teacher, batch, truth, schedule))

    @property
    def _fine(self) -> int:
        """Steps of the fine path: no fewer than the most that are searched."""
        return int(max(self.config.fine, *self.config.counts))

    @torch.no_grad()
    def costs(self, batch: Batch) -> Tensor:
        """[F + 1, F + 1] root mean square by which one DDIM step from rung i to rung j > i misses the fine path."""
        grid = times.grid(self.process, times.uniform(self._fine))
        x, jumps = batch.noise * self.process.prior(batch.noise.new_tensor(grid[:1])), list[tuple[Tensor, Tensor]]()
        path = [x]
        for t, s in pairwise(grid):
            jumps.append(self.cast.teacher(x, x.new_full((len(x),), t), batch.cond))
            x = self.process.mix(*jumps[-1], x.new_full((len(x),), s))
            path.append(x)
        cost = torch.full((len(grid), len(grid)), float("inf"), dtype=torch.float64)
        for i, line in enumerate(jumps):
            for j in range(i + 1, len(grid)):
                there = self.process.mix(*line, x.new_full((len(x),), grid[j]))
                cost[i, j] = over_rows((there - path[j]).square()).sqrt().mean()
        return cost


def cheapest(cost: Tensor, k: int, later: float) -> tuple[int, ...]:
    """The rungs that the k cheapest steps from rung 0 to the last start at: V_i = min over j of cost_ij + later V_j."""
    value = torch.full((len(cost),), float("inf"), dtype=cost.dtype)
    value[-1] = 0.0
    nexts: list[list[int]] = []
    for _ in range(k):
        value, chosen = (cost + later * value).min(dim=1)
        nexts.insert(0, chosen.tolist())
    rungs = [0]
    for step in nexts[:-1]:
        rungs.append(step[rungs[-1]])
    return tuple(rungs)


PRESETS = {"gits": Preset(GITS, "Times by dynamic programming over the curvature of the teacher's path.", "2405.11326")}
