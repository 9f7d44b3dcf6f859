"""What methods of continuous time share: a denoiser in the coordinates of another process, derivatives along a path.

In rectified flow's coordinates the straight line of any (x0, eps) has the constant velocity eps - x0, so a network
that reads s gives there the mean velocity from t to s, whatever it was trained in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.denoiser import BaseDenoiser, Cond
from engines.process import RF, Process, rebase


class Rebased(BaseDenoiser):
    """A denoiser that is asked about the same sample at the same signal-to-noise ratio in `process`."""

    def __init__(self, denoiser: BaseDenoiser, process: Process) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = process
        self.inputs = denoiser.inputs

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        own = self.denoiser.process
        # near pure noise an angle in single precision is too coarse for processes whose time grows with its tangent
        y, time = rebase(x.double(), t.double(), self.process, own)
        end = None if s is None else own.t_of_angle(self.process.angle(s.double())).to(s.dtype)
        x0, eps = self.denoiser(y.to(x.dtype), time.to(t.dtype), cond, end, w)
        return x0, eps


def most_noise(process: Process) -> float:
    """The noise level of rectified flow that the process ends at: below 1 where it keeps some of the data."""
    last = torch.tensor(process.t_max, dtype=torch.float64)
    return float(RF().t_of_angle(process.angle(last)))


def along(
    function: Callable[..., Tensor], point: tuple[Tensor, ...], direction: tuple[Tensor, ...], step: float = 0.0
) -> tuple[Tensor, Tensor]:
    """function(*point) and its derivative along `direction`, without autocast.

    `step` 0 is the exact forward-mode derivative, for which attention is computed by plain matrix products. Another
    is the difference to the point that far behind, under the same dropout: for networks without such a derivative.
    """
    device = point[0].device
    with torch.autocast(device.type, enabled=False):
        if step == 0:
            with sdpa_kernel(SDPBackend.MATH):
                exact: Any = torch.func.jvp(function, point, direction)
            return exact[0], exact[1]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            behind = function(*(p - step * d for p, d in zip(point, direction, strict=True)))
        here = function(*point)
    return here, (here - behind) / step


def warmed(iteration: int, warmup: int) -> float:
    """The share of the derivative that counts after so many iterations: from 0 to 1 over `warmup`."""
    return min(1.0, iteration / warmup) if warmup else 1.0
