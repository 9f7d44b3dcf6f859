"""Optimal steps: the best k times for the teacher as it is, by dynamic programming along its path; no new weights.

`optimal_steps`: first candidates are uniform and bent grids, and OSS's programme over a fine grid: of the k DDIM steps
that lead to a rung, those are kept that arrive nearest to the fine path. Then, for the most promising solvers, each
inner time is moved while the k-step endpoint comes closer to the many-step teacher's. `gits`: what one straight step
from each point of the fine path to each later one misses the path by is that step's cost, and all costs together say
where the path is bent; the k steps of least total cost are the schedule. There every step is judged from the teacher's
own state, so one table of costs serves all counts. All times are searched as noise levels of rectified flow.

Source: OptimalSteps arXiv 2503.21774 (dynamic programme); GITS 2405.11326 §4 (geometry-inspired time schedule, with the
weight of later costs). The solver choice and the refinement are ours: on the embedded teacher's prototype a multistep
solver gained more than the best Euler grid.
Left out: learnt times and coefficients (learned_solvers.py).
Checked against: an exhaustive search (tests).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows
from distill_jobs.methods._search import Found, Levels, Search, SearchConfig, distance, plain, starts
from distill_jobs.methods.base import Preset
from distill_jobs.roles import Cast
from engines.manifest import Schedule
from engines.solvers import PlainSolver, trajectory


class OptimalStepsConfig(SearchConfig):
    solvers: tuple[PlainSolver, ...] = Field(("ddim", "ab2", "dpmpp_2m", "unipc"), min_length=1)
    refine: int = Field(2, ge=0, description="solvers whose times are refined, best first")
    rounds: int = Field(3, ge=0, description="sweeps over the inner times, each with half the stride")
    fine: int = Field(20, ge=2, description="points of the dynamic programme's grid")


@dataclass(frozen=True, slots=True)
class _Candidate:
    distance: float
    solver: str
    levels: Levels


class OptimalSteps(Search):
    Config = OptimalStepsConfig

    def __init__(self, cast: Cast, config: OptimalStepsConfig) -> None:
        super().__init__(cast, config)
        self._programmed: dict[int, Levels] = {}

    def search(self, batch: Batch, proceed: Callable[[], bool] = lambda: True) -> Mapping[int, Found]:
        self._programmed = self.programme(batch) if max(self.config.counts) > 1 else {}
        return super().search(batch, proceed)

    def best(self, batch: Batch, truth: Tensor, k: int) -> Schedule:
        def judge(solver: str, levels: Levels) -> _Candidate:
            return _Candidate(self._distance(batch, truth, levels, solver), solver, levels)

        uniform = judge("ddim", times.uniform(k))
        grids = starts(k) + ([self._programmed[k]] if k in self._programmed else [])
        solvers = self.config.solvers if k > 1 else ("ddim",)  # one step is the same for all
        firsts = [min((judge(name, grid) for grid in grids), key=lambda c: c.distance) for name in solvers]
        firsts.sort(key=lambda c: c.distance)
        refined = [self._refine(first, judge) for first in firsts[: self.config.refine]]
        best = min([uniform, *firsts, *refined], key=lambda c: c.distance)
        return plain(self.process, best.levels, best.solver)

    def _refine(self, best: _Candidate, judge: Callable[[str, Levels], _Candidate]) -> _Candidate:
        """Moves one inner level at a time by a share of its gap, keeps what comes closer."""
        stride = 0.5
        for _ in range(self.config.rounds):
            for j in range(1, len(best.levels)):
                for sign in (1, -1):
                    tried = judge(best.solver, _moved(best.levels, j, sign * stride))
                    best = min(best, tried, key=lambda c: c.distance)
            stride /= 2
        return best

    def _distance(self, batch: Batch, truth: Tensor, levels: Levels, solver: str) -> float:
        return distance(self.cast.teacher, batch, truth, plain(self.process, levels, solver))

    def _path(self, batch: Batch, levels: Levels, solver: str) -> list[Tensor]:
        return trajectory(self.cast.teacher, batch.noise, times.grid(self.process, levels), batch.cond, solver=solver)

    def programme(self, batch: Batch) -> dict[int, Levels]:
        """For each k the DDIM rungs whose own states stay nearest to the fine trajectory (OSS, algorithm 1)."""
        levels = times.uniform(self.config.fine)
        grid = times.grid(self.process, levels)
        truth = self._path(batch, levels, "ddim")
        states: dict[int, Tensor] = {0: truth[0]}  # where the best path of k steps stands at each rung
        routes: dict[int, tuple[int, ...]] = {0: (0,)}
        found: dict[int, Levels] = {}
        for k in range(1, max(self.config.counts) + 1):
            states, routes = self._extend(batch, grid, truth, states, routes)
            if len(grid) - 1 in routes:
                found[k] = tuple(levels[i] for i in routes[len(grid) - 1][:-1])
        return found

    def _extend(
        self,
        batch: Batch,
        grid: Sequence[float],
        truth: Sequence[Tensor],
        states: dict[int, Tensor],
        routes: dict[int, tuple[int, ...]],
    ) -> tuple[dict[int, Tensor], dict[int, tuple[int, ...]]]:
        """One DDIM step from every rung to every later one; each keeps the arrival nearest to the truth."""
        best: dict[int, tuple[float, Tensor, tuple[int, ...]]] = {}
        for i, x in states.items():
            if i == len(grid) - 1:
                continue
            with torch.no_grad():
                x0, eps = self.cast.teacher(x, x.new_full((len(x),), grid[i]), batch.cond)
            for j in range(i + 1, len(grid)):
                there = self.process.mix(x0, eps, x.new_full((len(x),), grid[j]))
                error = float((there - truth[j]).square().mean())
                if j not in best or error < best[j][0]:
                    best[j] = (error, there, (*routes[i], j))
        return {j: b[1] for j, b in best.items()}, {j: b[2] for j, b in best.items()}


def _moved(levels: Levels, j: int, share: float) -> Levels:
    """Level j moved by a share of the gap to its upper (share > 0) or lower neighbour."""
    ends: Any = (*levels, 0.0)
    gap = ends[j - 1] - ends[j] if share > 0 else ends[j] - ends[j + 1]
    return (*levels[:j], levels[j] + share * gap, *levels[j + 1 :])


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


PRESETS = {
    "optimal_steps": Preset(
        OptimalSteps, "The teacher's own best times and solver for few steps; no training.", "2503.21774"
    ),
    "gits": Preset(GITS, "Times by dynamic programming over the curvature of the teacher's path.", "2405.11326"),
}
