"""Policies: a network that says in one evaluation how the clean picture that it aims at changes on the way from t to s.

It gives x0 at N points of the way, equally far apart in noise level and linear in between. The velocity at any state of
the way follows in closed form, so the way is followed in small steps that cost a few multiplications and no network.
One point is a straight line: an ordinary network. A UNet becomes a policy by a last layer of N times its channels.

Source: pi-Flow arXiv 2510.14974 §3, its DX policy.
Left out: Gaussian mixtures (GMFlow), the smaller last step, temperature.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.errors import NotBuilt
from engines.manifest import Kind
from engines.process import Process, secant

SUBSTEPS = 16  # of one evaluation; each is of second order


@dataclass(frozen=True, slots=True)
class Policy:
    """points [N, B, ...]: the x0 of one evaluation, the first at t, the last at s. t and s [B], or [1] for all rows."""

    process: Process
    t: Tensor
    s: Tensor
    points: Tensor

    @classmethod
    def read(cls, process: Process, kind: Kind, pred: Tensor, x: Tensor, t: Tensor, s: Tensor) -> "Policy":
        """From a prediction at x = x_t [B, C, ...] (or without rows [C, ...]) whose channels are N predictions of x's
        side by side."""
        parts = torch.split(pred.to(x.dtype), x.shape[-3], dim=-3)
        return cls(process, t, s, torch.stack([process.split(part, kind, x, t)[0] for part in parts]))

    def x0(self, time: Tensor) -> Tensor:
        """The clean picture that a state at `time` (as t) is drawn to; at t the first point, at s the last."""
        last = len(self.points) - 1
        high, low = self._level(self.t), self._level(self.s)
        place = last * ((high - self._level(time)) / (high - low)).clamp(0, 1)
        at = torch.arange(last + 1, device=place.device).reshape(-1, *(1,) * place.dim())
        near = (1 - (place - at).abs()).clamp_min(0).to(self.points.dtype)  # [N, B]: the two neighbours' shares
        shares = near.reshape(*near.shape, *(1,) * (self.points.dim() - near.dim()))
        return (shares * self.points).sum(dim=0)

    def follow(self, x: Tensor, end: Tensor) -> Tensor:
        """The state at `end` (as t) of the way from x at t: DDIM steps, equally long in noise level, each towards the
        picture of its middle."""
        high, low = self._level(self.t), self._level(end)
        for i in range(SUBSTEPS):
            now, middle, then = (self._time(torch.lerp(high, low, (i + k) / SUBSTEPS)) for k in (0.0, 0.5, 1.0))
            x = self.process.mix(*self.process.split(self.x0(middle), "x0", x, now), then)
        return x

    def line(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) whose one DDIM step from x at t to s ends where the way does."""
        return secant(self.process, x, self.t, self.follow(x, self.s), self.s)

    def at(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) of the policy's own velocity at any state x at `time`."""
        return self.process.split(self.x0(time), "x0", x, time)

    def detach(self) -> "Policy":
        return Policy(self.process, self.t, self.s, self.points.detach())

    def _level(self, time: Tensor) -> Tensor:
        """The noise level of rectified flow with the same signal-to-noise ratio."""
        alpha, sigma = self.process.alpha(time), self.process.sigma(time)
        return sigma / (alpha + sigma)

    def _time(self, level: Tensor) -> Tensor:
        return self.process.t_of_angle(torch.atan2(level, 1 - level)).clamp(max=self.process.t_max)


def widened(config: Mapping[str, Any], points: int) -> dict[str, Any]:
    """The diffusers config of a denoiser that gives its prediction `points` times side by side.

    Raises:
        NotBuilt: it is no UNet. A transformer's last layer gives patches, whose channels lie otherwise.
    """
    if points == 1:
        return dict(config)
    if "down_block_types" not in config:
        raise NotBuilt(f"a {config.get('_class_name')} cannot be a policy yet: choose another method than pi_flow")
    kept = {key: value for key, value in config.items() if key != "_use_default_values"}  # diffusers would drop ours
    return kept | {"out_channels": points * config["out_channels"]}


def repeated(weights: Mapping[str, Tensor], points: int) -> dict[str, Tensor]:
    """The weights of a UNet for its widened config: every point gives what the one gave."""
    return {name: torch.cat([w] * points) if name.startswith("conv_out.") else w for name, w in weights.items()}
