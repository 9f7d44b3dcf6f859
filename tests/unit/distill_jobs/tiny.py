"""The smallest real thing to train: a two-layer network over a Gaussian teacher, in single precision."""

from typing import Any

import torch
from torch import Tensor, nn

from distill_jobs.batches import TensorSource
from distill_jobs.methods.base import Preset, presets
from engines.denoiser import Denoiser, Guided
from engines.process import RF

SHAPE = (2, 2, 2)
_SMALL = {
    "batch": 8,
    "pairs": 64,
    "generate": 64,
    "teacher_steps": 4,
    "fake_updates": 2,
    "fake_warmup": 4,
    "phase_every": 2,
    "phase": 2,
    "anneal": 5,
    "disc_warmup": 2,
    "warmup": 2,
    "easy": 3,
    "mse": 2,
    "conditional": 2,
}


def _settings(preset: Preset) -> dict[str, Any]:
    return {name: value for name, value in _SMALL.items() if name in preset.method.Config.model_fields}


STAGES = {name: _settings(one) for name, one in presets().items() if one.method.roles(one.config({}))}
"""Every method that trains, with settings that are quick."""


class TinyNet(nn.Module):
    """net(x, t, cond, s, w) of 8 values, with dropout so that randomness in the network is tested too."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = nn.Linear(11, 16)
        self.outer = nn.Linear(16, 8)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Tensor | None, w: Tensor | None) -> Tensor:
        s = t if s is None else s
        h = torch.cat([x.flatten(1), torch.stack([t, s, cond.expand(len(x))], dim=1)], dim=1)
        return self.outer(self.dropout(torch.tanh(self.inner(h)))).reshape(x.shape)


def tiny_teacher() -> Guided:
    return Guided(Denoiser(TinyNet(1), RF(), "flow"), torch.zeros(1), 1.5)


def tiny_student(dropout: float = 0.0) -> Denoiser:
    return Denoiser(TinyNet(1, dropout), RF(), "flow", inputs={"s"})


class BlockNet(nn.Module):
    """net(x, t, cond, s, w) of 8 values with two blocks between a first and a last layer; deaf to s."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Linear(10, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)])
        self.last = nn.Linear(16, 8)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Any, w: Any) -> Tensor:
        h = self.first(torch.cat([x.flatten(1), torch.stack([t, cond.expand(len(x))], dim=1)], dim=1))
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.last(h)
        return out.reshape(x.shape)


def blocks_student() -> Denoiser:
    return Denoiser(BlockNet(), RF(), "flow", {"s"})


def tiny_source() -> TensorSource:
    return TensorSource(torch.linspace(-1, 1, 50), SHAPE)
