"""What a frozen teacher sees in a noised sample: the activations that discriminators, moments and distances read."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engines.denoiser import BaseDenoiser, Cond

MIDDLE = ("mid_block",)  # of a UNet: small, and it has seen the whole latent


def tapped(network: nn.Module, taps: Sequence[str]) -> list[nn.Module]:
    """The submodules whose names end in one of `taps`, in the network's order."""
    ends = tuple(f".{tap}" for tap in taps)
    return [module for name, module in network.named_modules() if f".{name}".endswith(ends)]


def features(
    den: BaseDenoiser, x: Tensor, t: Tensor, cond: Cond, taps: Sequence[str] = MIDDLE
) -> tuple[Tensor, list[Tensor]]:
    """(x0 prediction, activations [B, D, H', W'] in x's dtype) of one unguided evaluation, differentiable in x.

    A network without such submodules is known by x and its prediction for it [B, 2C, H, W].
    """
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out: seen.append(_as_picture(out)))
        for module in tapped(den, taps)
    ]
    try:
        x0, _ = den(x, t, cond)
    finally:
        for hook in hooks:
            hook.remove()
    return x0, [one.to(x.dtype) for one in seen] or [torch.cat([x, x0], dim=1)]


def _as_picture(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The activation as [B, D, H', W']: a transformer's tokens [B, L, D] are one column."""
    last = out[-1] if isinstance(out, tuple) else out
    return last if last.dim() == 4 else last.transpose(1, 2).unsqueeze(-1)
