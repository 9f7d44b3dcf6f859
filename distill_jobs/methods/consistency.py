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
`hyper_sd`: lcm within 8 segments, which merge in pairs. `slam`: the left side stands anywhere on the straight line from
x_r to x_t, at the share gamma of the noise level between them, so that each teacher step teaches all that lies along
it; at gamma = 1 it is lcm, at 0 both sides are one point.

`icd`: pcm with a way back. An encoder, a network of its own, learns the same path upwards: from noise level t to the
upper edge of t's phase, where its neighbour is one teacher step *up* from x_t. Both learn to undo each other: what the
one has carried across a phase the other must bring back (preservation). Encoding starts a little above clean data,
where a direction is known.

Source: CD arXiv 2303.01469 alg. 2; LCM 2310.04378 §4; PCM 2405.18407 §3; TDD 2409.01347 §3; SCott 2403.01505 §3;
Hyper-SD 2404.13686 §3.1; SLAM (SPLAM) 2404.13903; iCD 2406.14539. Rungs are equal steps of noise level, not Karras'.
LCM's embedded weight is the job's to ask for (`student.guidance`); without it the teacher's is baked in. iCD's decoder
reads its weight and is preserved at weight 1, its encoder is unguided; here the weight is baked, so both follow one
guided path, which is the same where the weight is 1. Its dynamic guidance is `guidance_interval`.
SLAM tells its network (t, gamma) and interpolates sigma / alpha; here the network is told the noise level of the point.
Left out: LPIPS, the adversarial terms of PCM and SCott, Hyper-SD's later stages; serving iCD's encoder, which stays in
the job's checkpoints.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from abc import abstractmethod
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows, root_mse
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods.base import Count, MethodConfig, Preset
from distill_jobs.methods.flow_map import heun
from distill_jobs.roles import Cast, Role, guided_within
from engines.denoiser import BaseDenoiser, Cond
from engines.manifest import Schedule
from engines.process import over

ENCODER = "encoder"  # the role of `icd` that takes pictures to noise
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
        there = self.neighbour(batch, x, t, near)
        target = self.target(there, near, end, batch.cond)
        guess = self.cast.student.jump(*self.asked(batch, x, t, there, near), end, batch.cond)
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

    def asked(self, batch: Batch, x: Tensor, t: Tensor, there: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """The state of the left side and its time [B]; `there` is the neighbour at `near`."""
        return x, t

    def weight(self, u: Tensor, r: Tensor) -> Tensor:
        return torch.ones_like(u)

    def size(self, t: Tensor) -> Tensor:
        """[B] alpha + sigma, by which states are greater than those of rectified flow at the same noise level."""
        return self.process.alpha(t) + self.process.sigma(t)

    def target(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """The right side's jump from t to s >= 0; where they are one it stays."""
        player = self.cast.student if self.config.keep is None else self.cast["target"]
        return landed(player, x, t, s, cond, stays=t <= s)

    def distance(self, error: Tensor, weight: Tensor) -> Tensor:
        if self.config.smooth is not None:
            return root_mse(over(weight, error) * error, weight * self.config.smooth)
        squared: Tensor = (weight * over_rows(error.square())).mean()
        return squared


@torch.no_grad()
def landed(player: BaseDenoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond, stays: Tensor) -> Tensor:
    """Where the jump from t to s leads; rows of `stays` [B] are there already. The next network that is asked drops out
    the same units."""
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        there = player.jump(x, t, s, cond)
    return torch.where(over(stays, x), x, there)


# distillation: the neighbour is the teacher's ------------------------------------------------------------------------


class TeacherStepConfig(SelfConsistencyConfig):
    solver: Literal["ddim", "heun"] = Field("ddim", description="the teacher's step")
    substeps: int = Field(1, ge=1, description="teacher steps from t to its neighbour")
    churn: float = Field(0.0, ge=0, le=1, description="noise that a DDIM step renews: 1 is ancestral sampling")


class TeacherStep(SelfConsistency):
    Config = TeacherStepConfig

    def __init__(self, cast: Cast, config: Any) -> None:
        super().__init__(cast, config)
        self.tutor = cast.teacher

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
        return heun(self.tutor, x, t, s, batch.cond, torch.maximum(s, least))

    def _ddim(self, x: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """The line of (x0, eps); with churn, ancestral sampling would renew 1 - (sigma_s alpha_t / alpha_s sigma_t)^2
        of the variance of eps."""
        x0, eps = self.tutor(x, t, batch.cond)
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


class SubPath(Consistency):
    def asked(self, batch: Batch, x: Tensor, t: Tensor, there: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """The point of the line through both at a drawn share of the noise level between them: x / (alpha + sigma) is
        linear in it. Where the process ends at some noise both may be one point."""
        low, high = (times.level_of(self.process, at) for at in (near, t))
        share = torch.maximum(batch.draw(times.Uniform()), (END / high).clamp_max(1))  # never all the way to no noise
        between = times.on(self.process, torch.lerp(low, high, share))
        far, close = (state / over(self.size(at), state) for state, at in ((x, t), (there, near)))
        return over(self.size(between), x) * torch.lerp(close, far, over(share, x)), between


class InvertibleConfig(ConsistencyConfig):
    counts: tuple[Count, ...] = Field((4,), min_length=1, description="phases")
    eta: float = Field(0.0, ge=0, le=1)
    keep: float | None = Field(None, ge=0, lt=1, description="of an averaged target; without one it is the student")
    first: float = Field(0.02, gt=0, lt=1, description="noise level that encoding starts at")
    preserve: float = Field(0.1, ge=0, description="weight of bringing back what the other has carried across a phase")
    guidance_interval: tuple[float, float] | None = Field(
        None, description="noise levels between which a guided teacher is guided; all without one"
    )

    @model_validator(mode="after")
    def _starts_in_the_last_phase(self) -> Self:
        if last := [count for count in self.counts if self.levels(count, {})[-1] <= self.first]:
            raise ValueError(f"first must be below the last rung of every count, not {self.first} with {last[0]} steps")
        return self


class Invertible(Consistency):
    Config = InvertibleConfig

    def __init__(self, cast: Cast, config: InvertibleConfig) -> None:
        super().__init__(cast, config)
        self.tutor = guided_within(cast.teacher, config.guidance_interval)

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {ENCODER: config.student_role()} | super().roles(config)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        found = self.upwards(batch) if role == ENCODER else super().loss(role, batch)
        weight = self.config.preserve
        return found | ({"preservation": weight * self.preservation(role, batch)} if weight else {})

    def phases(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noise levels [B] (low, high) at the edges of a phase of each row, all of one count."""
        counts = sorted(self.config.counts)
        levels = self.config.levels(counts[batch.pick(len(counts))], {})
        edges, k = batch.noise.new_tensor((*levels, self.config.first)), batch.picks(len(levels))
        return edges[k + 1], edges[k]

    def upwards(self, batch: Batch) -> dict[str, Tensor]:
        """The encoder's consistency: a point and its neighbour above end in one point at the upper edge."""
        assert batch.rows.x is not None
        c, encoder = self.config, self.cast[ENCODER]
        low, high = self.phases(batch)
        u = low + batch.draw(times.Uniform()) * (high - low)
        t, end = times.on(self.process, u), times.on(self.process, high)
        near = torch.minimum(times.on(self.process, (u + c.top * c.skip / c.rungs).clamp_max(1)), end)
        x = self.process.mix(batch.rows.x, batch.noise, t)
        there = self.neighbour(batch, x, t, near)
        target = landed(encoder, there, near, end, batch.cond, stays=near >= end)
        guess = encoder.jump(x, t, end, batch.cond)
        return {"consistency": self.distance(guess - target, 1 / self.size(end))}

    def preservation(self, role: str, batch: Batch) -> Tensor:
        """The distance to which `role` brings a state back that the other has carried across a phase."""
        assert batch.rows.x is not None
        low, high = (times.on(self.process, level) for level in self.phases(batch))
        encoder, student = self.cast[ENCODER], self.cast.student
        away, back, here, there = (student, encoder, high, low) if role == ENCODER else (encoder, student, low, high)
        x = self.process.mix(batch.rows.x, batch.noise, here)
        with torch.no_grad():
            carried = away.jump(x, here, there, batch.cond)
        return self.distance(back.jump(carried, there, here, batch.cond) - x, 1 / self.size(here))


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
    "slam": Preset(
        SubPath, "lcm asked anywhere on the straight line that each of the teacher's steps takes.", "2404.13903"
    ),
    "icd": Preset(
        Invertible, "pcm beside an encoder that takes pictures back to noise; they undo each other.", "2406.14539"
    ),
    "hyper_sd": Preset(Segments, "Consistency within segments that merge until one is left.", "2404.13686"),
}
