"""Learned solvers: the times of a few-step solver, and what its steps do, so that its endpoints meet the teacher's.

A step is a row of coefficients of the state and of all clean predictions so far (`_unrolled`). By gradient through the
whole sampling: `ld3` learns the times of a known solver, `gas` also corrections to its rows, which begin at zero.
`amed` takes its steps in two evaluations: by the mean value theorem the step from t to s is exact along the direction
that the path has somewhere between, so the first evaluation leads to a learnt time there, and the second takes the
whole step from t along what it sees, times a scale near 1. An odd count begins with a single one and its own scale.

In `ld3` each row's starting noise may move within `tolerance` while the times are learnt: a student can seldom land on
the teacher's endpoint from the same noise, but from noise close by it often can, which is as good in distribution.

Without gradient, in k evaluations: the student's own sampling is followed beside the teacher's fine path from the same
noise, and how far a row is moved along some directions is the least-squares answer to "end this step where the path
is"; later steps start from what the fitted ones made. `optimal_step_size`: one scale on the straight jump. `d_ode`: one
weight on the change of the prediction since the step before. `fitted_solver`: every coefficient; a Gaussian's flow map
is linear in these, so of Gaussian data it is exact.

Source: LD3 arXiv 2405.15506 §3 (soft teacher); GAS 2510.17699; AMED 2312.00094; D-ODE 2309.16421 (one parameter per
step, fitted to finer steps of the same solver). Ours: outer times of `amed` are learnt too; `optimal_step_size` (the
scale of 2312.00094, fitted instead of learnt); `fitted_solver`.
Left out: ld3's perceptual distance (root mean square of latents instead) and minibatches (one batch is learnt from);
times of their own that only the network is told (LD3, GAS, AMED); GAS' adversarial loss; AMED's network that says time
and scale for each sample (here they are the same for all, so that a schedule can carry them).
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.methods._search import Levels, Search, SearchConfig, distance, starts, written_out
from distill_jobs.methods._unrolled import Base, Learned, LearnedConfig, StepRows, leaf, solver_rows
from distill_jobs.methods.base import Preset
from engines.manifest import Schedule
from engines.process import Process
from engines.solvers import trajectory


class _OfSolvers(Learned):
    """Begins with the nearest of the solvers that the job names."""

    @property
    def bases(self) -> tuple[Base, ...]:
        solvers: tuple[Base, ...] = self.config.solvers
        return solvers


class LD3Config(LearnedConfig):
    solvers: tuple[Base, ...] = Field(
        ("ddim", "ab2", "dpmpp_2m"), min_length=1, description="of which the best is used"
    )
    tolerance: float = Field(0.05, ge=0, lt=1, description="how far a row's noise may move, over its own length")


class LD3(_OfSolvers):
    Config = LD3Config

    def extras(self, k: int) -> list[Tensor]:
        return []

    def step_rows(self, t: Tensor, base: Base, extras: Sequence[Tensor]) -> StepRows:
        return solver_rows(self.process, t, base)

    def schedule(self, grid: tuple[float, ...], base: Base, rows: list[list[float]]) -> Schedule:
        return Schedule(times=grid, solver=base)

    def starting_noise(self, batch: Batch, shifts: Tensor) -> Tensor:
        """Shifted by no more than the tolerance: longer shifts are cut to it."""
        axes = tuple(range(1, shifts.dim()))
        most = self.config.tolerance * batch.noise.square().sum(axes, keepdim=True).sqrt()
        length = (shifts.square().sum(axes, keepdim=True) + 1e-12).sqrt()
        moved: Tensor = batch.noise + shifts * (most / length).clamp(max=1)
        return moved


class GASConfig(LearnedConfig):
    solvers: tuple[Base, ...] = Field(("ddim", "ab2", "dpmpp_2m"), min_length=1, description="to start from, the best")


class GAS(_OfSolvers):
    Config = GASConfig

    def extras(self, k: int) -> list[Tensor]:
        return [leaf([0.0] * (i + 2)) for i in range(k)]

    def step_rows(self, t: Tensor, base: Base, extras: Sequence[Tensor]) -> StepRows:
        known = solver_rows(self.process, t, base)
        return [pad(row, (0, len(more) - len(row))) + more for row, more in zip(known, extras, strict=True)]


class AMED(Learned):
    Config = LearnedConfig

    def extras(self, k: int) -> list[Tensor]:
        return [leaf([1.0] * -(-k // 2))]

    def step_rows(self, t: Tensor, base: Base, extras: Sequence[Tensor]) -> StepRows:
        """In rectified flow's scale, x / (alpha + sigma), where a path of one (x0, eps) is straight in the level u."""
        u, scales = times.level_of(self.process, t), list(extras[0])
        count = len(t) - 1
        made = [_single(u[0], u[1], scales.pop(0))] if count % 2 else []
        for i, c in zip(range(count % 2, count, 2), scales, strict=True):
            made += [_single(u[i], u[i + 1], torch.ones_like(c)), _second(u[i], u[i + 1], u[i + 2], c)]
        size = self.process.alpha(t) + self.process.sigma(t)
        return [torch.cat([row[:1] / size[i], row[1:]]) * size[i + 1] for i, row in enumerate(made)]


def _single(u: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """x + c (v - u) (eps - x0), from level u to v."""
    slope = c * (v - u) / u  # eps = (x - (1 - u) x0) / u
    return torch.stack([1 + slope, -slope])


def _second(u: Tensor, between: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """x_u + c (v - u) (eps - x0) by what is predicted at the level between; x_u is the first evaluation undone."""
    slope, back = c * (v - u) / between, u / between
    return torch.stack([back + slope, -slope, 1 - back])


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
    "ld3": Preset(LD3, "A solver's times, learnt by gradient from the teacher's endpoints.", "2405.15506"),
    "gas": Preset(GAS, "Times and coefficients of a whole solver, learnt from the teacher's endpoints.", "2510.17699"),
    "amed": Preset(AMED, "Two evaluations a step: to a learnt time between, and along its direction.", "2312.00094"),
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
