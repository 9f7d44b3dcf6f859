"""Alignment: the share of what a caption states that the feature network's heads find in its picture.

Attributes that the caption leaves open do not count. A blurry average can score high here: alignment alone is no gate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from distill_jobs.tasks.base import ABSENT

Ints = npt.NDArray[np.int64]


def accuracy(found: Ints, stated: Ints) -> float | None:
    """Share of the stated attributes [N, A] that were found; None where nothing was stated."""
    counted = stated != ABSENT
    return float((found == stated)[counted].mean()) if counted.any() else None


def by_attribute(found: Ints, stated: Ints, names: Sequence[str]) -> dict[str, float | None]:
    """Accuracy of each attribute by its name, to see which one a generator gets wrong."""
    return {name: accuracy(found[:, [i]], stated[:, [i]]) for i, name in enumerate(names)}
