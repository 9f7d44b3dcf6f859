"""The fixed feature network of the metrics: what it sees in a picture decides what the metrics can tell apart.

Half of its features are its last embedding, from which attribute heads read the caption's content; the rest are means
and deviations of its first layer, and the mean |Laplacian| of the picture at two sizes. The last are not learned: even
trained on clean pictures only, a network that reads attributes perfectly grows blind to grain (added grain of 6 levels
moved its Fréchet distance by 3 %). With `features_train` and `networks` the only module of the evaluation that imports
torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill_jobs.evaluate.pixels import Pixels, levels
from distill_jobs.tasks import shapes
from distill_jobs.tasks.base import Task
from engines.errors import CorruptBlob

WEIGHTS = "features.safetensors"
EMBEDDING, TEXTURE = 64, 24
ROUGHNESS = 6  # 3 channels at 2 sizes
DIMENSIONS = EMBEDDING + 2 * TEXTURE + ROUGHNESS
_GRID = 4  # the picture is summed up on 4 × 4 cells whatever its size, so that places can be read
_BATCH = 128

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Observation:
    """What the network saw in N pictures."""

    features: Floats  # [N, DIMENSIONS]
    attributes: npt.NDArray[np.int64]  # [N, A], the most likely class of each attribute


@dataclass(frozen=True, slots=True)
class Seen:
    """One forward pass."""

    embedding: Tensor  # [B, EMBEDDING]
    texture: Tensor  # [B, 2 · TEXTURE + ROUGHNESS]
    logits: tuple[Tensor, ...]  # one [B, classes] per attribute


class FeatureNet(nn.Module):
    """Convolutions at 1/2, 1/4 and 1/8 of the picture's size, a 4 × 4 summary, one linear head for all attributes."""

    centre: Tensor
    scale: Tensor

    def __init__(self, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.classes = classes
        self.first = _convolution(12, TEXTURE)
        self.middle = nn.Sequential(_convolution(TEXTURE, 64, 2), _convolution(64, 64))
        self.last = nn.Sequential(_convolution(64, 112, 2), _convolution(112, 112))
        self.embed = nn.Linear(112 * _GRID * _GRID, EMBEDDING)
        self.heads = nn.Linear(EMBEDDING, sum(classes))
        self.register_buffer("centre", torch.zeros(DIMENSIONS))  # of the real pictures' features, set after training
        self.register_buffer("scale", torch.ones(DIMENSIONS))

    def forward(self, pixels: Tensor) -> Seen:
        x = pixels.to(torch.float32) / 127.5 - 1
        first = self.first(nn.functional.pixel_unshuffle(x, 2))
        last = self.last(self.middle(first))
        embedding = self.embed(nn.functional.adaptive_avg_pool2d(last, _GRID).flatten(1)).float()
        texture = torch.cat([first.float().mean((2, 3)), first.float().std((2, 3)), _roughness(x)], 1)
        logits = self.heads(nn.functional.gelu(embedding)).float()
        return Seen(embedding, texture, tuple(logits.split(list(self.classes), 1)))

    def features(self, seen: Seen) -> Tensor:
        return (torch.cat([seen.embedding, seen.texture], 1) - self.centre) * self.scale


class FeatureNetwork:
    """`FeatureNet` with its committed weights, in numpy terms; `task` is what it was taught to read."""

    def __init__(self, net: FeatureNet, task: Task, digest: str) -> None:
        self._net: FeatureNet = net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.task = task
        self.digest = digest  # of the weights: figures of two digests must not be compared

    @torch.no_grad()
    def observe(self, pixels: Pixels, progress: Callable[[int], None] | None = None) -> Observation:
        """Features and attributes of pictures [N, 3, H, W], rounded to 8-bit levels first, as a reader of PNG sees."""
        features, attributes = [], []
        for start in range(0, len(pixels), _BATCH):
            seen = self._net(torch.from_numpy(levels(pixels[start : start + _BATCH])))
            features.append(self._net.features(seen))
            attributes.append(torch.stack([head.argmax(1) for head in seen.logits], 1))
            if progress is not None:
                progress(min(start + _BATCH, len(pixels)))
        return Observation(torch.cat(features).numpy(), torch.cat(attributes).numpy())


def load(task: Task = shapes.TASK, path: Path | None = None) -> FeatureNetwork:
    """The task's committed network, or another one of its kind.

    Raises:
        CorruptBlob: the file does not hold exactly this network's tensors, or is not there.
    """
    path = path or task.weights / WEIGHTS
    if not path.is_file():
        raise CorruptBlob(f"the task {task.name} has no metric network ({path.name}): train it with features_train")
    net = FeatureNet(task.classes)
    tensors = {name: value.float() for name, value in load_file(path).items()}
    try:
        net.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CorruptBlob(f"{path.name} does not fit the feature network: {error}; train it again") from error
    return FeatureNetwork(net, task, hashlib.sha256(path.read_bytes()).hexdigest())


def _roughness(x: Tensor) -> Tensor:
    """Mean |Laplacian| [B, 6] of each channel, at full and at half size."""
    kernel = x.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).expand(3, 1, 3, 3)
    sizes = (x, nn.functional.avg_pool2d(x, 2))
    return torch.cat([nn.functional.conv2d(size, kernel, groups=3).abs().mean((2, 3)) for size in sizes], 1)


def _convolution(width_in: int, width_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width_out, track_running_stats=True),
        nn.ReLU(),
    )
