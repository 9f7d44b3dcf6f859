"""Decoupled distribution matching: what guidance adds and what matching corrects, each at its own noise levels.

The guided gradient of DMD is a sum of two. Distribution matching (DM), F - T_c with the unguided teacher T_c, undoes
what is wrong with the samples and is asked at every noise level. The augmentation by guidance (CA), with the guided
teacher T_w as T_w - T_c = (w - 1)(T_c - T_0), drives the student; it is asked only where the picture is not decided
yet, at noise levels below that of the rung where the prediction is made. Each has its own normaliser. An unguided
teacher leaves DM alone.

`cdm` makes the student fit for any step count: backward simulation follows a random schedule, and unguided DM is asked
also beside that trajectory, at the point which the student's own line from the rung has at another noise level.

Source: arXiv 2511.22677 (decoupled hybrid schedule; the paper's time runs from noise to data, so its tau > t are the
lower noise levels); CDM 2605.06376. Left out: CDM's warm-up of the second term.
Checked against: byliutao/cdm (range of noise levels), the closed form of Gaussian data (tests).
"""

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import scale_of, toward
from distill_jobs.methods.base import Preset
from distill_jobs.methods.score_matching import ScoreMatching, ScoreMatchingConfig
from distill_jobs.roles import Cast, unguided
from engines.manifest import Schedule
from engines.solvers import sample


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
    "decoupled_dmd": Preset(
        DecoupledDMD, "dmd whose guidance and matching each have their own noise levels.", "2511.22677"
    ),
    "cdm": Preset(CDM, "decoupled_dmd on random schedules, for a student of any step count.", "2605.06376"),
}
