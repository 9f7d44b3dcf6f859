"""Counts what training asks of networks: the currency in which methods are compared, whatever machine they run on.

One row through a network is 1, its backward pass 2 more where the network's weights take gradients and 1 where only
its input does; a forward-mode derivative costs 1 more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from engines.denoiser import Denoiser


class Meter:
    """`rows` is the sum so far."""

    def __init__(self) -> None:
        self.rows = 0

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, Denoiser) and inputs:
            self.rows += len(inputs[0]) * _cost(module, inputs)


@contextmanager
def metered() -> Iterator[Meter]:
    """Counts every evaluation of a `Denoiser` in this process while it is open."""
    meter = Meter()
    handle = register_module_forward_pre_hook(meter._see)
    try:
        yield meter
    finally:
        handle.remove()


def _cost(module: nn.Module, inputs: tuple[Any, ...]) -> int:
    tensors = [part for part in inputs if isinstance(part, Tensor)]
    forward = 1 + any(torch.func.debug_unwrap(part) is not part for part in tensors)
    if not torch.is_grad_enabled():
        return forward
    if any(parameter.requires_grad for parameter in module.parameters()):
        return forward + 2
    return forward + any(part.requires_grad for part in tensors)
