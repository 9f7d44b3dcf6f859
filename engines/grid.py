"""Weights on a grid of whole numbers, symmetric and per output channel: multiples -Q..Q of a scale, Q = 127 or 7.

A scale has four significant bits, so a multiple of it has at most eleven: a number of half precision, in which students
are stored. So a blob holds its grid exactly, engines read it as any other weights, and one that computes with whole
numbers finds them by dividing by the scales, which stand beside the blob.

Source: symmetric scales per output channel arXiv 1806.08342.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engines.errors import InvalidRequest

Bits = Literal[4, 8]
SCALES = "scales.safetensors"
"""The file of a student's denoiser that holds the scale [out] of each weight that is on the grid, by its name."""
_LEAST = 2.0**-20  # multiples of less would be finer than half precision is near zero


def most(bits: int) -> int:
    """Q, the largest multiple."""
    return int(2 ** (bits - 1)) - 1


def scales_of(weight: Tensor, bits: int) -> Tensor:
    """[out] of a weight [out, ...]: its largest value over Q, rounded up, so that nothing is clipped."""
    share = weight.detach().flatten(1).abs().amax(dim=1) / most(bits)
    mantissa, exponent = torch.frexp(share.clamp_min(_LEAST))
    return torch.ldexp(torch.ceil(16 * mantissa) / 16, exponent)


def rounded(weight: Tensor, scales: Tensor) -> Tensor:
    """The nearest multiples [out, ...] of the scales [out]."""
    each = _over(scales, weight)
    return torch.round(weight.detach() / each) * each


@dataclass(frozen=True, slots=True)
class Grid:
    """The scales [out] of the weights that are on the grid, by name."""

    bits: Bits
    scales: Mapping[str, Tensor]

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Whether the weights are what the scales say, to the last bit.

        Raises:
            InvalidRequest: one lies beside its grid, or none has its name.
        """
        for name, scales in self.scales.items():
            if name not in weights:
                raise InvalidRequest(f"scales.{name}: no weight is called so")
            multiples = weights[name].float() / _over(scales, weights[name])
            if bool((multiples != multiples.round()).any()) or bool((multiples.abs() > most(self.bits)).any()):
                dtype = str(weights[name].dtype).removeprefix("torch.")
                raise InvalidRequest(f"{name} in {dtype} is not on its grid of {self.bits} bits: round it, store fp16")


def _over(scales: Tensor, weight: Tensor) -> Tensor:
    return scales.reshape(-1, *(1,) * (weight.dim() - 1))
