"""How times are drawn. All draws are noise levels u of rectified flow in 0..1, so one setting fits every process.

`on(process, u)` says where that signal-to-noise ratio is in the process' own time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from engines.process import RF, Process


class Times(Protocol):
    """A distribution of noise levels."""

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """[rows] fp32 on the CPU, in 0..1."""


@dataclass(frozen=True)
class Uniform:
    low: float = 0.0
    high: float = 1.0

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(rows, generator=generator)


@dataclass(frozen=True)
class LogitNormal:
    mean: float = 0.0
    std: float = 1.0

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn(rows, generator=generator))


@dataclass(frozen=True)
class Bent:
    """`base` moved towards noise by the static shift mu, as flow models of high resolution are trained."""

    base: Times
    mu: float

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        u = self.base.draw(rows, generator)
        return self.mu * u / (1 + (self.mu - 1) * u)


@dataclass(frozen=True)
class WithFirst:
    """`share` of the rows at u = 1, where every sampling starts; the others from `base`."""

    base: Times
    share: float

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        u = self.base.draw(rows, generator)
        return torch.where(torch.rand(rows, generator=generator) < self.share, torch.ones_like(u), u)


def on(process: Process, u: Tensor) -> Tensor:
    """The process' time with the signal-to-noise ratio that rectified flow has at `u`, at most t_max."""
    if isinstance(process, RF):
        return u
    angle = RF().angle(u.double())
    return process.t_of_angle(angle).clamp(0, process.t_max).to(u.dtype)


def grid(process: Process, levels: tuple[float, ...]) -> tuple[float, ...]:
    """The process' times at falling noise levels, and its end 0: the `times` of a `Schedule`."""
    u = torch.tensor(levels, dtype=torch.float64)
    return (*(float(t) for t in on(process, u)), 0.0)


def between(process: Process, t: float, s: float, steps: int) -> tuple[float, ...]:
    """The process' times from t to s < t in `steps` equal steps of noise level; exactly t and s at the ends."""
    high, low = (float(level_of(process, torch.tensor([at], dtype=torch.float64))) for at in (t, s))
    levels = tuple(high + (low - high) * i / steps for i in range(1, steps))
    return (t, *grid(process, levels)[:-1], s)


def level_of(process: Process, t: Tensor) -> Tensor:
    """The noise level of the process' time: `on` backwards."""
    return RF().t_of_angle(process.angle(t))


def phased(steps: int, splits: Sequence[float]) -> tuple[float, ...]:
    """`steps` noise levels from 1, without the end, that hold all of the falling `splits`: each phase between two of
    them has equally many, as far as that goes (the earlier ones first), equally spaced."""
    edges = (1.0, *splits, 0.0)
    each, over = divmod(steps, len(splits) + 1)
    counts = [each + (i < over) for i in range(len(splits) + 1)]
    return tuple(
        high + (low - high) * k / count
        for (high, low), count in zip(pairwise(edges), counts, strict=True)
        for k in range(count)
    )


def uniform(steps: int) -> tuple[float, ...]:
    """`steps` equally spaced noise levels from 1, without the end."""
    return tuple(1 - i / steps for i in range(steps))
