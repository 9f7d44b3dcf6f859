"""Grain and saturation: two plain figures of pixels that feature distances hardly see and few-step students get wrong.

Grain is the mean |Laplacian| where a picture should be flat: a pixel counts when the levels of its 5 × 5 neighbourhood
span less than 24 in every channel. Measure it on pictures that were not rounded: rounding alone makes about one level.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distill_jobs.evaluate.pixels import Pixels

FLAT_RANGE_LEVELS = 24
_OFFSET_LEVELS = 0.25  # a ratio to a picture without any grain stays finite
_CHUNK = 16  # pictures at once: small enough to stay in the cache

Floats = npt.NDArray[np.float32]


class GrainTally:
    """Grain of pictures that come in batches."""

    def __init__(self) -> None:
        self._flat_sum = self._sum = 0.0
        self._flat_count = self._count = 0

    def add(self, pixels: Pixels) -> None:
        """Counts pictures [N, 3, H, W] in levels 0..255."""
        for start in range(0, len(pixels), _CHUNK):
            levels = np.asarray(pixels[start : start + _CHUNK], dtype=np.float32)
            roughness = np.abs(_laplacian(levels)).mean(1)  # [n, H − 4, W − 4]
            flat = (_range(levels) < FLAT_RANGE_LEVELS).all(1)
            self._flat_sum += float(roughness[flat].sum(dtype=np.float64))
            self._flat_count += int(flat.sum())
            self._sum += float(roughness.sum(dtype=np.float64))
            self._count += roughness.size

    def mean(self) -> float:
        """Mean |Laplacian| over the flat pixels; over all where no pixel is flat, for that is grain all over."""
        return self._flat_sum / self._flat_count if self._flat_count else self._sum / self._count


def grain(pixels: Pixels) -> float:
    """Grain of pictures [N, 3, H, W] in 8-bit levels."""
    tally = GrainTally()
    tally.add(pixels)
    return tally.mean()


def ratio(student: float, teacher: float) -> float:
    return (student + _OFFSET_LEVELS) / (teacher + _OFFSET_LEVELS)


def saturation(pixels: Pixels) -> float:
    """Mean chroma: the strongest minus the weakest channel, in 8-bit levels."""
    strongest, weakest = pixels.max(1), pixels.min(1)
    return float((strongest.astype(np.float32) - weakest).mean(dtype=np.float64))


def _laplacian(levels: Floats) -> Floats:
    """Sum of the four neighbours minus four times the pixel, for each pixel with a whole 5 × 5 neighbourhood."""
    x = levels[:, :, 1:-1, 1:-1]
    around = x[:, :, :-2, 1:-1] + x[:, :, 2:, 1:-1] + x[:, :, 1:-1, :-2] + x[:, :, 1:-1, 2:]
    return around - 4 * x[:, :, 1:-1, 1:-1]


def _range(levels: Floats) -> Floats:
    """Highest minus lowest level of each whole 5 × 5 neighbourhood: windows of 2, 4, then 5, per axis."""
    high = _window(levels, np.maximum)
    high -= _window(levels, np.minimum)
    return high


def _window(levels: Floats, pick: np.ufunc) -> Floats:
    pair = pick(levels[:, :, :-1], levels[:, :, 1:])
    four = pick(pair[:, :, :-2], pair[:, :, 2:])
    column = pick(four[:, :, :-1], levels[:, :, 4:])
    pair = pick(column[..., :-1], column[..., 1:])
    four = pick(pair[..., :-2], pair[..., 2:])
    return np.asarray(pick(four[..., :-1], column[..., 4:]))
