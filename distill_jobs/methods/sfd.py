"""SFD: simple and fast distillation, a short fine-tune at the few times that sampling visits and nowhere else.

The student follows its own sampling from stored noise; at every rung its next step is pulled to where the teacher's
path from the same noise is, and the next rung starts from what the student made, without gradient. What it learns at
the few times carries over to the times between, so nothing is trained there. `sfd_v` makes one student for several
counts: its network is told where each step leads.

Source: arXiv 2409.19681 (§3; the variable form §3.4). Left out: the analytical first step; one optimiser step per rung
(all rungs of an update are summed instead).
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.methods._bank import BankConfig, BankMethod
from distill_jobs.methods.base import Preset
from distill_jobs.pairs import TeacherPath
from distill_jobs.roles import Cast
from engines.errors import InvalidRequest


class SFDConfig(BankConfig):
    batch: int = Field(64, ge=1)
    eta: float = Field(0.0, ge=0, le=0, description="0: the student's path is deterministic, as the teacher's")
    pairs: int = Field(2048, ge=1, description="teacher trajectories in the bank")
    teacher_steps: int = Field(4, ge=1, description="of each piece of a path between two rungs")


class SFD(BankMethod):
    Config = SFDConfig
    several_counts_read_s = True

    def __init__(self, cast: Cast, config: SFDConfig) -> None:
        super().__init__(cast, config)
        if len(config.counts) > 1 and "s" not in cast.student.inputs:
            raise InvalidRequest("sfd makes one count of steps: for several its student must read s, as sfd_v's does")
        levels = {k: config.levels(k, {}) for k in sorted(config.counts)}
        self.union = tuple(sorted({u for grid in levels.values() for u in grid}, reverse=True))
        self.places = [[self.union.index(u) for u in grid] for grid in levels.values()]

    @property
    def path(self) -> TeacherPath:
        return PathThrough(self.union, self.config.teacher_steps, self.config.teacher_solver)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        grid = batch.noise.new_tensor(times.grid(self.process, self.union))
        size = self.process.alpha(grid) + self.process.sigma(grid)  # rungs count alike in rectified flow's scale
        places = [*self.places[batch.pick(len(self.places))], len(self.union)]
        x, misses = batch.rows.pair[:, places[0]], list[Tensor]()
        for here, there in pairwise(places):
            t, s = (grid[at].expand(len(batch)) for at in (here, there))
            x = self.cast.student.jump(x.detach(), t, s, batch.cond)
            misses.append((x - batch.rows.pair[:, there]).abs().mean() / size[there])
        return {"sfd": torch.stack(misses).mean()}


class SFDv(SFD):
    inputs = frozenset({"s"})


@dataclass(frozen=True, slots=True)
class PathThrough(TeacherPath):
    """`steps` equal steps of noise level from each rung to the next and to the end: all rungs are on the path."""

    @property
    def grid(self) -> tuple[float, ...]:
        rungs = pairwise((*self.rungs, 0.0))
        return tuple(high + (low - high) * i / self.steps for high, low in rungs for i in range(self.steps))

    @property
    def indices(self) -> list[int]:
        return [i * self.steps for i in range(len(self.rungs))]


PRESETS = {
    "sfd": Preset(
        SFD, "A short fine-tune at the rungs of one sampling, along the teacher's path.", "2409.19681", {"counts": (4,)}
    ),
    "sfd_v": Preset(SFDv, "sfd for several counts at once: the network reads where each step leads.", "2409.19681"),
}
