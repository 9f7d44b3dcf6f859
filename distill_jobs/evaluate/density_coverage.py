"""Density and coverage: precision and recall that one stray picture cannot spoil.

Both count made pictures in the balls round real ones. Density is the mean number of balls round a made picture, over
k: about 1 for a perfect generator, more where its pictures crowd into the dense parts. Coverage is the share of real
pictures whose ball holds any made one; of a perfect generator with as many pictures about 1 − 2^−k, .97 for k = 5.

Source: Naeem et al. 2020, arXiv 2002.09797, section 3 (k = 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_jobs.evaluate.neighbours import AnyFloats, distances, first_rows, radii

NEIGHBOURS = 5


@dataclass(frozen=True, slots=True)
class DensityCoverage:
    density: float
    coverage: float


def density_coverage(made: AnyFloats, real: AnyFloats, *, k: int = NEIGHBOURS) -> DensityCoverage:
    """Of features [M, D] against real ones [N, D]; the first `MOST_ROWS` of each count."""
    made, real = first_rows(made), first_rows(real)
    reach = radii(real, k)
    balls, held = 0, np.zeros(len(real), dtype=bool)
    for part in distances(made, real):
        inside = part < reach
        balls += int(inside.sum())
        held |= inside.any(0)
    return DensityCoverage(balls / (k * len(made)), float(held.mean()))
