"""What a network means: net + process + prediction kind -> (x0, eps), a velocity, or a jump along the flow map.

Samplers and distillation methods read only this contract, so neither knows how a network was trained.
B rows; x [B, ...]; t, s, w [B]; cond any pytree of tensors [B, ...].
"""

from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from engines.manifest import Kind
from engines.policy import Policy
from engines.process import Process, over

Cond = Any  # a pytree of tensors with leading B, or None


class Weighted(NamedTuple):
    """A condition whose rows bring the guidance weight w [B] that they are asked with.

    A pytree like any other condition: whoever hands a condition to a network, whole or by rows, hands on the weights.
    """

    cond: Cond
    w: Tensor


class Forgetting(NamedTuple):
    """A condition that a student reads, and the one that its teacher is asked with `instead`, row by row.

    A pytree like any other, so whoever hands a condition to both networks hands each its own.
    """

    cond: Cond
    instead: Cond


Net = Callable[[Tensor, Tensor, Cond, Tensor | None, Tensor | None], Tensor]  # net(x, t, cond, s, w) -> pred


class BaseDenoiser(nn.Module):
    """Anything that splits x_t into (x0, eps); the rest of the contract follows from that."""

    process: Process
    inputs: frozenset[str] = frozenset()
    reads_instead = False  # of a `Forgetting` condition, as a teacher does that must not teach all it knows

    @abstractmethod
    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x0, eps) at x = x_t; with `s`, those whose straight line from t to s is the flow map's jump."""

    def velocity(
        self, x: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> Tensor:
        """alpha' x0 + sigma' eps."""
        x0, eps = self(x, t, cond, s, w)
        return self.process.velocity(x0, eps, t)

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None, w: Tensor | None = None) -> Tensor:
        """x_s from x_t: the flow map. Of a network that ignores s it is exactly one DDIM step."""
        x0, eps = self(x, t, cond, s, w)
        return self.process.mix(x0, eps, s)

    def read(self, cond: Cond, w: Tensor | None) -> tuple[Cond, Tensor | None]:
        """The condition as this network is asked with it, and the weights [B]: `w` where it is given, else the
        condition's own."""
        if isinstance(cond, Weighted):
            cond, w = cond.cond, cond.w if w is None else w
        if isinstance(cond, Forgetting):
            cond = cond.instead if self.reads_instead else cond.cond
        return cond, w


class Denoiser(BaseDenoiser):
    """A network with its process and prediction kind. `inputs` says which of s and w the network reads.

    A network that reads s and is given none is asked for s = t, its instantaneous velocity. One of several `points` is
    a policy: its answer is the line to where its way from t to s ends, or without s its velocity at t.
    """

    def __init__(
        self, net: Net, process: Process, kind: Kind, inputs: Collection[str] = frozenset(), points: int = 1
    ) -> None:
        super().__init__()
        self.net = net
        self.process = process
        self.kind: Kind = kind
        self.inputs = frozenset(inputs)
        self.points = points

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        pred = self._asked(x, t, cond, s, w)
        if self.points == 1:
            return self.process.split(pred, self.kind, x, t)
        way = Policy.read(self.process, self.kind, pred, x, t, torch.zeros_like(t) if s is None else s)
        return way.at(x, t) if s is None else way.line(x)

    def policy(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None, w: Tensor | None = None) -> Policy:
        """The way from x = x_t to s that one evaluation lays out."""
        return Policy.read(self.process, self.kind, self._asked(x, t, cond, s, w), x, t, s)

    def _asked(self, x: Tensor, t: Tensor, cond: Cond, s: Tensor | None, w: Tensor | None) -> Tensor:
        cond, w = self.read(cond, w)
        if "w" in self.inputs and w is None:
            raise ValueError("this network reads the guidance weight: give w [B]")
        time = self.process.network_time
        s_net = time(t if s is None else s) if "s" in self.inputs else None
        given = over(self.process.network_scale(t), x).to(x.dtype) * x
        return self.net(given, time(t), cond, s_net, w if "w" in self.inputs else None).to(x.dtype)


class Guided(BaseDenoiser):
    """Classifier-free guidance u + w(c - u) around a denoiser; w = 1 asks the network once.

    `null_cond` has leading 1 (or B); `interval` (low, high) are the times inside which guidance acts (arXiv
    2404.07724); a call whose rows are all outside asks the network once. A `w` [B] given to a call, or brought by its
    condition (`Weighted`), replaces the weight of this object.
    """

    def __init__(
        self, denoiser: BaseDenoiser, null_cond: Cond, w: float, interval: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.null_cond = null_cond
        self.w = w
        self.interval = interval
        self.process = denoiser.process
        self.inputs = denoiser.inputs - {"w"}
        self.reads_instead = denoiser.reads_instead

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        cond, w = self.read(cond, w)
        if w is None and (self.w == 1.0 or self._is_off(t)):
            c: tuple[Tensor, Tensor] = self.denoiser(x, t, cond, s)
            return c
        weight = self._weight(t, w).to(x.dtype)
        # one call of 2B rows: the conditional ones first
        both = _cat(cond, expand(self.null_cond, len(x)))
        x0, eps = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), both, None if s is None else torch.cat([s, s]))
        return _guide(x0, weight), _guide(eps, weight)

    def _is_off(self, t: Tensor) -> bool:
        return self.interval is not None and not bool(self._inside(t, *self.interval).any())

    def _weight(self, t: Tensor, w: Tensor | None) -> Tensor:
        weight = torch.full_like(t, self.w) if w is None else w
        if self.interval is None:
            return weight
        return torch.where(self._inside(t, *self.interval), weight, torch.ones_like(weight))

    @staticmethod
    def _inside(t: Tensor, low: float, high: float) -> Tensor:
        return (t >= low) & (t <= high)


class AtWeight(BaseDenoiser):
    """A denoiser that reads its guidance weight, asked with `w` where a call or its condition brings none."""

    def __init__(self, denoiser: BaseDenoiser, w: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.w = w
        self.process = denoiser.process
        self.inputs = denoiser.inputs - {"w"}
        self.reads_instead = denoiser.reads_instead

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        cond, w = self.read(cond, w)
        asked: tuple[Tensor, Tensor] = self.denoiser(x, t, cond, s, torch.full_like(t, self.w) if w is None else w)
        return asked


def _guide(both: Tensor, w: Tensor) -> Tensor:
    c, u = both.chunk(2)
    return u + over(w, u) * (c - u)


def expand(cond: Cond, rows: int) -> Cond:
    """A condition of one row (or already of `rows`) repeated to `rows`, as a view."""
    return tree_map(lambda part: part.expand(rows, *part.shape[1:]) if isinstance(part, Tensor) else part, cond)


def _cat(first: Cond, second: Cond) -> Cond:
    return tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a, first, second)
