"""Teacher trajectories as training data: made once in shards, kept on disk, found again after a death.

Shard k follows from (source, seed, k) alone, so a resumed run has the same pairs as an uninterrupted one.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils._pytree import tree_map

from distill_jobs import times
from distill_jobs.batches import Batch, Rows, Source, make_batch, seed_of, take
from distill_jobs.methods.base import Workspace
from engines.denoiser import BaseDenoiser, Cond
from engines.solvers import continued, trajectory

SHARD = 64  # rows
_DRAWS, _SHARDS = 1 << 32, 1 << 33  # keep these seeds apart from those of updates


@dataclass(frozen=True, slots=True)
class TeacherPath:
    """How the teacher is followed: `steps` equal steps of noise level, and which levels of it are kept.

    The path starts at the first rung (1 without any): networks that predict eps must start below pure noise.
    """

    rungs: tuple[float, ...]
    steps: int
    solver: str

    @property
    def grid(self) -> tuple[float, ...]:
        start = self.rungs[0] if self.rungs else 1.0
        return tuple(start * u for u in times.uniform(self.steps))

    @property
    def indices(self) -> list[int]:
        """Where the rungs are on the path: its nearest points."""
        return [min(range(self.steps), key=lambda i: abs(self.grid[i] - u)) for u in self.rungs]

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise levels that are really kept."""
        return tuple(self.grid[i] for i in self.indices)

    def states(self, teacher: BaseDenoiser, noise: Tensor, cond: Cond) -> Tensor:
        """[B, R + 1, C, H, W]: x at the rungs of one teacher trajectory each, and its endpoint."""
        path = trajectory(teacher, noise, times.grid(teacher.process, self.grid), cond, solver=self.solver)
        return torch.stack([path[i] for i in self.indices] + [path[-1]], dim=1)


def follow(teacher: BaseDenoiser, x: Tensor, levels: tuple[float, ...], cond: Cond, solver: str) -> Tensor:
    """Where the teacher's path over `levels` ends that stands at x [B, ...] on the first of them."""
    grid = times.grid(teacher.process, levels)
    return continued(teacher, x, grid, cond, solver=solver)[-1]


class Pairs:
    """Trajectory rows [N, R + 1, C, H, W] with their conditions, drawn by position like a `Source`."""

    def __init__(self, states: Tensor, conds: list[Cond], seed: int) -> None:
        self.states, self.conds, self.seed = states, conds, seed

    def rows(self, position: int, count: int) -> Rows:
        """Any rows at random, by position."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, _DRAWS, position))
        index = torch.randint(len(self.states), (count,), generator=generator)
        parts = [take(self.conds[i // SHARD], torch.tensor([i % SHARD])) for i in index.tolist()]
        return Rows(cond=_stack(parts), pair=self.states[index])


def collect(teacher: BaseDenoiser, source: Source, space: Workspace, how: TeacherPath, count: int) -> Pairs | None:
    """About `count` pairs (whole shards), or None when told to stop before they were complete."""
    total = -(-count // SHARD)
    makers = space.group.size if space.folder else 1  # what is not kept cannot be shared out
    states: Tensor | None = None  # of all shards from the first on: to join them would hold each twice
    mine = set()

    def keep(k: int) -> Tensor:
        shard = _shard(teacher, source, space, how, k)
        found = shard.new_empty(total * SHARD, *shard.shape[1:]) if states is None else states
        found[k * SHARD : (k + 1) * SHARD] = shard
        mine.add(k)
        return found

    for first in range(0, total, makers):
        if not space.proceed():
            return None
        k = first + space.group.rank % makers
        if k < total:
            states = keep(k)
        space.report(min(count, (first + makers) * SHARD), count)
    space.group.meet()
    for k in set(range(total)) - mine:
        states = keep(k)
    assert states is not None
    return Pairs(states, [_batch(source, space, k).cond for k in range(total)], space.seed)


def _shard(teacher: BaseDenoiser, source: Source, space: Workspace, how: TeacherPath, k: int) -> Tensor:
    """One shard's states, from the disk where they are there."""
    path = space.folder / f"pairs-{k:05d}.safetensors" if space.folder else None
    if path and path.exists():
        kept: Tensor = load_file(path)["states"]
        return kept
    batch = _batch(source, space, k)
    states = how.states(teacher, batch.noise, batch.cond).cpu()
    _write(path, states)
    return states


def _batch(source: Source, space: Workspace, k: int) -> Batch:
    seed = seed_of(space.seed, _SHARDS, k)
    return make_batch(source.rows(k, SHARD), source.shape, seed=seed, device=space.device)


def _write(path: Path | None, states: Tensor) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        file.write(save({"states": states.contiguous()}))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _stack(parts: list[Cond]) -> Cond:
    """Conditions of one row each as one of all."""
    return tree_map(lambda *rows: torch.cat(rows) if isinstance(rows[0], Tensor) else rows[0], *parts)
