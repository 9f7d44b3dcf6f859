"""Precision and recall: how many made pictures look real, and how many real ones could have been made.

Each set's manifold is the union of balls round its pictures that reach to their k-th neighbour; precision is the share
of made pictures inside the real one, recall the share of real pictures inside the made one.

Source: Kynkäänniemi et al. 2019, arXiv 1904.06991, section 2 (k = 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_jobs.evaluate.neighbours import AnyFloats, Doubles, distances, first_rows, radii

NEIGHBOURS = 3


@dataclass(frozen=True, slots=True)
class PrecisionRecall:
    precision: float
    recall: float


def precision_recall(made: AnyFloats, real: AnyFloats, *, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Of features [M, D] against real ones [N, D]; the first `MOST_ROWS` of each count."""
    made, real = first_rows(made), first_rows(real)
    return PrecisionRecall(_inside(made, real, radii(real, k)), _inside(real, made, radii(made, k)))


def _inside(rows: AnyFloats, centres: AnyFloats, reach: Doubles) -> float:
    """Share of `rows` in at least one ball."""
    return float(np.concatenate([(part <= reach).any(1) for part in distances(rows, centres)]).mean())
