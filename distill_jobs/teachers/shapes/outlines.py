"""Signed distances of the shape kinds: one formula each, in pixels, so that edges are antialiased at any size."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

KINDS = ("circle", "square", "triangle", "ring", "cross")
_EDGE_PX = 1.5  # width of the antialiased edge
_SIN60, _COS60 = math.sin(math.pi / 3), 0.5


def distance(kind: int, x: Floats, y: Floats, radius: Floats) -> Floats:
    """Distance [M, P, P] to the outline, negative inside; `x` [M, 1, P] and `y` [M, P, 1] from the centre, y down."""
    name = KINDS[kind]
    found: Floats
    if name == "circle":
        found = np.sqrt(x * x + y * y) - radius
    elif name == "ring":
        found = np.abs(np.sqrt(x * x + y * y) - 0.74 * radius) - 0.26 * radius
    elif name == "square":
        found = np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    elif name == "triangle":
        sides = np.abs(x) * _SIN60 * 1.04 - y * _COS60
        found = np.maximum(sides - 0.55 * radius, y - 0.85 * radius)
    else:
        found = _cross(np.abs(x), np.abs(y), radius)
    return found


def coverage(distance_px: Floats) -> Floats:
    """Share of a pixel that lies inside, from its distance to the outline."""
    share: Floats = np.clip(0.5 - distance_px / np.float32(_EDGE_PX), 0, 1)
    return share


def _cross(x: Floats, y: Floats, radius: Floats) -> Floats:
    thin = np.float32(0.34)
    upright = np.maximum(x - thin * radius, y - radius)
    across = np.maximum(x - radius, y - thin * radius)
    both: Floats = np.minimum(upright, across)
    return both
