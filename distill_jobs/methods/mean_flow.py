"""Mean velocities: a student that reads s learns u(x, t, s), the mean of the teacher's velocity v from t down to s.

Everything is said in rectified flow, where u of any process is eps - x0 and the jump is x + (s - t) u. A share of the
rows has s = t, where u must be v; the others are held to an identity that makes the means of one flow agree.

`mean_flow`: u = v - (t - s) du/dt, the derivative along the path, (v d_x + d_t) u, without gradient; it counts fully
after a warm-up, and as many rows learn the velocity: without either, jumps become worse than they began on teachers
whose derivative is far longer than v. `ayf` (Eulerian map distillation) is the same with less of the weight on rows
that are nearly right. `imean_flow`: the compound velocity
u + (t - s) du/dt is regressed on v, with du/dt along the student's own velocity u(x, t, t), which, unlike a velocity
sampled from data, is a function of the state; the teacher's path is not asked for. `esd`: the end of the jump must not
move, d/dt X_{t->s} = 0 along v, with the gradient through the derivative too. `psd`: the jump t -> s is the jump
u -> s of the jump t -> u; as mean velocities, so the division by t - s is exact. `shortcut`: two half jumps of a slowly
moving average, between dyadic times. `traflow`: three targets in balance, psd's two, which are the teacher's velocity
and consistency with itself, and where the teacher's own path from x at t ends.

`twin_flow`: the student is its own critic. Told negative times, the same network learns the velocity field of what it
makes itself: flow matching on its samples y at -t. At t it keeps the field of the teacher, which starts its jumps too:
(t - s) u(t, s) is d v and two half jumps on from t - d to s, the difference over d. Where the two fields part at a
noised y, y is moved as a critic's distribution matching would: down F(-t) - F(t) of the clean predictions, here without
its factor t, v(t) - v(-t). So no critic is held in memory; a published student is asked at t alone.

Source: arXiv 2505.13447 §4 (MeanFlow); 2506.14603 §3 (AYF-EMD); 2512.02012 §4 (improved MeanFlow);
2505.18825 §3 (ESD, PSD); 2410.12557 §3 (shortcut); TwinFlow 2512.05150, as in its authors' code (below); TraFlow
2502.16972: the targets are those that its abstract names, their formulas are ours. Where these train from data, v is
here the teacher's velocity.
Left out: guidance as an input and auxiliary heads (iMF), autoguidance and adversarial finetuning (AYF), learned loss
weights; a shortcut's smallest halves are jumps like the others, as the student reads s and not a step size; TwinFlow's
growing of its own guidance, and its weights by time.
Checked against: the closed-form flow map of Gaussian data (tests); for TwinFlow inclusionAI/TwinFlow
src/methodes/twinflow/twinflow.py.
"""

from abc import abstractmethod
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, take
from distill_jobs.losses import over_rows, toward
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods._tangent import Rebased, along, most_noise, warmed
from distill_jobs.methods.base import MethodConfig, Preset
from distill_jobs.methods.flow_map import heun
from distill_jobs.roles import Cast, Role
from engines.denoiser import BaseDenoiser, Cond, Denoiser
from engines.errors import InvalidRequest
from engines.process import RF, over
from engines.solvers import sample

_LEAST = 2e-3  # the least noise level that a jump starts from


class MeanVelocityConfig(DataConfig):
    eta: float = Field(0.0, ge=0, le=1)
    batch: int = Field(64, ge=1)
    top: float = Field(1.0, gt=0.01, le=1, description="the most noise a jump starts from")
    first_share: float = Field(0.25, ge=0, le=1, description="share of rows that start at pure noise")
    diagonal: float = Field(0.5, ge=0, lt=1, description="share of rows with s = t, which learn the teacher's velocity")
    power: float = Field(0.5, ge=0, le=1, description="p of the weight 1 / (|error|^2 + floor)^p of a row; 0 is none")
    floor: float = Field(1e-3, gt=0)


class MeanVelocity(DataMethod):
    """The parent: rows, the diagonal and the weighting. `Config` must be a `MeanVelocityConfig`."""

    Config: ClassVar[type[MethodConfig]] = MeanVelocityConfig
    inputs = frozenset({"s"})

    def __init__(self, cast: Cast, config: Any) -> None:
        super().__init__(cast, config)
        if "s" not in cast.student.inputs:
            raise InvalidRequest("mean velocities need a student whose network reads s")
        self.student, self.tutor = Rebased(cast.student, RF()), Rebased(cast.teacher, RF())
        self._top = min(config.top, most_noise(self.process))

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.x is not None
        t, s = self.levels(batch)
        x = RF().mix(batch.rows.x, batch.noise, t)
        n = min(round(self.config.diagonal * len(batch)), len(batch) - 1)
        same, apart = torch.arange(n), torch.arange(n, len(batch))
        cond = take(batch.cond, same)
        flow = self.student.velocity(x[same], t[same], cond) - self._flow(x[same], t[same], cond)
        jump = self.error(x[apart], t[apart], s[apart], take(batch.cond, apart), batch)
        return {"mean_velocity": weighted(torch.cat([flow, jump]), self.config.power, self.config.floor)}

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noise levels (t, s) with s < t."""
        t = self._top * batch.draw(times.WithFirst(times.Uniform(_LEAST, 1.0), self.config.first_share))
        return t, t * batch.draw(times.Uniform(0.0, 0.98))

    @abstractmethod
    def error(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """How far the mean velocity from t to s breaks the identity: zero for the teacher's flow map."""

    @torch.no_grad()
    def _flow(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.tutor.velocity(x, t, cond)

    @torch.no_grad()
    def panel(self, batch: Batch) -> dict[str, Tensor]:
        schedule = next(iter(self.schedules.values()))
        return {"gen": sample(self.cast.student, batch.noise, schedule.times, batch.cond)}


class MeanFlowConfig(MeanVelocityConfig):
    warmup: int = Field(0, ge=0, description="iterations until the derivative counts fully")
    difference: float = Field(
        0.0, ge=0, le=0.05, description="step of a difference (1e-3) for networks without forward-mode derivatives"
    )


class MeanFlow(MeanVelocity):
    Config: ClassVar[type[MethodConfig]] = MeanFlowConfig

    def __init__(self, cast: Cast, config: MeanFlowConfig) -> None:
        super().__init__(cast, config)
        self.curriculum = {"tangent": warmed(0, config.warmup)}

    def error(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond, batch: Batch) -> Tensor:
        flow = self._flow(x, t, cond)
        with torch.no_grad():
            _, slope = self.slope(x, t, s, cond, self.direction(x, t, cond, flow))
        target = flow - self.curriculum["tangent"] * over(t - s, x) * slope
        return self.student.velocity(x, t, cond, s) - target

    def direction(self, x: Tensor, t: Tensor, cond: Cond, flow: Tensor) -> Tensor:
        """dx/dt of the path along which u is differentiated."""
        return flow

    def slope(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond, direction: Tensor) -> tuple[Tensor, Tensor]:
        """(u, du/dt) with s held."""
        step = self.config.difference
        ways = (direction, torch.ones_like(t))
        return along(lambda x, t: self.student.velocity(x, t, cond, s), (x, t), ways, step)

    def after(self, iteration: int) -> None:
        self.curriculum["tangent"] = warmed(iteration + 1, self.config.warmup)


class ImprovedMeanFlow(MeanFlow):
    def direction(self, x: Tensor, t: Tensor, cond: Cond, flow: Tensor) -> Tensor:
        return self.student.velocity(x, t, cond)


class ESD(MeanFlow):
    def error(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """-d/dt of x + (s - t) u."""
        flow = self._flow(x, t, cond)
        mean, slope = self.slope(x, t, s, cond, flow)
        return mean - flow + self.curriculum["tangent"] * over(t - s, x) * slope


class PSDConfig(MeanVelocityConfig):
    midpoint: bool = Field(False, description="whether the jump is parted in the middle, and not anywhere")


class PSD(MeanVelocity):
    Config: ClassVar[type[MethodConfig]] = PSDConfig

    def error(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond, batch: Batch) -> Tensor:
        parted = times.Uniform(0.5, 0.5) if self.config.midpoint else times.Uniform(0.02, 0.98)
        share = batch.draw(parted)[-len(t) :]
        return self.student.velocity(x, t, cond, s) - joined(self.student, x, t, s, share, cond)


class TraFlowConfig(PSDConfig):
    output: float = Field(1.0, gt=0, description="weight of the teacher's output")
    steps: int = Field(4, ge=1, description="of the teacher from t to its output: Heun's, the last one Euler's")


class TraFlow(PSD):
    Config: ClassVar[type[MethodConfig]] = TraFlowConfig

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.x is not None
        c, found = self.config, super().loss(role, batch)
        t, _ = self.levels(batch)
        x = RF().mix(batch.rows.x, batch.randn(), t)
        line = (x - self.output(x, t, batch.cond)) / over(t, x)
        error = self.student.velocity(x, t, batch.cond, torch.zeros_like(t)) - line
        return found | {"output": c.output * weighted(error, c.power, c.floor)}

    @torch.no_grad()
    def output(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Where the teacher's path from x at t ends; its steps are equal in noise level."""
        levels = [t * (1 - k / self.config.steps) for k in range(self.config.steps)]
        for now, then in pairwise(levels):
            x = heun(self.tutor, x, now, then, cond, then)
        end: Tensor = self.tutor(x, levels[-1], cond)[0]
        return end


class ShortcutConfig(MeanVelocityConfig):
    halvings: int = Field(6, ge=0, description="jumps are as long as 1, 1/2, ... to 1/2 to this power")
    keep: float = Field(0.99, ge=0, lt=1, description="of the moving average that makes the half jumps; paper .999")


class Shortcut(MeanVelocity):
    Config: ClassVar[type[MethodConfig]] = ShortcutConfig

    def __init__(self, cast: Cast, config: ShortcutConfig) -> None:
        super().__init__(cast, config)
        self.target = Rebased(cast["target"], RF())

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {"target": Role(init="student", train="frozen"), "student": config.student_role()}

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A jump from a multiple of its dyadic length to the next."""
        parts = 2 ** (batch.draw(times.Uniform()) * (self.config.halvings + 1)).floor()
        start = times.WithFirst(times.Uniform(), self.config.first_share)
        end = torch.minimum((batch.draw(start) * parts).floor(), parts - 1) / parts
        return self._top * (end + 1 / parts), self._top * end

    def error(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond, batch: Batch) -> Tensor:
        half = torch.full_like(t, 0.5)
        return self.student.velocity(x, t, cond, s) - joined(self.target, x, t, s, half, cond)

    def after(self, iteration: int) -> None:
        self.cast.follow("target", "student", self.config.keep)


class TwinFlowConfig(MeanVelocityConfig):
    delta: float = Field(0.01, gt=0, le=0.1, description="of noise level, of the velocity's step; at most half a jump")
    limit: float = Field(1.0, gt=0, description="greatest value of a jump's error and of a difference of fields")
    fake: float = Field(1.0, gt=0, description="weight of learning its own samples' field")
    twin: float = Field(0.5, ge=0, description="weight of moving its samples to where both fields agree")


class TwinFlow(MeanVelocity):
    Config: ClassVar[type[MethodConfig]] = TwinFlowConfig

    def __init__(self, cast: Cast, config: TwinFlowConfig) -> None:
        super().__init__(cast, config)
        least = times.on(self.process, torch.tensor([_LEAST], dtype=torch.float64))
        if float(self.process.network_time(least)) < 0:
            raise InvalidRequest("twin_flow tells its network negative times: those of this process are so already")
        self.twin = Rebased(mirrored(cast.student), RF())

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        c, y = self.config, self.generate(batch)
        found = super().loss(role, batch)
        y_t, t, eps = self._noised(y.detach(), batch)
        own = self.twin.velocity(y_t, t, batch.cond) - (eps - y.detach())
        return found | {"fake": c.fake * weighted(own, c.power, c.floor), "twin": c.twin * self.matching(y, batch)}

    def error(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """Its gradient by u is its value's, which the limit cuts."""
        mean = self.student.velocity(x, t, cond, s)
        step = torch.minimum((t - s) / 2, torch.full_like(t, self.config.delta))
        flow = self._flow(x, t, cond)
        rest = joined(self.student, x - over(step, x) * flow, t - step, s, torch.full_like(t, 0.5), cond)
        part = over((t - s) / step, x)
        found = part * mean.detach() - (part - 1) * rest - flow
        return mean - mean.detach() + found.clamp(-self.config.limit, self.config.limit)

    def matching(self, y: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            y_t, t, _ = self._noised(y, batch)
            apart = self.student.velocity(y_t, t, batch.cond) - self.twin.velocity(y_t, t, batch.cond)
        return toward(y, apart.clamp(-self.config.limit, self.config.limit))

    def _noised(self, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(y_t, t, eps)."""
        t, eps = self._top * batch.draw(times.Uniform(_LEAST, 1.0)), batch.randn()
        return RF().mix(y, eps, t), t, eps


def mirrored(student: BaseDenoiser) -> Denoiser:
    """The same network, told the negative of every time."""
    if not isinstance(student, Denoiser):
        raise InvalidRequest("twin_flow needs a student that is one network")
    net = student.net

    def told(x: Tensor, t: Tensor, cond: Cond, s: Tensor | None, w: Tensor | None) -> Tensor:
        return net(x, -t, cond, None if s is None else -s, w)

    return Denoiser(told, student.process, student.kind, student.inputs)


@torch.no_grad()
def joined(den: Rebased, x: Tensor, t: Tensor, s: Tensor, share: Tensor, cond: Cond) -> Tensor:
    """The mean velocity from t to s of two jumps, the first of which is `share` of the way."""
    between = t + share * (s - t)
    first = den.velocity(x, t, cond, between)
    second = den.velocity(x + over(between - t, x) * first, between, cond, s)
    return second + over(share, x) * (first - second)


def weighted(error: Tensor, power: float, floor: float) -> Tensor:
    """The rows' mean squares, each over (itself + floor)^power without gradient, averaged."""
    square = over_rows(error.square())
    return (square / (square.detach() + floor) ** power).mean()


PRESETS = {
    "mean_flow": Preset(
        MeanFlow,
        "Mean velocities by the MeanFlow identity, from the teacher's field.",
        "2505.13447",
        {"warmup": 200},
    ),
    "imean_flow": Preset(
        ImprovedMeanFlow,
        "mean_flow whose derivative follows the student's own velocity.",
        "2512.02012",
        {"warmup": 200},
    ),
    "ayf": Preset(
        MeanFlow,
        "Eulerian flow map distillation with normalised tangents that are warmed up.",
        "2506.14603",
        {"warmup": 300, "floor": 0.01},
    ),
    "esd": Preset(
        ESD,
        "Eulerian flow map: where a jump ends must not move along the path.",
        "2505.18825",
        {"power": 0.0, "warmup": 200},
    ),
    "psd": Preset(PSD, "Progressive flow map: a jump is two jumps, parted anywhere.", "2505.18825", {"power": 0.0}),
    "traflow": Preset(
        TraFlow, "The teacher's output, its velocity and consistency with oneself, in balance.", "2502.16972"
    ),
    "twin_flow": Preset(
        TwinFlow, "Its own critic: one network, told negative times, knows the field of what it makes.", "2512.05150"
    ),
    "shortcut": Preset(
        Shortcut, "Shortcuts: two half jumps of a moving average are one jump.", "2410.12557", {"power": 0.0}
    ),
}
