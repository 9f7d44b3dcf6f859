"""Trains a task's feature network on clean real pictures: `python -m distill_jobs.evaluate.features_train`.

Batch i depends on the seed and on i alone, so a stopped run continues from its checkpoint as if it had not been.
The learning rate falls to zero over `--updates`, never by the clock.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_jobs.evaluate import features
from distill_jobs.tasks import base as tasks
from distill_jobs.tasks.base import ABSENT, Pictures, Task

log = logging.getLogger(__name__)
_SEED_OFFSET = 3_000_000_000  # keeps these pictures apart from the teacher's and from those of the evaluation
_SCALE_PICTURES, _CHECK_PICTURES = 8192, 4096
_ROUGHNESS_WEIGHT = 0.1  # grain of 3 levels then moves the distance at N = 2,000 by about one floor
_LOG_EVERY, _SAVE_EVERY = 100, 1000


@dataclass(frozen=True, slots=True)
class Options:
    task: Task
    updates: int
    batch: int
    lr: float
    seed: int
    size: int
    checkpoint: Path
    out: Path


class Training:
    """Network, optimiser and the number of updates made: all that a checkpoint holds."""

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.done = 0
        self.net = features.FeatureNet(options.task.classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=options.lr, weight_decay=0.02)
        if options.checkpoint.exists():
            self._restore(options.checkpoint)

    def update(self) -> float:
        batch = _pictures(self.options, self.done, self.options.batch)
        for group in self.optimiser.param_groups:
            group["lr"] = self.options.lr * _falling(self.done, self.options.updates)
        with torch.autocast("cpu", torch.bfloat16):
            seen = self.net(torch.from_numpy(batch.pixels))
        loss = attribute_loss(seen.logits, torch.from_numpy(batch.attributes))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimiser.step()
        self.done += 1
        return loss.item()

    def save(self) -> None:
        path = self.options.checkpoint
        tensors = {f"net.{name}": value.contiguous() for name, value in self.net.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value.contiguous() for name, value in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"done": str(self.done)})
        partial.replace(path)

    def _restore(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.done = int(file.metadata()["done"])
        tensors = load_file(path)
        net = {name.removeprefix("net."): value for name, value in tensors.items() if name.startswith("net.")}
        self.net.load_state_dict(net, strict=True)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, field = name.split(".")
                state.setdefault(int(index), {})[field] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": state})
        log.info("continuing", extra={"update": self.done})


def attribute_loss(logits: tuple[Tensor, ...], attributes: Tensor) -> Tensor:
    """Cross-entropy summed over the attributes that the captions state."""
    return torch.stack(
        [
            nn.functional.cross_entropy(head, attributes[:, i], ignore_index=ABSENT, reduction="sum")
            for i, head in enumerate(logits)
        ]
    ).sum() / len(attributes)


def accuracy(net: features.FeatureNet, task: Task, pictures: Pictures) -> float:
    """Share of the stated attributes that the heads read from real pictures."""
    seen = features.FeatureNetwork(net, task, digest="").observe(pictures.pixels).attributes
    stated = pictures.attributes != ABSENT
    return float((seen == pictures.attributes)[stated].mean())


def export(net: features.FeatureNet, options: Options) -> None:
    """Writes the network as fp16 with the centre and scale of real pictures' features, after rounding its weights."""
    net.eval()
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half().float())
        net.centre.zero_()
        net.scale.fill_(1)
        pixels = _pictures(options, -1, _SCALE_PICTURES).pixels
        seen = features.FeatureNetwork(net, options.task, digest="").observe(pixels).features
        net.centre.copy_(torch.from_numpy(seen.mean(0)))
        net.scale.copy_(torch.from_numpy(1 / seen.std(0).clip(1e-3)))
        net.scale[-features.ROUGHNESS :] *= _ROUGHNESS_WEIGHT
    options.out.parent.mkdir(parents=True, exist_ok=True)
    half = {n: v.half() if v.is_floating_point() else v for n, v in net.state_dict().items()}
    save_file({name: value.contiguous() for name, value in half.items()}, options.out)


def train(options: Options) -> float:
    """Trains, or continues, to the last update; returns the accuracy on unseen real pictures."""
    training = Training(options)
    started = time.process_time()
    training.net.train()
    losses: list[float] = []
    while training.done < options.updates:
        losses.append(training.update())
        if training.done % _LOG_EVERY == 0:
            seconds = time.process_time() - started
            log.info("update %d loss %.3f cpu_s %.0f", training.done, float(np.mean(losses[-_LOG_EVERY:])), seconds)
        if training.done % _SAVE_EVERY == 0:
            training.save()
    training.save()
    export(training.net, options)
    reached = accuracy(training.net, options.task, _pictures(options, -2, _CHECK_PICTURES))
    log.info("accuracy %.4f", reached)
    return reached


def _pictures(options: Options, index: int, n: int) -> Pictures:
    """Batch `index` of a run; negative indices are kept for what is not trained on."""
    seed = _SEED_OFFSET + options.seed * 10_000_000 + index + 1000
    return options.task.sample(n, seed, split="all", size=options.size)


def _falling(done: int, updates: int) -> float:
    return min(1.0, (done + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done / updates))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the feature network of the metrics.")
    parser.add_argument("--task", type=tasks.load, default=tasks.load(tasks.DEFAULT))
    parser.add_argument("--updates", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="pixels; the task's own if missing")
    parser.add_argument("--checkpoint", type=Path, required=True, help="continued from when it exists")
    parser.add_argument("--out", type=Path, help="the task's committed file if missing")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    told = parser.parse_args()
    told.size = told.size or told.task.size_px
    told.out = told.out or told.task.weights / features.WEIGHTS
    train(Options(**vars(told)))


if __name__ == "__main__":
    main()
