"""Diversity: how far apart the pictures of one caption lie, as a share of how far apart real ones do.

A generator that answers every seed of a caption with the same picture scores 0, whatever its Fréchet distance.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def spread(features: npt.NDArray[np.floating], groups: npt.NDArray[np.int64]) -> float:
    """Mean Euclidean distance between pictures of one caption.

    `features` [N, D]; `groups` [N] says which caption made each row. Every caption weighs the same; one picture alone
    says nothing and is left out.
    """
    means = [_mean_distance(features[groups == group]) for group in np.unique(groups)]
    known = [mean for mean in means if mean is not None]
    if not known:
        raise ValueError("diversity needs a caption with at least two pictures")
    return float(np.mean(known))


def ratio(features: npt.NDArray[np.floating], groups: npt.NDArray[np.int64], real_spread: float) -> float:
    return spread(features, groups) / real_spread


def _mean_distance(rows: npt.NDArray[np.floating]) -> float | None:
    if len(rows) < 2:
        return None
    first, second = np.triu_indices(len(rows), 1)
    differences = rows[first].astype(np.float64) - rows[second]
    return float(np.sqrt(np.square(differences).sum(1)).mean())
