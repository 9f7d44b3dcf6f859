"""Single trajectory distillation: a flow map that agrees with itself along stored teacher trajectories.

Consistency methods ask their student at pictures that are noised anew, which are on a teacher trajectory each, but not
on one that sampling would follow. Here all states of a training row lie on one trajectory of the teacher from the state
that sampling starts at, kept in a bank: x_n and x_(n+1) are neighbours on it, and for any later s the student's jump
x_n -> s is regressed on its averaged jump x_(n+1) -> s, which is x_(n+1) itself where s is its time.

Source: arXiv 2412.18945. Left out: starting states that are pictures noised in part (students are sampled from noise);
a bank that is refilled while training; the adversarial loss.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import root_mse
from distill_jobs.methods._bank import BankConfig, BankMethod
from distill_jobs.methods.base import Preset
from distill_jobs.pairs import TeacherPath
from distill_jobs.roles import Cast, Role
from engines.errors import InvalidRequest
from engines.process import over


class STDConfig(BankConfig):
    batch: int = Field(64, ge=1)
    pairs: int = Field(2048, ge=1, description="teacher trajectories in the bank")
    states: int = Field(8, ge=1, description="states kept of each, besides its end")
    between: int = Field(2, ge=1, description="teacher steps from one state to the next")
    keep: float = Field(0.95, ge=0, lt=1, description="of the averaged student after each iteration")


class STD(BankMethod):
    Config = STDConfig
    inputs = frozenset({"s"})

    def __init__(self, cast: Cast, config: STDConfig) -> None:
        super().__init__(cast, config)
        if "s" not in cast.student.inputs:
            raise InvalidRequest("std trains a flow map: its student's network must read s")
        self.levels = tuple(config.top * u for u in times.uniform(config.states))

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {"target": Role(init="student", train="frozen"), "student": config.student_role()}

    @property
    def path(self) -> TeacherPath:
        return TeacherPath(self.levels, self.config.states * self.config.between, self.config.teacher_solver)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        n, k = self._rungs(batch)
        grid = batch.noise.new_tensor(times.grid(self.process, self.levels))
        row = torch.arange(len(batch), device=n.device)
        x, after = batch.rows.pair[row, n], batch.rows.pair[row, n + 1]
        with torch.no_grad():
            there = self.cast["target"].jump(after, grid[n + 1], grid[k], batch.cond)
            there = torch.where(over(k == n + 1, x), after, there)
        return {"std": root_mse(self.cast.student.jump(x, grid[n], grid[k], batch.cond) - there)}

    def _rungs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B] indices: of a state, and of where to jump from it, at the next state or later."""
        n = batch.picks(self.config.states)
        later = batch.draw(times.Uniform()) * (self.config.states - n)
        return n, n + 1 + later.long()

    def after(self, iteration: int) -> None:
        self.cast.follow("target", "student", self.config.keep)


PRESETS = {"std": Preset(STD, "A flow map that agrees with itself along stored teacher trajectories.", "2412.18945")}
