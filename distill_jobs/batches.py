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
    """One update's rows, or a share of them. noise [B, C, H, W] is fresh; further draws come from `generator` (CPU, so
    they are the same on every device), always those of the whole update, of which a share keeps its own."""

    rows: Rows
    noise: Tensor
    generator: torch.Generator
    share: "Share | None" = None

    @property
    def cond(self) -> Cond:
        return self.rows.cond

    def __len__(self) -> int:
        return len(self.noise)

    def randn(self) -> Tensor:
        """Fresh noise shaped as `noise`."""
        shape = (self._drawn, *self.noise.shape[1:])
        return self._own(torch.randn(shape, generator=self.generator, dtype=torch.float32)).to(self.noise)

    def draw(self, times: Times) -> Tensor:
        return self._own(times.draw(self._drawn, self.generator)).to(self.noise)

    def picks(self, below: int) -> Tensor:
        """[B] integers, one for each row."""
        drawn = torch.randint(below, (self._drawn,), generator=self.generator)
        return self._own(drawn).to(self.noise.device)

    def pick(self, below: int) -> int:
        """One integer for the whole batch: all rows take the same rung."""
        return int(torch.randint(below, (), generator=self.generator))

    def shares(self, count: int) -> "list[Batch]":
        """`count` equal parts, each with the randomness that this batch would have from now on. Every count-th row:
        the first rows, of which methods make something else, are spread evenly too."""
        if count == 1:
            return [self]
        return [self._part(torch.arange(first, len(self), count)) for first in range(count)]

    def _part(self, index: Tensor) -> "Batch":
        share = Share(index, len(self)) if self.share is None else Share(self.share.index[index], self.share.of)
        return Batch(chosen(self.rows, index), self.noise[index], self.generator.clone_state(), share)

    @property
    def _drawn(self) -> int:
        return len(self) if self.share is None else self.share.of

    def _own(self, drawn: Tensor) -> Tensor:
        return drawn if self.share is None else drawn[self.share.index]


@dataclass(frozen=True, slots=True)
class Share:
    """Which rows of an update a batch has: `index` [B] among `of`."""

    index: Tensor
    of: int

    def repeated(self, times: int) -> "Share":
        """Of the same rows of an update that is repeated as often."""
        return Share(torch.cat([self.index + k * self.of for k in range(times)]), self.of * times)


class Source(Protocol):
    """Training rows by position: the same position gives the same rows for ever."""

    shape: tuple[int, ...]  # C, H, W of a latent
    has_data: bool  # whether rows carry x

    def rows(self, position: int, count: int) -> Rows: ...


class TensorSource:
    """A source over tensors in memory, reshuffled each epoch by the seed."""

    def __init__(self, cond: Cond, shape: tuple[int, ...], *, x: Tensor | None = None, seed: int = 0) -> None:
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
    index = torch.arange(len(batch)).repeat(times)
    noise = torch.cat([batch.noise] + [batch.randn() for _ in range(times - 1)])
    share = None if batch.share is None else batch.share.repeated(times)
    return Batch(chosen(batch.rows, index), noise, batch.generator, share)


def chosen(rows: Rows, index: Tensor) -> Rows:
    """The rows `index` of rows."""
    return Rows(
        cond=take(rows.cond, index),
        x=None if rows.x is None else rows.x[index],
        pair=None if rows.pair is None else rows.pair[index],
    )


def tree_to(rows: Rows, device: torch.device | str) -> Rows:
    def move(part: object) -> object:
        return part.to(device) if isinstance(part, Tensor) else part

    x, pair = (None if part is None else part.to(device) for part in (rows.x, rows.pair))
    return Rows(cond=tree_map(move, rows.cond), x=x, pair=pair)


def take(cond: Cond, index: Tensor) -> Cond:
    """The rows `index` of a condition."""
    return tree_map(lambda part: part[index] if isinstance(part, Tensor) else part, cond)
