"""Consistency distillation: neighbours on the teacher's path map to one point, f(x_t, t) = f(x_r, r) for r < t.

f jumps from t to an end e(t) and keeps a point that is there already, so agreement of neighbours spreads from the end
to pure noise. x_r is one step of the guided teacher from x_t, and the right side f(x_r, r) has no gradient: it is an
average of the student, or the student itself under the same dropout.

The end is where the student's own sampling jumps: (1 - eta) times the next rung of its schedule. Re-noising (eta 1)
makes it 0, the classical consistency model; eta 0 makes it the edge of the phase that t is in. Of several counts each
row takes one, so a network that reads no s learns the mean of their lines; one that reads s keeps them apart.

`cd`: one Heun step between neighbours of 40 rungs, squared distance. `lcm`: a guided DDIM step over 20 of 1000 rungs,
pseudo-Huber distance. `pcm`: lcm within the phases of one count. `tdd`: ends drawn from (1 - eta)..1 times the rungs of
several counts. `scott`: the teacher's steps are stochastic; their mean is what is learnt, so churn costs variance.
`hyper_sd`: lcm within 8 segments, which merge in pairs.

Source: CD arXiv 2303.01469 alg. 2; LCM 2310.04378 §4; PCM 2405.18407 §3; TDD 2409.01347 §3; SCott 2403.01505 §3;
Hyper-SD 2404.13686 §3.1. Rungs are equal steps of noise level, not Karras'.
LCM's embedded weight is the job's to ask for (`student.guidance`); without it the teacher's is baked in.
Left out: LPIPS, the adversarial terms of PCM and SCott, Hyper-SD's later stages.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from abc import abstractmethod
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows, root_mse
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods.base import MethodConfig, Preset
from distill_jobs.methods.flow_map import heun
from distill_jobs.roles import Role
from engines.denoiser import Cond
from engines.manifest import Schedule
from engines.process import over

END = 1e-3  # the least noise level at which a network is asked for a direction


class SelfConsistencyConfig(DataConfig):
    batch: int = Field(64, ge=1)
    top: float = Field(1.0, gt=0.01, le=1, description="the most noise a jump starts from")
    first_share: float = Field(0.1, ge=0, le=1, description="share of rows that start at the top")
    keep: float | None = Field(
        0.95, ge=0, lt=1, description="of the averaged target per update; without one it is the student"
    )
    smooth: float | None = Field(
        1e-3, gt=0, description="corner of the pseudo-Huber distance; without one it is squared"
    )


class SelfConsistency(DataMethod):
    """The parent: the two sides and their distance. Who inherits says which times and where the neighbour is."""

    Config: ClassVar[type[MethodConfig]] = SelfConsistencyConfig

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        target = {} if config.keep is None else {"target": Role(init="student", train="frozen")}
        return target | {"student": config.student_role()}

    def after(self, iteration: int) -> None:
        if self.config.keep is not None:
            self.cast.follow("target", "student", self.config.keep)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.x is not None
        u, r = self.levels(batch)
        t, end = times.on(self.process, u), self.ends(batch, u, r)
        near = torch.maximum(times.on(self.process, r), end)
        x = self.process.mix(batch.rows.x, batch.noise, t)
        target = self.target(self.neighbour(batch, x, t, near), near, end, batch.cond)
        guess = self.cast.student.jump(x, t, end, batch.cond)
        return {"consistency": self.distance(guess - target, self.weight(u, r))}

    @abstractmethod
    def levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noise levels [B] (t, r) of the two sides, r < t."""

    def ends(self, batch: Batch, u: Tensor, r: Tensor) -> Tensor:
        """The process' times [B] at which the sides are compared."""
        return torch.zeros_like(u)

    @abstractmethod
    def neighbour(self, batch: Batch, x: Tensor, t: Tensor, near: Tensor) -> Tensor:
        """The state at `near` on the path through x at t; without gradient."""

    def weight(self, u: Tensor, r: Tensor) -> Tensor:
        return torch.ones_like(u)

    @torch.no_grad()
    def target(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """The right side's jump from t to s >= 0; where they are one it stays."""
        player = self.cast.student if self.config.keep is None else self.cast["target"]
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the left side drops out the same units
            there = player.jump(x, t, s, cond)
        return torch.where(over(t <= s, x), x, there)

    def distance(self, error: Tensor, weight: Tensor) -> Tensor:
        if self.config.smooth is not None:
            return root_mse(over(weight, error) * error, weight * self.config.smooth)
        squared: Tensor = (weight * over_rows(error.square())).mean()
        return squared


# distillation: the neighbour is the teacher's ------------------------------------------------------------------------


class TeacherStepConfig(SelfConsistencyConfig):
    solver: Literal["ddim", "heun"] = Field("ddim", description="the teacher's step")
    substeps: int = Field(1, ge=1, description="teacher steps from t to its neighbour")
    churn: float = Field(0.0, ge=0, le=1, description="noise that a DDIM step renews: 1 is ancestral sampling")


class TeacherStep(SelfConsistency):
    Config = TeacherStepConfig

    @torch.no_grad()
    def neighbour(self, batch: Batch, x: Tensor, t: Tensor, near: Tensor) -> Tensor:
        step = self._heun if self.config.solver == "heun" else self._ddim
        for now, then in pairwise(self._path(t, near)):
            x = step(x, now, then, batch)
        return x

    def _path(self, t: Tensor, near: Tensor) -> list[Tensor]:
        """Times from t to `near` in `substeps` equal steps of angle, which suit every process."""
        first, last = (self.process.angle(time.double()) for time in (t, near))
        between = (torch.lerp(first, last, k / self.config.substeps) for k in range(1, self.config.substeps))
        return [t, *(self.process.t_of_angle(angle).to(t) for angle in between), near]

    def _heun(self, x: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        least = times.on(self.process, torch.full_like(s, END))
        return heun(self.cast.teacher, x, t, s, batch.cond, torch.maximum(s, least))

    def _ddim(self, x: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """The line of (x0, eps); with churn, ancestral sampling would renew 1 - (sigma_s alpha_t / alpha_s sigma_t)^2
        of the variance of eps."""
        x0, eps = self.cast.teacher(x, t, batch.cond)
        if self.config.churn:
            p = self.process
            old = p.sigma(s) * p.alpha(t) / (p.alpha(s) * p.sigma(t))
            renewed = over(self.config.churn**2 * (1 - old.square()).clamp_min(0), x)
            eps = (1 - renewed).sqrt() * eps + renewed.sqrt() * batch.randn()
        return self.process.mix(x0, eps, s)


class DistillationConfig(TeacherStepConfig):
    rungs: int = Field(1000, ge=2, description="equal steps of noise level between which neighbours are taken")
    skip: int = Field(20, ge=1, description="rungs from t to its neighbour")


class Distillation(TeacherStep):
    Config = DistillationConfig

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        c = self.config
        return rungs(batch.draw(times.WithFirst(times.Uniform(), c.first_share)), c.rungs, c.skip, c.top)


class ConsistencyConfig(DistillationConfig):
    spread: bool = Field(False, description="ends are drawn from (1 - eta)..1 times a rung, so that eta can still fall")


class Consistency(Distillation):
    Config = ConsistencyConfig

    def ends(self, batch: Batch, u: Tensor, r: Tensor) -> Tensor:
        renoised = self.config.eta * (batch.draw(times.Uniform()) if self.config.spread else torch.ones_like(u))
        counts = [self.config.levels(count, {}) for count in sorted(self.config.counts)]
        ends: Tensor = (1 - renoised) * times.on(self.process, below(u, counts, batch))
        return ends


class SegmentsConfig(DistillationConfig):
    segments: int = Field(8, ge=1, description="at first; each phase halves them")
    phase_every: int = Field(400, ge=1, description="iterations of a phase; all merges must fit in the stage")


class Segments(Distillation):
    Config = SegmentsConfig

    @property
    def segments(self) -> int:
        now: int = self.config.segments >> int(self.curriculum.get("phase", 0))
        return max(1, now)

    @property
    def schedules(self) -> dict[int, Schedule]:
        """While there are edges the student stands on them, and eta counts only once it aims at 0."""
        eta = self.config.eta if self.segments == 1 else 0.0
        return {k: one.model_copy(update={"eta": eta}) for k, one in super().schedules.items()}

    def ends(self, batch: Batch, u: Tensor, r: Tensor) -> Tensor:
        return times.on(self.process, below(u, [times.uniform(self.segments)], batch))

    def after(self, iteration: int) -> None:
        super().after(iteration)
        self.curriculum["phase"] = (iteration + 1) // self.config.phase_every


def rungs(drawn: Tensor, count: int, skip: int, top: float) -> tuple[Tensor, Tensor]:
    """(t, r) among `count` equal steps of noise level up to `top`: the rung above a draw in 0..1, and `skip` below."""
    i = (drawn * count).ceil().clamp_min(1)
    return top * i / count, top * (i - skip).clamp_min(0) / count


def below(u: Tensor, counts: list[tuple[float, ...]], batch: Batch) -> Tensor:
    """The next lower rung [B] of each row's schedule, 0 under the last; `counts` are the schedules to draw from."""
    longest = max(map(len, counts))
    grids = u.new_tensor([(*levels, *(0.0,) * (longest - len(levels))) for levels in counts])
    which = batch.picks(len(counts))
    under = grids[which] < u[:, None] - 1e-6
    return torch.where(under, grids[which], 0).amax(dim=1)


_CD = {"rungs": 40, "skip": 1, "solver": "heun", "smooth": None}
PRESETS = {
    "cd": Preset(
        Consistency, "Consistency distillation: neighbours a Heun step apart map to one end.", "2303.01469", _CD
    ),
    "lcm": Preset(Consistency, "Latent consistency: long guided DDIM steps and a robust distance.", "2310.04378"),
    "pcm": Preset(
        Consistency,
        "Consistency within phases, sampled deterministically on their edges.",
        "2405.18407",
        {"counts": (4,), "eta": 0.0},
    ),
    "tdd": Preset(
        Consistency,
        "Consistency towards the rungs of all schedules of 4 to 8 steps.",
        "2409.01347",
        {"counts": (4, 5, 6, 7, 8), "eta": 0.2, "spread": True},
    ),
    "scott": Preset(
        Consistency,
        "Consistency distillation of stochastic teacher steps.",
        "2403.01505",
        {"churn": 0.2, "substeps": 2},
    ),
    "hyper_sd": Preset(Segments, "Consistency within segments that merge until one is left.", "2404.13686"),
}
