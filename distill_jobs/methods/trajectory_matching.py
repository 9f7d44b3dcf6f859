"""Distribution matching along the student's sampling: where it stands there says at which noise levels it is compared.

`tdm`: at each rung of its deterministic path the student has the teacher's marginal. From a rung at t it jumps to the
next, s. Its x_s is noised further, x_tau = k x_s + b eps with k = alpha_tau / alpha_s and b^2 = sigma_tau^2 - k^2
sigma_s^2, to a time tau of this segment [s, t] alone; there the student follows the difference of the critic's and the
teacher's prediction, F - T, as the gradient of a pseudo-Huber distance. So the segments share one critic: each teaches
it its own times. It must learn the score of x_tau though no clean picture is known at s > 0. Its target is the clean
prediction whose score is that of the noising, -eps / b: z = (x_tau - sigma_tau^2 eps / b) / alpha_tau, in which the
noise of x_s averages out. Its variance grows as 1 / b^2, which the weight takes back. At s = 0 all this is denoising.

`phased_dmd`: sampling goes through phases, each with an expert of its own where the student has several
(`distill_jobs.experts`). From a rung at t the student jumps to the end s of its phase, and is re-noised to the next
rung while that is above s (eta 1). So all steps of a phase have one aim, the teacher's marginal at s. They are judged
at x_s as above, at noise levels of their phase alone; the direction F - T is DMD's, at the clean prediction of the
jump. The last phase, where s = 0, is DMD below the last split. The critic begins as the student's copy, so each expert
has its own.

`decoupled_dmd`: the guided gradient of DMD is a sum of two. Distribution matching (DM), F - T_c with the unguided
teacher T_c, undoes what is wrong with the samples and is asked at every noise level. The augmentation by guidance (CA),
with the guided teacher T_w as T_w - T_c = (w - 1)(T_c - T_0), drives the student; it is asked only where the picture is
not decided yet, at noise levels below that of the rung where the prediction is made. Each has its own normaliser. An
unguided teacher leaves DM alone. `cdm` makes the student fit for any step count: backward simulation follows a random
schedule, and unguided DM is asked also beside that trajectory, at the point which the student's own line from the rung
has at another noise level.

Source: TDM arXiv 2503.06674; the critic's target of Phased DMD 2510.27684, whose velocity in rectified flow is
-x_s / (1 - s) + eps [tau + (1 - tau) s^2 / (1 - s)^2] / b (this formula was read, the paper was not); decoupled
2511.22677 (hybrid schedule; the paper's time runs from noise to data, so its tau > t are the lower noise levels); CDM
2605.06376.
Left out: phases trained one after the other, a third critic for high noise at x0, the terms for diversity and real data
(phased); TDM's importance weights (the target replaces them) and its input for the number of steps: of several counts
the critic learns the mixture; CDM's warm-up of the second term.
Checked against: byliutao/cdm (range of noise levels), the closed form of Gaussian data (tests).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.experts import Experts
from distill_jobs.losses import over_rows, scale_of, toward
from distill_jobs.methods._schemas import ONE_SPLIT, phases_fault
from distill_jobs.methods.base import Count, FewStepMethod, Preset
from distill_jobs.methods.score_matching import CriticConfig, ScoreMatching, ScoreMatchingConfig, WithCritic
from distill_jobs.roles import Cast, Role, unguided
from engines.errors import InvalidRequest
from engines.manifest import Schedule
from engines.process import Process, over
from engines.solvers import sample


class TDMConfig(CriticConfig):
    counts: tuple[Count, ...] = Field((4,), min_length=1, description="step counts the student is made for")
    eta: float = Field(0.0, ge=0, le=0, description="the trajectory is deterministic")
    huber: float = Field(1e-3, gt=0, description="root mean square of F - T below which the distance is quadratic")


class Segments(WithCritic):
    """States x_s of the student, judged at times from s on to the `top` of a segment."""

    @torch.no_grad()
    def _judged(self, x_s: Tensor, s: Tensor, top: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(F, T), the clean predictions of critic and teacher for x_s as it is noised further."""
        tau = self._within(s, top, batch)
        keep, fresh = _kernel(self.process, s, tau)
        x = over(keep, x_s) * x_s + over(fresh, x_s) * batch.randn()
        return self.cast["fake"](x, tau, batch.cond)[0], self.cast.teacher(x, tau, batch.cond)[0]

    def _fake_loss(self, x_s: Tensor, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """|F - z|^2 with the weight of flow matching times (b / sigma_tau)^2, free of divisions by b."""
        tau, eps = self._within(s, t, batch), batch.randn()
        keep, fresh = _kernel(self.process, s, tau)
        alpha, sigma = self.process.alpha(tau), self.process.sigma(tau)
        b, a_tau, s_tau = (over(part, x_s) for part in (fresh, alpha, sigma))
        x = over(keep, x_s) * x_s + b * eps
        guess, _ = self.cast["fake"](x, tau, batch.cond)
        error = b / s_tau * guess - (b * x / s_tau - s_tau * eps) / a_tau
        loss: Tensor = (((alpha + sigma) / sigma).square() * over_rows(error.square())).mean()
        return loss

    def _within(self, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Times [B] whose noise levels are spread over the segment from s to t, as far as tau_min and tau_max go."""
        c = self.config
        low, high = (times.level_of(self.process, end) for end in (s, t))
        low = low.clamp_min(c.tau_min)
        high = torch.maximum(low, high.clamp_max(c.tau_max))
        return times.on(self.process, low + (high - low) * batch.draw(times.Bent(times.Uniform(), c.tau_shift)))


class TDM(Segments):
    Config = TDMConfig

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        schedule, rung = self.rung(batch)
        x = sample(self.cast.student, batch.noise, schedule.times[: rung + 1], batch.cond)
        t, s = (batch.noise.new_full((len(batch),), end) for end in schedule.times[rung : rung + 2])
        if role == "fake":
            with torch.no_grad():
                x_s = self.cast.student.jump(x, t, s, batch.cond)
            return {"dsm": self._fake_loss(x_s, s, t, batch)}
        return {"tdm": self._student_loss(self.cast.student.jump(x, t, s, batch.cond), s, t, batch)}

    def _student_loss(self, x_s: Tensor, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        fake, real = self._judged(x_s, s, t, batch)
        gap = fake - real
        return toward(x_s, gap / over((over_rows(gap.square()) + self.config.huber**2).sqrt(), gap))


def _kernel(process: Process, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(k, b) [B] of x_t = k x_s + b eps: the noising from s on to t."""
    keep = process.alpha(t) / process.alpha(s)
    return keep, (process.sigma(t).square() - (keep * process.sigma(s)).square()).clamp_min(0).sqrt()


class PhasedConfig(ScoreMatchingConfig):
    counts: tuple[Count, ...] = Field((4,), min_length=1, description="step counts the student is made for")
    floor: float = Field(1e-4, gt=0, description="least normaliser")
    splits: tuple[float, ...] | None = Field(
        None,
        description="falling noise levels where a phase ends; if missing, where the student's experts change, or 0.5",
    )


class PhasedDMD(Segments):
    Config = PhasedConfig

    def __init__(self, cast: Cast, config: PhasedConfig) -> None:
        own = cast.student.levels if isinstance(cast.student, Experts) else ()
        self.splits = config.splits or own or ONE_SPLIT
        for count in config.counts:
            if fault := phases_fault(count, config.grids.get(count), self.splits):
                raise InvalidRequest(f"phased_dmd: {fault}", param="method.counts")
        super().__init__(cast, config)

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        roles = super().roles(config)
        return roles | {"fake": replace(roles["fake"], init="student")}

    @property
    def schedules(self) -> dict[int, Schedule]:
        found = self.scheduled({k: times.phased(k, self.splits) for k in self.config.counts})
        return {k: one.model_copy(update={"eta": self._etas(one.times)}) for k, one in found.items()}

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        schedule, rung = self.rung(batch)
        path, draw = schedule.times[: rung + 1], (lambda _: batch.randn())
        x = sample(self.cast.student, batch.noise, path, batch.cond, schedule.eta, draw=draw)
        t, top, s = (batch.noise.new_full((len(batch),), at) for at in (path[-1], *self.phase(path[-1])))
        if role == "fake":
            with torch.no_grad():
                x_s = self.cast.student.jump(x, t, s, batch.cond)
            return {"dsm": self._fake_loss(x_s, s, top, batch)}
        y, eps = self.cast.student(x, t, batch.cond, s)
        fake, real = self._judged(self.process.mix(y, eps, s), s, top, batch)
        return {"dmd": toward(y, (fake - real) / scale_of(y - real, self.config.floor))}

    def phase(self, t: float) -> tuple[float, float]:
        """The times where the phase of a rung at t begins and ends; a split is the first rung of the phase below it."""
        edges = times.grid(self.process, (1.0, *self.splits))
        place = sum(t <= split for split in edges[1:-1])
        return edges[place], edges[place + 1]

    def _etas(self, path: Sequence[float]) -> tuple[float, ...]:
        """With which a step from t leads to the end of its phase before it is re-noised, by `eta` of the way there."""
        ends = [self.phase(t)[1] for t in path[:-1]]
        return tuple(self.config.eta * (1 - end / s) if s > 0 else 0.0 for end, s in zip(ends, path[1:], strict=True))

    def panel(self, batch: Batch) -> dict[str, Tensor]:
        return FewStepMethod.panel(self, batch)  # one jump of the first expert ends at x_s


class DecoupledConfig(ScoreMatchingConfig):
    floor: float = Field(0.1, gt=0, description="least normaliser")


class DecoupledDMD(ScoreMatching):
    Config = DecoupledConfig
    term = "dm"

    def __init__(self, cast: Cast, config: DecoupledConfig) -> None:
        super().__init__(cast, config)
        self.plain = unguided(cast.teacher)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        if role != "student":
            return super().loss(role, batch)
        return self._terms(*self.before(batch, *self.rung(batch)), batch)

    def _terms(self, x: Tensor, t: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What the student's prediction from x_t is asked for."""
        y = self.cast.student.jump(x, t, torch.zeros_like(t), batch.cond)
        terms = {"dm": self._student_loss(y, batch)}
        return terms if self.plain is self.cast.teacher else terms | {"ca": self._augmentation(y, t, batch)}

    def before(self, batch: Batch, schedule: Schedule, rung: int) -> tuple[Tensor, Tensor]:
        """(x_t, t [B]) where the student's own sampling stands before its jump from this rung; without gradient."""
        path = schedule.times[: rung + 1]
        x = sample(self.cast.student, batch.noise, path, batch.cond, self.config.eta, draw=lambda _: batch.randn())
        return x, batch.noise.new_full((len(batch),), path[-1])

    def below(self, t: Tensor, batch: Batch) -> Tensor:
        """Times [B] as `levels` draws them, shrunk to noise levels below that of t."""
        u = times.level_of(self.process, t) * self.levels(batch)
        return torch.minimum(times.on(self.process, u.clamp_min(self.config.tau_min)), t)

    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            y_t, t = self.noised(y, batch)
            real, _ = self.plain(y_t, t, batch.cond)
            fake, _ = self.cast["fake"](y_t, t, batch.cond)
            direction = (fake - real) / scale_of(y - real, self.config.floor)
        return toward(y, direction)

    def _augmentation(self, y: Tensor, rung: Tensor, batch: Batch) -> Tensor:
        t = self.below(rung, batch)
        return self._toward_guided(y, self.process.mix(y.detach(), batch.randn(), t), t, batch)

    def _toward_guided(self, y: Tensor, y_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            real, _ = self.plain(y_t, t, batch.cond)
            guided, _ = self.cast.teacher(y_t, t, batch.cond)
            direction = (real - guided) / scale_of(y - real, self.config.floor)
        return toward(y, direction)


class CDMConfig(DecoupledConfig):
    eta: float = Field(0.0, ge=0, le=1)
    longest: int = Field(8, ge=1, description="most steps of a random schedule in training")
    beside: float = Field(1.0, ge=0, description="weight of matching beside the student's trajectory")


class CDM(DecoupledDMD):
    Config = CDMConfig

    def rung(self, batch: Batch) -> tuple[Schedule, int]:
        """Of a schedule of random length and random levels, which starts where the student's schedules do."""
        first = self._grids[0][0]
        steps = 1 + batch.pick(self.config.longest)
        drawn = times.Uniform(self.config.tau_min, self.config.tau_max).draw(steps - 1, batch.generator)
        inner = times.grid(self.process, tuple(sorted(set(drawn.tolist()), reverse=True)))
        path = (first, *(t for t in inner if t < first))
        schedule = Schedule(times=path, eta=self.config.eta, solver="ddim")
        return schedule, batch.pick(schedule.steps)

    def _terms(self, x: Tensor, t: Tensor, batch: Batch) -> dict[str, Tensor]:
        terms = super()._terms(x, t, batch)
        with torch.no_grad():
            s = self.below(t, batch)
            x = self.cast.student.jump(x, t, s, batch.cond)
        y = self.cast.student.jump(x, s, torch.zeros_like(s), batch.cond)
        return terms | {"beside": self.config.beside * self._student_loss(y, batch)}


PRESETS = {
    "tdm": Preset(TDM, "Matches the teacher's marginals along the student's deterministic path.", "2503.06674"),
    "phased_dmd": Preset(
        PhasedDMD,
        "dmd in phases, judged where each phase of sampling ends; for students of several experts.",
        "2510.27684",
    ),
    "decoupled_dmd": Preset(
        DecoupledDMD, "dmd whose guidance and matching each have their own noise levels.", "2511.22677"
    ),
    "cdm": Preset(CDM, "decoupled_dmd on random schedules, for a student of any step count.", "2605.06376"),
}
