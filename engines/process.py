"""The noising processes: with `engines.noising` the only place with alpha and sigma, so that no other file holds a sign
or a time convention.

Source: RF arXiv 2209.03003; VP arXiv 2011.13456 (linear beta) and 2102.09672 (cosine); DDPM 2006.11239; EDM
2206.00364; TrigFlow 2410.11081; time shift 2403.03206 §5.3.2.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from engines.manifest import Betas, Kind, ProcessSpec
from engines.noising import TINY, nonzero
from engines.noising import Process as Process
from engines.noising import over as over

_LEAST_NOISE = 1e-4  # what networks of EDM are told of less: ln(0) is no time, and a jump to clean data needs one


def secant(process: Process, x: Tensor, t: Tensor, there: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, eps) of the line through x at t and `there` at s: [[alpha_t, sigma_t], [alpha_s, sigma_s]] (x0, eps) =
    (x, there)."""
    (a, b), (c, d) = ((over(process.alpha(time), x), over(process.sigma(time), x)) for time in (t, s))
    det = a * d - b * c
    return (d * x - b * there) / det, (a * there - c * x) / det


@dataclass(frozen=True)
class RF(Process):
    """Rectified flow: a straight line from data (t = 0) to noise (t = 1).

    With `ticks`, networks are told whole 1/ticks, rounded down, and sampling starts with unit noise though the first
    time is below 1, as diffusers' DPM-Solver and UniPC do with flows. A derivative by time passes the rounding as if it
    were not there.
    """

    ticks: int | None = None

    def network_time(self, t: Tensor) -> Tensor:
        if self.ticks is None:
            return t
        return t + ((t * self.ticks).floor() / self.ticks - t).detach()

    def prior(self, t: Tensor) -> Tensor:
        return self.sigma(t) if self.ticks is None else torch.ones_like(t)

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def t_of_angle(self, angle: Tensor) -> Tensor:
        return angle.sin() / (angle.sin() + angle.cos())


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving, t in [0, 1]: cosine, or the linear beta from `beta_min` to `beta_max`."""

    curve: Literal["cosine", "linear"] = "cosine"
    beta_min: float = 0.1
    beta_max: float = 20.0

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp() if self.curve == "linear" else (t * (math.pi / 2)).cos()

    def sigma(self, t: Tensor) -> Tensor:
        if self.curve == "linear":
            return (-torch.expm1(2 * self._log_alpha(t))).clamp_min(0).sqrt()
        return (t * (math.pi / 2)).sin()

    def dalpha(self, t: Tensor) -> Tensor:
        if self.curve == "linear":
            return self.alpha(t) * self._dlog_alpha(t)
        return -(math.pi / 2) * self.sigma(t)

    def dsigma(self, t: Tensor) -> Tensor:
        if self.curve == "linear":
            return -self.alpha(t).square() * self._dlog_alpha(t) / nonzero(self.sigma(t))
        return (math.pi / 2) * self.alpha(t)

    def t_of_angle(self, angle: Tensor) -> Tensor:
        if self.curve == "cosine":
            return angle * (2 / math.pi)
        span, half = self.beta_max - self.beta_min, self.beta_min / 2
        log_alpha = angle.cos().clamp_min(TINY).log()
        return ((half**2 - span * log_alpha).sqrt() - half) / (span / 2)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t.square() * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        return -t * (self.beta_max - self.beta_min) / 2 - self.beta_min / 2


@dataclass(frozen=True)
class DDPM(Process):
    """The variance-preserving chain of Stable Diffusion 1-2, SDXL and PixArt: t = (k + 1) / N at the chain's step k.

    So t = 0 is clean data, which no step of the chain is, and the network is told k / N. Between steps sigma / alpha
    is linear, as diffusers' Euler has it. Sampling starts with unit noise, though alpha at t = 1 is not 0.
    """

    betas: Betas

    @property
    def t_max(self) -> float:
        return 1.0

    def network_time(self, t: Tensor) -> Tensor:
        return (t - 1 / self.betas.steps).clamp_min(0)

    def prior(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.rsqrt(1 + self._ratio(t)[0].square())

    def sigma(self, t: Tensor) -> Tensor:
        ratio = self._ratio(t)[0]
        return ratio * torch.rsqrt(1 + ratio.square())

    def dalpha(self, t: Tensor) -> Tensor:
        ratio, slope = self._ratio(t)
        return -ratio * slope * torch.rsqrt(1 + ratio.square()) ** 3

    def dsigma(self, t: Tensor) -> Tensor:
        ratio, slope = self._ratio(t)
        return slope * torch.rsqrt(1 + ratio.square()) ** 3

    def t_of_angle(self, angle: Tensor) -> Tensor:
        table = _noise_to_signal(self.betas).to(angle)
        ratio = angle.tan().clamp(0, float(table[-1]))
        above = torch.searchsorted(table, ratio.contiguous()).clamp(1, self.betas.steps)
        low, high = table[above - 1], table[above]
        return (above - 1 + (ratio - low) / (high - low)) / self.betas.steps

    def _ratio(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sigma / alpha at t and its derivative."""
        table, position = _noise_to_signal(self.betas).to(t), t * self.betas.steps
        below = position.detach().long().clamp(0, self.betas.steps - 1)
        rise = table[below + 1] - table[below]
        return table[below] + (position - below) * rise, self.betas.steps * rise


@cache
def _noise_to_signal(betas: Betas) -> Tensor:
    """sigma / alpha at t = 0, 1/N, ..., 1: [N + 1] fp64."""
    if betas.curve == "linear":
        beta = torch.linspace(betas.start, betas.end, betas.steps, dtype=torch.float64)
    elif betas.curve == "scaled_linear":
        beta = torch.linspace(betas.start**0.5, betas.end**0.5, betas.steps, dtype=torch.float64).square()
    else:  # arXiv 2102.09672 eq. 17
        t = torch.linspace(0, 1, betas.steps + 1, dtype=torch.float64)
        bar = ((t + 0.008) / 1.008 * (math.pi / 2)).cos().square()
        beta = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    log_signal = (1 - beta).log().cumsum(0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), (torch.expm1(-log_signal)).sqrt()])


@dataclass(frozen=True)
class EDM(Process):
    """Variance exploding: t is the noise level itself, up to `sigma_max`. Networks are preconditioned for data of
    deviation `sigma_data` (EDM, table 1).

    They are given c_in x_t and told c_noise, and c_skip x_t + c_out F is x0 where F is a prediction of kind edm. F of
    the other sign is the v of x_t and data that are scaled to unit deviation, and that is what v means here. Sampling
    starts with a little more than t's own deviation, as diffusers' EDM schedulers do.
    """

    sigma_data: float = 0.5
    sigma_max: float = 80.0

    def network_time(self, t: Tensor) -> Tensor:
        """c_noise = ln(t) / 4 in thousands: families tell their networks a thousand times this."""
        return t.clamp_min(_LEAST_NOISE).log() / 4000

    def network_scale(self, t: Tensor) -> Tensor:
        """c_in."""
        return torch.rsqrt(t.square() + self.sigma_data**2)

    def prior(self, t: Tensor) -> Tensor:
        return (t.square() + 1).sqrt()

    def row(self, kind: Kind, t: Tensor) -> tuple[Tensor, Tensor]:
        if kind != "v":
            return super().row(kind, t)
        a, b = super().row("edm", t)
        return -a, -b

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def t_of_angle(self, angle: Tensor) -> Tensor:
        return angle.tan()


@dataclass(frozen=True)
class TRIG(Process):
    """TrigFlow: x_t = cos t x0 + sin t z with z of the data's own deviation `sigma_data`; t in [0, pi/2]."""

    sigma_data: float = 0.5

    @property
    def t_max(self) -> float:
        return math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        return t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        return t.sin() * self.sigma_data

    def dalpha(self, t: Tensor) -> Tensor:
        return -t.sin()

    def dsigma(self, t: Tensor) -> Tensor:
        return t.cos() * self.sigma_data

    def t_of_angle(self, angle: Tensor) -> Tensor:
        return torch.atan2(angle.sin(), angle.cos() * self.sigma_data)


@dataclass(frozen=True)
class Shifted(Process):
    """The same path with its time bent towards noise: base time u = mu t / (1 + (mu - 1) t), scaled by t_max.

    The network keeps its own time: `network_time` gives it u.
    """

    process: Process
    mu: float

    @property
    def t_max(self) -> float:
        return self.process.t_max

    @property
    def sigma_data(self) -> float:
        return self.process.sigma_data

    def network_time(self, t: Tensor) -> Tensor:
        return self.process.network_time(self._bend(t, self.mu))

    def network_scale(self, t: Tensor) -> Tensor:
        return self.process.network_scale(self._bend(t, self.mu))

    def prior(self, t: Tensor) -> Tensor:
        return self.process.prior(self._bend(t, self.mu))

    def row(self, kind: Kind, t: Tensor) -> tuple[Tensor, Tensor]:
        return super().row(kind, t) if kind == "flow" else self.process.row(kind, self._bend(t, self.mu))

    def alpha(self, t: Tensor) -> Tensor:
        return self.process.alpha(self._bend(t, self.mu))

    def sigma(self, t: Tensor) -> Tensor:
        return self.process.sigma(self._bend(t, self.mu))

    def dalpha(self, t: Tensor) -> Tensor:
        return self.process.dalpha(self._bend(t, self.mu)) * self._slope(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return self.process.dsigma(self._bend(t, self.mu)) * self._slope(t)

    def t_of_angle(self, angle: Tensor) -> Tensor:
        return self._bend(self.process.t_of_angle(angle).clamp(max=self.t_max), 1 / self.mu)

    def _bend(self, t: Tensor, mu: float) -> Tensor:
        r = t / self.t_max
        return self.t_max * mu * r / (1 + (mu - 1) * r)

    def _slope(self, t: Tensor) -> Tensor:
        return self.mu / (1 + (self.mu - 1) * t / self.t_max).square()


def make(spec: ProcessSpec) -> Process:
    """The process that a manifest names."""
    kinds: dict[str, Process] = {
        "rf": RF(spec.ticks),
        "vp": VP(),
        "edm": EDM(spec.sigma_data, spec.sigma_max or EDM.sigma_max),
        "trig": TRIG(sigma_data=spec.sigma_data),
    }
    process = DDPM(spec.betas) if spec.betas else kinds[spec.kind]
    return process if spec.shift == 1.0 else Shifted(process, spec.shift)


def rebase(x: Tensor, t: Tensor, src: Process, dst: Process) -> tuple[Tensor, Tensor]:
    """(x', t'): the same sample at the same signal-to-noise ratio in another process."""
    t_dst = dst.t_of_angle(src.angle(t))
    scale = torch.hypot(dst.alpha(t_dst), dst.sigma(t_dst)) / torch.hypot(src.alpha(t), src.sigma(t))
    return x * over(scale, x), t_dst
