"""Reflow: a student whose paths are the straight lines between the ends of its teacher's: few steps follow them.

`reflow` takes whole trajectories: where the teacher's path leads from noise z to the picture y, the student regresses
the velocity eps - x0 at alpha y + sigma z on z - y, at all noise levels alike. `rfpp` draws the levels from a U, dense
at both ends where the error of a straight coupling lies, and measures by pseudo-Huber. `slimflow` starts with fresh
noise z' for each picture, as the teacher was trained, and turns it into the trajectory's own: sqrt(1 - b^2) z + b z',
where b falls from 1 to 0, so that a small student need not start as a copy of its teacher. `perflow` cuts the path into
windows, the steps of the schedule with the least count: data is noised to a window's upper edge, the teacher goes on to
its lower edge, and the student learns the line between the two; no whole trajectory is needed. Lines are straight in
rectified flow, so every process learns the same flow in its own coordinates.

Source: reflow arXiv 2209.03003 §2.2; rfpp 2405.20320 §4; slimflow 2407.12718 §3 (annealing reflow);
perflow 2405.07510 §3.
Left out: perceptual distances; real pictures inverted into noise (rfpp §4); flow-guided distillation (slimflow §3);
repeated reflow (run the stage again with the student as teacher); the one-step distillation of InstaFlow (2309.06380),
which is `kd` with one rung.
Checked against: the closed-form coupling of Gaussian data (tests).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import huber
from distill_jobs.methods._bank import BankConfig, BankMethod
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods._line import END, Line, ask, flow_error, path
from distill_jobs.methods.base import Count, Method, Preset
from distill_jobs.pairs import TeacherPath
from distill_jobs.roles import Cast
from engines.process import secant
from engines.solvers import PlainSolver


@dataclass(frozen=True)
class UShaped:
    """Density ~ exp(a u) + exp(a (1 - u)) on 0..1: dense at both ends."""

    a: float

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        rising = torch.log1p(torch.rand(rows, generator=generator) * math.expm1(self.a)) / self.a
        return torch.where(torch.rand(rows, generator=generator) < 0.5, rising, 1 - rising)


class ReflowConfig(BankConfig):
    batch: int = Field(128, ge=1)
    teacher_steps: int = Field(16, ge=1)
    ends: float = Field(
        0.0, ge=0, le=50, description="exponent of the U that noise levels are drawn from; 0 is uniform"
    )
    distance: Literal["square", "huber"] = "square"
    huber_c: float = Field(0.00054, gt=0, description="corner of the pseudo-Huber distance, per number of a latent")
    anneal: int = Field(0, ge=0, description="iterations in which fresh noise gives way to the trajectory's own")


class Reflow(BankMethod):
    Config = ReflowConfig

    def __init__(self, cast: Cast, config: ReflowConfig) -> None:
        super().__init__(cast, config)
        self.curriculum = {"fresh": 1.0 if config.anneal else 0.0}

    @property
    def path(self) -> TeacherPath:
        return TeacherPath((self.config.top,), self.config.teacher_steps, self.config.teacher_solver)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        c, start, end = self.config, batch.rows.pair[:, 0], batch.rows.pair[:, -1]
        top = times.on(self.process, batch.noise.new_full((len(batch),), c.top))
        x0, eps = secant(self.process, start, top, end, torch.zeros_like(top))
        fresh = self.curriculum["fresh"]
        line = (x0, math.sqrt(1 - fresh**2) * eps + fresh * batch.randn() if fresh else eps)
        u = batch.draw(UShaped(c.ends) if c.ends else times.Uniform())
        error = _error(self, line, END + (c.top - END) * u, torch.zeros_like(u), batch)
        distance = huber(error, c.huber_c * error[0].numel()) if c.distance == "huber" else error.square().mean()
        return {"reflow": distance}

    def after(self, iteration: int) -> None:
        if self.config.anneal:
            self.curriculum["fresh"] = max(0.0, 1 - (iteration + 1) / self.config.anneal)


class PeRFlowConfig(DataConfig):
    counts: tuple[Count, ...] = Field((4,), min_length=1, description="the least is the number of windows")
    eta: float = Field(0.0, ge=0, le=0, description="windows are joined end to end: no step re-noises")
    batch: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    window_steps: int = Field(4, ge=1, description="of the teacher from the upper edge of a window to its lower edge")
    window_solver: PlainSolver = "ab2"

    @model_validator(mode="after")
    def _windows_are_split(self) -> Self:
        edges = set(self.levels(min(self.counts), {}))
        for count in self.counts:
            if not edges <= set(self.levels(count, {})):
                raise ValueError(f"the grid of {count} steps must have every edge of the {len(edges)} windows")
        return self


class PeRFlow(DataMethod):
    Config = PeRFlowConfig

    def __init__(self, cast: Cast, config: PeRFlowConfig) -> None:
        super().__init__(cast, config)
        self.windows = list(pairwise((*config.levels(min(config.counts), {}), 0.0)))

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        high, low = self.windows[batch.pick(len(self.windows))]
        u = batch.draw(times.Uniform(max(low, min(END, high / 2)), high))
        return {"perflow": _error(self, self.line(high, low, batch), u, torch.full_like(u, low), batch).square().mean()}

    @torch.no_grad()
    def line(self, high: float, low: float, batch: Batch) -> Line:
        """The line between the ends of the teacher's path through one window."""
        assert batch.rows.x is not None
        c, teacher = self.config, self.cast.teacher
        ends = times.on(self.process, batch.noise.new_tensor([high, low]))
        upper, lower = (end.expand(len(batch)) for end in ends)
        start = self.process.mix(batch.rows.x, batch.noise, upper)
        end = path(teacher, start, high, low, c.window_steps, batch.cond, c.window_solver)[-1]
        return secant(self.process, start, upper, end, lower)


def _error(method: Method, line: Line, u: Tensor, low: Tensor, batch: Batch) -> Tensor:
    """How far the student's velocity at noise levels u of the line is from the line's own."""
    t = times.on(method.process, u)
    x = method.process.mix(*line, t)
    return flow_error(ask(method.cast.student, x, t, times.on(method.process, low), batch), line)


PRESETS = {
    "reflow": Preset(Reflow, "Straight lines between noise and what the teacher makes of it.", "2209.03003"),
    "rfpp": Preset(
        Reflow,
        "reflow with noise levels from a U and a pseudo-Huber distance.",
        "2405.20320",
        {"ends": 4.0, "distance": "huber"},
    ),
    "slimflow": Preset(
        Reflow, "reflow that anneals from fresh noise to the trajectories' own.", "2407.12718", {"anneal": 1000}
    ),
    "perflow": Preset(PeRFlow, "Straight lines through the windows of a few-step schedule.", "2405.07510"),
}
