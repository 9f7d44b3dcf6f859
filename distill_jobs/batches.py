"""What a method is given for one update: rows of conditions, noise and, where asked, latents or teacher pairs.

Everything follows from (seed, position), never from what was drawn before: a resumed run sees what an
uninterrupted one would have seen.
"""

import struct
import zlib
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from distill_jobs.times import Times
from engines.denoiser import Cond, Weighted

_WEIGHTS = 1 << 34  # keeps these seeds apart from those of updates and pairs


@dataclass(frozen=True, slots=True)
class Rows:
    """What a source holds for some rows. x: clean latents [B, C, H, W]; pair: teacher states [B, R + 1, C, H, W],
    the last of them the endpoint."""

    cond: Cond
    x: Tensor | None = None
    pair: Tensor | None = None

    @property
    def count(self) -> int:
        return len(next(part for part in (self.x, self.pair, *tree_leaves(self.cond)) if part is not None))


@dataclass(frozen=True, slots=True)
class Batch:
    """One update's rows. noise [B, C, H, W] is fresh; further draws come from `generator` (CPU, so they are the same
    on every device)."""

    rows: Rows
    noise: Tensor
    generator: torch.Generator

    @property
    def cond(self) -> Cond:
        return self.rows.cond

    def __len__(self) -> int:
        return len(self.noise)

    def randn(self) -> Tensor:
        """Fresh noise shaped as `noise`."""
        draw = torch.randn(self.noise.shape, generator=self.generator, dtype=torch.float32)
        return draw.to(self.noise)

    def draw(self, times: Times) -> Tensor:
        return times.draw(len(self), self.generator).to(self.noise)

    def pick(self, below: int) -> int:
        """One integer for the whole batch: all rows take the same rung."""
        return int(torch.randint(below, (), generator=self.generator))


class Source(Protocol):
    """Training rows by position: the same position gives the same rows for ever."""

    shape: tuple[int, int, int]  # C, H, W of a latent
    has_data: bool  # whether rows carry x

    def rows(self, position: int, count: int) -> Rows: ...


class TensorSource:
    """A source over tensors in memory, reshuffled each epoch by the seed."""

    def __init__(self, cond: Cond, shape: tuple[int, int, int], *, x: Tensor | None = None, seed: int = 0) -> None:
        self.cond, self.x, self.seed = cond, x, seed
        self.shape = shape
        self.has_data = x is not None
        self.size = len(tree_leaves(cond)[0]) if x is None else len(x)
        self._epoch, self._order = -1, list[int]()

    def rows(self, position: int, count: int) -> Rows:
        index = torch.tensor([self._row(position * count + i) for i in range(count)])
        return Rows(cond=take(self.cond, index), x=None if self.x is None else self.x[index])

    def _row(self, n: int) -> int:
        epoch, at = divmod(n, self.size)
        if epoch != self._epoch:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed_of(self.seed, epoch)))
            self._epoch, self._order = epoch, order.tolist()
        return self._order[at]


class WeightedSource:
    """The rows of a source with a guidance weight each, uniform in low..high: for a student that reads its weight.

    Teacher and student are asked through the condition, so no method need know that it learns all weights at once.
    """

    def __init__(self, source: Source, low: float, high: float, *, seed: int = 0) -> None:
        self.source, self.low, self.high, self.seed = source, low, high, seed
        self.shape, self.has_data = source.shape, source.has_data

    def rows(self, position: int, count: int) -> Rows:
        rows = self.source.rows(position, count)
        generator = torch.Generator().manual_seed(seed_of(self.seed, _WEIGHTS, position))
        w = self.low + (self.high - self.low) * torch.rand(count, generator=generator)
        return replace(rows, cond=Weighted(rows.cond, w))


def seed_of(*parts: int) -> int:
    """One 32-bit seed from several numbers: torch's CPU generator reads no more bits than that."""
    return zlib.crc32(struct.pack(f">{len(parts)}q", *parts))


def make_batch(rows: Rows, shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu") -> Batch:
    """The batch of these rows with the noise of `seed`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(rows.count, *shape, generator=generator).to(device)
    return Batch(rows=tree_to(rows, device), noise=noise, generator=generator)


def repeated(batch: Batch, times: int) -> Batch:
    """The batch's rows `times` over, each time with other noise; the first ones keep theirs."""
    rows = batch.rows
    index = torch.arange(len(batch), device=batch.noise.device).repeat(times)
    more = Rows(
        cond=take(rows.cond, index),
        x=None if rows.x is None else rows.x[index],
        pair=None if rows.pair is None else rows.pair[index],
    )
    noise = torch.cat([batch.noise] + [batch.randn() for _ in range(times - 1)])
    return Batch(rows=more, noise=noise, generator=batch.generator)


def tree_to(rows: Rows, device: torch.device | str) -> Rows:
    def move(part: object) -> object:
        return part.to(device) if isinstance(part, Tensor) else part

    x, pair = (None if part is None else part.to(device) for part in (rows.x, rows.pair))
    return Rows(cond=tree_map(move, rows.cond), x=x, pair=pair)


def take(cond: Cond, index: Tensor) -> Cond:
    """The rows `index` of a condition."""
    return tree_map(lambda part: part[index] if isinstance(part, Tensor) else part, cond)
