"""Guidance distillation: the student answers in one evaluation as its guided teacher does in two.

Its line is regressed on the guided teacher's at the same state and time, errors weighing max(SNR, 1); the number of
steps stays as it is. `guidance` asks at latents noised anew. But a guided sampler is seldom there: guidance moves it
away from them. `agd` asks at states that are kept from one guided trajectory a row, so no data is needed. It is meant
for adapters (`student.train: {lora: ...}`), which leave the teacher as it is and go with other checkpoints of its base.
One weight is baked in; in `guidance` a student that reads its weight (`student.guidance`) learns a range of them.

Source: guidance arXiv 2210.03142 §3.1; agd 2503.07274 §4, through LoRA 2312.06899.
Left out: agd's own adapter layers, LoRA takes their place, and its range of weights.
Checked against: the closed-form guided denoiser of Gaussian data (tests).
"""

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.methods._bank import BankConfig, BankMethod
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods._line import END, ask, snr_error
from distill_jobs.methods.base import Count, Preset
from distill_jobs.pairs import TeacherPath
from distill_jobs.roles import Cast


class GuidanceConfig(DataConfig):
    counts: tuple[Count, ...] = Field((16,), min_length=1, description="step counts that the student is sampled in")
    eta: float = Field(0.0, ge=0, le=1)
    batch: int = Field(64, ge=1)


class Guidance(DataMethod):
    Config = GuidanceConfig

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.x is not None
        top = max(self.config.levels(k, {})[0] for k in self.config.counts)
        t = times.on(self.process, batch.draw(times.Uniform(END, top)))
        x = self.process.mix(batch.rows.x, batch.noise, t)
        with torch.no_grad():
            line = self.cast.teacher(x, t, batch.cond)
        guess = ask(self.cast.student, x, t, torch.zeros_like(t), batch)
        return {"guidance": snr_error(guess, line).mean()}


class GuidedPathConfig(BankConfig):
    counts: tuple[Count, ...] = Field((16,), min_length=1, description="step counts that the student is sampled in")
    batch: int = Field(64, ge=1)
    pairs: int = Field(1024, ge=1, description="guided trajectories in the bank")
    states: int = Field(16, ge=1, description="states kept of each, one teacher step apart")


class GuidedPath(BankMethod):
    Config = GuidedPathConfig

    def __init__(self, cast: Cast, config: GuidedPathConfig) -> None:
        super().__init__(cast, config)
        self.levels = tuple(config.top * u for u in times.uniform(config.states))

    @property
    def path(self) -> TeacherPath:
        return TeacherPath(self.levels, self.config.states, self.config.teacher_solver)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        n = batch.picks(self.config.states)
        x = batch.rows.pair[torch.arange(len(batch), device=n.device), n]
        t = batch.noise.new_tensor(times.grid(self.process, self.levels))[n]
        with torch.no_grad():
            line = self.cast.teacher(x, t, batch.cond)
        guess = ask(self.cast.student, x, t, torch.zeros_like(t), batch)
        return {"guided_path": snr_error(guess, line).mean()}


PRESETS = {
    "guidance": Preset(
        Guidance, "Bakes the teacher's guidance into one evaluation; the student still takes many steps.", "2210.03142"
    ),
    "agd": Preset(
        GuidedPath, "Bakes guidance into an adapter, learnt on the guided teacher's own trajectories.", "2503.07274"
    ),
}
