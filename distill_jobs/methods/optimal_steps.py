"""Optimal steps: the best k times and the best solver for the teacher as it is; a student without new weights.

First candidates: uniform and bent grids, and the dynamic programme of OSS over a fine grid. Then, for the most
promising solvers, each inner time is moved while the k-step endpoint comes closer to the many-step teacher's.
All times are searched as noise levels of rectified flow.

Source: OptimalSteps arXiv 2503.21774 (dynamic programme). The solver choice and the refinement are ours: on the
embedded teacher's prototype a multistep solver gained more than the best Euler grid.
Left out: learned coefficients (gas.py, amed.py, fitted_steps.py) and times learnt by gradient (ld3.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
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


PRESETS = {
    "optimal_steps": Preset(
        OptimalSteps, "The teacher's own best times and solver for few steps; no training.", "2503.21774"
    )
}
