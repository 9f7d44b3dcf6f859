"""Pictures as the evaluation takes them: whole 8-bit levels, or the same levels before rounding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""[N, 3, H, W]: uint8, or float32 in levels 0..255 that are not rounded yet."""


def levels(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """Whole 8-bit levels, as a reader of the PNG sees them; uint8 is returned as it is."""
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels, dtype=np.uint8)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
