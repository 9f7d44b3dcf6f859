"""The scale of fp8 (e4m3). Who builds reads this without torch, who serves without onnx."""

import math

_LARGEST = 448.0  # of e4m3


def exponent(largest: float) -> int:
    """That of the least power of two that brings all of up to `largest` into the range of fp8."""
    return math.ceil(math.log2(largest / _LARGEST))
