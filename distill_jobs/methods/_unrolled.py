"""Schedules that are learnt by gradient through the few-step sampling: times, and what else a subclass adds.

The falling noise levels of K steps are the softmax of K gaps, so no order has to be enforced. Each step is a row
(a, b_0, b_1, …): x_(i+1) = a x_i + b_0 x0_i + b_1 x0_(i-1) + …, which every deterministic solver is for given times.
The teacher's weights stay as they are; the gradient runs through its evaluations.

Source: the solvers as `engines.solvers` has them. Checked against: those (tests).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import root_mse
from distill_jobs.methods._search import Levels, Search, SearchConfig, distance, starts, written_out
from engines.denoiser import BaseDenoiser, Cond
from engines.manifest import Schedule
from engines.process import Process

StepRows = list[Tensor]  # one [2 .. i + 2] fp64 per step
Base = Literal["ddim", "ab2", "dpmpp_2m"]


class LearnedConfig(SearchConfig):
    iterations: int = Field(40, ge=1, description="gradient steps per count")
    lr: float = Field(0.05, gt=0, description="of the gaps' logits; all rates fall linearly to zero")
    lr_extras: float = Field(0.02, gt=0, description="of what is learnt besides the times")


class Learned(Search):
    """The parent: a subclass says what is learnt besides the times, and what the rows are."""

    def best(self, batch: Batch, truth: Tensor, k: int) -> Schedule:
        """The better of where learning began and where it ended; where it began if learning left the numbers."""

        def miss(schedule: Schedule) -> float:
            return distance(self.cast.teacher, batch, truth, schedule)

        bases = self.bases if k > 1 else ("ddim",)  # one step is the same for all
        begun = [
            (self._schedule(_gaps(levels), base, self.extras(k)), levels, base)
            for base in bases
            for levels in starts(k)
        ]
        first, levels, base = min(begun, key=lambda start: miss(start[0]))
        gaps, extras = _gaps(levels).requires_grad_(), self.extras(k)
        if k > 1 or extras:
            self._learn(batch, truth, gaps, base, extras)
        try:
            return min(first, self._schedule(gaps, base, extras), key=miss)
        except ValueError:  # of the schedule: times that do not fall, coefficients that are no numbers
            return first

    @property
    def bases(self) -> tuple[Base, ...]:
        """Solvers to begin from; the one that is nearest as it is gets learnt."""
        return ("ddim",)

    @abstractmethod
    def extras(self, k: int) -> list[Tensor]:
        """What is learnt besides the times, as fp64 leaves at their start."""

    @abstractmethod
    def step_rows(self, t: Tensor, base: Base, extras: Sequence[Tensor]) -> StepRows:
        """The steps at the times t [K + 1] of the process, the last one 0."""

    def schedule(self, grid: tuple[float, ...], base: Base, rows: list[list[float]]) -> Schedule:
        """What is served for these times and rows."""
        return written_out(grid, rows)

    def starting_noise(self, batch: Batch, shifts: Tensor) -> Tensor:
        """[B, ...]: where the student's samplings start. `shifts` are learnt, one per row, from zero."""
        return batch.noise

    def _learn(self, batch: Batch, truth: Tensor, gaps: Tensor, base: Base, extras: Sequence[Tensor]) -> None:
        c, shifts = self.config, torch.zeros_like(batch.noise).requires_grad_()
        rates = {c.lr: [gaps], c.lr_extras: [shifts, *extras]}
        optimiser = torch.optim.Adam([{"params": leaves, "lr": lr} for lr, leaves in rates.items()])
        falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=c.iterations)
        for _ in range(c.iterations):
            optimiser.zero_grad(set_to_none=True)
            t = grid(self.process, gaps)
            noise = self.starting_noise(batch, shifts)
            loss = root_mse(unrolled(self.cast.teacher, noise, t, self.step_rows(t, base, extras), batch.cond) - truth)
            torch.autograd.backward(loss)
            optimiser.step()
            falling.step()

    @torch.no_grad()
    def _schedule(self, gaps: Tensor, base: Base, extras: Sequence[Tensor]) -> Schedule:
        t = grid(self.process, gaps)
        return self.schedule(tuple(t.tolist()), base, [row.tolist() for row in self.step_rows(t, base, extras)])


def _gaps(levels: Levels) -> Tensor:
    """[K] logits whose softmax are the gaps between these levels and 0."""
    ends = torch.tensor([*levels, 0.0], dtype=torch.float64)
    return (ends[:-1] - ends[1:]).log()


def grid(process: Process, gaps: Tensor) -> Tensor:
    """[K + 1] the process' times at the levels of these gaps, from 1 to 0; with gradient."""
    inner = 1 - gaps.softmax(dim=0).cumsum(dim=0)[:-1]
    first = times.on(process, gaps.new_ones(1))
    return torch.cat([first, times.on(process, inner), gaps.new_zeros(1)])


def unrolled(den: BaseDenoiser, noise: Tensor, t: Tensor, rows: StepRows, cond: Cond) -> Tensor:
    """[B, ...]: the sampling over times t [K + 1] by these rows, with gradient to all three."""
    x, seen = noise * den.process.prior(t[:1]).to(noise), list[Tensor]()
    for i, row in enumerate(rows):
        x0, _ = den(x, t[i].to(noise).expand(len(x)), cond)
        seen.insert(0, x0)
        keep, *shares = row.to(noise)
        x = keep * x + sum((share * part for share, part in zip(shares, seen, strict=False)), torch.zeros_like(x))
    return x


def solver_rows(process: Process, t: Tensor, solver: Base) -> StepRows:
    """The rows of a solver of `engines.solvers` at times t [K + 1] fp64, with gradient."""
    made: dict[str, Callable[[Process, Tensor], StepRows]] = {"ddim": _ddim, "dpmpp_2m": _dpmpp, "ab2": _ab2}
    return made[solver](process, t)


def _ddim(process: Process, t: Tensor) -> StepRows:
    a, b = process.alpha(t), process.sigma(t)
    shrink = b[1:] / b[:-1]
    return list(torch.stack([shrink, a[1:] - a[:-1] * shrink], dim=1))


def _dpmpp(process: Process, t: Tensor) -> StepRows:
    """DDIM's rows with the clean prediction extrapolated in log(alpha / sigma), where all three are finite."""
    a, b, rows = process.alpha(t), process.sigma(t), _ddim(process, t)
    for i in range(1, len(rows)):
        if float(b[i + 1].detach()) > 0 and float(a[i - 1].detach()) > 0:
            before, now, after = (a[i - 1 : i + 2] / b[i - 1 : i + 2]).log()
            ratio = (after - now) / (now - before) / 2
            rows[i] = torch.stack([rows[i][0], rows[i][1] * (1 + ratio), -rows[i][1] * ratio])
    return rows


def _ab2(process: Process, t: Tensor) -> StepRows:
    """x + h ((1 + r) v - r v_before), where v_before is had from x through the row that led from there to here."""
    a, b = process.alpha(t[:-1]), process.sigma(t[:-1])
    of_x = process.dsigma(t[:-1]) / b  # v = of_x x + of_x0 x0
    of_x0, h = process.dalpha(t[:-1]) - of_x * a, t[1:] - t[:-1]
    rows = [torch.stack([1 + h[0] * of_x[0], h[0] * of_x0[0]])]
    for i in range(1, len(h)):
        keep, *shares = rows[-1]
        r, per_x = h[i] / h[i - 1] / 2, of_x[i - 1] / keep
        older = [of_x0[i - 1] - per_x * shares[0], *(-per_x * share for share in shares[1:])]
        new = [1 + h[i] * ((1 + r) * of_x[i] - r * per_x), h[i] * (1 + r) * of_x0[i]]
        rows.append(torch.stack(new + [-h[i] * r * part for part in older]))
    return rows


def leaf(values: Any) -> Tensor:
    """An fp64 leaf that is learnt."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)
