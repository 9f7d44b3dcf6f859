"""Nearest neighbours in feature space: the balls of which manifold metrics are made.

Rows go through in chunks, so that no matrix of all distances is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
AnyFloats = npt.NDArray[np.floating]

MOST_ROWS = 2000
"""Radii shrink as sets grow, and figures with them: larger sets are cut to this, so that theirs can be compared."""
_CHUNK = 256


def distances(rows: AnyFloats, others: AnyFloats, *, chunk: int = _CHUNK) -> Iterator[Doubles]:
    """Euclidean distances of `rows` [M, D] to all `others` [N, D], some rows [m, N] at a time."""
    targets = np.asarray(others, dtype=np.float64)
    squares = np.square(targets).sum(1)
    for start in range(0, len(rows), chunk):
        part = np.asarray(rows[start : start + chunk], dtype=np.float64)
        found = np.square(part).sum(1)[:, None] + squares - 2 * part @ targets.T
        yield np.sqrt(found.clip(0))


def radii(rows: AnyFloats, k: int, *, chunk: int = _CHUNK) -> Doubles:
    """Distance [N] from each row to its k-th nearest other row.

    Raises:
        ValueError: there are not k others.
    """
    if len(rows) <= k:
        raise ValueError(f"{k} nearest neighbours need more than {k} pictures, not {len(rows)}")
    return np.concatenate([np.partition(part, k, axis=1)[:, k] for part in distances(rows, rows, chunk=chunk)])


def first_rows(rows: AnyFloats) -> AnyFloats:
    """At most `MOST_ROWS` of them, the first."""
    return rows[:MOST_ROWS]
