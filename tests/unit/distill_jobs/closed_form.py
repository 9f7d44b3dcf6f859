"""Teachers and students whose every answer is known: Gaussian data N(mean, std^2) in any process and prediction kind.

A condition is the data's mean per row [B], so guidance has a closed form too: it moves the mean to u + w (c - u).
"""

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from distill_jobs.batches import Batch, Rows, make_batch
from engines.denoiser import Denoiser, Guided
from engines.manifest import Kind
from engines.process import EDM, RF, TRIG, VP, Process, Shifted

PROCESSES: dict[str, Process] = {
    "rf": RF(),
    "vp": VP(),
    "vp-linear": VP(curve="linear"),
    "edm": EDM(),
    "trig": TRIG(sigma_data=0.5),
    "rf-shifted": Shifted(RF(), 3.0),
}
KINDS: tuple[Kind, ...] = get_args(Kind)
STD = 0.5
NULL_MEAN, MEAN, W = -0.5, 1.0, 1.7
GUIDED_MEAN = NULL_MEAN + W * (MEAN - NULL_MEAN)
SHAPE = (2, 3, 3)


def over(value: Tensor) -> Tensor:
    return value.reshape(-1, 1, 1, 1)


class GaussianNet(nn.Module):
    """Given no s: the optimal denoiser. Given s (or with `endpoint`: 0): the line to the flow map's end at s.

    The data's mean is cond (plus `shift`), or `shift` alone without cond; `log_std` is its log deviation.
    """

    def __init__(
        self, process: Process, kind: Kind, shift: float = 0.0, std: float = STD, endpoint: bool = False
    ) -> None:
        super().__init__()
        self.process, self.kind, self.endpoint = process, kind, endpoint
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None, s: Tensor | None, w: Tensor | None) -> Tensor:
        x, t = self._state(x, t)
        s = torch.zeros_like(t) if s is None and self.endpoint else (None if s is None else self._end(s))
        mean = self.shift if cond is None else over(cond) + self.shift
        a, b = over(self.process.alpha(t)), over(self.process.sigma(t))
        var = (2 * self.log_std).exp()
        if s is None or bool((s == t).all()):
            x0 = mean + a * var / (a * a * var + b * b) * (x - a * mean)
            return self.process.join(x0, (x - a * x0) / b, self.kind, t)
        c, d = over(self.process.alpha(s)), over(self.process.sigma(s))
        end = c * mean + ((c * c * var + d * d) / (a * a * var + b * b)).sqrt() * (x - a * mean)
        det = a * d - b * c
        return self.process.join((d * x - b * end) / det, (a * end - c * x) / det, self.kind, t)

    def _state(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t of the process again, from what its network is given."""
        t = self._own(t)
        return x / over(self.process.network_scale(t)), t

    def _own(self, t: Tensor) -> Tensor:
        """The process' time again from the network's own."""
        if isinstance(self.process, EDM):
            return (4000 * t).exp()
        if not isinstance(self.process, Shifted):
            return t
        mu = 1 / self.process.mu
        return mu * t / (1 + (mu - 1) * t)

    def _end(self, s: Tensor) -> Tensor:
        """The same of the time that is jumped to, which EDM tells as very little noise where it is none."""
        clean = s <= self.process.network_time(torch.zeros_like(s))
        return torch.where(clean, torch.zeros_like(s), self._own(s)) if isinstance(self.process, EDM) else self._own(s)


def teacher_of(process: Process, kind: Kind, w: float = W) -> Guided:
    """The guided teacher whose data is N(GUIDED_MEAN, STD^2) for rows conditioned on MEAN."""
    null = torch.tensor([NULL_MEAN], dtype=torch.float64)
    return Guided(Denoiser(GaussianNet(process, kind), process, kind), null, w)


def student_of(
    process: Process, kind: Kind, *, shift: float = GUIDED_MEAN - MEAN, std: float = STD, reads_s: bool = True
) -> Denoiser:
    """The exact flow map of N(cond + shift, std^2): of the guided teacher, if nothing else is said."""
    net = GaussianNet(process, kind, shift, std, endpoint=not reads_s)
    return Denoiser(net, process, kind, inputs={"s"} if reads_s else ())


def fake_of(process: Process, kind: Kind, *, shift: float = GUIDED_MEAN - MEAN, std: float = STD) -> Denoiser:
    """The exact critic of samples from N(cond + shift, std^2)."""
    return Denoiser(GaussianNet(process, kind, shift, std), process, kind)


def batch_of(rows: int = 64, seed: int = 0, x: Tensor | None = None, pair: Tensor | None = None) -> Batch:
    cond = torch.full((rows,), MEAN, dtype=torch.float64)
    batch = make_batch(Rows(cond=cond, x=x, pair=pair), SHAPE, seed)
    return Batch(rows=batch.rows, noise=batch.noise.double(), generator=batch.generator)


def data_of(rows: int = 64, mean: float = GUIDED_MEAN) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return mean + STD * torch.randn(rows, *SHAPE, generator=generator, dtype=torch.float64)


def exact_pairs(process: Process, noise: Tensor, times: tuple[float, ...]) -> Tensor:
    """[B, R + 1, ...]: the teacher's true states at `times` and its endpoint."""
    flow = student_of(process, "x0")
    cond = torch.full((len(noise),), MEAN, dtype=torch.float64)
    first = noise.new_full((len(noise),), times[0])
    start = over(process.sigma(first)) * noise
    with torch.no_grad():
        states = [start] + [flow.jump(start, first, torch.full_like(first, t), cond) for t in (*times[1:], 0.0)]
    return torch.stack(states, dim=1)


Mutant = Callable[..., object]
