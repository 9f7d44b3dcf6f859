"""Clipping: the share of values that stand at an end of the range, as over-saturated students put them there.

It is measured after rounding, as in the picture that people get, and stands beside the teacher's own share where the
teacher's answers have one: those that were kept before it was measured have none.
"""

from __future__ import annotations

import numpy as np

from distill_jobs.evaluate.pixels import Pixels

_LOW, _HIGH = 0.5, 254.5  # halves round to even: 0.5 is 0, 254.5 is 254


def clipped(pixels: Pixels) -> float:
    """Share of the values of pictures [N, 3, H, W] that are 0 or 255."""
    return float(np.mean((pixels <= _LOW) | (pixels > _HIGH)))
