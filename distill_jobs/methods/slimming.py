"""Slimming: a student with fewer layers than its teacher learns what that one sees and says, then learns few steps.

At noised latents z_t the student's clean prediction is regressed on the teacher's, guided as the teacher is, and the
outputs of its blocks on those of the same blocks there, each relative to the size of the teacher's. It is the first
stage of a job whose `student.slim` leaves layers out; a few-step method follows it. The student keeps the teacher's own
step counts as far as this stage goes: alone it makes a smaller many-step model.

Source: BK-SDM arXiv 2305.15798 §3.2 (task, output and feature losses); KOALA 2312.04005 §3.2 (features of the
attention alone, `koala`). Left out: the denoising loss on real pictures, which needs no teacher; progressive
reconstruction of blocks one after another (PPCL, TinySR).
Checked against: the closed-form denoiser of Gaussian data (tests).
"""

import re
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods.base import Preset
from distill_jobs.roles import unguided
from engines.denoiser import BaseDenoiser, Cond

_TAPS = {
    "blocks": re.compile(r"(^|\.)(down_blocks|up_blocks)\.\d+$"),
    "attention": re.compile(r"(^|\.)(down_blocks|up_blocks)\.\d+\.attentions\.0$"),
}


class SlimmingConfig(DataConfig):
    batch: int = Field(64, ge=1)
    lr: float = Field(5e-4, gt=0)
    eta: float = Field(0.0, ge=0, le=1)
    top: float = Field(0.98, gt=0, le=1, description="the highest noise level that is learnt")
    taps: Literal["blocks", "attention"] = Field("blocks", description="whose outputs are compared")
    features: float = Field(1.0, ge=0, description="weight of the outputs of blocks; 0 compares predictions alone")


class Slimming(DataMethod):
    Config = SlimmingConfig

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.x is not None
        c, taps = self.config, _TAPS[self.config.taps]
        t = times.on(self.process, c.top * batch.draw(times.Uniform()))
        z = self.process.mix(batch.rows.x, batch.noise, t)
        with torch.no_grad():
            target, _ = self.cast.teacher(z, t, batch.cond)
            _, theirs = _seen(unguided(self.cast.teacher), z, t, batch.cond, taps) if c.features else (None, {})
        x0, own = _seen(self.cast.student, z, t, batch.cond, taps)
        losses = {"output": (x0 - target).square().mean()}
        if shared := own.keys() & theirs.keys():
            apart = [_relative(own[name], theirs[name]) for name in sorted(shared)]
            losses["features"] = c.features * torch.stack(apart).mean()
        return losses


def _seen(
    den: BaseDenoiser, x: Tensor, t: Tensor, cond: Cond, taps: re.Pattern[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """x0 and the outputs of the modules whose names `taps` finds, by name."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
            seen[name] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [module.register_forward_hook(keep(n)) for n, module in den.named_modules() if taps.search(n)]
    try:
        x0, _ = den(x, t, cond)
    finally:
        for handle in handles:
            handle.remove()
    return x0, seen


def _relative(own: Tensor, theirs: Tensor) -> Tensor:
    theirs = theirs.float()
    return (own.float() - theirs).square().mean() / theirs.square().mean().clamp_min(1e-6)


PRESETS = {
    "slimming": Preset(
        Slimming, "A student with fewer layers learns its teacher's predictions and block outputs.", "2305.15798"
    ),
    "koala": Preset(
        Slimming, "Slimming by the outputs of each block's first attention alone.", "2312.04005", {"taps": "attention"}
    ),
}
