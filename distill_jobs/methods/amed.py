"""AMED: one slope per two evaluations, taken at a learnt time between, with a learnt scale.

By the mean value theorem the step from t to s is exact along the direction that the path has somewhere in between. The
first evaluation leads to that time, the second takes the whole step from t along what it sees there, times a scale c
near 1. Of an odd count the first step is a single evaluation with a scale of its own.

Source: arXiv 2312.00094. Left out: a network that says time and scale for each sample (they are the same for all, so
that a schedule can carry them), and the scale of the time that the network is told. Ours: outer times are learnt too.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.methods._search import written_out
from distill_jobs.methods._unrolled import Base, Learned, LearnedConfig, StepRows, leaf
from distill_jobs.methods.base import Preset
from engines.manifest import Schedule


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

    def schedule(self, grid: tuple[float, ...], base: Base, rows: list[list[float]]) -> Schedule:
        return written_out(grid, rows)


def _single(u: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """x + c (v - u) (eps - x0), from level u to v."""
    slope = c * (v - u) / u  # eps = (x - (1 - u) x0) / u
    return torch.stack([1 + slope, -slope])


def _second(u: Tensor, between: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """x_u + c (v - u) (eps - x0) by what is predicted at the level between; x_u is the first evaluation undone."""
    slope, back = c * (v - u) / between, u / between
    return torch.stack([back + slope, -slope, 1 - back])


PRESETS = {
    "amed": Preset(AMED, "Two evaluations a step: to a learnt time between, and along its direction.", "2312.00094")
}
