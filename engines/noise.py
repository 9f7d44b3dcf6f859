"""The one source of randomness in serving: a replayed row gives the same picture on every machine.

Draws come from the CPU generator whatever the device, because only it is the same everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def noise(seed: int, k: int, shape: Sequence[int]) -> Tensor:
    """The k-th fp32 draw (from 0, the starting noise) of `torch.Generator("cpu").manual_seed(seed)`.

    All k + 1 draws have the row's own `shape` [C, (T,) H, W], as a diffusers pipeline with one row makes them.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(k):
        torch.randn(tuple(shape), generator=generator)
    return torch.randn(tuple(shape), generator=generator)
