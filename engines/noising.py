"""What a noising process is: the algebra of samples between data and noise, and of what networks predict about them.

x_t = alpha(t) x0 + sigma(t) eps, with eps of unit variance and t [B] in the process' own unit; t = `t_max` is noise.
A prediction is one row (a, b) of a x0 + b eps: x0 (1, 0) · eps (0, 1) · v (-sigma, alpha) · flow (alpha', sigma') ·
edm, the F of EDM's preconditioning for data of deviation d: (sigma / d, -d alpha) / hypot(sigma, d alpha).

Source: v arXiv 2202.00512 appendix D; EDM 2206.00364 table 1. The processes are in `engines.process`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.manifest import Kind

TINY = 1e-12  # keeps 0/0 at the very ends of a process finite


def over(t: Tensor, x: Tensor) -> Tensor:
    """t [B] shaped to multiply x [B, ...]."""
    return t.reshape(-1, *(1,) * (x.dim() - 1))


def nonzero(value: Tensor) -> Tensor:
    return torch.where(value.abs() < TINY, torch.full_like(value, TINY), value)


@dataclass(frozen=True)
class Process(ABC):
    """x_t = alpha(t) x0 + sigma(t) eps. All methods are pure and keep the dtype of what they are given."""

    @property
    @abstractmethod
    def t_max(self) -> float: ...

    @property
    def sigma_data(self) -> float:
        """The deviation of the data that networks are normalised for."""
        return 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def t_of_angle(self, angle: Tensor) -> Tensor:
        """The inverse of `angle`."""

    def network_time(self, t: Tensor) -> Tensor:
        """What a network trained on this process (without its shift) is told for `t`."""
        return t

    def network_scale(self, t: Tensor) -> Tensor:
        """What such a network is given of x_t: x_t times this."""
        return torch.ones_like(t)

    def prior(self, t: Tensor) -> Tensor:
        """The deviation of the noise that sampling from time `t` starts with."""
        return self.sigma(t)

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return over(self.alpha(t), x0) * x0 + over(self.sigma(t), x0) * eps

    def row(self, kind: Kind, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) [B] of the prediction a x0 + b eps."""
        if kind == "x0":
            return torch.ones_like(t), torch.zeros_like(t)
        if kind == "eps":
            return torch.zeros_like(t), torch.ones_like(t)
        if kind == "v":
            return -self.sigma(t), self.alpha(t)
        if kind == "flow":
            return self.dalpha(t), self.dsigma(t)
        if kind == "edm":
            sigma, signal = self.sigma(t), self.sigma_data * self.alpha(t)
            deviation = torch.hypot(sigma, signal)
            return sigma / (self.sigma_data * deviation), -signal / deviation
        raise ValueError(f"prediction {kind!r} is not one of x0, eps, v, flow, edm")

    def join(self, x0: Tensor, eps: Tensor, kind: Kind, t: Tensor) -> Tensor:
        a, b = self.row(kind, t)
        return over(a, x0) * x0 + over(b, x0) * eps

    def split(self, pred: Tensor, kind: Kind, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) from a prediction at x = x_t: the inverse of [[alpha, sigma], [a, b]]."""
        alpha, sigma = over(self.alpha(t), x), over(self.sigma(t), x)
        if kind == "x0":
            return pred, (x - alpha * pred) / nonzero(sigma)
        if kind == "eps":
            return (x - sigma * pred) / nonzero(alpha), pred
        a, b = (over(part, x) for part in self.row(kind, t))
        det = nonzero(alpha * b - sigma * a)
        return (b * x - sigma * pred) / det, (alpha * pred - a * x) / det

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """dx/dt along the path of this (x0, eps)."""
        return self.join(x0, eps, "flow", t)

    def score(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The gradient of log p(x_t) that (x0, eps) stands for."""
        return -eps / nonzero(over(self.sigma(t), eps))

    def angle(self, t: Tensor) -> Tensor:
        """atan2(sigma, alpha) in [0, pi/2]: the signal-to-noise ratio as a time that all processes share."""
        return torch.atan2(self.sigma(t), self.alpha(t))
