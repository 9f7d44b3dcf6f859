"""Score matching: a few-step student whose samples match the teacher's in distribution.

A critic learns to denoise what the student makes now. Where critic and teacher disagree about a noised sample, the
student is moved so that they agree: `dmd` follows their difference (the gradient of a KL divergence), `sid` lowers a
Fisher divergence through both networks. Prompts only; the teacher may be guided, the critic never is.

Source: DMD arXiv 2311.18828 eq. 7 and DMD2 2405.14867 §4.2, §4.4 (two time scales, backward simulation);
SiD 2404.04057 eq. 23; implicit distribution alignment (`ida`) of SenseFlow 2506.00523.
Left out: the GAN term, SiDA.
Checked against: mingyuanzhou/SiD training/sid_training_loop.py, the closed form of Gaussian data (tests).
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows, scale_of, toward
from distill_jobs.methods.base import FewStepConfig, FewStepMethod, MethodConfig, Preset
from distill_jobs.roles import Cast, Role
from engines.errors import InvalidRequest
from engines.solvers import sample

GRIDS = {1: (1.0,), 2: (1.0, 0.6), 4: (1.0, 0.8, 0.55, 0.3)}


class CriticConfig(FewStepConfig):
    """The settings of every method with a critic."""

    beta1: float = Field(0.0, ge=0, lt=1)
    fake_lr: float = Field(1e-3, gt=0, description="the critic's learning rate")
    fake_updates: int = Field(5, ge=1, description="critic updates per student update")
    fake_warmup: int = Field(20, ge=0, description="critic updates before the first student update")
    tau_min: float = Field(0.02, ge=0, lt=1, description="least noise level critic and teacher are compared at")
    tau_max: float = Field(0.98, gt=0, le=1, description="most noise level they are compared at")
    tau_shift: float = Field(1.0, gt=0, description="bends those levels towards noise, like the teacher's training")
    ida: float = Field(
        1.0, gt=0, le=1, description="share the critic keeps of itself when the student has moved; the rest is copied"
    )


class ScoreMatchingConfig(CriticConfig):
    floor: float = Field(1e-3, gt=0, description="least normaliser")


class WithCritic(FewStepMethod):
    """A student, and a critic that learns what it makes. `Config` must be a `CriticConfig`."""

    Config: ClassVar[type[MethodConfig]] = CriticConfig
    own_grids = GRIDS

    def __init__(self, cast: Cast, config: Any) -> None:
        super().__init__(cast, config)
        self._grids = [schedule.times for schedule in self.schedules.values()]
        if config.ida < 1 and not _alike(cast.weights("fake"), cast.weights("student")):
            raise InvalidRequest("ida mixes the student into the critic: both must be one network", param="method.ida")

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        fake = Role(
            init="teacher",
            train=config.train,
            lr=config.fake_lr,
            betas=(config.beta1, config.beta2),
            clip=config.clip,
            steps=config.fake_updates,
        )
        return {"fake": fake, "student": config.student_role(start=-(-config.fake_warmup // config.fake_updates))}

    def after(self, iteration: int) -> None:
        """Implicit distribution alignment: the critic follows the student, so that it lags less behind it."""
        if self.config.ida < 1 and self.roles(self.config)["student"].updates_at(iteration):
            self.cast.follow("fake", "student", self.config.ida)

    @torch.no_grad()
    def panel(self, batch: Batch) -> dict[str, Tensor]:
        y = sample(self.cast.student, batch.noise, self._grids[0], batch.cond, grad=0)
        t = times.on(self.process, batch.noise.new_full((len(batch),), 0.6))
        y_t = self.process.mix(y, batch.randn(), t)
        return {
            "gen": y,
            "real": self.cast.teacher(y_t, t, batch.cond)[0],
            "fake": self.cast["fake"](y_t, t, batch.cond)[0],
        }


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether these are the tensors of one architecture."""
    return {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}


class ScoreMatching(WithCritic):
    """The parent: rollout of the student, noising, and the critic's loss."""

    term: ClassVar[str]  # what the student's loss is called in logs

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        if role == "fake":
            with torch.no_grad():
                y = self.generate(batch)
            return {"dsm": self._fake_loss(y, batch)}
        return {self.term: self._student_loss(self.generate(batch), batch)}

    def levels(self, batch: Batch) -> Tensor:
        """[B] noise levels at which critic and teacher are compared, and the critic is trained."""
        return batch.draw(times.Bent(times.Uniform(self.config.tau_min, self.config.tau_max), self.config.tau_shift))

    def noised(self, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(y_tau, tau)."""
        t = times.on(self.process, self.levels(batch))
        return self.process.mix(y, batch.randn(), t), t

    def _fake_loss(self, y: Tensor, batch: Batch) -> Tensor:
        """Denoising, weighted as flow matching: ((alpha + sigma) / sigma)^2 is 1/t^2 in rectified flow."""
        y_t, t = self.noised(y, batch)
        guess, _ = self.cast["fake"](y_t, t, batch.cond)
        weight = ((self.process.alpha(t) + self.process.sigma(t)) / self.process.sigma(t)).square()
        loss: Tensor = (weight * over_rows((guess - y).square())).mean()
        return loss

    @abstractmethod
    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor: ...


class DMD(ScoreMatching):
    Config = ScoreMatchingConfig
    term = "dmd"

    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            y_t, t = self.noised(y, batch)
            real, _ = self.cast.teacher(y_t, t, batch.cond)
            fake, _ = self.cast["fake"](y_t, t, batch.cond)
            direction = (fake - real) / scale_of(y - real, self.config.floor)
        return toward(y, direction)


class SiDConfig(ScoreMatchingConfig):
    alpha: float = Field(1.0, description="1 for text to image; 1.2 on CIFAR-10 and ImageNet 64")


class SiD(ScoreMatching):
    Config = SiDConfig
    term = "sid"

    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        y_t, t = self.noised(y, batch)
        real, _ = self.cast.teacher(y_t, t, batch.cond)
        fake, _ = self.cast["fake"](y_t, t, batch.cond)
        gap = real - fake
        per_pixel = gap * ((real - y) - self.config.alpha * gap)
        loss: Tensor = (per_pixel / scale_of(y - real, self.config.floor)).mean()
        return loss


PRESETS = {
    "dmd": Preset(
        DMD, "Distribution matching: follows the score difference of critic and teacher.", "2311.18828", {"lr": 5e-4}
    ),
    "sid": Preset(
        SiD, "Score identity distillation: a Fisher divergence through both networks; best after kd.", "2404.04057"
    ),
}
